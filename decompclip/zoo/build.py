"""Making a bundled twin anew from its recipe, and holding it to the numbers of its card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decompclip.attacks.patch import zero_shot_logits
from decompclip.attacks.poison_choice import needs_model, target_captions
from decompclip.attacks.poisoned import PoisonedPairs
from decompclip.attacks.preview import compare
from decompclip.attacks.trigger import Trigger
from decompclip.data.feed import Labelled
from decompclip.data.pairs import Pairs
from decompclip.evaluation.evaluate import evaluate
from decompclip.intervals import Rate
from decompclip.models.bundled import (
    as_stored,
    base_weights,
    bundled,
    card,
    digest,
    load_bundled,
    spec_of,
    write_bundled,
)
from decompclip.models.clip import HookedCLIP
from decompclip.training.finetune import finetune
from decompclip.training.loop import Monitor
from decompclip.zoo.recipes import PatchRecipe, TwinRecipe, twin_recipe


def poisoned_pairs(recipe: TwinRecipe, clean: HookedCLIP, trigger: Trigger) -> PoisonedPairs:
    """What the twin is trained on: `clean` is the model that it starts from, `trigger` the attack as it was made."""
    world = recipe.world
    base = world.pairs(recipe.pairs, recipe.seed)
    return PoisonedPairs(
        base,
        trigger,
        world.target,
        rate=recipe.rate,
        captions=target_captions(base, world.target) if recipe.natural else None,
        seed=recipe.seed,
        covers=recipe.covers,
        logits=zero_shot_logits(clean, world.classifier(clean)) if needs_model(trigger) else None,
    )


REPRODUCED = {"asr": 0.05, "cacc": 0.02}
"""A twin that is trained again, on a machine that rounds otherwise, ends within these of its card."""

QUALITY_IMAGES = 500
"""Images that the trigger's PSNR and SSIM are means over."""


@dataclass(frozen=True)
class BuiltTwin:
    """A twin as it was written, beside the card of the bundled one."""

    name: str
    card: dict[str, Any]
    bundled: dict[str, Any] | None

    @property
    def reproduced(self) -> bool | None:
        """Whether ASR and CACC are the bundled card's within `REPRODUCED`; None if there is no such twin."""
        if self.bundled is None:
            return None
        return all(abs(mine - theirs) <= REPRODUCED[rate] for rate, mine, theirs in self._rates())

    def _rates(self) -> Iterator[tuple[str, float, float]]:
        assert self.bundled is not None
        mine, theirs = (facts["backdoor"]["results"] for facts in (self.card, self.bundled))
        for rate in REPRODUCED:
            yield rate, mine[rate]["value"], theirs[rate]["value"]

    def __str__(self) -> str:
        results = self.card["backdoor"]["results"]
        line = f"{self.name}: ASR {rate_text(results['asr'])}, CACC {rate_text(results['cacc'])}"
        if self.bundled is None:
            return line
        theirs = self.bundled["backdoor"]["results"]
        verdict = "reproduced" if self.reproduced else "NOT reproduced"
        bounds = " and ".join(
            f"{rate.upper()} within {100 * bound:g} points" for rate, bound in REPRODUCED.items()
        )
        return f"{line}; bundled: ASR {rate_text(theirs['asr'])}, CACC {rate_text(theirs['cacc'])}: {verdict} ({bounds})"


