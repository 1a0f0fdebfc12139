"""ViTCache: TransformerLens' ActivationCache, right for an image tower.

Its helpers were written for language models. Here each either tells the truth about a ViT or raises:

* behind `ln_pre` the stream starts at block 0's input ("ln_pre"), not at embedding plus positions;
* LayerScale is part of what a head writes;
* heads write through a LayerNorm across them, or behind attention, where the tower has one;
* this tower's LayerNorms keep their gains, so that applying one to a stack multiplies by its gain; the
  bias is a constant of no component: `(stack.sum(0) + ln.b) @ proj` is the image feature of a class token;
* with class-token pooling only the class token passes the last LayerNorm: ask for it with `pos_slice=0`;
  other towers pool several rows: `decompose` is what sums to their features.
"""

from __future__ import annotations

from typing import Any, Literal, NoReturn, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.utilities.components_utils import get_act_name
from transformer_lens.utilities.slice import Slice

from decompclip.tower.layers import LayerNorm, blocks

Position = Slice | int | tuple[int, ...] | list[int] | Tensor | None  # as TransformerLens' SliceInput
Stack = Float[Tensor, "component *batch_and_token d_model"]


class ViTCache(ActivationCache):
    """Activations of one forward pass, by hook name or by TransformerLens' short name and layer.

    `cache["resid_post", 3]`, `cache["z", -1]`, `cache["hook_ln_pre"]`, `cache["scale"]`:

        embed, pos_embed, hook_ln_pre, resid_pre/mid/post, attn_out, mlp_out   [batch token d_model]
        q, k, v, z            [batch token head d_head]      attn_scores, pattern   [batch head token token]
        result                [batch token head d_model]     pre, post              [batch token d_mlp]
        normalized (ln1, ln2) [batch token d_model]          scale (ln1, ln2)       [batch token 1]
        ln_final.hook_normalized [batch 1 d_model]           ln_final.hook_scale    [batch 1 1]

    Rows of the last block: all tokens, or token 0 alone after `run_with_cache(images, pooled_rows=True)`. `batch` is
    missing after `remove_batch_dim`.
    """

    model: Any  # a HookedViT

    def __init__(self, cache: dict[str, Tensor], visual: nn.Module, *, has_batch_dim: bool = True) -> None:
        super().__init__(cache, visual, has_batch_dim)

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        """The activation of a full hook name, a short name, or `(name, layer)`, `(name, layer, "ln1")`.

        Raises:
            IndexError: the tower has no such layer.
            KeyError: no activation of this name was cached.
        """
        name, *rest = (key,) if isinstance(key, str) else key
        if rest and isinstance(rest[0], int):
            n = self.model.cfg.n_layers
            if not -n <= rest[0] < n:
                raise IndexError(
                    f"expected a layer in 0..{n - 1} (or -{n}..-1 from the end); received {rest[0]} in {key!r}"
                )
            rest[0] %= n
        full = name if name in self.cache_dict and not rest else get_act_name(name, *rest)
        if full not in self.cache_dict:
            raise KeyError(
                f"expected the name of a cached activation; received {key!r} ({full}); cached are "
                f"{len(self)} activations (list them with cache.keys()): see run_with_cache's names_filter"
            )
        return self.cache_dict[full]

    def __repr__(self) -> str:
        return f"ViTCache({len(self)} activations, batch axis: {'yes' if self.has_batch_dim else 'no'})"

    def apply_slice_to_batch_dim(self, batch_slice: Position) -> ViTCache:
        """The cache of some images; a number takes the batch axis away."""
        cut = super().apply_slice_to_batch_dim(_cut(batch_slice))
        return ViTCache(cut.cache_dict, self.model, has_batch_dim=cut.has_batch_dim)

    # The stream, taken apart

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Position = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The stream at the input of each block up to `layer`, and for the last also at the tower's end.

        Args:
            apply_ln: the last LayerNorm, with bias, taken anew on each stream (`@ visual.proj` gives what
                the tower would answer if it ended there); only for the whole tower.

        Raises:
            NotImplementedError: `apply_ln` for less than the whole tower.
            IndexError: the tower has no such layer.
        """
        layer = self._layer(layer, mlp_input)
        n_layers = self.model.cfg.n_layers
        if apply_ln and layer < n_layers:
            raise NotImplementedError(
                f"expected layer=None with apply_ln: the stream's reading by the last LayerNorm; received layer="
                f"{layer}, whose LayerNorm's cached scale fits its own input alone; apply visual.blocks[{layer}].ln1 "
                "yourself"
            )
        names = []
        for number in range(min(layer + 1, n_layers)):
            names.append((f"{number}_pre", ("resid_pre", number)))
            if (incl_mid and number < layer) or (mlp_input and number == layer):
                names.append((f"{number}_mid", ("resid_mid", number)))
        if layer == n_layers:
            names.append(("final_post", ("resid_post", n_layers - 1)))
        labels = [label for label, _ in names]
        stack = self._stack([self[key] for _, key in names], pos_slice)
        stack = self.model.ln_final(stack) if apply_ln else stack
        return (stack, labels) if return_labels else stack

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Position = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """What was written to the stream before `layer` (None: before the tower's end); it sums to the stream.

        Labels: "ln_pre" (or "embed", "pos_embed" in a tower without), "0_attn_out", "0_mlp_out", ...; an
        attention's output includes its biases.

        Raises:
            ValueError: an unknown mode.
            IndexError: the tower has no such layer.
        """
        layer = self._layer(layer, mlp_input)
        if mode not in ("all", "mlp", "attn"):
            raise ValueError(f"expected mode 'all', 'mlp' or 'attn'; received {mode!r}")
        names: list[tuple[str, Any]] = list(self._embeds()) if incl_embeds else []
        kinds = [kind for kind, other in (("attn_out", "mlp"), ("mlp_out", "attn")) if mode != other]
        names += [(f"{number}_{kind}", (kind, number)) for number in range(layer) for kind in kinds]
        if mlp_input and mode != "mlp":
            names.append((f"{layer}_attn_out", ("attn_out", layer)))
        labels = [label for label, _ in names]
        stack = self._stack([self[key] for _, key in names], pos_slice)
        stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice) if apply_ln else stack
        return (stack, labels) if return_labels else stack

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Position = None,
        apply_ln: bool = False,
    ) -> Any:
        """What each head before `layer` wrote to the stream, without the layers' output biases.

        Labels: "L0H0", ...; "remainder" (asked for by `incl_remainder`) is the rest of the stream.

        Raises:
            IndexError: the tower has no such layer.
        """
        layer = self._layer(layer, False)
        parts = [part for number in range(layer) for part in self._results(number)]
        labels = [f"L{number}H{head}" for number in range(layer) for head in range(self.model.cfg.n_heads)]
        if incl_remainder:
            stream = self["resid_post", layer - 1] if layer else self["resid_pre", 0]
            parts.append(stream - sum(parts))
            labels.append("remainder")
        stack = self._stack(parts, pos_slice)
        stack = self.apply_ln_to_stack(stack, layer, False, pos_slice) if apply_ln else stack
        return (stack, labels) if return_labels else stack

    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Position = None,
        batch_slice: Position = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Stack:
        """The LayerNorm before `layer` (None: the last one), at its cached scale, on each component of a stack,
        with the gain, without the bias: the results sum to the LayerNorm's output less `ln.b`.

        Raises:
            ValueError: the last LayerNorm, on more than the class token.
            NotImplementedError: `recompute_ln`.
            IndexError: the tower has no such layer.
        """
        if recompute_ln:
            raise NotImplementedError("recompute_ln: apply visual.ln_final to the stack yourself")
        layer = self._layer(layer, mlp_input)
        final = layer == self.model.cfg.n_layers
        name = "ln_final" if final else f"blocks.{layer}.ln{2 if mlp_input else 1}"
        scale = self[f"{name}.hook_scale"]
        if self.has_batch_dim:
            scale = _cut(batch_slice).apply(scale, dim=0)
        if has_batch_dim:
            residual_stack = _cut(batch_slice).apply(residual_stack, dim=1)
        if not final:
            scale = _cut(pos_slice).apply(scale, dim=-2)
        elif self.model.cfg.pool != "cls":
            scale = _cut(pos_slice).apply(scale, dim=-2) if scale.shape[-2] > 1 else scale
        elif scale.ndim == residual_stack.ndim:  # the stack's token axis went with pos_slice
            self._only_class_token(pos_slice)
            scale = scale[..., 0, :]
        elif residual_stack.shape[-2] != 1 or _cut(pos_slice).mode != "identity":
            self._only_class_token(pos_slice)
        if self.model.cfg.norm == "post" and not final:
            raise NotImplementedError("the blocks of a post-norm tower read the stack as it is")
        norm = cast(LayerNorm, self.model.get_submodule(name))
        return (residual_stack - residual_stack.mean(-1, keepdim=True)) / scale * norm.w

    # What has no meaning here, or is not written

    def logit_lens(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError."""
        _missing("logit_lens", "accumulated_resid(apply_ln=True) @ visual.proj @ text_features.T")

    def logit_attrs(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError."""
        _missing("logit_attrs", "decompose_resid(apply_ln=True, pos_slice=0) @ visual.proj @ text_features.T")

    def get_neuron_results(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError."""
        _missing("get_neuron_results", 'cache["post", layer] and visual.blocks[layer].mlp.W_out')

    stack_neuron_results = get_neuron_results

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError."""
        _missing("get_full_resid_decomposition", "decompose_resid and stack_head_results")

    # Parts

    def _layer(self, layer: int | None, mlp_input: bool) -> int:
        n_layers: int = self.model.cfg.n_layers
        layer = n_layers if layer is None or layer == -1 else layer
        last = n_layers - 1 if mlp_input else n_layers
        if not 0 <= layer <= last:
            raise IndexError(
                f"expected a layer in 0..{last}{' with mlp_input' if mlp_input else ', or None for the end'}; "
                f"received {layer}; the tower has {n_layers} layers"
            )
        return layer

    def _embeds(self) -> list[tuple[str, str]]:
        if self.model.ln_pre is not None:
            return [("ln_pre", "hook_ln_pre")]
        positions = [] if self.model.W_pos is None else [("pos_embed", "hook_pos_embed")]
        return [("embed", "hook_embed"), *positions]

    def _results(self, layer: int) -> Float[Tensor, "head *batch_and_token d_model"]:
        block, name = blocks(self.model)[layer], f"blocks.{layer}.attn.hook_result"
        result = self.cache_dict.get(name)
        if result is None:
            z = self["z", layer]
            if block.attn.ln is not None:
                z = z / self[f"blocks.{layer}.attn.ln.hook_scale"][..., None]
            result = torch.einsum("...he,hed->...hd", z, block.attn.W_written)
        if block.post_norm:
            centred = result - result.mean(-1, keepdim=True)
            result = centred / self[f"blocks.{layer}.ln1.hook_scale"][..., None] * block.ln1.w
        return rearrange(result if block.ls1 is None else result * block.ls1, "... head d -> head ... d")

    def _stack(self, parts: list[Tensor], pos_slice: Position) -> Stack:
        if len({part.shape[-2] for part in parts}) > 1:
            # The last block kept token 0 alone: any other slice would take it for another token.
            self._only_class_token(pos_slice)
        if not parts:
            return _cut(pos_slice).apply(self["resid_pre", 0], dim=-2)[None][:0]
        return torch.stack([_cut(pos_slice).apply(part, dim=-2) for part in parts])

    def _only_class_token(self, pos_slice: Position) -> None:
        chosen = _cut(pos_slice).apply(torch.arange(self.model.cfg.n_tokens)).reshape(-1)
        if chosen.tolist() != [0]:
            raise ValueError(
                "expected the class token alone, for only it goes on to the feature; received a slice of "
                f"{len(chosen)} tokens, {chosen.tolist()[:3]}...; pass pos_slice=0"
            )


def _cut(position: Position) -> Slice:
    return position if isinstance(position, Slice) else Slice(position)  # pyright: ignore[reportArgumentType]


def _missing(name: str, instead: str) -> NoReturn:
    raise NotImplementedError(f"{name} is written for language models; use {instead}")
