"""bake: a repair that is the same for every image, folded into weights and biases.

What can be folded exactly, and why:

* a head: without value weights its z is its value bias, whatever the attention, which sums to one. So the bias becomes
  what stands in for the head (`ZeroAblate` keeps the bias).
* an MLP: without output weights its output is its output bias. That becomes what stands in for the MLP; LayerScale, and a
  LayerNorm behind the MLP, are set not to change it.
* both are one vector for all tokens. The mean of `MeanAblate` differs from token to token. That does not matter in the
  last block of a tower with a class token, where one token is all that counts; for other layers
  `average_over_tokens(edit, model)` takes the mean over tokens too.

A direct edit cannot be folded: it keeps the scale that the last LayerNorm has without the edit, which no weight knows.
So the causal edit is baked. Edits that depend on the image are for `Guard`.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from decompclip.api import still_found
from decompclip.decomposition.components import ComponentMask, resolve
from decompclip.models.clip import HookedCLIP
from decompclip.operators.ablation import MeanAblate, ZeroAblate, fit_rows, token_mask
from decompclip.operators.intervention import Composition, Intervention, steps_of
from decompclip.tower.config import ViTConfig
from decompclip.tower.layers import Block, blocks
from decompclip.tower.vit import HookedViT, hooked

SAME = 1e-6
"""Largest difference between tokens of what stands in for a component, as a share of its largest entry."""


def average_over_tokens(edit: Intervention, model: HookedCLIP) -> Intervention:
    """The same edit with means over images and tokens, which `bake` can fold into any layer.

    The last block of a tower with a class token keeps its means: that token is all that counts there.

    Args:
        edit: as `bake` takes it.
        model: that it is for.

    Raises:
        ValueError: an edit that depends on the image, or moments without stream means.
    """
    return Composition(tuple(_averaged(step, model.cfg) for step in steps_of(edit)))


def _averaged(step: Intervention, cfg: ViTConfig) -> Intervention:
    if isinstance(step, ZeroAblate):
        return step
    if not isinstance(step, MeanAblate):
        raise _unbakable(step)
    moments = step.moments
    if moments.streams is None:
        raise ValueError(
            "expected moments with stream means; received moments of terms alone; fit them with "
            "Moments.fit(model, batches, stream=True)"
        )
    streams = moments.streams
    z = streams.z.mean(1, keepdim=True).expand_as(streams.z).clone()
    out = streams.mlp_out.mean(1, keepdim=True).expand_as(streams.mlp_out).clone()
    if _one_row(cfg):
        z[-1], out[-1] = streams.z[-1], streams.mlp_out[-1]
    return replace(step, moments=replace(moments, streams=replace(streams, z=z, mlp_out=out)))


@torch.no_grad()
def bake(model: HookedCLIP, edit: Intervention) -> HookedCLIP:
    """A copy of `model` whose plain outputs are those of `model` under the causal `edit`.

        repaired = bake(model, average_over_tokens(MeanAblate(mlps[-5:], moments), model))
        repaired.to_open_clip()   # an ordinary open_clip model; `save_model(repaired, folder)` writes it

    Args:
        model: left as it is.
        edit: `MeanAblate` and `ZeroAblate` of heads and MLPs, also composed with `|`.

    Raises:
        ValueError: an edit that depends on the image (use `Guard`), of other components, of a part of the tokens, or
            by means that differ from token to token where that counts (use `average_over_tokens`); moments of another
            model; a model under hooks.
        IndexError: the edit names a component that the tower does not have.
    """
    if any(hooked(module) for module in model.visual.modules()):
        raise ValueError(
            "expected a model without hooks; received one under some, which are no weights and would be lost; bake "
            "outside of model.hooks(...)"
        )
    baked = copy.deepcopy(model)
    for step in steps_of(edit):
        _fold(step, model.visual, baked.visual)
    own = ("sha256", "files", "files_not_read")
    baked.provenance = {
        **{key: value for key, value in model.provenance.items() if key not in own},
        "name": f"{model.name}, repaired",
        "baked": {"base": model.name, "edit": repr(edit)},
    }
    return baked


def _fold(step: Intervention, origin: HookedViT, visual: HookedViT) -> None:
    """Write one step into `visual`; what stands in is read from the tower as it was, as hooks do."""
    if not isinstance(step, MeanAblate | ZeroAblate):
        raise _unbakable(step)
    mask = resolve(step.components, origin)
    if mask.empty:
        return
    if mask.embed or mask.pool:
        raise ValueError(
            f"expected heads and MLPs; received {step!r}, which names the embedding or the pool's MLP; leave them out, "
            "or use Guard(model, edit)"
        )
    fill = step.stream_fill(origin, mask)
    for layer, block in enumerate(blocks(visual)):
        if not (mask.heads[layer].any() or mask.mlps[layer]):
            continue
        _check_rows(step, layer, origin.cfg)
        heads, out = fill.heads[layer], fill.mlps[layer]
        if mask.heads[layer].any():
            z = _one(heads[:, mask.heads[layer].to(heads.device)], layer, origin.cfg, step)
            _set_heads(block, mask, layer, z)
        if mask.mlps[layer]:
            _set_mlp(block, _one(out, layer, origin.cfg, step))


def _set_heads(block: Block, mask: ComponentMask, layer: int, z: Tensor) -> None:
    """Value weights zero, value biases `z` [head d_head] of the chosen heads."""
    attn = block.attn
    split = (3, attn.n_heads, attn.d_head)
    chosen = mask.heads[layer].to(attn.W_QKV.device)
    attn.W_QKV.view(*split, -1)[2, chosen] = 0
    attn.b_QKV.view(*split)[2, chosen] = z.to(attn.b_QKV)


def _set_mlp(block: Block, out: Tensor) -> None:
    """An MLP that writes `out` [d_model] for every token."""
    block.mlp.W_out.zero_()
    bias = block.ln2.b if block.post_norm else block.mlp.b_out
    if block.post_norm:
        block.mlp.b_out.zero_()
        block.ln2.w.zero_()
    if block.ls2 is not None:
        block.ls2.fill_(1)
    bias.copy_(out)


def _check_rows(step: MeanAblate | ZeroAblate, layer: int, cfg: ViTConfig) -> None:
    """Raises ValueError unless the edit reaches all tokens that count."""
    tokens = token_mask(step.rows, cfg.n_tokens, cfg)
    counted = tokens[..., cfg.pooled_rows] if _one_row(cfg) and layer == cfg.n_layers - 1 else tokens
    if not counted.all():
        raise ValueError(
            f"expected an edit of all tokens, for weights serve all of them; received {step!r}; leave rows out, or "
            "use model.hooks(edit)"
        )


def _one(x: Tensor, layer: int, cfg: ViTConfig, step: Intervention) -> Tensor:
    """What stands in for a component `[token ...]`, where it is one and the same for all tokens that count."""
    if _one_row(cfg) and layer == cfg.n_layers - 1:
        x = fit_rows(x, 1, cfg.pooled_rows, axis=0)
    if (x - x[:1]).abs().max() > SAME * x.abs().max():
        raise ValueError(
            f"expected one mean for all tokens, for a bias serves all of them; received {step!r}, whose means differ "
            f"from token to token in layer {layer}; bake average_over_tokens(edit, model)"
        )
    return x[0]


def _one_row(cfg: ViTConfig) -> bool:
    """Whether the last block's other rows than the class token's reach no feature."""
    return cfg.pool == "cls"


def _unbakable(step: Intervention) -> ValueError:
    return ValueError(
        "expected a repair that is the same for every image, MeanAblate or ZeroAblate of heads and MLPs; received "
        f"{step!r}; use Guard(model, defense), which repairs image by image"
    )


__getattr__ = still_found(__name__, {__name__: "even=average_over_tokens"})
