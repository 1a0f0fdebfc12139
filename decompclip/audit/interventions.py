"""What the audit does to a model's terms, scored: mean-ablation, repair, detection."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.audit.checks import Predicted, Scorer, Setting
from decompclip.audit.collect import ImageSet, Split
from decompclip.audit.config import AuditConfig
from decompclip.audit.result import KINDS, SCHEMES, Ablations, Detection, Suspicion
from decompclip.audit.verdict import RepairResult
from decompclip.data.images import ImageSource
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.moments import Moments
from decompclip.defenses.agnostic import AgnosticDet, AgnosticRep
from decompclip.defenses.decomp import DecompDet, DecompRep, late_mlps
from decompclip.defenses.detectors.token_rep import TokenRep
from decompclip.defenses.selector import Similarity, Threshold
from decompclip.evaluation.evaluate import classify
from decompclip.evaluation.metrics import auroc, auroc_interval, predict
from decompclip.intervals import Rate
from decompclip.models.clip import HookedCLIP
from decompclip.operators.ablation import MeanAblate
from decompclip.operators.intervention import Intervention
from decompclip.operators.sweep_results import Kind, Scheme
from decompclip.operators.sweeps import ablation_sweep

SIMILARITIES: tuple[Similarity, ...] = ("cosine", "dot")
THRESHOLDS: tuple[Threshold, ...] = ("quantile", "epsilon")
RULES = tuple(product(SIMILARITIES, THRESHOLDS))
NAMES = {"heads": "heads", "mlps": "MLPs"}

BUDGET = 0.01
"""Clean images that the repair without a hint may touch, as a share."""

BINS, SHOWN = 40, 0.99
"""Bins of the histogram of scores, and the share of them that it shows apart."""


def ablate(
    split: Split, moments: Moments, classifier: Float[Tensor, "class d_embed"], score: Scorer
) -> Ablations:
    """Mean-ablation of all heads or all MLPs, and layer by layer in every scheme (docs/method.md, section 2)."""
    sets = (split.clean.decomposition, split.suspect.decomposition)
    complete = {}
    for kind, name in NAMES.items():
        edit = MeanAblate(heads if kind == "heads" else mlps, moments)
        answers = [classify(edit, d, classifier) for d in sets]
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
    split: Split,
    moments: Moments,
    classifier: Float[Tensor, "class d_embed"],
    score: Scorer,
    config: AuditConfig,
) -> Iterator[RepairResult]:
    """Decomp-Rep under both similarities and both thresholds, and for triggers that cover the image (docs/method.md, section 3)."""
    before = _answers(split, classifier)
    for similarity, threshold in RULES:
        edit = DecompRep(
            similarity=similarity,
            threshold=threshold,
            epsilon=config.epsilon,
            quantile=_quantile(split, config),
        ).fit(split.validation.decomposition)
        after = _answers(split, classifier, edit)
        sets = (split.clean.decomposition, split.suspect.decomposition)
        flagged = [float(edit.flags(d).sum((1, 2)).double().mean()) for d in sets]
        name = f"Decomp-Rep, {rule_name(similarity, threshold)}"
        yield RepairResult(score(name, *after), score.change(before, after), *flagged)
    n_layers = split.clean.decomposition.n_layers
    first = n_layers - late_mlps(n_layers)
    after = _answers(split, classifier, MeanAblate(mlps[first:], moments))
    name = f"Decomp-Rep for global triggers, {_layers('mlps', 'backward', first, n_layers)}"
    yield RepairResult(score(name, *after), score.change(before, after))


def repair_without_hint(
    split: Split, classifier: Float[Tensor, "class d_embed"], score: Scorer
) -> RepairResult:
    """`AgnosticRep`, at the least budget of clean images that the validation part can tell, 1 % or more.

    Raises:
        ValueError: as `AgnosticRep.fit`, of too few clean images.
    """
    validation = split.validation.decomposition
    budget = max(BUDGET, 1 / (len(validation) - 1)) if len(validation) > 1 else BUDGET
    edit = AgnosticRep(classifier, budget=budget).fit(validation)
    after = _answers(split, classifier, edit)
    name = f"Agnostic repair, budget {100 * budget:.2g}\u00a0%"
    return RepairResult(score(name, *after), score.change(_answers(split, classifier), after))


@torch.no_grad()
def repair_by_patches(
    model: HookedCLIP,
    clean: ImageSource,
    suspect: ImageSource,
    split: Split,
    classifier: Float[Tensor, "class d_embed"],
    score: Scorer,
    config: AuditConfig,
) -> RepairResult:
    """`TokenRep`, for triggers of few patches. It reads pictures, not terms: the sources are gone through once more.

    Raises:
        ValueError: as `TokenRep.fit`, of too few clean images.
    """
    edit = TokenRep(model, classifier, batch_size=config.batch_size)
    edit.fit([model.denormalize(images) for images in _again(clean, split.validation, config)])
    edit.fpr = max(edit.fpr, 1 / (len(edit.scores_) + 1))  # the least that so few can tell
    parts = ((clean, split.clean), (suspect, split.suspect))
    reported = (_again(source, images, config) for source, images in parts)
    after = [torch.cat([_classes(edit.encode_image(x), classifier) for x in batches]) for batches in reported]
    setting = score(f"Token repair, budget {100 * edit.fpr:.2g}\u00a0%", after[0], after[1])
    return RepairResult(setting, score.change(_answers(split, classifier), (after[0], after[1])))


def _again(source: ImageSource, chosen: ImageSet, config: AuditConfig) -> Iterator[Float[Tensor, "_ 3 h w"]]:
    """The pictures of these images, in their order."""
    names = set(chosen.paths)
    for batch in source.batches(config.batch_size):
        rows = [row for row, path in enumerate(batch.paths) if path in names]
        if rows:
            yield batch.images[rows]


def _classes(features: Tensor, classifier: Tensor) -> Int[Tensor, " batch"]:
    return predict(features.float().cpu(), classifier)


def _answers(
    split: Split, classifier: Float[Tensor, "class d_embed"], edit: Intervention | None = None
) -> Predicted:
    clean, suspect = (
        classify(edit, d, classifier) for d in (split.clean.decomposition, split.suspect.decomposition)
    )
    return clean, suspect


def detect(split: Split, config: AuditConfig) -> Iterator[Detection]:
    """Decomp-Det under both similarities and both thresholds (docs/method.md, section 3)."""
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
        yield Detection(
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


def suspicion(split: Split, classifier: Float[Tensor, "class d_embed"], config: AuditConfig) -> Suspicion:
    """`AgnosticDet` at the stated share of false positives, with the histogram of both sets' scores.

    Raises:
        ValueError: as `AgnosticDet.fit` and `threshold_at`, of too few clean images.
    """
    detector = AgnosticDet(classifier).fit(split.validation.decomposition)
    threshold = detector.threshold_at(config.false_positives)
    clean, suspect = (detector.score(part.decomposition).double() for part in (split.clean, split.suspect))
    # one long tail would leave a histogram of a single bin: the last bin holds what lies beyond
    top = max(2 * threshold, float(torch.cat([clean, suspect]).quantile(SHOWN)))
    edges = torch.linspace(0, top, BINS + 1, dtype=torch.float64)
    counts = [torch.histc(s.clamp(0, top), BINS, 0, top).long() for s in (clean, suspect)]
    return Suspicion(
        config.false_positives,
        threshold,
        auroc(clean, suspect),
        *auroc_interval(clean, suspect),
        Rate.of(clean > threshold),
        Rate.of(suspect > threshold),
        edges,
        *counts,
    )


def _quantile(split: Split, config: AuditConfig) -> float:
    """The one asked for; of few images the least that they can tell, so that a small audit says what it can."""
    least = 1 / len(split.validation.decomposition)
    return max(config.quantile, least) if config.quantile > 0 else config.quantile


def rule_name(similarity: str, threshold: str) -> str:
    words = {"dot": "dot product", "epsilon": "fixed\u00a0ε", "quantile": "clean quantile"}
    return f"{words.get(similarity, similarity)}, {words[threshold]}"
