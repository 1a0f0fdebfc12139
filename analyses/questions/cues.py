"""Does a model answer by a cue, and does it stop where the heads that see the cue are ablated? Worst-group accuracy.

Paper:     Gandelsman, Efros and Steinhardt (ICLR 2024), section 5: heads for the place are mean-ablated, Waterbirds.
Command:   python -m analyses.cues [--world shapes | photos]
           python -m analyses.cues --world waterbirds --folder FOLDER [--model ViT-L-14 --pretrained openai]
           python -m analyses.cues --world celeba --folder FOLDER [--model ... --pretrained ...]
Run time:  45 s and 85 s of processor time, the fine-tuning included.
Expected:  theirs: worst-group accuracy of OpenCLIP's ViT-L-14 on Waterbirds from 48 to 73 %.
Writes:    analyses/results/cues/WORLD.json, WORLD.png

Heads are ranked by how much of the cue they encode (`heads_for`, by texts, which needs no labels of the cue; or by probes), and how
many of the first of them are mean-ablated, directly, is chosen by worst-group accuracy on validation images: none, if none helps.
Means are those of the validation images. Numbers are of test images; intervals are those of `group_accuracy`.
Beside it stand all draws of as many random heads of the same layers, and the model with the same heads baked out (`bake`: the causal edit).

shapes: circles and squares under noise, so that the background helps to tell the shape; a copy of the bundled model is
fine-tuned where circles have a white background and squares a black one in all but 5 % of the images.
photos: photographs with a warm or a cold cast, animals and all else; the bundled model has seen no cast, so there is no tie for it to have learned:
it shows whether heads for colour carry what a cast does, not whether a learned tie is undone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.study.command import add_option
from analyses.study.results import RESULTS
from decompclip.data.pairs import Pairs, SubsetPairs
from decompclip.data.shapes import PROPERTIES, ShapesPairs
from decompclip.data.tables import CuePairs
from decompclip.evaluation.metrics import GroupAccuracy, group_accuracy, predict
from decompclip.figures.theme import write_figure
from decompclip.files import write_json

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP


BATCH = 128

SHAPES, GROUNDS = ("circle", "square"), ("white", "black")
PLACES = ("bamboo forest", "broadleaf forest", "ocean", "natural lake")
"""What is behind Waterbirds, in words."""

CASTS = {"warm": (1.0, 0.75, 0.45), "cold": (0.45, 0.75, 1.0)}
"""Factors of red, green and blue."""

ANIMALS = ("amphibian", "bird", "cat", "dog", "fish", "insect", "invertebrate", "mammal", "reptile", "spider")
"""Kinds of photographs that make one of the two classes."""


@dataclass(frozen=True)
class Config:
    world: str = "shapes"
    """Of `WORLDS`, or of `TABLES`, from a folder."""
    model: str = ""
    pretrained: str = ""
    classes: tuple[str, ...] = ()
    """Of a folder, in the words of prompts; by default the usual ones."""
    words: tuple[str, ...] = ()
    """Of the cue, by which heads are found; by default the world's."""
    by: str = "texts"
    most: int = 12
    """Heads, at most so many."""
    control: int = 200
    """Draws of random heads."""
    noise: float = 0.4
    untied: float = 0.05
    epochs: int = 2
    lr: float = 3e-5
    images: int = 1_500
    """Photographs of each split."""
    seed: int = 1
    """0 served the choice of noise, rate and epochs, with which the model goes by shape and background both."""


@dataclass(frozen=True, eq=False)
class Part:
    """Images of one split.

    Attributes:
        pixels: batches of images in [0, 1], each with the places of its images.
        labels, cues: of all images, by place.
    """

    pixels: Callable[[], Iterator[tuple[Float[Tensor, "batch 3 h w"], Int[Tensor, " batch"]]]]
    labels: Int[Tensor, " image"]
    cues: Int[Tensor, " image"]


@dataclass(frozen=True, eq=False)
class World:
    """A model, and images of which class and cue are known.

    Attributes:
        prompts: of the classifier's classes.
        kind: of each of these, the place in `classes`.
        classes, cues: names of the groups.
        words: of the cue, by which heads are found.
    """

    title: str
    model: HookedCLIP
    prompts: tuple[str, ...]
    kind: Int[Tensor, " class"]
    classes: tuple[str, ...]
    cues: tuple[str, ...]
    words: tuple[str, ...]
    validation: Part
    test: Part

    @cached_property
    def classifier(self) -> Float[Tensor, "class d_embed"]:
        return self.model.zero_shot_classifier(self.prompts)


