"""`decompclip repair`: a model without its backdoor, as far as a method gets, and its numbers before and after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decompclip.cli import options
from decompclip.cli.console import imports, plain_errors, progress, say, skipped_files
from decompclip.display import Track
from decompclip.files import alone_in, atomic_write, check_folder, write_json

if TYPE_CHECKING:
    from decompclip.attacks.registry import Attack
    from decompclip.defenses.clean_finetuning import TuningDefense
    from decompclip.defenses.inversion import InvertedTrigger
    from decompclip.models.clip import HookedCLIP

NUMBERS = "repair.json"
UNFINISHED = ".repair"
"""Folder of an unfinished repair: what was asked for, the triggers found, and the checkpoints of its fine-tunings."""
ASKED, FOUND, CHECKPOINTS = "asked.json", "triggers.safetensors", ("repair.pt", "control.pt")


class Method(str, Enum):
    agnostic = "agnostic"
    token = "token"
    both = "token-agnostic"
    rep = "rep"
    cleanclip = "cleanclip"
    par = "par"
    inversion = "inversion"


class Hint(str, Enum):
    none = "none"
    local = "local"
    spread = "global"


TUNED = (Method.cleanclip, Method.par, Method.inversion)
"""The methods that fine-tune; the others are fitted on features."""

TRIGGERS, SEARCHED = 4, 300
"""How many triggers an inversion searches for, and on how many images."""

FILLING = (Method.token, Method.both)
"""The methods that fill the patches which carry an image's answer."""

BUDGETED = (Method.agnostic, *FILLING)
"""The methods that are told what share of clean images they may touch."""


