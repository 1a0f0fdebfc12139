"""Logit lens: what the tower would answer if it ended earlier, layer by layer and patch by patch (docs/method.md, section 4).

    logit_lens(model, images, ["a star", "a ring"])

nostalgebraist (2020) reads a language model's stream by its unembedding; here it is the last LayerNorm, the pooling and the
projection, as the tower has them. Nothing is fitted, so early layers may speak in directions that these do not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from decompclip.decomposition.maps import term_maps
from decompclip.display import Result
from decompclip.intervals import half_width
from decompclip.operators.attention import BATCH, pictures_of
from decompclip.operators.inputs import Images, TextFeatures, encode_texts, image_batches
from decompclip.operators.parts import image_names, place_of
from decompclip.operators.scores import features_of
from decompclip.tower.vit import Hook, HookedViT, tower

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP


LINES = 6
"""Texts up to which each is a line."""


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Result):
    """Scores of texts, read off the stream at every depth.

    Attributes:
        scores: of the pooled rows; the last depth is the model's own answer.
        patches: of each patch's row, read as if it alone were pooled; None where they were not asked for.
        depths: "input" (of block 0), then the blocks by number.
        texts: names of the directions.
        names: of the images.
        normalized: whether readings are of length one: with texts of length one, scores are cosines.
        image_size, patch_size: height and width, pixels.
        pictures: the images themselves, where they are known.
    """

    scores: Float[Tensor, "image depth text"]
    patches: Float[Tensor, "image depth text rows columns"] | None
    depths: tuple[str, ...]
    texts: tuple[str, ...]
    names: tuple[str, ...]
    normalized: bool
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    pictures: UInt8[Tensor, "batch h w 3"] | None = None

    def to_frame(self) -> pd.DataFrame:
        """One row a depth and text: the mean over images with its 95 % interval, and how often the text is the first."""
        import pandas as pd

        mean, error = self.scores.mean(0).double(), half_width(self.scores.double())
        first = F.one_hot(self.scores.argmax(2), len(self.texts)).double().mean(0)
        columns = {"mean": mean, "low": mean - error, "high": mean + error, "first": first}
        return pd.DataFrame(
            {
                "depth": [depth for depth in self.depths for _ in self.texts],
                "text": list(self.texts) * len(self.depths),
            }
            | {name: values.flatten().numpy() for name, values in columns.items()}
        )

    def figure(self) -> go.Figure:
        """The mean scores, depth by depth: lines with their intervals, or cells where the texts are many."""
        y, mean, error = self._unit, self.scores.mean(0), half_width(self.scores)
        if len(self.texts) > LINES:
            from decompclip.figures.heatmaps import matrix

            return matrix(
                mean.numpy(),
                rows=self.depths,
                columns=self.texts,
                unit=y,
                hover="after %{y}, %{x}: %{z:.4f}",
                scale="diverging",
                row_height=26,
                y="after block",
                upward=True,
            )
        from decompclip.figures.curves import Curve, LinePanel, line_panels

        curves, several = {}, len(self.names) > 1
        for place, text in enumerate(self.texts):
            values, half = mean[:, place], error[:, place]
            low, high = ((values - half).tolist(), (values + half).tolist()) if several else (None, None)
            curves[text] = Curve(list(range(len(values))), values.tolist(), low, high)
        of = f"{len(self.names)} images, mean and 95 % interval" if several else "".join(self.names)
        panel = LinePanel("", f"after block ({of})", y, curves, ticks=self.depths)
        return line_panels([panel], columns=1, row_height=300)

    def maps(self, text: int | str = 0, images: Sequence[int] | None = None) -> go.Figure:
        """The patches' scores of one text over the images, a row a depth, the last one first; of many, some evenly chosen.

        Args:
            text: by name or place.
            images: by place; by default the first.

        Raises:
            LookupError: there is no such text or image.
            ValueError: patches were not asked for.
        """
        if self.patches is None:
            raise ValueError(
                "expected a lens of patches; received one without; ask for them: logit_lens(..., patches=True)"
            )
        from decompclip.figures.gallery import MAX_ROWS, Overlay, gallery

        at = place_of(text, self.texts, "text")
        given = range(len(self.names)) if images is None else images
        rows = [place_of(i, self.names, "image") for i in given]
        steps = min(MAX_ROWS, len(self.depths))
        depths = torch.linspace(len(self.depths) - 1, 0, steps).round().int().tolist()
        overlay = Overlay(
            rearrange(self.patches[rows][:, depths, at], "b depth r c -> depth b r c"),
            [f"after block {self.depths[i]}" if i else self.depths[0] for i in depths],
            [self.names[row] for row in rows],
            self.image_size,
            self.patch_size,
            True,
            self.texts[at],
            None if self.pictures is None else self.pictures[rows],
        )
        return gallery(overlay, what=self._unit)

    @property
    def _unit(self) -> str:
        return "cosine" if self.normalized else "product of reading and text"

    def __repr__(self) -> str:
        return (
            f"LogitLens({len(self.depths)} depths, {len(self.texts)} text{'s' * (len(self.texts) > 1)}, {len(self.names)} "
            f"image{'s' * (len(self.names) > 1)}{'' if self.patches is None else ', patch by patch'})"
        )


@torch.no_grad()
def logit_lens(
    model: HookedViT | HookedCLIP,
    images: Images,
    texts: str | Sequence[str] | TextFeatures | Float[Tensor, "text d_embed"],
    *,
    patches: bool = True,
    normalize: bool = True,
    names: Sequence[str] | None = None,
    batch_size: int = BATCH,
) -> LogitLens:
    """Read the stream at the input of block 0 and after every block as the tower reads its end, and score texts with it.

    A reading is what the model would answer if the blocks that follow were taken out. A patch's reading is the answer if the
    tower pooled that patch's row alone: in place of the class token, of the mean, or as all that a pooling query sees.

    Args:
        model: a model, or its image tower (with text features).
        images: as the tower takes them: a tensor, batches, or a source such as `FolderSource`.
        texts: each scored by itself, in words or as features (`attribute` and `nearest` average a list of strings, and score
            those of `encode_texts` by themselves).
        patches: whether patches are read too.
        normalize: readings to length one.
        names: of the images; by default their numbers.
        batch_size: of the forward passes.

    Returns:
        Scores, image by image.

    Raises:
        ValueError: no images or texts, features of another width or model, texts for a bare tower, or names of another
            number.
    """
    visual = tower(model)
    along, labels = _texts(model, texts)
    streams: dict[int, Tensor] = {}

    def keep(x: Tensor, hook: Any, depth: int) -> None:
        streams[depth] = x

    n_layers, (rows, columns) = visual.cfg.n_layers, visual.cfg.grid
    hooks: list[Hook] = [("blocks.0.hook_resid_pre", partial(keep, depth=0))]
    hooks += [(f"blocks.{i}.hook_resid_post", partial(keep, depth=i + 1)) for i in range(n_layers)]
    scores, of_patches, pictures = [], [], []

    def score(reading: Float[Tensor, "*batch d_embed"]) -> Float[Tensor, "*batch text"]:
        reading = reading.float()
        reading = F.normalize(reading, dim=-1) if normalize else reading
        return (reading @ along.to(reading).T).cpu()

    for batch in image_batches(images, batch_size=batch_size, device=model.device):
        with visual.hooks(fwd_hooks=hooks):
            visual(batch) if isinstance(model, HookedViT) else model.encode_image(batch)
        found = [streams.pop(depth) for depth in range(n_layers + 1)]
        scores.append(torch.stack([score(visual.read(stream)) for stream in found], dim=1))
        if patches:
            alone = (stream[:, visual.cfg.n_prefix :].flatten(0, 1)[:, None] for stream in found)
            readings = (score(visual.read_rows(row)) for row in alone)
            laid = [rearrange(x, "(b r c) t -> b t r c", r=rows, c=columns) for x in readings]
            of_patches.append(torch.stack(laid, dim=1))
        pictures.append(pictures_of(model, batch))
    if not scores:
        raise ValueError("expected at least one image; received none; check the image source")
    count = sum(map(len, scores))
    return LogitLens(
        scores=torch.cat(scores),
        patches=torch.cat(of_patches) if patches else None,
        depths=("input", *map(str, range(n_layers))),
        texts=labels,
        names=image_names(names, count),
        normalized=normalize,
        image_size=visual.cfg.image_size,
        patch_size=visual.cfg.patch_size,
        pictures=None
        if any(x is None for x in pictures)
        else torch.cat([x for x in pictures if x is not None]),
    )


def _texts(
    model: HookedViT | HookedCLIP, texts: Any
) -> tuple[Float[Tensor, "text d_embed"], tuple[str, ...]]:
    """Features and names of texts, each by itself."""
    width = tower(model).cfg.d_embed
    if isinstance(texts, Tensor | TextFeatures):
        return features_of(texts, width, term_maps(tower(model), "centred").fingerprint)
    if isinstance(model, HookedViT):
        raise ValueError(
            f"expected text features [text, {width}] for an image tower, which reads no text; received {texts!r}; pass the "
            "whole model"
        )
    if not isinstance(texts, Iterable):
        raise ValueError(f"expected texts, or features [text, {width}]; received {texts!r}")
    named: list[str] = [texts] if isinstance(texts, str) else list(texts)
    if not named:
        raise ValueError("expected at least one text; received none; name what to score images by")
    found = encode_texts(model, named)
    return found.features, found.texts
