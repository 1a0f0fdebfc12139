"""The audit, from two image sources to one result; and the demonstration of it on the bundled models."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from importlib.metadata import version
from operator import or_
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip import __version__
from decompclip.attacks.registry import backdoor
from decompclip.audit.checks import WEAK, ClassShare, Scorer, checks, class_shares, most_over_predicted
from decompclip.audit.collect import WORLD, ImageSet, Split, SplitNames, collect, open_source, split
from decompclip.audit.components import Shift, infection, shift, weights_alone
from decompclip.audit.config import AuditConfig
from decompclip.audit.controls import controls
from decompclip.audit.interventions import (
    PatchAnswers,
    ablate,
    answers_by_patches,
    detect,
    repair,
    repair_by_patches,
    repair_without_hint,
    suspicion,
)
from decompclip.audit.result import AuditResult, Examples, HeadMaps
from decompclip.audit.verdict import Evidence, Target
from decompclip.data.images import ImageBatch, ImageSource, SkippedFile, class_index
from decompclip.data.pairs import SubsetPairs, permuted
from decompclip.data.photos import PhotoPairs
from decompclip.data.processes import Processes
from decompclip.decomposition.components import heads
from decompclip.decomposition.moments import Moments
from decompclip.display import Track, silently
from decompclip.evaluation.evaluate import classify
from decompclip.models.clip import HookedCLIP
from decompclip.models.errors import warn_caller
from decompclip.models.loading import load
from decompclip.models.names import bundled
from decompclip.operators.attention import pictures_of

if TYPE_CHECKING:
    from accelerate import Accelerator

SHOWN_CLASSES = 8
SHOWN_HEADS = 2
"""From either end of the order."""

PACKAGES = ("torch", "open_clip_torch", "transformer_lens", "numpy", "scipy", "scikit-learn", "pillow")


def run_audit(
    model: HookedCLIP,
    clean: ImageSource,
    suspect: ImageSource,
    class_names: Sequence[str],
    *,
    target: str | int | Target | None = None,
    name: str | None = None,
    clean_name: str = "clean images",
    suspect_name: str = "suspect images",
    config: AuditConfig | None = None,
    accelerator: Accelerator | None = None,
    track: Track = silently,
) -> AuditResult:
    """Ask of a model whether suspect images do to it what clean ones do not, and where.

    Each image set goes through the model once, and once more for the repair by patches; all else works on the decompositions.

    Args:
        model: what is audited.
        clean: images that nobody tampered with.
        suspect: images that may carry a trigger, of the same kind otherwise; best paired with the clean ones.
        class_names: of the zero-shot classifier.
        target: the class that the attacker wants, where known. Else it is inferred from suspect images that
            serve nothing else: the class predicted more often than on clean images by the most. Where suspect images
            go to another class than the one named, that one is looked at, and the result says so.
        name: of the model in the report, by default its own.
        clean_name: what the report calls the clean images.
        suspect_name: likewise the suspect images.
        config: options.
        accelerator: of Hugging Face's accelerate, to spread the passes over images over its processes: all return what one
            process would. The first one holds the decompositions, and does the rest.
        track: shows progress.

    Raises:
        TypeError: images of several processes that are not read by place.
        ValueError: an unknown target, fewer than two classes, no readable images, or too few; fewer than processes, or
            processes that disagree.
        DecompositionError: a feature is not the sum of its terms.
    """
    config, class_names = config or AuditConfig(), tuple(class_names)
    if len(class_names) < 2:
        raise ValueError(f"expected at least two classes to tell apart; received {list(class_names)}")
    named, name = _named(target, class_names), name or model.name
    classifier = model.zero_shot_classifier(class_names).detach().float().cpu()
    group = Processes(accelerator)
    group.check_work(
        model,
        classifier,
        {
            "the clean images or their preprocessing": clean,
            "the suspect images or their preprocessing": suspect,
        },
        {"the options": config, "the target": target, "the classes": class_names},
    )
    sets = [
        collect(model, source, config, description=f"{name}: {words}", group=group, track=track)
        for source, words in ((clean, clean_name), (suspect, suspect_name))
    ]
    own: list[Split] = []  # of the first process alone, which has the sets

    def divide() -> SplitNames:
        infer = named is None or (named.inferred and named.asked is None)
        clean_set, suspect_set = (found for found in sets if found is not None)
        own.append(split(clean_set, suspect_set, config, infer_target=infer))
        return own[0].names

    names = group.in_first(divide)
    # too few clean images for it: the rest of the audit stands
    patched = answers_by_patches(model, (clean, suspect), names, classifier, config, group)

    def conclude() -> AuditResult:
        clean_set, suspect_set = (found for found in sets if found is not None)
        return AuditResult(
            **_answers(model, own[0], patched, classifier, class_names, name, target, clean_set.kept, config),
            provenance=provenance_of(model) | {"sum_error": max(clean_set.sum_error, suspect_set.sum_error)},
            config=config,
            clean_name=clean_name,
            suspect_name=suspect_name,
            skipped={"clean": clean_set.skipped, "suspect": suspect_set.skipped},
        )

    return group.in_first(conclude)


def _answers(
    model: HookedCLIP,
    parts: Split,
    patched: PatchAnswers | ValueError,
    classifier: Float[Tensor, "class d_embed"],
    class_names: tuple[str, ...],
    name: str,
    target: str | int | Target | None,
    seen: dict[str, Tensor],
    config: AuditConfig,
) -> dict[str, Any]:
    """What an `AuditResult` says of the two sets; `seen` are pictures of clean images by name."""
    found = evidence(model, parts, classifier, class_names, name=name, target=target, config=config)
    aim, seed = found.target, config.seed
    score = Scorer(parts.clean.labels, parts.suspect.labels, aim.index, len(class_names))
    others = torch.arange(len(class_names)) != aim.index
    toward = F.normalize(classifier[aim.index] - classifier[others].mean(0), dim=0)
    moments = Moments.of(parts.validation.decomposition, second=False)
    moved = shift(parts.clean.decomposition, parts.suspect.decomposition, toward, paired=parts.paired)
    repairs, left_out = list(repair(parts, moments, classifier, score, config)), {}
    suspected = None
    # too few clean images, of too few classes: the rest of the audit stands
    hint = f"{100 * config.validation:g} % of the clean images serve for this; give more"
    try:
        suspected = suspicion(parts, classifier, config)
        repairs.append(repair_without_hint(parts, classifier, score))
    except ValueError as error:
        left_out["detection and repair without a hint"] = f"{error}; {hint}"
    if isinstance(patched, ValueError):
        left_out["token repair"] = f"{patched}; {hint}"
    else:
        repairs.append(repair_by_patches(patched, parts, classifier, score))
    known = {part.name: getattr(found, part.name) for part in fields(Evidence) if part.init}
    return {
        **known,
        "class_shares": found.class_shares[:SHOWN_CLASSES],
        "repairs": tuple(repairs),
        "ablations": ablate(parts, moments, classifier, score),
        "shift": moved,
        "infection": infection(
            parts, moved, moments, classifier, score, affected=found.as_it_is.has_effect, seed=seed
        ),
        "detectors": tuple(detect(parts, config)),
        "suspicion": suspected,
        "examples": examples(
            model,
            parts,
            moved,
            classifier,
            class_names,
            aim,
            toward,
            count=config.examples,
            seen=seen,
        ),
        "left_out": left_out,
    }


def evidence(
    model: HookedCLIP,
    parts: Split,
    classifier: Float[Tensor, "class d_embed"],
    class_names: tuple[str, ...],
    *,
    name: str,
    target: str | int | Target | None,
    config: AuditConfig,
) -> Evidence:
    """`weigh`, and common corruptions of the same size where suspect images have more than a small effect."""
    found = weigh(parts, classifier, class_names, name=name, target=target)
    if found.as_it_is.difference_interval[0] < WEAK:
        return found
    aim, size = found.target.index, config.batch_size
    tried = controls(model, parts, classifier, class_names, aim, batch_size=size, seed=config.seed)
    return replace(found, controls=tried)


def weigh(
    parts: Split,
    classifier: Float[Tensor, "class d_embed"],
    class_names: tuple[str, ...],
    *,
    name: str,
    target: str | int | Target | None = None,
) -> Evidence:
    """What a verdict stands on, from the answers alone: which class suspect images go to, and how many.

    Args:
        parts: the image sets.
        classifier: zero-shot.
        class_names: its classes.
        name: of the model.
        target: as in `run_audit`.

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
        paired=parts.paired,
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
    return classify(None, images.decomposition, classifier)


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


