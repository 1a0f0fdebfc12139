"""What the audit does to a model's terms, scored: mean-ablation, repair, detection."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.audit.collect import Split
from decompclip.audit.config import AuditConfig
from decompclip.audit.result import KINDS, SCHEMES, Ablations, Detector, Repair, Scorer
from decompclip.cache.components import heads, mlps
from decompclip.cache.moments import Moments
from decompclip.defenses.decomp_det import DecompDet
from decompclip.defenses.decomp_rep import DecompRep
from decompclip.evaluation.intervals import Rate
from decompclip.evaluation.metrics import auroc, auroc_interval, predict
from decompclip.operators.ablation import MeanAblate, sweeps

SIMILARITIES = ("cosine", "dot")
THRESHOLDS = ("quantile", "epsilon")
NAMES = {"heads": "heads", "mlps": "MLPs"}


def ablate(
    split: Split, moments: Moments, classifier: Float[Tensor, "class d_embed"], score: Scorer
) -> Ablations:
    """Mean-ablation of all heads or all MLPs, and layer by layer in every scheme (METHOD 2)."""
    sets = (split.clean.decomposition, split.suspect.decomposition)
    complete, swept = {}, [sweeps(d, moments, classifier) for d in sets]
    for kind, name in NAMES.items():
        edit = MeanAblate(heads if kind == "heads" else mlps, moments)
        complete[kind] = score(
            f"all {name} mean-ablated", *(predict(edit(d).features, classifier) for d in sets)
        )
    settings = {
        kind: {
            scheme: tuple(
                score(f"{_layers(kind, scheme, layer, n_layers)} mean-ablated", clean[layer], suspect[layer])
                for layer in range(n_layers)
            )
            for scheme in SCHEMES
            for clean, suspect in [[found[kind, scheme] for found in swept]]
        }
        for kind in KINDS
        for n_layers in [sets[0].n_layers]
    }
    return Ablations(complete, settings)


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
    for (similarity, threshold), detector in detectors(split, config):
        edit = DecompRep(
            similarity=similarity, threshold=threshold, epsilon=config.epsilon, quantile=config.quantile
        ).fit(split.validation.decomposition)
        name = f"Decomp-Rep, {rule_name(similarity, threshold)}"
        setting = score(name, *(predict(edit(d).features, classifier) for d in sets))
        clean, suspect = (float(detector.score(d).double().mean()) for d in sets)
        yield Repair(similarity, threshold, setting, clean, suspect)


def detect(split: Split, config: AuditConfig) -> Iterator[Detector]:
    """Decomp-Det under both similarities and both thresholds (METHOD 3)."""
    for (similarity, threshold), detector in detectors(split, config):
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


def detectors(split: Split, config: AuditConfig) -> Iterator[tuple[tuple[str, str], DecompDet]]:
    """Decomp-Det, fitted, under every rule."""
    for similarity, threshold in product(SIMILARITIES, THRESHOLDS):
        detector = DecompDet(
            similarity=similarity,
            threshold=threshold,
            epsilon=config.epsilon,
            quantile=config.quantile,
            zeta=config.zeta,
        )
        yield (similarity, threshold), detector.fit(split.validation.decomposition)


def rule_name(similarity: str, threshold: str) -> str:
    words = {"dot": "dot product", "epsilon": "fixed\u00a0ε", "quantile": "clean quantile"}
    return f"{words.get(similarity, similarity)}, {words[threshold]}"
