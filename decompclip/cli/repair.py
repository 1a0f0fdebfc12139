"""`decompclip repair`: a model without its backdoor, as far as a method gets. Heavy imports wait inside."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decompclip.cli.console import imports, plain_errors, say
from decompclip.cli.options import (
    MAX_SEED,
    TRIGGER,
    Activation,
    Checkpoint,
    Device,
    Model,
    Pretrained,
    attack_on,
    check_folder,
    usable_device,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from decompclip.attacks.registry import Attack
    from decompclip.models.clip import HookedCLIP


NUMBERS = "repair.json"


class Method(str, Enum):
    agnostic = "agnostic"
    rep = "rep"
    cleanclip = "cleanclip"
    par = "par"


class Hint(str, Enum):
    none = "none"
    local = "local"
    spread = "global"


def repair(
    model: Model,
    clean: Annotated[
        str,
        typer.Option(
            help="What to repair with. agnostic, rep: clean images, a folder, shapes:N, cifar10. cleanclip, par: clean "
            "image-caption pairs, as finetune takes them."
        ),
    ],
    method: Annotated[
        Method,
        typer.Option(
            help="agnostic, rep: repair images one by one, in a guarded model that decompclip.load opens. cleanclip, par: "
            "fine-tune; rep with --hint global: replace the last MLPs: ordinary open_clip models."
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
            help=f"Measure this attack's success as well; by default the one that MODEL remembers. own; {TRIGGER}."
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="The class that the attacker wants.")] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="File with one class a line; bundled models and data sets know theirs."),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="agnostic: share of clean images that may be touched.")
    ] = 0.01,
    hint: Annotated[
        Hint,
        typer.Option(
            help="rep: what is known of the trigger, as the paper's method must be told: local (a patch), or global."
        ),
    ] = Hint.none,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="cleanclip, par: in place of the recipe's.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="cleanclip, par: in place of the recipe's.")] = None,
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
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    activation: Annotated[
        Activation, typer.Option(help="Of the MLPs, where the checkpoint does not say.")
    ] = Activation.auto,
    limit: Annotated[int, typer.Option(min=0, help="Most images of a folder; 0 takes all.")] = 4000,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of halves, order and draws.")] = 0,
    device: Device = None,
) -> None:
    """Repair MODEL with clean data, and measure before and after: accuracy, attack success, and what is touched.

    The numbers are of the folder as written, opened again, on images that nothing was fitted on.
    """
    with plain_errors():
        from decompclip.attacks.registry import OWN, remembered

        if trigger is None and len(remembered(model, checkpoint)) == 1:
            trigger = OWN
        attack = attack_on(model, checkpoint, trigger, target)
        check_folder(out, "the repaired model")
        if out.exists() and any(out.iterdir()):
            raise FileExistsError(
                f"expected an empty or a new folder with --out; {out} holds files; name another"
            )
        if images is not None and (images == clean or Path(images).resolve() == Path(clean).resolve()):
            raise ValueError(
                f"expected other images with --images than with --clean, for nothing is measured on what a repair was fitted "
                f"on; received {clean} twice; leave --images out, and half of it is kept for measuring"
            )
        if hint is not Hint.none and method is not Method.rep:
            raise ValueError(f"expected --method rep with --hint; received {method.value}, which takes none")
        tuned = {"--epochs": epochs, "--lr": lr}
        if method in (Method.agnostic, Method.rep) and (given := [k for k, x in tuned.items() if x]):
            raise ValueError(f"expected --method cleanclip or par with {given[0]}; received {method.value}")
        typer.echo(f"{model}: loading", err=True)
        with imports():
            from decompclip.cli.diagnosis import check_text
            from decompclip.cli.evaluate import known_classes
            from decompclip.data.images import class_index
            from decompclip.files import write_json
            from decompclip.models.loading import load

        names = known_classes(classes, model, images or clean)
        label = None if attack is None or attack.target is None else class_index(attack.target, names)
        weights = {"pretrained": pretrained, "checkpoint": checkpoint, "activation": activation.value}
        clip = load(model, **weights, device=usable_device(device))
        check_text(clip)
        fit, held = _data(clip, clean, images, names, method, limit=limit or None, seed=seed)
        if method in (Method.agnostic, Method.rep):
            other = _fitted(
                clip, fit, names, method, hint, out, budget=budget, batch=batch_size or 64, seed=seed
            )
        else:
            other = _tuned(
                clip, fit, method, out, epochs=epochs, lr=lr, batch=batch_size, seed=seed, control=control
            )
        from decompclip.defenses.guard import load as reopen

        subjects = {"before": clip, "after": reopen(out, device=clip.device)}
        if control and other is not None:
            subjects["control"] = other(subjects["after"])
        rows = {
            name: _measured(subject, clip, held, names, attack, label, batch_size or 64)
            for name, subject in subjects.items()
        }
        facts = {
            "model": model,
            "method": method.value,
            "clean": clean,
            "images": images,
            "seed": seed,
            "options": {
                "budget": budget,
                "hint": hint.value,
                "epochs": epochs,
                "lr": lr,
                "batch_size": batch_size,
            },
            "trigger": attack and attack.trigger.card(),
            "target_class": attack and attack.target,
            "results": rows,
        }
        write_json(out / NUMBERS, facts)
        _tell(rows, attack, method, hint)
        typer.echo(f"Model: {out.resolve()}; numbers: {(out / NUMBERS).resolve()}")
        if lost := costly(rows, method):
            say(lost, err=True)


def _data(
    clip: HookedCLIP,
    clean: str,
    images: str | None,
    names: tuple[str, ...],
    method: Method,
    *,
    limit: int | None,
    seed: int,
) -> tuple[Any, Any]:
    """What to fit on, and labelled images to measure on.

    Raises:
        ValueError: no images, or pairs without labels where half of them is to be measured on.
    """
    import numpy as np

    from decompclip.data.pairs import SubsetPairs
    from decompclip.data.sources import open_labelled, open_pairs

    def labelled(spec: str) -> Any:
        return open_labelled(spec, clip.image_size, names, preprocess=clip.pixels, limit=limit, seed=seed)

    if method in (Method.agnostic, Method.rep):
        source = labelled(clean)
        if images is not None:
            return source, labelled(images)
        order = np.random.Generator(np.random.Philox(key=[seed, 1])).permutation(len(source))
        first = np.isin(np.arange(len(source)), order[: len(source) // 2])
        return Part(source, first), Part(source, ~first)
    pairs = open_pairs(clean, clip.pixels, seed=seed)
    if images is not None:
        return pairs, labelled(images)
    if pairs.labels is None or tuple(pairs.class_names) != names:
        raise ValueError(
            f"expected --images, labelled images to measure on: the pairs of {clean} do not name the classes that they "
            "would be measured by"
        )
    order = np.random.Generator(np.random.Philox(key=[seed, 1])).permutation(len(pairs))
    half = len(pairs) // 2
    kept = order[half : half + (limit or len(pairs))]
    return SubsetPairs(pairs, sorted(order[:half].tolist()), order_seed=seed), SubsetPairs(
        pairs, sorted(kept.tolist())
    )


class Part:
    """A part of a source of images: those of the places where `kept` is true, called by these places."""

    def __init__(self, source: Any, kept: Any) -> None:
        self.source, self.kept = source, kept

    def batches(self, batch_size: int = 64) -> Iterator[Any]:
        from types import SimpleNamespace

        import torch

        from decompclip.evaluation.evaluate import batches_of

        seen = 0
        for batch in batches_of(self.source, batch_size):
            places = torch.arange(seen, seen + len(batch.images))
            rows = torch.from_numpy(self.kept[seen : seen + len(batch.images)])
            seen += len(batch.images)
            if rows.any():
                labels = None if batch.labels is None else batch.labels[rows]
                yield SimpleNamespace(images=batch.images[rows], labels=labels, indices=places[rows])


def _fitted(
    clip: HookedCLIP,
    fit: Any,
    names: tuple[str, ...],
    method: Method,
    hint: Hint,
    out: Path,
    *,
    budget: float,
    batch: int,
    seed: int,
) -> Any:
    """Fit a repair of features, and write it; returns what makes its control of the model written."""
    from functools import reduce
    from operator import or_

    import numpy as np
    import torch

    from decompclip.decomposition.components import mlps
    from decompclip.decomposition.moments import Moments
    from decompclip.defenses.agnostic import AgnosticRep
    from decompclip.defenses.bake import average_over_tokens, bake
    from decompclip.defenses.decomp import DecompRep, late_mlps
    from decompclip.defenses.guard import AtRandom, Guard, save_guard
    from decompclip.evaluation.evaluate import batches_of
    from decompclip.models.folders import save_model
    from decompclip.operators.ablation import MeanAblate

    with torch.no_grad():
        if hint is Hint.spread:
            inputs = (clip.normalize(b.images) for b in batches_of(fit, batch))
            moments = Moments.fit(clip, inputs, stream=True)
            n_layers = clip.cfg.n_layers
            late = late_mlps(n_layers)

            def without(layers: Sequence[int]) -> HookedCLIP:
                chosen = [mlps[layer] for layer in layers]
                return bake(clip, average_over_tokens(MeanAblate(reduce(or_, chosen), moments), clip))

            save_model(without(range(n_layers - late, n_layers)), out)
            if 2 * late > n_layers:
                return None
            others = np.random.Generator(np.random.Philox(key=[seed, 2])).permutation(n_layers - late)
            return lambda _: without(others[:late].tolist())
        convention = "paper" if hint is Hint.local else "centred"
        terms = (
            clip.decompose(clip.normalize(b.images), convention=convention, normalize=True)
            for b in batches_of(fit, batch)
        )
        if method is Method.agnostic:
            defense: Any = AgnosticRep(clip.zero_shot_classifier(names), budget=budget, seed=seed)
        elif hint is Hint.local:
            defense = DecompRep.paper(trigger="local")
        else:
            defense = DecompRep(similarity="cosine", threshold="quantile")
        save_guard(Guard(clip, defense.fit(terms)), out)
    return lambda guard: AtRandom(guard, seed=seed)


def _tuned(
    clip: HookedCLIP,
    pairs: Any,
    method: Method,
    out: Path,
    *,
    epochs: int | None,
    lr: float | None,
    batch: int | None,
    seed: int,
    control: bool,
) -> Any:
    """Fine-tune, and write the model; returns what makes its control."""
    from dataclasses import replace

    from decompclip.defenses.clean_finetuning import PAR_RECIPE, TUNING_DEFENSES
    from decompclip.models.folders import save_model
    from decompclip.training.recipes import RECIPES

    asked: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": batch}
    recipe = RECIPES["cleanclip"] if method is Method.cleanclip else PAR_RECIPE
    recipe = replace(recipe, **{key: x for key, x in asked.items() if x is not None})

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    options: dict[str, Any] = {"seed": seed, "progress": True, "log": tell}
    save_model(TUNING_DEFENSES[method.value](recipe=recipe).apply(clip, pairs, **options).model, out)
    plain = TUNING_DEFENSES["clean"](recipe=replace(recipe, loss="clip"))
    return (lambda _: plain.apply(clip, pairs, **options).model) if control else None


TOUCHED = 1e-4
"""Cosine distance to the model's own feature, beyond which an image counts as touched: rounding is a hundredth of it."""