@torch.no_grad()
def examples(
    model: HookedCLIP,
    split: Split,
    shift: Shift,
    classifier: Float[Tensor, "class d_embed"],
    class_names: tuple[str, ...],
    target: Target,
    toward: Float[Tensor, " d_embed"],
    *,
    count: int,
    seen: dict[str, Tensor],
) -> Examples | None:
    """Maps over `count` suspect images, each followed by the clean image that it is paired with.

    Args:
        seen: pictures of clean images by name.
    """
    paths = _choose(split.suspect, classifier, target.index, count)
    if not paths:
        return None
    # images that are not paired have nothing in common but the name
    sides = {"suspect": split.suspect.kept, "clean": seen if split.paired else {}}
    shown = [(side, path, kept[path]) for path in paths for side, kept in sides.items() if path in kept]
    images = torch.stack([image for *_, image in shown]).to(model.device)
    chosen = affected_heads(shift)
    components = reduce(or_, (heads[layer, head] for layer, head, _ in chosen))
    d = model.decompose(images, convention="centred", normalize=True, tokens=components)
    answers = classify(None, d, classifier).tolist()
    grid = model.cfg.grid
    maps = []
    for layer, head, end in chosen:
        attention = d.attention(layer, head).float().cpu()
        contribution = d.token_logits(toward[None].to(d.embed), layer, head)[..., 0].float().cpu()
        maps.append(
            HeadMaps(layer, head, end, _grid(attention, grid), attention[:, 0], _grid(contribution, grid))
        )
    captions = tuple(
        f"{path}: taken for {class_names[answer]}"
        for (_, path, _), answer in zip(shown, answers, strict=True)
    )
    pictures = pictures_of(model, images)
    assert pictures is not None, "a HookedCLIP knows its pixels"
    return Examples(pictures, captions, tuple(side for side, *_ in shown), tuple(maps))


