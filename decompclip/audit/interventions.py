"""What the audit does to a model's terms, scored: mean-ablation, repair, detection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.audit.checks import Predicted, Scorer, Setting
from decompclip.audit.collect import Split, SplitNames
from decompclip.audit.config import AuditConfig
from decompclip.audit.result import KINDS, SCHEMES, Ablations, Detection, Suspicion
from decompclip.audit.verdict import RepairResult
from decompclip.data.images import ImageSource
from decompclip.data.processes import ALONE, Processes
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


class PatchAnswers(NamedTuple):
    """Answers to both sets after `TokenRep`, and the share of clean images that it may touch; of several processes in the first."""

    clean: Int[Tensor, " image"]
    suspect: Int[Tensor, " image"]
    budget: float


@torch.no_grad()
def answers_by_patches(
    model: HookedCLIP,
    sources: tuple[ImageSource, ImageSource],
    names: SplitNames,
    classifier: Float[Tensor, "class d_embed"],
    config: AuditConfig,
    group: Processes = ALONE,
) -> PatchAnswers | ValueError:
    """`TokenRep`, for triggers of few patches. It reads pictures, not terms: the sources are gone through once more.

    Args:
        model: the model.
        sources: of clean images, and of suspect ones.
        names: which of them it is fitted on, and which it is asked of.
        classifier: zero-shot.
        config: options.
        group: the processes that share the batches; the first one fits.

    Returns:
        The answers; or what `TokenRep.fit` says of too few clean images, in every process.

    Raises:
        ValueError: images that cannot be read, in the process that reads them.
    """
    clean, suspect = sources
    edit = TokenRep(model, classifier, batch_size=config.batch_size)
    validation = list(group.in_order(list(_chosen(group, clean, names.validation, config))))

    def fit() -> tuple[Tensor, Tensor] | ValueError:
        pixels = [model.denormalize(images).to(model.device) for images in validation]
        try:
            edit.fit(pixels)
        except ValueError as error:
            return error
        return edit.typical_.cpu(), edit.scores_.cpu()

    fitted = group.in_first(fit)
    if isinstance(fitted, ValueError):
        return fitted
    typical, scores = fitted
    edit.typical_, edit.scores_ = typical.to(model.device), scores.to(model.device)
    edit.fpr = max(edit.fpr, 1 / (len(edit.scores_) + 1))  # the least that so few can tell
    after = []
    for source, chosen in ((clean, names.clean), (suspect, names.suspect)):
        parts = _chosen(group, source, chosen, config)
        own = [x if x is None else _classes(edit.encode_image(x.to(model.device)), classifier) for x in parts]
        after.append(torch.cat([*group.in_order(own), torch.empty(0, dtype=torch.long)]))
    return PatchAnswers(after[0], after[1], edit.fpr)


def repair_by_patches(
    found: PatchAnswers, split: Split, classifier: Float[Tensor, "class d_embed"], score: Scorer
) -> RepairResult:
    """What `answers_by_patches` found, scored."""
    after = (found.clean, found.suspect)
    setting = score(f"Token repair, budget {100 * found.budget:.2g}\u00a0%", *after)
    return RepairResult(setting, score.change(_answers(split, classifier), after))


def _chosen(
    group: Processes, source: ImageSource, paths: Sequence[str], config: AuditConfig
) -> Iterator[Float[Tensor, "_ 3 h w"] | None]:
    """The pictures of these paths in this process's batches, in their order; None where a batch has none."""
    names = set(paths)
    with closing(group.batches(source, config.batch_size)) as batches:
        for batch in batches:
            rows = [row for row, path in enumerate(batch.paths if batch else ()) if path in names]
            yield batch.images[rows] if rows else None


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
    return max(config.quantile, 1 / len(split.validation.decomposition))


def rule_name(similarity: str, threshold: str) -> str:
    words = {"dot": "dot product", "epsilon": "fixed\u00a0ε", "quantile": "clean quantile"}
    return f"{words.get(similarity, similarity)}, {words[threshold]}"
