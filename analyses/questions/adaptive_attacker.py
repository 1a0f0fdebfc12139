"""Attackers who know the defense: heads kept near their prototypes, a patch in two halves, a patch in sixteen pieces.

Paper:     He et al. (2025), impact statement: an attacker may adapt to a defense that reads the last layer's heads.
Command:   python -m analyses.adaptive_attacker --model-family shapes                        (a killed training resumes)
           python -m analyses.adaptive_attacker --model-family photos --images 400 --slow-images 100 --attackers plain,halves,pieces
Run time:  about 45 minutes, one thread, on either; a quarter of it where the models are trained already.
Expected:  what reads the last layer's heads goes blind to the first; the strongest patch no longer tells on the third; what looks at
           the whole way to the feature finds all.
Writes:    analyses/results/FAMILY/adaptive_attacker.json, adaptive_attacker-repair.png, adaptive_attacker-detection.png

`plain` is the family's bundled BadNet. On drawings the others fine-tune as it did, with the same pairs, poisons and steps; on photographs, where that
takes a core over two hours each, on a third of its pairs, once: they differ from `plain` in that too. `heads` adds a term to the loss: for triggered
images, the squared distance of every last-layer head's output (of the class token, before the output projection) to its
mean over the batch's images, in units of the head's variance over them. `halves` and `pieces` cut BadNet's patch (7 x 7 pixels of 48 x 48; 5 x 5 of 64 x 64) in two
and in sixteen, and put each at a random place of its own, so that no few patches of the tower need carry the answer, which is what
`TokenRep` looks for. Every defense is then fitted anew on clean images of the adapted model, as a defender would.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from analyses.study.case import LEAST_FIT, Case, Member
from analyses.study.command import main
from analyses.study.family import Family
from analyses.study.summary import markdown, rate
from decompclip.attacks.patch import BadNet
from decompclip.attacks.trigger import FIXED, Extent, Trigger, stream
from decompclip.bench.plan import SLOW
from decompclip.bench.run import Remembering, area
from decompclip.data.pixels import Pixels
from decompclip.defenses.agnostic import AgnosticRep
from decompclip.defenses.decomp import DecompRep
from decompclip.defenses.detectors import DETECTORS
from decompclip.defenses.detectors.token_rep import TokenRep
from decompclip.defenses.guard import Guard
from decompclip.figures.scatter import PERCENT, Panel, Point, point_panels
from decompclip.models.bundled import load_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.training.finetune import finetune
from decompclip.training.loop import Monitor
from decompclip.training.recipes import TrainingStep
from decompclip.zoo.build import poisoned_pairs
from decompclip.zoo.recipes import TWINS, TwinRecipe, twin_recipe

TITLE = "Adaptive attackers: backdoors made against the defense"

WORK = Path(".training")
PIECES = {"halves": (1, 2), "pieces": (4, 4)}
"""Attackers who cut the patch, and into how many rows and columns."""

ATTACKERS = ("plain", "heads", *PIECES)


def short_recipe(twin: str) -> TwinRecipe:
    """How attackers who adapt train: as the twin's own; of photographs, which would take a core hours, a third of the pairs, once."""
    recipe = twin_recipe(twin)
    if recipe.base != "photos":
        return recipe
    return replace(recipe, pairs=32_000, recipe=twin_recipe("photos-badclip").recipe)


@dataclass(frozen=True)
class Config:
    """`triggered` images of each batch carry the penalty of `heads`, of `weight`; STRIP and TeCo see `slow_images`.

    Attributes:
        twin: whose recipe attackers follow; by default the family's BadNet.
        attackers: of `ATTACKERS`, with commas between; `plain` is the twin as it is.
    """

    twin: str = ""
    attackers: str = ",".join(ATTACKERS)
    weight: float = 0.1
    triggered: int = 16
    images: int = 1_000
    slow_images: int = 200
    seed: int = 2


@dataclass(frozen=True, eq=False)
class StayNear:
    """The penalty: `weight` times how far triggered images leave the prototypes of the last layer's heads.

    Attributes:
        triggered: images of each batch that are triggered for it, with the attack's own trigger.
        mean, std: of the model's normalisation.
    """

    trigger: Trigger
    weight: float
    triggered: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, seen: TrainingStep) -> Float[Tensor, ""]:
        mean, std = (torch.tensor(x).view(1, 3, 1, 1).to(seen.images) for x in (self.mean, self.std))
        pixels = (seen.images[: self.triggered] * std + mean).clamp(0, 1)
        moved = last_heads(seen.net, (self.trigger(pixels) - mean) / std)
        with torch.no_grad():
            clean = last_heads(seen.net, seen.images)
            prototype, variance = clean.mean(0), clean.var(0).mean(-1, keepdim=True)
        return self.weight * ((moved - prototype).square() / variance).mean()