class NoisyShapes(ShapesPairs):
    """Drawings under noise, with captions that name the shape alone."""

    def __init__(self, length: int, *, seed: int, noise: float) -> None:
        super().__init__(length, seed=seed)
        self.noise = noise

    def _images(self, indices: Sequence[int]) -> list[Tensor | str]:
        images = self.world.draw(indices).images
        noise = torch.empty_like(images)
        for row, index in enumerate(indices):
            draws = np.random.Generator(np.random.Philox(key=[self.world.seed + 1_000_000, index]))
            draws.standard_normal(dtype=np.float32, out=noise[row].numpy())
        return list((images + self.noise * noise).clamp(0, 1))

    @cached_property
    def captions(self) -> Sequence[str]:
        return [f"a photo of a {PROPERTIES['shape'][shape]}" for shape in self._attributes.shape.tolist()]


def drawn(length: int, *, seed: int, noise: float, untied: float) -> tuple[SubsetPairs, Part]:
    """Of so many drawings those of the two shapes on the two grounds; of those whose ground is the other shape's, a share."""
    base = NoisyShapes(length, seed=seed, noise=noise)
    attributes = base.world.attributes()
    first, second = (attributes.shape == PROPERTIES["shape"].index(name) for name in SHAPES)
    white, black = (attributes.background == PROPERTIES["background"].index(name) for name in GROUNDS)
    lot = torch.rand(length, generator=torch.Generator().manual_seed(seed))
    used = (first | second) & (white | black) & ((first == white) | (lot < untied))
    places = used.nonzero()[:, 0]
    pairs = SubsetPairs(base, places.tolist())
    return pairs, part_of(pairs, second[places].long(), black[places].long())


def part_of(pairs: Pairs, labels: Tensor, cues: Tensor) -> Part:
    def pixels() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in pairs.batches(BATCH):
            assert batch.indices is not None
            yield batch.images, batch.indices

    return Part(pixels, labels, cues)


def shapes_world(config: Config) -> World:
    """The bundled model, fine-tuned where the background goes with the shape."""
    import decompclip
    from decompclip.training.recipes import FineTuning

    options: dict[str, Any] = {"noise": config.noise}
    pairs, _ = drawn(40_000, seed=7_100 + config.seed, untied=config.untied, **options)
    recipe = FineTuning(epochs=config.epochs, batch_size=64, lr=config.lr, loss="grouped")
    model = decompclip.finetune(decompclip.load(config.model or "shapes"), pairs, recipe, seed=config.seed)
    validation, test = (
        drawn(24_000, seed=seed + config.seed, untied=1, **options)[1] for seed in (7_200, 7_300)
    )
    words = config.words or PROPERTIES["background"]
    title = "circles and squares under noise, the background tied to the shape in training"
    return World(title, model.model, SHAPES, torch.arange(2), SHAPES, GROUNDS, words, validation, test)


def photos_world(config: Config) -> World:
    """The bundled model of photographs, each with one of two casts."""
    import decompclip
    from decompclip.data.photos import PROMPTS, PhotoPairs

    model = decompclip.load(config.model or "photos")
    gains = torch.tensor(list(CASTS.values()))[:, :, None, None]

    def cast(split: Literal["validation", "test"], seed: int) -> tuple[PhotoPairs, Part]:
        whole, generator = PhotoPairs(split), torch.Generator().manual_seed(seed)
        places = torch.randperm(len(whole), generator=generator)[: config.images].tolist()
        cues = torch.randint(2, (len(places),), generator=generator)
        kinds = [whole.properties["kind"][place] for place in places]
        other = torch.tensor([int(kind not in ANIMALS) for kind in kinds])
        plain = part_of(SubsetPairs(whole, places), other, cues)

        def pixels() -> Iterator[tuple[Tensor, Tensor]]:
            for images, at in plain.pixels():
                yield images * gains[cues[at]], at

        return whole, replace(plain, pixels=pixels)

    (whole, test), (_, validation) = cast("test", config.seed + 1), cast("validation", config.seed)
    kind = torch.ones(len(whole.class_names), dtype=torch.long)
    for label, name in zip(whole.known_labels, whole.properties["kind"], strict=True):
        if label is not None:
            kind[label] = int(name not in ANIMALS)
    words = config.words or PROMPTS["colour"][0]
    title = "photographs with a warm or a cold cast, which the model has not been trained on"
    classes, cues = ("animal", "anything else"), tuple(CASTS)
    return World(title, model, whole.class_names, kind, classes, cues, words, validation, test)


