"""The audit, from two image sources to one result."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip import __version__
from decompclip.audit.checks import Scorer, checks
from decompclip.audit.collect import ImageSet, Split, collect, split
from decompclip.audit.config import AuditConfig, Track, silently
from decompclip.audit.controls import controls
from decompclip.audit.evidence import Evidence, Target, shift
from decompclip.audit.examples import examples
from decompclip.audit.infected import infection
from decompclip.audit.interventions import ablate, detect, repair, repair_without_hint, suspicion
from decompclip.audit.result import AuditResult
from decompclip.audit.shares import ClassShare, class_shares, most_over_predicted
from decompclip.audit.words import WEAK
from decompclip.data.images import ImageSource, class_index
from decompclip.decomposition.moments import Moments
from decompclip.evaluation.metrics import predict
from decompclip.models.clip import HookedCLIP

SHOWN_CLASSES = 8
PACKAGES = ("torch", "open_clip_torch", "transformer_lens", "numpy", "scipy", "scikit-learn", "pillow")


@dataclass(frozen=True)
class Names:
    """What the report calls the audited thing and its images."""

    model: str
    clean: str
    suspect: str


def run_audit(
    model: HookedCLIP,
    clean: ImageSource,
    suspect: ImageSource,
    class_names: Sequence[str],
    *,
    target: str | int | Target | None = None,
    names: Names | None = None,
    config: AuditConfig | None = None,
    track: Track = silently,
) -> AuditResult:
    """Ask of a model whether suspect images do to it what clean ones do not, and where.

    Each image set goes through the model once; everything else works on the decompositions.

    Args:
        clean: images that nobody tampered with.
        suspect: images that may carry a trigger, of the same kind otherwise; best the clean ones' twins.
        class_names: of the zero-shot classifier.
        target: the class that the attacker wants, where known. Else it is inferred from suspect images that
            serve nothing else: the class predicted more often than on clean images by the most. Where suspect images
            go to another class than the one named, that one is looked at, and the result says so.
        track: shows progress.

    Raises:
        ValueError: an unknown target, fewer than two classes, no readable images, or too few.
        DecompositionError: a feature is not the sum of its terms.
    """
    config, class_names = config or AuditConfig(), tuple(class_names)
    if len(class_names) < 2:
        raise ValueError(f"expected at least two classes to tell apart; received {list(class_names)}")
    named = _named(target, class_names)
    names = names or Names(model.name, "clean images", "suspect images")
    classifier = model.zero_shot_classifier(class_names).detach().float().cpu()
    clean_set = collect(model, clean, config, description=f"{names.model}: {names.clean}", track=track)
    suspect_set = collect(model, suspect, config, description=f"{names.model}: {names.suspect}", track=track)
    infer = named is None or (named.inferred and named.asked is None)
    parts = split(clean_set, suspect_set, config, infer_target=infer)
    found = weigh(parts, classifier, class_names, name=names.model, target=target)
    if found.as_it_is.difference_interval[0] >= WEAK:
        tried = controls(
            model,
            parts,
            classifier,
            class_names,
            found.target.index,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        found = replace(found, controls=tried)
    aim, as_it_is = found.target, found.as_it_is
    score = Scorer(parts.clean.labels, parts.suspect.labels, aim.index, len(class_names))
    others = torch.arange(len(class_names)) != aim.index
    toward = F.normalize(classifier[aim.index] - classifier[others].mean(0), dim=0)

    moments = Moments.of(parts.validation.decomposition, second=False)
    moved = shift(parts.clean.decomposition, parts.suspect.decomposition, toward, twins=parts.twins)
    repairs, left_out = list(repair(parts, moments, classifier, score, config)), {}
    suspected = None
    try:
        suspected = suspicion(parts, classifier, config)
        repairs.append(repair_without_hint(parts, classifier, score))
    except ValueError as error:  # too few clean images of too few classes: the rest of the audit stands
        part = f"{100 * config.validation:g} % of the clean images serve for this"
        left_out["detection and repair without a hint"] = f"{error}; {part}, give more"
    return AuditResult(
        name=names.model,
        provenance=provenance_of(model) | {"sum_error": max(clean_set.sum_error, suspect_set.sum_error)},
        config=config,
        clean_name=names.clean,
        suspect_name=names.suspect,
        counts=found.counts,
        class_names=class_names,
        target=aim,
        twins=parts.twins,
        as_it_is=as_it_is,
        class_shares=found.class_shares[:SHOWN_CLASSES],
        ablations=ablate(parts, moments, classifier, score),
        shift=moved,
        infection=infection(
            parts, moved, moments, classifier, score, affected=as_it_is.has_effect, seed=config.seed
        ),
        repairs=tuple(repairs),
        detectors=tuple(detect(parts, config)),
        suspicion=suspected,
        checks=found.checks,
        controls=found.controls,
        examples=examples(
            model,
            parts,
            moved,
            classifier,
            class_names,
            aim,
            toward,
            count=config.examples,
            seen=clean_set.kept,
        ),
        skipped={"clean": clean_set.skipped, "suspect": suspect_set.skipped},
        left_out=left_out,
    )


def weigh(
    parts: Split,
    classifier: Float[Tensor, "class d_embed"],
    class_names: tuple[str, ...],
    *,
    name: str,
    target: str | int | Target | None = None,
) -> Evidence:
    """What a verdict stands on, from the answers alone: which class suspect images go to, and how many.

    Raises:
        ValueError: an unknown target.
    """
    answers = _predict(parts.clean, classifier), _predict(parts.suspect, classifier)
    shares = class_shares(*answers, class_names)
    aim = _named(target, class_names) or _inferred(parts, classifier, class_names)
    aim = _aimed(aim, shares, len(parts.suspect)) if isinstance(target, str | int) else aim
    score = Scorer(parts.clean.labels, parts.suspect.labels, aim.index, len(class_names))
    return Evidence(
        name=name,
        class_names=class_names,
        counts={
            "validation": len(parts.validation),
            "clean": len(parts.clean),
            "suspect": len(parts.suspect),
            "held_out": len(parts.held_out) if parts.held_out else 0,
        },
        target=aim,
        twins=parts.twins,
        as_it_is=score("as it is", *answers),
        class_shares=tuple(sorted(shares, key=lambda share: -share.difference)),
        checks=checks(parts, answers, classifier, class_names),
    )


def _named(target: str | int | Target | None, class_names: tuple[str, ...]) -> Target | None:
    if target is None or isinstance(target, Target):
        return target
    index = class_index(target, class_names) if isinstance(target, str) else target
    if not 0 <= index < len(class_names):
        raise ValueError(f"expected a target in 0..{len(class_names) - 1}; received {target}")
    return Target(index, class_names[index], False, None, 0)


def _predict(images: ImageSet, classifier: Tensor) -> Int[Tensor, " batch"]:
    return predict(images.decomposition.features, classifier)


def _inferred(
    parts: Split, classifier: Float[Tensor, "class d_embed"], class_names: tuple[str, ...]
) -> Target:
    held_out = parts.held_out
    assert held_out is not None, "split sets images apart to infer the target on"
    shares = class_shares(_predict(parts.validation, classifier), _predict(held_out, classifier), class_names)
    best = most_over_predicted(shares)
    evidence = (best.difference, *best.interval)
    return Target(shares.index(best), best.name, True, evidence, len(held_out))


def _aimed(aim: Target, shares: Sequence[ClassShare], images: int) -> Target:
    """The class asked for, or the one that suspect images go to instead, by more than a small effect and beyond chance."""
    most = most_over_predicted(shares)
    if most.name == aim.name or most.interval[0] <= max(WEAK, shares[aim.index].interval[1]):
        return aim
    evidence = (most.difference, *most.interval)
    return Target(shares.index(most), most.name, True, evidence, images, asked=aim.name)


def provenance_of(model: HookedCLIP) -> dict[str, object]:
    """Of a model: where its weights are from, its tower, and the versions of what it ran with."""
    versions = {"decompclip": __version__, "python": platform.python_version()}
    return {
        **model.provenance,
        "tower": model.cfg.to_dict(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions | {package: version(package) for package in PACKAGES},
    }