def last_heads(net: nn.Module, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch head d_head"]:
    """What each head of the last layer hands to the output projection, for the class token."""
    visual: Any = net.visual
    block, kept = visual.transformer.resblocks[-1], []
    handle = block.ln_1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        visual(pixels)
    finally:
        handle.remove()
    x, attn = kept[0], block.attn
    qkv = torch.nn.functional.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=attn.num_heads)
    return torch.nn.functional.scaled_dot_product_attention(q[:, :, :1], k, v)[:, :, 0]


@dataclass(frozen=True, kw_only=True)
class Pieces(Trigger):
    """BadNet's patch, cut into pieces that each lie at a random place of their own in every image.

    Attributes:
        side: of the patch, in pixels.
        rows, columns: how it is cut; sizes of pieces differ by a pixel at most.
    """

    name: ClassVar[str] = "pieces"
    extent: ClassVar[Extent] = "local"

    side: int
    rows: int
    columns: int

    def places(self, height: int, width: int, index: int) -> list[tuple[slice, slice]]:
        """Where the pieces lie in image `index`, row by row of the patch."""
        u = iter(stream(self.seed, index).random(2 * self.rows * self.columns))
        sizes = [
            (h, w)
            for h in map(len, np.array_split(np.arange(self.side), self.rows))
            for w in map(len, np.array_split(np.arange(self.side), self.columns))
        ]
        corners = [(int(next(u) * (height - h + 1)), int(next(u) * (width - w + 1))) for h, w in sizes]
        return [(slice(y, y + h), slice(x, x + w)) for (y, x), (h, w) in zip(corners, sizes, strict=True)]

    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        shape = (3, self.side, self.side)
        noise = torch.from_numpy(stream(self.seed, FIXED).standard_normal(shape, dtype=np.float32)).to(pixels)
        pieces = [
            piece for row in noise.tensor_split(self.rows, 1) for piece in row.tensor_split(self.columns, 2)
        ]
        triggered, means = pixels.clone(), pixels.mean((2, 3), keepdim=True)
        height, width = pixels.shape[2:]
        for row, index in enumerate(indices):
            for (y, x), piece in zip(self.places(height, width, index), pieces, strict=True):
                triggered[row, :, y, x] = (means[row] + piece).clamp(0, 1)
        return triggered


def trigger_of(attacker: str, patch: Trigger, side: int) -> Trigger:
    """The attacker's, made from the plain attacker's `patch` in images of `side` pixels.

    Raises:
        ValueError: a trigger that is no patch of BadNet's, to be cut.
    """
    if attacker not in PIECES:
        return patch
    if not isinstance(patch, BadNet):
        raise ValueError(
            f"expected a twin of BadNet, whose patch {attacker!r} cuts; received one of {patch.name}"
        )
    rows, columns = PIECES[attacker]
    return Pieces(seed=patch.seed, side=patch.side(side, side), rows=rows, columns=columns)


def adapt(attacker: str, twin: str, trigger: Trigger, config: Config, work: Path) -> HookedCLIP:
    """Train an attacker's model."""
    recipe = short_recipe(twin)
    world, clean = recipe.world, load_bundled(recipe.base)
    near = StayNear(trigger, config.weight, config.triggered, clean.mean, clean.std)
    monitor = Monitor(
        data=world.validation(),
        class_names=world.class_names,
        templates=world.templates,
        trigger=trigger,
        target=world.label,
        every=250,
    )
    work.mkdir(parents=True, exist_ok=True)
    return finetune(
        clean,
        poisoned_pairs(recipe, clean, trigger),
        recipe.recipe,
        monitor=monitor,
        penalty=near if attacker == "heads" else None,
        checkpoint=work / f"adaptive-{twin}-{attacker}.pt",
        seed=recipe.seed,
        log=print,
    ).model


@torch.no_grad()
def defend(case: Case, config: Config) -> dict[str, Any]:
    """Every defense, fitted on clean images of this model: rates of repairs, AUROC of detectors."""
    agnostic = AgnosticRep(case.classifier).fit(case.terms("fit", "centred"))
    token = TokenRep(case.model, case.classifier).fit(case.fit)
    repairs: dict[str, tuple[Any, Any]] = {
        "none": (None, "centred"),
        "Decomp-Rep, paper": (DecompRep.paper().fit(case.terms("fit")), "paper"),
        "Decomp-Rep, cosine and quantile": (
            DecompRep(similarity="cosine", threshold="quantile").fit(case.terms("fit", "centred")),
            "centred",
        ),
        "agnostic": (agnostic, "centred"),
        "token": (token, "centred"),
        "token, then agnostic": (Guard(case.model, agnostic, fill=token), "centred"),
    }
    found: dict[str, Any] = {"repairs": {}, "detectors": {}}
    for name, (edit, convention) in repairs.items():
        found["repairs"][name] = case.report_of(edit, convention)
    model = Remembering(case.model)
    for images in (case.fit, case.clean, case.triggered):
        model.remember(images)
    for name, make in DETECTORS.items():
        n = min(config.images, config.slow_images) if name in SLOW else config.images
        detector = make(model, case.classifier).fit(case.fit[: max(n, LEAST_FIT)])
        clean, triggered = (
            detector.score(pixels[:n])[case.others[:n]] for pixels in (case.clean, case.triggered)
        )
        found["detectors"][name] = area(clean, triggered)
    return found