def affected_heads(shift: Shift) -> list[tuple[int, int, str]]:
    """The heads whose mean moves most, and those whose mean moves least, as (layer, head, end)."""
    n_heads = shift.heads_distance.shape[1]
    order = shift.heads_distance.flatten().argsort(descending=True).tolist()
    most = order[:SHOWN_HEADS]
    least = [flat for flat in order[::-1][:SHOWN_HEADS] if flat not in most]
    ends = [(most, "most"), (least, "least")]
    return [(flat // n_heads, flat % n_heads, end) for flats, end in ends for flat in flats]


def _choose(suspect: ImageSet, classifier: Tensor, target: int, count: int) -> list[str]:
    """Kept suspect images, those first that the model takes for the target without their being of it."""
    places = [i for i, path in enumerate(suspect.paths) if path in suspect.kept]
    hits = (classify(None, suspect.decomposition, classifier) == target).tolist()
    labels = [None] * len(suspect) if suspect.labels is None else suspect.labels.tolist()
    places.sort(key=lambda i: (not (hits[i] and labels[i] != target), i))
    return [suspect.paths[i] for i in places[:count]]


def _grid(tokens: Float[Tensor, "image token"], grid: tuple[int, int]) -> Float[Tensor, "image rows columns"]:
    return rearrange(tokens[:, -grid[0] * grid[1] :], "i (rows columns) -> i rows columns", rows=grid[0])


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


DEMO = ("photos:badnet", "shapes:badnet", "shapes:blended")
"""A local trigger on photographs; a local and a global one on drawings."""

DEMO_PHOTOGRAPHS = 400
"""At most so many: a tower of photographs takes ten times as long as one of drawings. Half of them are fitted on, one a class."""


@dataclass(frozen=True)
class Held:
    """Images drawn once and gone through by several models."""

    drawn: tuple[ImageBatch, ...]

    @property
    def skipped(self) -> tuple[SkippedFile, ...]:
        return ()

    def __len__(self) -> int:
        return sum(len(batch.paths) for batch in self.drawn)

    def batches(self, batch_size: int = 64) -> Iterator[ImageBatch]:
        """The batches as they were drawn, whatever size is asked for."""
        del batch_size
        yield from self.drawn


def run_demo(*, images: int, config: AuditConfig, track: Track = silently) -> list[AuditResult]:
    """Audit the backdoored model of each trigger, and the clean model that it was made from, on the same images.

    All models of a world take the same pixels alike, so that every image set is drawn only once. Photographs are test images of
    Tiny ImageNet; where the folder that DECOMPCLIP_DATA names has none, drawings alone are audited.

    Args:
        images: of each set.
        config: options.
        track: shows progress.

    Raises:
        ValueError: the bundled models are not there.
    """
    twins = {spec: spec.replace(":", "-") for spec in DEMO}
    if not set(bundled()).issuperset(twins.values()):
        raise ValueError("expected the bundled models; this installation lacks them: reinstall decompclip")
    try:
        PhotoPairs("test")
    except FileNotFoundError:
        warn_caller("drawings alone are audited: DECOMPCLIP_DATA names no folder with Tiny ImageNet")
        twins = {spec: name for spec, name in twins.items() if world_of(spec) == WORLD}
    results: list[AuditResult] = []
    clean: dict[str, tuple[HookedCLIP, Held]] = {}
    for spec, name in twins.items():
        world = world_of(spec)
        if world not in clean:
            model = load(world)
            clean[world] = model, _drawn(world, model, images, config, track)
        reference, own = clean[world]
        suspect, model = _drawn(spec, reference, images, config, track), load(name)
        own_config = config if world == WORLD else replace(config, validation=0.5)
        audited = [
            run_audit(
                clip,
                own,
                suspect,
                reference.class_names,
                target=backdoor(name).target,
                clean_name=world,
                suspect_name=spec,
                config=own_config,
                track=track,
            )
            for clip in (reference, model)
        ]
        weights = weights_alone(model, reference, reference.class_names)
        results += [audited[0], audited[1].beside(audited[0], weights=weights)]
    return results


def world_of(spec: str) -> str:
    """`shapes`, of `shapes:badnet`."""
    return spec.partition(":")[0]


def _drawn(spec: str, model: HookedCLIP, images: int, config: AuditConfig, track: Track) -> Held:
    """What `spec` names, as `model` takes it."""
    if world_of(spec) == WORLD:
        source: ImageSource = open_source(spec, model, model.class_names, limit=images, seed=config.seed)
        batches, count = source.batches(config.batch_size), len(source)
    else:
        whole, count = PhotoPairs("test"), min(images, DEMO_PHOTOGRAPHS)
        pairs = SubsetPairs(whole, permuted(len(whole), config.seed)[:count].tolist())
        trigger = backdoor(spec.replace(":", "-")).trigger if ":" in spec else lambda pixels, _: pixels
        batches = (
            ImageBatch(model.normalize(trigger(batch.images, batch.indices)), batch.labels, batch.ids)
            for batch in pairs.batches(config.batch_size)
        )
    return Held(tuple(track(batches, f"drawing {spec}", -(-count // config.batch_size))))
