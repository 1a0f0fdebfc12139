"""What the audit does to a model's terms, scored: mean-ablation, repair, detection."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.audit.collect import Split
from decompclip.audit.config import AuditConfig
from decompclip.audit.result import KINDS, SCHEMES, Ablations, Detector, Repair, Scorer, Setting
from decompclip.cache.components import heads, mlps
from decompclip.cache.moments import Moments
from decompclip.defenses.decomp_det import DecompDet
from decompclip.defenses.decomp_rep import DecompRep
from decompclip.defenses.selector import Similarity, Threshold
from decompclip.evaluation.intervals import Rate
from decompclip.evaluation.metrics import auroc, auroc_interval, predict
from decompclip.operators.ablation import MeanAblate
from decompclip.operators.sweep_results import Kind, Scheme
from decompclip.operators.sweeps import ablation_sweep

SIMILARITIES: tuple[Similarity, ...] = ("cosine", "dot")
THRESHOLDS: tuple[Threshold, ...] = ("quantile", "epsilon")
RULES = tuple(product(SIMILARITIES, THRESHOLDS))
NAMES = {"heads": "heads", "mlps": "MLPs"}


def ablate(
    split: Split, moments: Moments, classifier: Float[Tensor, "class d_embed"], score: Scorer
) -> Ablations:
    """Mean-ablation of all heads or all MLPs, and layer by layer in every scheme (METHOD 2)."""
    sets = (split.clean.decomposition, split.suspect.decomposition)
    complete = {}
    for kind, name in NAMES.items():
        edit = MeanAblate(heads if kind == "heads" else mlps, moments)
        answers = [predict(edit(d).features, classifier) for d in sets]
        complete[kind] = score(f"all {name} mean-ablated", answers[0], answers[1])
    clean, suspect = (ablation_sweep(d, moments, classifier) for d in sets)

    def settings(kind: Kind, scheme: Scheme) -> tuple[Setting, ...]:
        found = zip(clean[kind, scheme].predictions, suspect[kind, scheme].predictions, strict=True)
        n_layers = len(clean[kind, scheme])
        return tuple(
            score(f"{_layers(kind, scheme, layer, n_layers)} mean-ablated", *answers)
            for layer, answers in enumerate(found)
        )

    return Ablations(
        complete, {kind: {scheme: settings(kind, scheme) for scheme in SCHEMES} for kind in KINDS}
    )


def _layers(kind: str, scheme: str, layer: int, n_layers: int) -> str:
    what = NAMES[kind]
    first, last = {"forward": (0, layer), "backward": (layer, n_layers - 1), "separate": (layer, layer)}[
        scheme
    ]
    return f"{what} of layer {first}" if first == last else f"{what} of layers {first} to {last}"


def repair(
    split: Split, classifier: Float[Tensor, "class d_embed"], score: Scorer, config: AuditConfig
) -> Iterator[Repair]:
    """Decomp-Rep under both similarities and both thresholds (METHOD 3)."""
    sets = (split.clean.decomposition, split.suspect.decomposition)
    for similarity, threshold in RULES:
        edit = DecompRep(
            similarity=similarity,
            threshold=threshold,
            epsilon=config.epsilon,
            quantile=_quantile(split, config),
        ).fit(split.validation.decomposition)
        name = f"Decomp-Rep, {rule_name(similarity, threshold)}"
        answers = [predict(edit(d).features, classifier) for d in sets]
        clean, suspect = (float(edit.flags(d).sum((1, 2)).double().mean()) for d in sets)
        yield Repair(similarity, threshold, score(name, answers[0], answers[1]), clean, suspect)


def detect(split: Split, config: AuditConfig) -> Iterator[Detector]:
    """Decomp-Det under both similarities and both thresholds (METHOD 3)."""
    for similarity, threshold in RULES:
        detector = DecompDet(
            similarity=similarity,
            threshold=threshold,
            epsilon=config.epsilon,
            quantile=_quantile(split, config),
            zeta=config.zeta,
        ).fit(split.validation.decomposition)
        clean = detector.score(split.clean.decomposition)
        suspect = detector.score(split.suspect.decomposition)
        low, high = auroc_interval(clean, suspect)
        most = split.clean.decomposition.n_heads + 1
        yield Detector(
            similarity,
            threshold,
            config.zeta,
            auroc(clean, suspect),
            low,
            high,
            Rate.of(clean > config.zeta),
            Rate.of(suspect > config.zeta),
            *(torch.bincount(counts.long(), minlength=most) for counts in (clean, suspect)),
        )


def _quantile(split: Split, config: AuditConfig) -> float:
    """The one asked for; of few images the least that they can tell, so that a small audit says what it can."""
    least = 1 / len(split.validation.decomposition)
    return max(config.quantile, least) if config.quantile > 0 else config.quantile


def rule_name(similarity: str, threshold: str) -> str:
    words = {"dot": "dot product", "epsilon": "fixed\u00a0ε", "quantile": "clean quantile"}
    return f"{words.get(similarity, similarity)}, {words[threshold]}"