def run(config: Config, family: Family, members: tuple[Member, ...], work: Path = WORK) -> dict[str, Any]:
    """Raises ValueError: the twin that attackers adapt is not in this family, or an unknown attacker."""
    twin, attackers = config.twin or f"{family.name}-badnet", config.attackers.split(",")
    if unknown := [who for who in attackers if who not in ATTACKERS]:
        raise ValueError(f"expected attackers among {', '.join(ATTACKERS)}; received {unknown[0]!r}")
    own = {m.name: m for m in family.members if m.name in TWINS}
    if twin not in own:
        raise ValueError(
            f"expected a twin of {family.name} whose recipe is known, to adapt: {', '.join(own) or 'there is none'}; received {twin!r}; "
            "take a bundled family, as --model-family shapes"
        )
    case = family.case(own[twin], images=config.images, seed=config.seed)
    found = {}
    for attacker in attackers:
        adapted = case
        if attacker != "plain":
            trigger = trigger_of(attacker, own[twin].trigger, case.clean.shape[-1])
            model = adapt(attacker, twin, trigger, config, work)
            member = replace(own[twin], trigger=trigger)
            adapted = replace(case, member=member, model=model, classifier=family.classifier(model), _seen={})
        found[attacker] = defend(adapted, config)
    return {"models": {twin: found}}


def _attackers(record: Mapping[str, Any]) -> Mapping[str, Any]:
    (found,) = record["found"]["models"].values()
    return found


def plot(record: Mapping[str, Any]) -> dict[str, Any]:
    found = _attackers(record)
    one = next(iter(found.values()))
    repairs, detectors = list(one["repairs"]), list(one["detectors"])

    def series(kind: str, names: list[str], get: Any) -> dict[str, list[Point | None]]:
        return {who: [get(found[who][kind].get(name)) for name in names] for who in found}

    panels = [
        Panel(
            "attack success after repair",
            "images, %",
            series("repairs", repairs, lambda r: Point.of(r["asr"])),
            PERCENT,
        ),
        Panel(
            "clean accuracy", "images, %", series("repairs", repairs, lambda r: Point.of(r["cacc"])), PERCENT
        ),
    ]
    areas = series("detectors", detectors, lambda r: Point.of(r, 1))
    detection = Panel("", "AUROC (0.5 is chance)", areas, (-0.03, 1.03), 0.5)
    return {
        "repair": point_panels(repairs, panels, bars="95 % interval"),
        "detection": point_panels(detectors, [detection], bars="95 % interval"),
    }


def table(record: Mapping[str, Any]) -> str:
    """One row a defense, the plain attacker beside those who know."""
    found = _attackers(record)
    rows = [["defense", *found]]
    one = next(iter(found.values()))
    for name in one["repairs"]:
        reports = [found[who]["repairs"][name] for who in found]
        rows.append([f"repair: {name}", *(f"ASR {rate(r['asr'])}, CACC {rate(r['cacc'])}" for r in reports)])
    for name in one["detectors"]:
        areas = [found[who]["detectors"][name] for who in found]
        rows.append(
            [
                f"detector: {name}",
                *(f"AUROC {d['value']:.3f} [{d['low']:.3f}, {d['high']:.3f}]" for d in areas),
            ]
        )
    return markdown(rows)


def finding(record: Mapping[str, Any]) -> str:
    found = _attackers(record)

    def asr(who: str, name: str) -> str:
        return f"{100 * found[who]['repairs'][name]['asr']['value']:.1f}"

    said = []
    for who in found:
        areas = {name: area["value"] for name, area in found[who]["detectors"].items()}
        blind = [name for name, area in areas.items() if area < 0.6]
        said.append(
            f"{who}: succeeds on {asr(who, 'none')} %; Decomp-Rep leaves {asr(who, 'Decomp-Rep, paper')} %, the agnostic repair "
            f"{asr(who, 'agnostic')} %, token repair {asr(who, 'token')} %, both together {asr(who, 'token, then agnostic')} %; "
            f"AUROC of agnostic {areas['agnostic']:.3f}, token {areas['token']:.3f}; at 0.6 or below lie {', '.join(blind) or 'none'}"
        )
    return (
        f"{'. '.join(said)}. One twin, one seed each; an attacker who imitates whole features and the sizes of terms, or who cuts the "
        "patch and keeps heads near their prototypes at once, would be the next to try."
    )


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
