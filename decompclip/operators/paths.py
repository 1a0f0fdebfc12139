"""Path patching: what one head sends to one later component, all other ways held fixed.

Source: Goldowsky-Dill et al. (2023), and Wang et al. (2023). The message is what the sender's contribution to the
stream changes by, from the base run to the source run. It is added to the receiver's input alone. The receiver's new
output is written into the base run, and later layers see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.decomposition.components import Components, Part, everything, resolve
from decompclip.moved import renamed
from decompclip.operators.patching import ImageBatches, TwoRuns, over_batches, record, writing
from decompclip.operators.scores import ImageScore, Text, Toward, score_toward
from decompclip.tower.config import ViTConfig
from decompclip.tower.vit import HookedViT, tower

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP


@dataclass(frozen=True, eq=False, repr=False)
class PathPatching(TwoRuns):
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

    largest = "effect"

    def merge(self, other: PathPatching) -> PathPatching:
        """The effects over the images of both.

        Raises:
            ValueError: the two are of different senders.
        """
        if self.sender != other.sender:
            raise ValueError(f"expected paths of one sender; received {self.sender!r} and {other.sender!r}")
        base, source, weight = self._with(other)
        of_heads, of_mlps = self.heads.lerp(other.heads, weight), self.mlps.lerp(other.mlps, weight)
        return PathPatching(self.sender, of_heads, of_mlps, base, source)

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


@renamed(score="toward")
def path_patching(
    model: HookedViT | HookedCLIP,
    base: ImageBatches,
    source: ImageBatches,
    toward: Toward,
    sender: Part,
    *,
    against: Text | None = None,
    receivers: Components = everything,
) -> PathPatching:
    """The effect of one head through each later head and MLP, its own layer's MLP among them.

    Args:
        model: a model, or its image tower.
        base: images that run with the patch; one batch, or batches one after the other.
        source: images whose activations are written in, image by image.
        toward: what images are scored by, as in `activation_patching`.
        sender: one head, such as `heads[3, 1]`.
        against: a text or direction whose score is subtracted.
        receivers: of which those later than the sender are looked at.

    Returns:
        The mean change of the score by receiver.

    Raises:
        ValueError: the sender is not one head, or as `activation_patching`.
        IndexError: a layer or head that the tower does not have.
    """
    visual, score = tower(model), score_toward(model, toward, against)
    return over_batches(partial(_patch_paths, visual, score, sender, receivers), base, source)


@torch.no_grad()
def _patch_paths(
    visual: HookedViT, judge: ImageScore, sender: Part, receivers: Components, base: Tensor, source: Tensor
) -> PathPatching:
    cfg = visual.cfg
    layer, head = _one_head(sender, cfg)
    mask = resolve(receivers, cfg)
    z_name, out_name = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_attn_out"
    donor = record(visual, source, [z_name])[z_name]
    of_base = record(visual, base, [out_name])[out_name]
    before, after = judge(visual(base)), judge(visual(source))
    with visual.hooks(fwd_hooks=[(z_name, writing(donor, (slice(None), slice(None), head)))]):
        # What the sender changes in the stream, past the output projection and any LayerScale.
        message = record(visual, base, [out_name])[out_name] - of_base

    def answer(entry: str, name: str) -> Tensor:
        """What a block puts out at `name` when the message is added at `entry`; the rest is thrown away."""
        with visual.hooks(fwd_hooks=[(entry, lambda x, hook: x + message)]):
            return record(visual, base, [name])[name]

    def effect(name: str, given: Tensor, *place: Any) -> float:
        with visual.hooks(fwd_hooks=[(name, writing(given, place))]):
            return float((judge(visual(base)) - before).mean())

    of_heads = torch.full((cfg.n_layers, cfg.n_heads), torch.nan)
    of_mlps = torch.full((cfg.n_layers,), torch.nan)
    for later in range(layer, cfg.n_layers):
        if later > layer and mask.heads[later].any():
            name = f"blocks.{later}.attn.hook_z"
            given = answer(f"blocks.{later}.hook_resid_pre", name)
            for number in mask.heads[later].nonzero().flatten().tolist():
                of_heads[later, number] = effect(name, given, slice(None), slice(None), number)
        if mask.mlps[later]:
            name = f"blocks.{later}.hook_mlp_out"
            of_mlps[later] = effect(name, answer(f"blocks.{later}.hook_resid_mid", name), slice(None))
    return PathPatching(sender, of_heads, of_mlps, before, after)


def _one_head(sender: Components, cfg: ViTConfig) -> tuple[int, int]:
    places = resolve(sender, cfg).heads.nonzero().tolist()
    if len(places) != 1 or not isinstance(sender, Part) or sender.kind != "heads":
        raise ValueError(
            f"expected one head as the sender, such as heads[3, 1]; received {sender!r}; patch several one by one"
        )
    return places[0][0], places[0][1]