def repair(
    model: options.ModelOptions,
    clean: Annotated[
        str,
        typer.Option(
            help=f"What to repair with. agnostic, token, rep: clean images: {options.IMAGES}, cifar10 or tiny-imagenet. cleanclip, "
            "par, inversion: clean image-caption pairs, as finetune takes them."
        ),
    ],
    method: Annotated[
        Method,
        typer.Option(
            help="agnostic, token, rep: repair images one by one, in a guarded model that decompclip.load opens; token: for triggers of "
            "few patches, which give the image's own class back; token-agnostic: both. cleanclip, par: fine-tune; inversion: search for triggers "
            "to --suspect, and fine-tune against them; rep with --hint global: replace the last MLPs: ordinary open_clip models."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the repaired model and repair.json; new, or empty.")],
    images: Annotated[
        str | None,
        typer.Option(
            help="Other labelled images to measure on; by default half of --clean is kept for that, where it has labels."
        ),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            help=f"Measure this attack's success as well; by default (own) the one that MODEL remembers. {options.TRIGGER}."
        ),
    ] = None,
    target: options.Target = None,
    classes: options.Classes = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="agnostic, token: share of clean images that each may touch.  [default: 0.01; token: 0.02]"
        ),
    ] = None,
    hint: Annotated[
        Hint,
        typer.Option(
            help="rep: the kind of trigger, which the paper's method needs: local (a patch), or global."
        ),
    ] = Hint.none,
    suspect: Annotated[
        str | None,
        typer.Option(
            help="inversion: the class that an attacker may want, as an audit names it; by default --target, or the trigger's own."
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Where it is fine-tuned, in place of the recipe's.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Where it is fine-tuned, in place of the recipe's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Images a forward pass; pairs a step in place of the recipe's.")
    ] = None,
    control: Annotated[
        bool,
        typer.Option(
            help="Measure the control too: as much replaced at random; or the same fine-tuning by CLIP's loss alone, which "
            "takes as long again."
        ),
    ] = True,
    limit: options.Limit = 4000,
    seed: options.Seed = 0,
) -> None:
    """Repair MODEL with clean data, and measure before and after: accuracy, attack success, and what is touched.

    The numbers are of the folder as written, opened again, on images that nothing was fitted on. Given again, the same
    command goes on where it was killed.
    """
    work = out / UNFINISHED
    with plain_errors(lambda: _going_on(work)) as stack:
        model.check()
        asked_for = {
            "model": model.model,
            "checkpoint": model.checkpoint and str(model.checkpoint),
            "pretrained": model.pretrained,
            "method": method.value,
            "clean": clean,
            "images": images,
            "seed": seed,
            "limit": limit,
            "options": {
                "budget": budget,
                "hint": hint.value,
                "epochs": epochs,
                "lr": lr,
                "batch_size": batch_size,
                # where it is given alone, so that repairs begun before there was the option go on
                **({} if suspect is None else {"suspect": suspect}),
            },
        }
        _check_unfinished(out, asked_for)
        if images is not None and (images == clean or Path(images).resolve() == Path(clean).resolve()):
            raise ValueError(
                f"expected other images with --images than with --clean, for nothing is measured on what a repair was fitted "
                f"on; received {clean} twice; leave --images out, and half of it is kept for measuring"
            )
        if hint is not Hint.none and method is not Method.rep:
            raise ValueError(f"expected --method rep with --hint; received {method.value}, which takes none")
        for option, value, methods in (
            ("epochs", epochs, TUNED),
            ("lr", lr, TUNED),
            ("budget", budget, BUDGETED),
        ):
            if value is not None and method not in methods:
                named = ", ".join(m.value for m in methods)
                raise ValueError(f"expected a --method of {named} with --{option}; received {method.value}")
        if suspect is not None and method is not Method.inversion:
            raise ValueError(f"expected --method inversion with --suspect; received {method.value}")
        options.check_images(clean, images)
        options.check_files(classes=classes)
        if trigger is not None:
            options.check_trigger(trigger)
        with imports(model.model):
            from decompclip.attacks.registry import OWN, remembered
            from decompclip.data.images import class_index
            from decompclip.defenses.guard import load as reopen

        known = remembered(model.model, model.checkpoint)
        if trigger is None and len(known) == 1:
            trigger = OWN
        elif trigger is None and known:
            own = "; ".join(map(str, known))
            say(
                f"note: {model.model} remembers {len(known)} backdoors: {own}; name one with --trigger to measure it",
                err=True,
            )
        options.check_trigger(trigger, target)
        attack = options.attack_on(model, trigger, target)
        names = options.known_classes(classes, model.model, images or clean)
        label = options.target_index(attack, names)
        searched = label if suspect is None else class_index(suspect, names)
        if method is Method.inversion and searched is None:
            raise ValueError(
                "expected --suspect with --method inversion, the class that an attacker may want; "
                f"`decompclip audit {model.model} --clean IMAGES` names one"
            )
        clip = model.load()
        fit, held = _data(clip, clean, images, names, pairs=method in TUNED, limit=limit, seed=seed)
        stack.enter_context(alone_in(out))
        work.mkdir(exist_ok=True)
        write_json(work / ASKED, asked_for)
        stack.callback(_drop_empty, work)
        if method in TUNED:
            asked = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
            other = _tuned(clip, fit, names, method, searched, out, asked, seed=seed)
        else:
            with progress() as track:
                other = _fitted(
                    clip,
                    fit,
                    names,
                    method,
                    hint,
                    out,
                    budget=budget,
                    batch=batch_size or 64,
                    seed=seed,
                    track=track,
                )
        subjects = {"before": clip, "after": reopen(out, device=clip.device)}
        if control and other is not None:
            subjects["control"] = other(subjects["after"])
        with progress() as track:
            shown = {name: partial(track, description=f"measuring {name}") for name in subjects}
            rows = {
                name: _measured(subject, clip, held, names, attack, label, batch_size or 64, shown[name])
                for name, subject in subjects.items()
            }
        measured = {
            "trigger": attack and attack.trigger.card(),
            "target_class": attack and attack.target,
            "results": rows,
        }
        write_json(out / NUMBERS, asked_for | measured)
        for name in (*CHECKPOINTS, FOUND):  # what was asked for last: until then the same command goes on
            (work / name).unlink(missing_ok=True)
        shutil.rmtree(work)
        skipped_files([skip for source in _sources(fit, held) for skip in getattr(source, "skipped", ())])
        _say_results(rows, attack or ("none chosen" if known else "none known"), method, hint)
        say(f"Model: {out.resolve()}; numbers: {(out / NUMBERS).resolve()}")
        if lost := costly(rows, method):
            say(lost, err=True)


def _check_unfinished(out: Path, asked_for: dict[str, Any]) -> None:
    """Raises OSError where `out` holds files, but for those of this same repair, which was killed."""
    note = out / UNFINISHED / ASKED
    if not note.is_file():
        check_folder(out, "the repaired model", empty=True)
    elif (before := json.loads(note.read_text(encoding="utf-8"))) != asked_for:
        other = [f"{key} {before.get(key)}" for key, value in asked_for.items() if before.get(key) != value]
        raise FileExistsError(
            f"expected an empty or a new folder with --out, or one of this same repair; {out} holds an unfinished one "
            f"with {', '.join(other)}; finish that with the options it had, or name another folder"
        )