def table_world(config: Config, folder: Path) -> World:
    """Waterbirds, or CelebA, from its folder."""
    import decompclip

    model = decompclip.load(config.model or "photos", pretrained=config.pretrained or None)
    parts = []
    for split in ("validation", "test"):
        pairs = TABLES[config.world](folder, split, model.preprocess)
        parts.append((pairs, part_of(pairs, pairs.labels, pairs.cues)))
    pairs = parts[0][0]
    names = config.classes or pairs.class_names
    words = config.words or (PLACES if config.world == "waterbirds" else pairs.cue_names)
    title = f"{config.world}, {model.name}"
    of_both: Any = (parts[0][1], parts[1][1])
    return World(title, model, names, torch.arange(2), names, pairs.cue_names, words, *of_both)


WORLDS = {"shapes": shapes_world, "photos": photos_world}
TABLES = {"waterbirds": CuePairs.waterbirds, "celeba": CuePairs.celeba}


# --- what heads add to each class


@dataclass(frozen=True, eq=False)
class Scores:
    """Of the images that could be read: scores of the classes, and what each head adds to them.

    Attributes:
        kind: of the classifier's classes.
    """

    whole: Float[Tensor, "image class"]
    heads: Float[Tensor, "image head class"]
    labels: Int[Tensor, " image"]
    cues: Int[Tensor, " image"]
    world: World

    def groups(self, predictions: Int[Tensor, " image"]) -> GroupAccuracy:
        names: Any = {"class_names": self.world.classes, "cue_names": self.world.cues}
        return group_accuracy(self.world.kind[predictions], self.labels, self.cues, **names)

    def without(self, chosen: Sequence[int], mean: Float[Tensor, "head class"]) -> GroupAccuracy:
        """With some heads at their means: direct mean-ablation, of scores in place of terms."""
        own = list(chosen)
        return self.groups((self.whole - (self.heads[:, own] - mean[own]).sum(1)).argmax(1))


@torch.no_grad()
def scores(world: World, part: Part, *, terms: bool = False) -> tuple[Scores, Any]:
    """Scores, and with `terms` the decomposition of all images beside."""
    from decompclip.decomposition.decomposition import Decomposition

    model, classifier = world.model, world.classifier
    whole, heads, kept, places = [], [], [], []
    for pixels, at in part.pixels():
        d = model.decompose(model.normalize(pixels), normalize=True)
        whole.append((d.features @ classifier.T).cpu())
        heads.append((d.heads.flatten(1, 2) @ classifier.T).cpu())
        places.append(at)
        if terms:
            kept.append(d)
    if not places:
        raise ValueError("expected photographs that can be read; received none; check the folder's pictures")
    at = torch.cat(places)
    found = Scores(torch.cat(whole), torch.cat(heads), part.labels[at], part.cues[at], world)
    return found, Decomposition.cat(kept) if terms else None


