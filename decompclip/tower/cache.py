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

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, NoReturn, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
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
        full = get_act_name(name, *rest)
        if full not in self.cache_dict:
            raise KeyError(
                f"expected the name of a cached activation; received {key!r} ({full}); cached are {len(self)} activations, "
                f"nearest {', '.join(nearest_names(full, self.cache_dict)) or 'none'} (list them with cache.keys()): see "
                "run_with_cache's names_filter"
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
            apply_ln: the last LayerNorm, with bias, taken anew on each stream (with a class token, `@ visual.proj` gives
                what the tower would answer if it ended there; other ways of pooling: `logit_lens`); only for the
                whole tower.

        Raises:
            NotImplementedError: `apply_ln` for less than the whole tower, or where the last LayerNorm reads the mean row.
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
        if apply_ln and self._ln_of_mean:
            raise NotImplementedError(
                "expected a tower whose last LayerNorm reads rows; received one that reads their mean; take "
                "logit_lens(model, images, texts), or visual.read(stream)"
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
            parts.append(self._stream_before(layer) - sum(parts))
            labels.append("remainder")
        stack = self._stack(parts, pos_slice)
        stack = self.apply_ln_to_stack(stack, layer, False, pos_slice) if apply_ln else stack
        return (stack, labels) if return_labels else stack

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Position = None,
        pos_slice: Position = None,
        project_output_onto: None = None,
    ) -> Float[Tensor, "*batch_and_token neuron d_model"]:
        """What each neuron of an MLP wrote to the stream, without the MLP's output bias. Large: choose neurons, positions.

        Raises:
            IndexError: the tower has no such layer, neuron or position.
            NotImplementedError: `project_output_onto`.
        """
        _no_projection(project_output_onto)
        post = self["post", layer]
        block = blocks(self.model)[layer]
        post = _cut(neuron_slice).apply(_cut(pos_slice).apply(self._rows(post, pos_slice), dim=-2), dim=-1)
        written = _cut(neuron_slice).apply(block.mlp.W_out.T)
        post, written = (post[..., None], written[None]) if written.ndim == 1 else (post, written)
        result = post[..., None] * written
        if block.post_norm:
            scale = self._rows(self[f"blocks.{layer % self.model.cfg.n_layers}.ln2.hook_scale"], pos_slice)
            centred = result - result.mean(-1, keepdim=True)
            result = centred / _cut(pos_slice).apply(scale, dim=-2)[..., None] * block.ln2.w
        return result if block.ls2 is None else result * block.ls2

    def stack_neuron_results(
        self,
        layer: int | None = -1,
        pos_slice: Position = None,
        neuron_slice: Position = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: None = None,
        mlp_input: bool = False,
    ) -> Any:
        """What each neuron before `layer` wrote to the stream. Large: choose neurons and positions.

        Labels: "L0N0", ...; "remainder" (asked for by `incl_remainder`) is the rest of the stream at the block's input
        (with `mlp_input`, at its MLP's).

        Raises:
            IndexError: the tower has no such layer, neuron or position.
            NotImplementedError: `project_output_onto`.
        """
        _no_projection(project_output_onto)
        layer = self._layer(layer, mlp_input)
        found = [self.get_neuron_results(number, neuron_slice, pos_slice) for number in range(layer)]
        kept = _cut(neuron_slice).apply(torch.arange(self.model.cfg.d_mlp)).reshape(-1).tolist()
        labels = [f"L{number}N{neuron}" for number in range(layer) for neuron in kept]
        empty = self._stack([], pos_slice)
        stack = torch.cat([empty, *(rearrange(x, "... n d -> n ... d") for x in found)])
        if incl_remainder:
            rest = self._stack([self._stream_before(layer, mlp_input)], pos_slice) - stack.sum(0)
            stack, labels = torch.cat([stack, rest]), [*labels, "remainder"]
        stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice) if apply_ln else stack
        return (stack, labels) if return_labels else stack

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Position = None,
        return_labels: bool = False,
        project_output_onto: None = None,
    ) -> Any:
        """The stream at the input of `layer` in full: heads, neurons (or MLPs), the embedding, and all biases together.

        The rows sum to the stream. Labels: "L0H0", ..., "L0N0", ... (or "0_mlp_out", ...), "ln_pre" (or "embed",
        "pos_embed"), "bias".

        Args:
            expand_neurons: a row a neuron, which is large, or a row an MLP (its output bias then is the MLP's).

        Raises:
            IndexError: the tower has no such layer or position.
            NotImplementedError: `project_output_onto`.
        """
        _no_projection(project_output_onto)
        layer = self._layer(layer, mlp_input)
        attentions = layer + mlp_input
        parts, labels = self.stack_head_results(attentions, return_labels=True, pos_slice=pos_slice)
        writes, names = self.decompose_resid(
            layer, mlp_input, incl_embeds=False, return_labels=True, pos_slice=pos_slice
        )
        embeds, of_embeds = self.decompose_resid(0, return_labels=True, pos_slice=pos_slice)
        if expand_neurons:
            neurons, more = self.stack_neuron_results(layer, pos_slice, return_labels=True)
        else:
            of_mlps = [place for place, name in enumerate(names) if name.endswith("mlp_out")]
            neurons, more = writes[of_mlps], [names[place] for place in of_mlps]
        bias = writes.sum(0) - parts.sum(0) - neurons.sum(0)
        stack = torch.cat([parts, neurons, embeds, bias[None]])
        labels = [*labels, *more, *of_embeds, "bias"]
        stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice) if apply_ln else stack
        return (stack, labels) if return_labels else stack

    def logit_attrs(
        self,
        residual_stack: Stack,
        directions: Float[Tensor, " d_embed"] | Float[Tensor, "text d_embed"],
        incorrect: Float[Tensor, " d_embed"] | Float[Tensor, "text d_embed"] | None = None,
        pos_slice: Position = None,
        batch_slice: Position = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component ..."]:
        """What each component of a stack adds to the image features' products with directions, less those with others.

        Past the last LayerNorm at its cached scale, and the projection. With a class token the whole stream's components
        (`decompose_resid(pos_slice=0)`) sum to the product, but for the tower's constants `(ln_final.b @ proj + b_proj)`;
        with a mean of rows their mean over the pooled rows does. `attribute(d, toward)` does it for every way of pooling, with
        names and intervals, constants apart, for unit features too.

        Args:
            residual_stack: components, as this class's other methods give them.
            directions: text features (where TransformerLens takes tokens); one, or several, a last axis then.
            incorrect: subtracted from them.
            pos_slice, batch_slice, has_batch_dim: as `apply_ln_to_stack`.

        Raises:
            NotImplementedError: a tower that pools by attention.
            ValueError: directions of another width; or as `apply_ln_to_stack`.
        """
        if self.model.pool is not None:
            raise NotImplementedError(
                "expected a tower that pools its class token, or a mean; received one that pools by attention, through "
                "values of its own; take attribute(model.decompose(images), directions)"
            )
        width = self.model.cfg.d_embed
        for given in (directions,) if incorrect is None else (directions, incorrect):
            if not isinstance(given, Tensor) or given.ndim not in (1, 2) or given.shape[-1] != width:
                shown = list(given.shape) if isinstance(given, Tensor) else repr(given)
                raise ValueError(
                    f"expected directions [text, {width}] or [{width}], features of texts; received {shown}; encode them "
                    "with model.encode_text"
                )
        along = directions if incorrect is None else directions - incorrect
        stack = self.apply_ln_to_stack(
            residual_stack, None, False, pos_slice, batch_slice, has_batch_dim=has_batch_dim
        )
        proj = self.model.proj
        return F.linear(stack if proj is None else stack @ proj, along.to(stack))

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

        Args:
            pos_slice: the positions that the stack was made of.
            batch_slice: images to take, of a stack of all of the cache's images; of a stack without a batch axis, its image.
            has_batch_dim: whether the stack has a batch axis, where the cache has one.
            recompute_ln: each element of the stack is a whole stream, with a scale of its own (and the bias), as
                `accumulated_resid` has them.

        Raises:
            ValueError: the last LayerNorm, on rows that do not pass it: with a class token, all but that; with a mean or an
                attention over patches, the prefix tokens. Or a stack of other images than the cache's.
            NotImplementedError: the blocks of a post-norm tower, which read the stack as it is.
            IndexError: the tower has no such layer.
        """
        layer = self._layer(layer, mlp_input)
        final = layer == self.model.cfg.n_layers
        if self.model.cfg.norm == "post" and not final:
            raise NotImplementedError("the blocks of a post-norm tower read the stack as it is")
        name = "ln_final" if final else f"blocks.{layer}.ln{2 if mlp_input else 1}"
        norm, scale = cast(LayerNorm, self.model.get_submodule(name)), self[f"{name}.hook_scale"]
        batch = _cut(batch_slice)
        if has_batch_dim and self.has_batch_dim:
            if residual_stack.shape[1] != len(scale):
                raise ValueError(
                    f"expected a stack [component, {len(scale)}, ..., d_model] of all images of the cache, which batch_slice= "
                    f"cuts; received {list(residual_stack.shape)}; pass it uncut, or cut the cache itself: "
                    "cache.apply_slice_to_batch_dim(batch_slice)"
                )
            residual_stack = batch.apply(residual_stack, dim=1)
        elif batch.mode != "identity" and not self.has_batch_dim:
            raise ValueError(
                f"expected no batch_slice, for the cache is of one image, without a batch axis; received {batch_slice!r}"
            )
        if recompute_ln:
            if final and self._ln_of_mean:
                raise NotImplementedError(
                    "expected a tower whose last LayerNorm reads rows; received one that reads their mean; take "
                    "visual.read(stream)"
                )
            return norm(residual_stack)
        if self.has_batch_dim:
            scale = batch.apply(scale)
        if final:
            scale = self._final_scale(scale, pos_slice, residual_stack)
        else:
            scale = _cut(pos_slice).apply(self._rows(scale, pos_slice), dim=-2)
        if residual_stack.ndim != scale.ndim + 1:
            raise ValueError(
                f"expected a stack [component, ..., d_model] beside a scale {list(scale.shape)}; received "
                f"{list(residual_stack.shape)}; say how it was sliced: pos_slice= and batch_slice="
            )
        return (residual_stack - residual_stack.mean(-1, keepdim=True)) / scale * norm.w

    def _final_scale(self, scale: Tensor, pos_slice: Position, stack: Tensor) -> Tensor:
        """The last LayerNorm's scales, row by row of a stack with these positions."""
        cfg = self.model.cfg
        one = _cut(pos_slice).mode == "int"
        pooled = list(range(cfg.n_tokens)[cfg.pooled_rows])
        chosen = _cut(pos_slice).apply(torch.arange(cfg.n_tokens)).reshape(-1).tolist()
        if cfg.pool == "cls" and _cut(pos_slice).mode == "identity" and stack.shape[-2] == 1:
            chosen = [0]  # the class token was kept alone
        if not set(chosen) <= set(pooled):
            if cfg.pool == "cls":
                self._only_class_token(pos_slice)
            raise ValueError(
                f"expected rows that the tower pools, {pooled[0]}..{pooled[-1]}; received {chosen[:3]}..., among them prefix "
                f"tokens, whose stream ends unread; pass pos_slice=({pooled[0]}, {pooled[-1] + 1})"
            )
        if scale.shape[-2] != 1:
            rows = torch.tensor([row - pooled[0] for row in chosen], device=scale.device)
            scale = scale.index_select(-2, rows)
        return scale[..., 0, :] if one else scale

    # What has no meaning here

    def logit_lens(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "logit_lens is written for language models; take decompclip.logit_lens(model, images, texts)"
        )

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

    @property
    def _ln_of_mean(self) -> bool:
        """Whether the last LayerNorm reads the mean of rows."""
        return self.model.cfg.pool == "mean" and self.model.cfg.ln_final == "pooled"

    def _stream_before(self, layer: int, mlp_input: bool = False) -> Tensor:
        """The stream at a block's input, or its MLP's; or at the tower's end."""
        if mlp_input:
            return self["resid_mid", layer]
        return self["resid_post", layer - 1] if layer else self["resid_pre", 0]

    def _rows(self, x: Tensor, pos_slice: Position) -> Tensor:
        """Something with a row a token; raises where the last block kept the class token alone and another is asked for."""
        if x.shape[-2] != self.model.cfg.n_tokens:
            self._only_class_token(pos_slice)
        return x

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
        for part in parts:
            # Where the last block kept token 0 alone, any other slice would take it for another token.
            self._rows(part, pos_slice)
        if not parts:
            return _cut(pos_slice).apply(self["embed"], dim=-2)[None][:0]
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


def _no_projection(project_output_onto: object) -> None:
    if project_output_onto is not None:
        raise NotImplementedError(
            "expected no project_output_onto; multiply the stack, or take attribute(d, toward, neurons=neuron_terms(...)), "
            "which holds no neuron's write"
        )


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of the known names: those that have the given one as their end or inside them, or are spelt alike."""
    names = list(known)
    held = [other for other in names if other.endswith(name)] or [other for other in names if name in other]
    return (held or get_close_matches(name, names))[:3]
