"""Path patching: what one head tells one later component, all other ways held fixed.

Source: Goldowsky-Dill et al. (2023), and Wang et al. (2023). The sender's write in the source run takes the place of
its write in the base run, in the receiver's input alone. What the receiver then puts out is written into the base run,
and later layers see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.decomposition.components import Components, Part, everything, resolve
from decompclip.operators.patching import ImageBatches, Score, check_request, over_batches, record, scorer
from decompclip.tower.config import ViTConfig
from decompclip.tower.vit import HookedViT

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP


@dataclass(frozen=True, eq=False, repr=False)
class PathPatching:
    """Effects of a head through each later component.

    Attributes:
        sender: the head, as an expression.
        heads, mlps: the mean change of the score by receiver; nan for those that are not later, or not asked for.
        base, source: the scores of the two runs as they are.
    """

    sender: Components
    heads: Float[Tensor, "layer head"]
    mlps: Float[Tensor, " layer"]
    base: Float[Tensor, " batch"]
    source: Float[Tensor, " batch"]

    def merge(self, other: PathPatching) -> PathPatching:
        """The effects over the images of both.

        Raises:
            ValueError: the two are of different senders.
        """
        if self.sender != other.sender:
            raise ValueError(f"expected paths of one sender; received {self.sender!r} and {other.sender!r}")
        weight = len(other.base) / (len(self.base) + len(other.base))
        before, after = torch.cat([self.base, other.base]), torch.cat([self.source, other.source])
        of_heads, of_mlps = self.heads.lerp(other.heads, weight), self.mlps.lerp(other.mlps, weight)
        return PathPatching(self.sender, of_heads, of_mlps, before, after)

    @property
    def gap(self) -> float:
        """By how much the source's mean score exceeds the base's."""
        return float((self.source - self.base).mean())

    def to_frame(self) -> pd.DataFrame:
        """One row a receiver: layer, head (none for an MLP), effect, share of the gap."""
        import pandas as pd

        rows: list[tuple[int, int | None, float]] = [
            (int(layer), int(head), float(self.heads[layer, head]))
            for layer, head in (~self.heads.isnan()).nonzero()
        ]
        rows += [(int(layer), None, float(self.mlps[layer])) for layer in (~self.mlps.isnan()).nonzero()]
        frame = pd.DataFrame(rows, columns=["layer", "head", "effect"]).astype({"head": "Int64"})
        return frame.assign(share=frame["effect"] / self.gap)

    def figure(self) -> go.Figure:
        """A map of the receivers."""
        from decompclip.figures.heatmaps import component_map

        title = f"message of {self.sender!r} to each of them"
        return component_map(
            self.heads, self.mlps, unit="change of the score", scale="diverging", title=title
        )

    def __repr__(self) -> str:
        receivers = int((~self.heads.isnan()).sum() + (~self.mlps.isnan()).sum())
        return f"PathPatching({self.sender!r} to {receivers} receivers, {len(self.base)} images)"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, float_format="{:.4f}".format, max_rows=60)


@torch.no_grad()
def path_patching(
    model: HookedViT | HookedCLIP,
    base: ImageBatches,
    source: ImageBatches,
    score: Float[Tensor, " d_embed"] | Score,
    sender: Part,
    *,
    receivers: Components = everything,
) -> PathPatching:
    """The effect of one head through each later head and MLP, its own layer's MLP among them.

    Args:
        base: images that run with the patch, image i with the sender of image i of the source.
        score: as `activation_patching` takes it.
        sender: one head, such as `heads[3, 1]`.
        receivers: of which those later than the sender are looked at.

    Raises:
        ValueError: the sender is not one head, or as `activation_patching`.
        IndexError: a layer or head that the tower does not have.
    """
    if not isinstance(base, Tensor):
        one = partial(path_patching, model, score=score, sender=sender, receivers=receivers)
        return over_batches(one, base, source)
    visual, source = check_request(model, base, source, ("z",))
    cfg, judge = visual.cfg, scorer(score, visual)
    layer, head = _one_head(sender, cfg)
    mask = resolve(receivers, cfg)
    z_name, out_name = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_attn_out"
    donor = record(visual, source, [z_name])[z_name]
    of_base = record(visual, base, [out_name])
    before, after = judge(visual(base)), judge(visual(source))

    def send(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, head] = donor[:, :, head]
        return z

    with visual.hooks(fwd_hooks=[(z_name, send)]):
        # What the head's write changes in the stream, past the output projection and any LayerScale.
        told = record(visual, base, [out_name])[out_name] - of_base[out_name]
    of_heads = torch.full((cfg.n_layers, cfg.n_heads), torch.nan)
    of_mlps = torch.full((cfg.n_layers,), torch.nan)

    def effect(name: str, answer: Tensor, place: Any) -> float:
        def write(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[place] = answer[place]
            return x

        with visual.hooks(fwd_hooks=[(name, write)]):
            return float((judge(visual(base, pooled_rows=False)) - before).mean())

    for later, is_mlp in _inputs(layer, cfg.n_layers):
        if is_mlp and mask.mlps[later]:
            name = f"blocks.{later}.hook_mlp_out"
            answer = _answer(visual, base, f"blocks.{later}.hook_resid_mid", name, told)
            of_mlps[later] = effect(name, answer, slice(None))
        elif not is_mlp and mask.heads[later].any():
            name = f"blocks.{later}.attn.hook_z"
            answer = _answer(visual, base, f"blocks.{later}.hook_resid_pre", name, told)
            for number in mask.heads[later].nonzero().flatten().tolist():
                place = (slice(None), slice(None), number)
                of_heads[later, number] = effect(name, answer, place)
    return PathPatching(sender, of_heads, of_mlps, before, after)


def _inputs(sender: int, n_layers: int) -> Iterator[tuple[int, bool]]:
    """The later components' layers, and whether they are MLPs."""
    yield sender, True
    for later in range(sender + 1, n_layers):
        yield from ((later, False), (later, True))


def _answer(visual: HookedViT, base: Tensor, entry: str, name: str, told: Tensor) -> Tensor:
    """What a block puts out at `name` when its stream at `entry` is told something more; the rest is thrown away."""
    with visual.hooks(fwd_hooks=[(entry, lambda x, hook: x + told)]):
        return record(visual, base, [name])[name]


def _one_head(sender: Components, cfg: ViTConfig) -> tuple[int, int]:
    places = resolve(sender, cfg).heads.nonzero().tolist()
    if len(places) != 1 or not isinstance(sender, Part) or sender.kind != "heads":
        raise ValueError(
            f"expected one head as the sender, such as heads[3, 1]; received {sender!r}; patch several one by one"
        )
    return places[0][0], places[0][1]