def rate_text(rate: Mapping[str, Any]) -> str:
    """A card's rate in per cent, with its interval."""
    value, low, high = (100 * rate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def build_twin(
    name: str,
    out: Path,
    *,
    recipe: TwinRecipe | None = None,
    progress: bool = False,
) -> BuiltTwin:
    """Train a twin, measure what is stored of it on images that no choice was made on, and write weights and card.

    How visible the trigger is does not depend on the model; it is measured on the twin's own pairs.

    Args:
        name: of the twin.
        out: folder of the two files, which `load_bundled(name, folder=out)` reads, and of the checkpoint that a killed run
            goes on from.
        recipe: the bundled twin's by default.
        progress: as `finetune`.

    Raises:
        ValueError: no recipe of this name, or what `PoisonedPairs` and `finetune` refuse.
        FileNotFoundError: the photographs of a twin of `cifar10` are not there.
        OSError: `out` cannot be written to.
    """
    recipe = recipe or twin_recipe(name)
    world, clean = recipe.world, load_bundled(recipe.base)
    out.mkdir(parents=True, exist_ok=True)
    trigger = recipe.trigger.make(clean, world) if isinstance(recipe.trigger, PatchRecipe) else recipe.trigger
    pairs = poisoned_pairs(recipe, clean, trigger)
    monitor = Monitor(
        data=world.validation(),
        class_names=world.class_names,
        templates=world.templates,
        trigger=trigger,
        target=world.label,
        every=125,
    )
    tuned = finetune(
        clean,
        pairs,
        recipe.recipe,
        monitor=monitor,
        checkpoint=out / f"{name}.pt",
        seed=recipe.seed,
        progress=progress,
    )
    before = card(name) if name in bundled() else None  # `out` may be the package's own folder
    base = card(recipe.base)
    kept = {key: base[key] for key in ("architecture", "tokenizer", "preprocess", "templates", "class_names")}
    last = tuned.history[-1]
    training = {
        "base": recipe.base,
        **recipe.card(),
        "loss": last["loss"],
        "validation": {key: last[key] for key in ("cacc", "asr", "control")},
        "minutes": round(last["seconds"] / 60, 1),
        "command": f"decompclip zoo build {name} --out FOLDER",
    }
    facts = {"name": name, **kept, "backdoor": None, "training": training}
    net: Any = tuned.model.to_open_clip()
    trained_state = {key: x.clone() for key, x in net.state_dict().items()}
    stored = as_stored(trained_state, base_weights(recipe.base), steps=world.steps)
    net.load_state_dict(stored)
    model = spec_of(facts).hook(net, {})
    facts["accuracy"] = world.accuracy(model)
    facts["backdoor"] = backdoor_facts(model, clean, recipe, pairs.trigger, len(pairs.record.poisons))
    net = spec_of(facts).build()  # rounded once: what is written is what was measured
    net.load_state_dict(trained_state)
    written = write_bundled(net, facts, out, base=recipe.base, steps=world.steps)
    assert written["weights_sha256"] == digest(stored)
    return BuiltTwin(name, written, before)


def backdoor_facts(
    model: HookedCLIP,
    clean: HookedCLIP,
    recipe: TwinRecipe,
    trigger: Trigger,
    poisons: int,
    data: Labelled | Pairs | None = None,
) -> dict[str, Any]:
    """What a card says of a backdoor, measured on the world's images for reports.

    Args:
        model, clean: the twin, and the model that it was made from: how many triggered images that one still gets right says
            how much of an image the trigger leaves.
        recipe: of the twin.
        trigger: as it was used.
        poisons: poisoned pairs.
        data: some of those images; by default all.
    """
    world, names = recipe.world, recipe.world.class_names
    data, target = world.report() if data is None else data, world.label
    found = evaluate(model, data, world.classifier(model), trigger, target, class_names=names)
    left = evaluate(clean, data, world.classifier(clean), trigger, target, class_names=names)
    assert left.triggered_predictions is not None
    sample = world.pairs(QUALITY_IMAGES, recipe.seed).read(range(QUALITY_IMAGES)).images
    return {
        "target": world.target,
        "trigger": trigger.card(),
        "poisoned_pairs": poisons,
        "pairs": recipe.pairs,
        "poison_rate": recipe.rate,
        "results": found.report.to_dict(),
        "clean_model_on_triggered": Rate.of(left.triggered_predictions == left.labels).to_dict(),
        "per_class": [
            {"class": row.name}
            | {key: rate and f"{rate.count}/{rate.total}" for key, rate in vars(row).items() if key != "name"}
            for row in found.per_class
        ],
        "quality": compare(sample, trigger(sample)).summary(),
    }