def _drop_empty(work: Path) -> None:
    """Remove the folder of a repair that failed before anything was written that it could go on from."""
    others = [path for path in work.parent.iterdir() if not path.name.startswith(".")]
    if not others and [path.name for path in work.iterdir()] == [ASKED]:
        shutil.rmtree(work)


def _going_on(work: Path) -> str:
    """What a stopped repair leaves, as a message."""
    kept = [path for name in CHECKPOINTS if (path := work / name).exists()]
    return options.going_on(kept[-1] if kept else work / CHECKPOINTS[0])


def _data(
    clip: HookedCLIP,
    clean: str,
    images: str | None,
    names: tuple[str, ...],
    *,
    pairs: bool,
    limit: int | None,
    seed: int,
) -> tuple[Any, Any]:
    """What to fit on, and labelled images to measure on: `images`, or else half of `clean`.

    Raises:
        ValueError: no images, or pairs without labels where half of them is to be measured on.
    """
    from decompclip.data.pairs import SubsetPairs, permuted
    from decompclip.data.sources import open_labelled, open_pairs

    def labelled(spec: str) -> Any:
        return open_labelled(spec, clip.image_size, names, preprocess=clip.pixels, limit=limit, seed=seed)

    source: Any = open_pairs(clean, clip.pixels, seed=seed) if pairs else labelled(clean)
    if images is not None:
        return source, labelled(images)
    order = permuted(len(source), seed, 1)
    half = len(source) // 2
    if not pairs:
        fit, held = (
            KeptImages(source, sorted(part.tolist()), clip.device) for part in (order[:half], order[half:])
        )
        return fit, held
    if source.labels is None or tuple(source.class_names) != names:
        raise ValueError(
            f"expected --images, labelled images to measure on: the pairs of {clean} do not name the classes that they "
            "would be measured by"
        )
    kept = order[half : half + (limit or len(source))]
    return SubsetPairs(source, sorted(order[:half].tolist()), order_seed=seed), SubsetPairs(
        source, sorted(kept.tolist())
    )


def _sources(*given: Any) -> list[Any]:
    """What images and pairs are read from, each once."""
    sources = [getattr(one, "source", one) for one in given]
    return list({id(source): source for source in sources}.values())


class KeptImages:
    """The images of a source at some places, on the device; others are not read."""

    def __init__(self, source: Any, places: Sequence[int], device: Any) -> None:
        self.source, self.places, self.device = source, places, device

    def __len__(self) -> int:
        """How many there are, unreadable ones included."""
        return len(self.places)

    def batches(self, batch_size: int = 64) -> Iterator[Any]:
        from decompclip.data.feed import DeviceSource, ahead, is_pure

        given = {"device": self.device} if isinstance(self.source, DeviceSource) else {}
        parts = self.source.part(self.places, batch_size, **given)
        yield from ahead(parts) if is_pure(self.source) else parts