def _measured(
    subject: Any,
    clip: HookedCLIP,
    held: Any,
    names: tuple[str, ...],
    attack: Attack | None,
    label: int | None,
    batch: int,
) -> dict[str, Any]:
    """CACC, ASR and control, the share of triggered images that get their own class, and that of clean images touched."""
    import torch
    from torch.nn import functional as F

    from decompclip.evaluation.evaluate import batches_of, evaluate
    from decompclip.intervals import Rate

    # each model by its own texts: fine-tuning moves the text tower too
    texts = subject if hasattr(subject, "zero_shot_classifier") else clip
    classifier = texts.zero_shot_classifier(names)
    found = evaluate(
        subject, held, classifier, attack and attack.trigger, label, class_names=names, batch_size=batch
    )
    touched = []
    with torch.no_grad():
        for part in batches_of(held, batch):
            images = clip.normalize(part.images)
            ours, theirs = (F.normalize(m.encode_image(images).float(), dim=-1) for m in (clip, subject))
            touched.append(((ours * theirs).sum(-1) < 1 - TOUCHED).cpu())
    rates: dict[str, Any] = {"cacc": found.cacc, "asr": found.asr, "control": found.report.control}
    if found.triggered_predictions is not None:
        others = found.labels != label
        rates["own_class"] = Rate.of(found.triggered_predictions[others] == found.labels[others])
    rates["touched"] = Rate.of(torch.cat(touched))
    return {key: rate and rate.to_dict() for key, rate in rates.items()}