def baked(world: World, chosen: Sequence[int]) -> GroupAccuracy:
    """Test images by a model of which these heads are baked out."""
    import decompclip
    from decompclip.decomposition.components import heads

    model, n = world.model, world.model.cfg.n_heads
    components = heads[chosen[0] // n, chosen[0] % n]
    for head in chosen[1:]:
        components = components | heads[head // n, head % n]
    batches = (model.normalize(pixels) for pixels, _ in world.validation.pixels())
    moments = decompclip.Moments.fit(model, batches, second=False)
    edit = decompclip.average_over_tokens(decompclip.MeanAblate(components, moments), model)
    fixed, answers, places = decompclip.bake(model, edit), [], []
    with torch.no_grad():
        for pixels, at in world.test.pixels():
            answers.append(predict(fixed.encode_image(fixed.normalize(pixels)), world.classifier).cpu())
            places.append(at)
    at = torch.cat(places)
    names: Any = {"class_names": world.classes, "cue_names": world.cues}
    return group_accuracy(world.kind[torch.cat(answers)], world.test.labels[at], world.test.cues[at], **names)


# --- the protocol


def run(config: Config, world: World) -> dict[str, Any]:
    """Heads found and chosen on validation images, numbers of test images."""
    from decompclip.operators.retrieval import heads_for

    own, d = scores(world, world.validation, terms=True)
    if config.by == "texts":
        ranked = heads_for(d, "cue", world.words, model=world.model)
    else:
        ranked = heads_for(d, "cue", labels=own.cues, seed=config.seed)
    n = world.model.cfg.n_heads
    order = [int(part.layer or 0) * n + int(part.head or 0) for part in ranked.parts]
    mean = own.heads.mean(0)
    curve = [own.without(order[:k], mean).worst for k in range(min(config.most, len(order)) + 1)]
    k = int(np.argmax(curve))
    chosen, test = order[:k], scores(world, world.test)[0]
    before, after = test.without([], mean), test.without(chosen, mean)
    layers = sorted({head // n for head in chosen})
    near = [layer * n + head for layer in layers for head in range(n)]
    draws, control = np.random.default_rng(config.seed), []
    for _ in range(config.control if k else 0):
        random = test.without(draws.choice(near, k, replace=False).tolist(), mean)
        control.append({"worst": random.worst, "accuracy": random.accuracy.value})
    value, low, high = after.gain(before, seed=config.seed)
    return {
        "config": asdict(config),
        "title": world.title,
        "images": {"validation": len(own.labels), "test": len(test.labels)},
        "heads": [str(part) for part in ranked.parts[: config.most]],
        "score": ranked.score[: config.most].tolist(),
        "curve": curve,
        "chosen": [str(part) for part in ranked.parts[:k]],
        "before": before.to_dict(),
        "after": after.to_dict(),
        "gain": {"value": value, "low": low, "high": high},
        "baked": baked(world, chosen).to_dict() if k else None,
        "control": control,
    }


def finding(said: dict[str, Any]) -> str:
    """In points, with 95 % intervals."""
    worst = [
        "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * said[way]["worst"][x] for x in ("value", "low", "high")))
        for way in ("before", "after")
    ]
    everything = [100 * said[way]["accuracy"]["value"] for way in ("before", "after")]
    where = f"{said['title']}: of {said['images']['test']} test images the worst group ({', '.join(said['before']['worst']['group'])}) has {worst[0]}"
    if not said["chosen"]:
        return f"{where}; no number of heads up to {said['config']['most']} helps on validation images, so none is ablated."
    gain = said["gain"]
    others = np.array([draw["worst"] for draw in said["control"]])
    beyond = (others >= said["after"]["worst"]["value"]).mean()
    return (
        f"{where}, without {', '.join(said['chosen'])} {worst[1]} ({', '.join(said['after']['worst']['group'])}): "
        f"{100 * gain['value']:+.1f} points [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]; all images {everything[0]:.1f} % and {everything[1]:.1f} %; "
        f"with the heads baked out the worst group has {100 * said['baked']['worst']['value']:.1f} %. Of {len(others)} draws of as many random heads of the same layers "
        f"the worst group has {100 * others.mean():.1f} % in the mean ({100 * others.min():.1f} to {100 * others.max():.1f}); {100 * beyond:.0f} % of the draws do as well."
    )


def plot(said: dict[str, Any]) -> go.Figure:
    """The worst group and all images, as they are, without the heads, and without random ones."""
    from decompclip.figures.scatter import PERCENT, Panel, Point, point_panels

    ways = {"before": "as it is", "after": "heads ablated", "baked": "heads baked out"}
    rows = [(name, said[way]) for way, name in ways.items() if said[way]]
    worst: list[Point | None] = [Point.of(found["worst"]) for _, found in rows]
    whole: list[Point | None] = [Point.of(found["accuracy"]) for _, found in rows]
    names = [name for name, _ in rows]
    if said["control"]:
        names.append("random heads, 95 % of the draws")
        for key, points in (("worst", worst), ("accuracy", whole)):
            draws = 100 * np.array([draw[key] for draw in said["control"]])
            points.append(Point(float(draws.mean()), *np.quantile(draws, (0.025, 0.975)).tolist()))
    panels = [
        Panel(title, "images, %", {"accuracy": points}, ends=PERCENT)
        for title, points in (("worst group", worst), ("all images", whole))
    ]
    return point_panels(names, panels, bars="95 % intervals")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Config):
        add_option(parser, field.name, field.default)
    parser.add_argument("--folder", type=Path, help="of Waterbirds or CelebA")
    parser.add_argument("--out", type=Path, default=RESULTS / "cues", help="folder of JSON and figure")
    given = vars(parser.parse_args())
    folder, out = given.pop("folder"), given.pop("out")
    config = Config(**given)
    known = WORLDS if folder is None else TABLES
    if config.world not in known or config.by not in ("texts", "probe"):
        parser.error(
            f"expected --world of {', '.join(WORLDS)}, or of {', '.join(TABLES)} with its --folder, and --by texts or probe; received "
            f"{config.world}{'' if folder is None else ' with a folder'}, {config.by}"
        )
    world = WORLDS[config.world](config) if folder is None else table_world(config, folder)
    said = run(config, world)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{config.world}.json", said)
    write_figure(plot(said), out / f"{config.world}.png")
    print(finding(said))


if __name__ == "__main__":
    main()