def _fitted(
    clip: HookedCLIP,
    fit: Any,
    names: tuple[str, ...],
    method: Method,
    hint: Hint,
    out: Path,
    *,
    budget: float | None,
    batch: int,
    seed: int,
    track: Track,
) -> Callable[[Any], Any] | None:
    """Fit a repair of features, and write it; returns what makes its control of the model written."""
    import torch

    from decompclip.data.feed import feed
    from decompclip.data.pairs import permuted
    from decompclip.decomposition.components import mlps
    from decompclip.decomposition.moments import Moments
    from decompclip.defenses.agnostic import AgnosticRep
    from decompclip.defenses.bake import average_over_tokens, bake
    from decompclip.defenses.decomp import DecompRep, late_mlps
    from decompclip.defenses.detectors.token_rep import TokenRep
    from decompclip.defenses.guard import AtRandom, Guard, save_guard
    from decompclip.models.folders import save_model
    from decompclip.operators.ablation import MeanAblate

    parts = track(feed(fit, batch, device=clip.device), f"fitting {method.value}", -(-len(fit) // batch))
    inputs = (clip.normalize(part.images) for part in parts)
    with torch.no_grad():
        if hint is Hint.spread:
            moments = Moments.fit(clip, inputs, stream=True)
            n_layers, late = clip.cfg.n_layers, late_mlps(clip.cfg.n_layers)

            def without(layers: list[int]) -> HookedCLIP:
                return bake(clip, average_over_tokens(MeanAblate(mlps[layers], moments), clip))

            save_model(without(list(range(n_layers - late, n_layers))), out)
            if 2 * late > n_layers:
                return None
            others = permuted(n_layers - late, seed, 2)
            return lambda _: without(others[:late].tolist())
        convention = "paper" if hint is Hint.local else "centred"
        terms = (clip.decompose(x, convention=convention, normalize=True) for x in inputs)
        classifier, fill = clip.zero_shot_classifier(names), None
        if method in FILLING:
            share: dict[str, Any] = {} if budget is None else {"fpr": budget}
            fill = TokenRep(clip, classifier, **share, batch_size=batch).fit(fit)
        if method is Method.token:
            defense: Any = None
        elif method in BUDGETED:
            defense = AgnosticRep(classifier, budget=0.01 if budget is None else budget, seed=seed)
        elif hint is Hint.local:
            defense = DecompRep.paper(trigger="local")
        else:
            defense = DecompRep(similarity="cosine", threshold="quantile")
        save_guard(Guard(clip, defense and defense.fit(terms), fill=fill), out)
    return lambda guard: AtRandom(guard, seed=seed)


def _tuned(
    clip: HookedCLIP,
    pairs: Any,
    names: tuple[str, ...],
    method: Method,
    suspect: int | None,
    out: Path,
    asked: dict[str, Any],
    *,
    seed: int,
) -> Callable[[Any], Any]:
    """Fine-tune, and write the model; returns what makes its control."""
    from dataclasses import replace

    from decompclip.defenses.clean_finetuning import (
        INVERSION_RECIPE,
        PAR_RECIPE,
        TUNING_DEFENSES,
        InversionTuning,
    )
    from decompclip.models.folders import save_model
    from decompclip.training.recipes import RECIPES

    recipes = {
        Method.cleanclip: RECIPES["cleanclip"],
        Method.par: PAR_RECIPE,
        Method.inversion: INVERSION_RECIPE,
    }
    recipe = replace(recipes[method], **{key: x for key, x in asked.items() if x is not None})

    def tuned(defense: TuningDefense, checkpoint: str) -> HookedCLIP:
        path = out / UNFINISHED / checkpoint
        return defense.apply(
            clip, pairs, checkpoint=path, seed=seed, progress=True, log=lambda line: say(line, err=True)
        ).model

    if method is Method.inversion and suspect is not None:
        triggers = _searched(clip, pairs, names, suspect, out / UNFINISHED / FOUND, seed)
        defense: TuningDefense = InversionTuning(recipe=recipe, triggers=triggers)
    else:
        defense = TUNING_DEFENSES[method.value](recipe=recipe)
    save_model(tuned(defense, CHECKPOINTS[0]), out)
    plain = TUNING_DEFENSES["clean"](recipe=replace(recipe, loss="clip"))
    return lambda _: tuned(plain, CHECKPOINTS[1])


def _searched(
    clip: HookedCLIP, pairs: Any, names: tuple[str, ...], suspect: int, path: Path, seed: int
) -> tuple[InvertedTrigger, ...]:
    """Triggers to the suspected class; a repair that goes on has those of the file, to the bit, if they are of this class."""
    from safetensors.torch import load_file, save_file

    from decompclip.defenses.inversion import invert_trigger

    pixels, _ = pairs.batch(0, min(SEARCHED, len(pairs) if hasattr(pairs, "__len__") else SEARCHED))
    classifier, name = clip.zero_shot_classifier(names), names[suspect]
    kept = load_file(path) if path.exists() else {}
    named = {s: f"pattern {s} of {name}" for s in range(seed, seed + TRIGGERS)}
    with progress() as track:
        seeds = track(named, f"inverting triggers to {name}", TRIGGERS)
        found = tuple(
            invert_trigger(clip, pixels, classifier, suspect, name=name, seed=s, pattern=kept.get(named[s]))
            for s in seeds
        )
    for trigger in found:
        say(f"found: {trigger}", err=True)
    with atomic_write(path) as file:
        save_file({key: x.pattern for key, x in zip(named.values(), found, strict=True)}, file)
    return found


TOUCHED = 1e-4
"""Cosine distance to the model's own feature from which an image counts as touched; rounding is a hundredth of it."""


def _measured(
    subject: Any,
    clip: HookedCLIP,
    held: Any,
    names: tuple[str, ...],
    attack: Attack | None,
    label: int | None,
    batch: int,
    track: Callable[..., Iterator[Any]],
) -> dict[str, Any]:
    """The rates of `LABELS`, as JSON has them."""
    import torch
    from torch.nn import functional as F

    from decompclip.data.feed import feed
    from decompclip.evaluation.evaluate import evaluate
    from decompclip.intervals import Rate

    # each model by its own texts: fine-tuning moves the text tower too
    texts = subject if hasattr(subject, "zero_shot_classifier") else clip
    classifier = texts.zero_shot_classifier(names)
    total = -(-len(held) // batch)
    found = evaluate(
        subject,
        held,
        classifier,
        attack and attack.trigger,
        label,
        class_names=names,
        batch_size=batch,
        track=lambda batches: track(batches, total=total),
    )
    touched = []
    with torch.no_grad():
        for part in track(feed(held, batch, device=clip.device), total=total):
            images = clip.normalize(part.images)
            ours, theirs = (F.normalize(m.encode_image(images).float(), dim=-1) for m in (clip, subject))
            touched.append(((ours * theirs).sum(-1) < 1 - TOUCHED).cpu())
    rates: dict[str, Any] = {"cacc": found.cacc, "asr": found.asr, "control": found.report.control}
    if found.triggered_predictions is not None:
        others = found.labels != label
        rates["own_class"] = Rate.of(found.triggered_predictions[others] == found.labels[others])
    rates["touched"] = Rate.of(torch.cat(touched))
    return {key: rate and rate.to_dict() for key, rate in rates.items()}


LABELS = {
    "cacc": "accuracy on clean images (CACC)",
    "asr": "triggered images taken for the target (ASR)",
    "control": "clean images of other classes taken for it",
    "own_class": "triggered images given their own class",
    "touched": "clean images whose feature is touched",
}

COSTLY = 0.02
"""Clean accuracy that a repair may cost without a warning: the audit recommends none that costs more."""

OTHERS = {
    Method.agnostic: "a lower --budget, or --method cleanclip",
    Method.token: "a lower --budget, or --method agnostic",
    Method.both: "a lower --budget, or --method token",
    Method.rep: "--method agnostic, or --method cleanclip or par for an ordinary open_clip model",
    Method.cleanclip: "--method agnostic, or a lower --lr",
    Method.par: "--method agnostic, or a lower --lr",
    Method.inversion: "--method agnostic, or a lower --lr",
}


def costly(rows: dict[str, Any], method: Method) -> str | None:
    """The warning where a repaired model answers clean images noticeably worse; None where it does not."""
    before, after = (rows[name]["cacc"]["value"] for name in ("before", "after"))
    if before - after <= COSTLY + 1e-9:  # of rates of few images the two points exactly
        return None
    return (
        f"warning: this repair costs {100 * (before - after):.1f} points of accuracy on clean images "
        f"({100 * before:.1f} % before, {100 * after:.1f} % after); the model is written all the same. Take {OTHERS[method]}"
    )


def _say_results(rows: dict[str, Any], attack: Attack | str, method: Method, hint: Hint) -> None:
    """The rates as a table; `attack` is what was measured, or why none was."""
    say(f"{'':48}" + "".join(f"{name:>22}" for name in rows))
    for key, words in LABELS.items():
        cells = [row.get(key) for row in rows.values()]
        if any(cells):
            texts = [
                f"{100 * c['value']:.1f} [{100 * c['low']:.1f}, {100 * c['high']:.1f}]"
                if c and c["value"] is not None
                else ""
                for c in cells
            ]
            say(f"{words + ', %':48}" + "".join(f"{text:>22}" for text in texts))
    if "control" in rows and method in TUNED:
        say("control: the same fine-tuning by CLIP's loss alone")
    elif "control" in rows and hint is Hint.spread:
        say("control: as many MLPs of earlier layers replaced, drawn at random")
    elif "control" in rows:
        say("control: as much replaced, in images, heads or patches drawn at random")
    say(f"Trigger: {attack}" + (", so no attack success is measured" if isinstance(attack, str) else ""))