SAID = {
    "cacc": "accuracy on clean images (CACC)",
    "asr": "triggered images taken for the target (ASR)",
    "control": "clean images of other classes taken for it",
    "own_class": "triggered images given their own class",
    "touched": "clean images whose feature is touched",
}


COSTLY = 0.02
"""Clean accuracy that a repair may cost without a word: the audit recommends none that costs more."""

OTHERS = {
    Method.agnostic: "a lower --budget, or --method cleanclip",
    Method.rep: "--method agnostic, or --method cleanclip or par for an ordinary open_clip model",
    Method.cleanclip: "--method agnostic, or a lower --lr",
    Method.par: "--method agnostic, or a lower --lr",
}


def costly(rows: dict[str, Any], method: Method) -> str | None:
    """What to say of a repair whose model answers clean images noticeably worse; None where it does not."""
    before, after = (rows[name]["cacc"]["value"] for name in ("before", "after"))
    if before - after <= COSTLY + 1e-9:  # of rates of few images the two points exactly
        return None
    return (
        f"warning: this repair costs {100 * (before - after):.1f} points of accuracy on clean images "
        f"({100 * before:.1f} % before, {100 * after:.1f} % after); the model is written all the same. Take {OTHERS[method]}"
    )


def _tell(rows: dict[str, Any], attack: Attack | None, method: Method, hint: Hint) -> None:
    typer.echo(f"{'':48}" + "".join(f"{name:>22}" for name in rows))
    for key, words in SAID.items():
        cells = [row.get(key) for row in rows.values()]
        if any(cells):
            texts = [
                f"{100 * c['value']:.1f} [{100 * c['low']:.1f}, {100 * c['high']:.1f}]" if c else ""
                for c in cells
            ]
            typer.echo(f"{words + ', %':48}" + "".join(f"{text:>22}" for text in texts))
    if "control" in rows:
        tuned = method in (Method.cleanclip, Method.par)
        typer.echo(
            "control: the same fine-tuning by CLIP's loss alone"
            if tuned
            else "control: as many MLPs of earlier layers replaced, drawn at random"
            if hint is Hint.spread
            else "control: as much replaced, in images or heads drawn at random"
        )
    typer.echo(
        "Trigger: none known, so no attack success is measured" if attack is None else f"Trigger: {attack}"
    )
