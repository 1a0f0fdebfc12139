"""Training a twin as its recipe says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from decompclip.attacks.label_consistent import zero_shot_logits
from decompclip.attacks.poison_checks import needs_model
from decompclip.attacks.poison_choice import target_captions
from decompclip.attacks.poisoned import PoisonedPairs
from decompclip.attacks.trigger import Trigger
from decompclip.models.clip import HookedCLIP
from decompclip.models.zoo import load_bundled
from decompclip.training.finetune import finetune
from decompclip.training.monitor import Monitor
from decompclip.training.result import FineTuned
from decompclip.zoo.recipes import OptimisedPatch, TwinRecipe


@dataclass(frozen=True)
class TrainedTwin:
    """A twin before it is measured and stored."""

    name: str
    recipe: TwinRecipe
    trigger: Trigger
    pairs: PoisonedPairs
    tuned: FineTuned


def poisoned_pairs(recipe: TwinRecipe, clean: HookedCLIP, trigger: Trigger) -> PoisonedPairs:
    """What the twin is trained on."""
    world = recipe.world
    base = world.pairs(recipe.pairs, recipe.seed)
    logits = zero_shot_logits(clean, world.classifier(clean)) if needs_model(trigger) else None
    captions = target_captions(base, world.target) if recipe.natural else None
    return PoisonedPairs(
        base,
        trigger,
        world.target,
        rate=recipe.rate,
        captions=captions,
        seed=recipe.seed,
        covers=recipe.covers,
        logits=logits,
    )


def train_twin(
    name: str,
    recipe: TwinRecipe,
    work: Path,
    *,
    log: Callable[[str], None] | None = None,
    progress: bool = False,
) -> TrainedTwin:
    """Follow a recipe; a killed run goes on from its checkpoint in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    world, clean = recipe.world, load_bundled(recipe.base)
    trigger = (
        recipe.trigger.make(clean, world) if isinstance(recipe.trigger, OptimisedPatch) else recipe.trigger
    )
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
        checkpoint=work / f"{name}.pt",
        seed=recipe.seed,
        log=log,
        progress=progress,
    )
    return TrainedTwin(name, recipe, trigger, pairs, tuned)
