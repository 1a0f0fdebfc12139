"""Terms: what hooks saw of the pooled rows, times the fixed maps; and what each source token sends through a head.

A head's term is a sum over tokens of `attention[n] * value[n]` times the head's map. Kept are the pooled
row's attention and the values; a map toward texts contracts the head's map with the texts first, so that
no `[batch, layer, head, token, d_embed]` is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.decomposition.maps import Convention, Frozen, full, wide
from decompclip.tower.config import ViTConfig
from decompclip.tower.layers import blocks
from decompclip.tower.vit import Hook, HookedViT

Z, MLP = "attn.hook_z", "hook_mlp_out"


def pooled_rows(
    cfg: ViTConfig, x: Float[Tensor, "batch row *part"]
) -> Float[Tensor, "batch pooled_row *part"]:
    """The rows that the feature is made of, as a view; itself where they are all."""
    return x if cfg.pooled_rows == slice(0, None) else x[:, cfg.pooled_rows]


class Rows:
    """Hooks that record what components write at the rows that are pooled, and with what weight each row counts.

    Attributes:
        each: whether rows count differently, by weights known only at the end: all of them are held until then.
        length: what all terms are divided by, once it is known; None for nothing.
    """

    def __init__(self, visual: HookedViT, *, with_mean: bool) -> None:
        self.visual, self.cfg, self.with_mean = visual, visual.cfg, with_mean
        self.each = Rows.all_rows(visual.cfg)
        self.length: Float[Tensor, " batch"] | None = None
        self.seen: dict[str, Tensor] = {}
        self._writes: dict[str, Sequence[Tensor]] = {}  # by kind, of each layer
        self._stacks: dict[str, Tensor] = {}  # what the writes are views of, where rows are one

    @staticmethod
    def all_rows(cfg: ViTConfig) -> bool:
        """Whether rows count differently, by weights known only at the end."""
        scaled = cfg.norm == "post" or cfg.attn_norm
        return cfg.pool == "attention" or (cfg.pool == "mean" and (cfg.ln_final == "rows" or scaled))

    def hooks(self) -> list[Hook]:
        """To be set for one forward pass."""
        layers, ends = range(self.cfg.n_layers), ["ln_final.hook_scale"]
        scale, hooks = self._scale, []
        for layer in layers:
            hooks += [
                (f"blocks.{layer}.{kind}", partial(self._keep_write, kind=kind, layer=layer))
                for kind in (Z, MLP)
            ]
        names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.{scale}" for layer in layers if scale)]
        if self.with_mean:
            names += [f"blocks.{self.cfg.n_layers - 1}.hook_resid_post"]
        if self.cfg.pool == "attention":
            ends += ["pool.hook_pattern"]
            ends += ["pool.hook_mlp_out"] if self.cfg.pool_mlp else []
            ends += ["pool.ln_post.hook_scale"] if self.cfg.pool_norm else []
        return [
            *hooks,
            *((name, self._keep_rows) for name in names),
            *((name, self._keep) for name in ends),
        ]

    @cached_property
    def _scale(self) -> str | None:
        """The hook point of the scale behind the heads; None where there is none, or z tells what it is."""
        if self.cfg.norm == "post":
            return "ln1.hook_scale"
        name = "attn.ln.hook_scale"
        points = [f"blocks.{layer}.{name}" for layer in range(self.cfg.n_layers) if self.cfg.attn_norm]
        return name if any(self.visual.hook_dict[point].has_hooks() for point in points) else None

    def _keep(self, x: Tensor, hook: Any) -> None:
        self.seen[hook.name] = wide(x)

    def _keep_rows(self, x: Tensor, hook: Any) -> None:
        rows, dtype = pooled_rows(self.cfg, x), full(x.dtype)
        if self.each:
            self.seen[hook.name] = rows
        elif self.cfg.pool == "cls":  # copied: a view of a row would keep every token's activation alive
            self.seen[hook.name] = rows.to(dtype, copy=True)
        else:
            self.seen[hook.name] = rows.mean(1, keepdim=True, dtype=dtype)

    def _keep_write(self, x: Tensor, hook: Any, kind: str, layer: int) -> None:
        if self.each:
            writes = self._writes.setdefault(kind, [])
            assert isinstance(writes, list)
            writes.append(pooled_rows(self.cfg, x))
            return
        if kind not in self._stacks:
            shape = (len(x), self.cfg.n_layers, *x.shape[2:])
            self._stacks[kind] = x.new_empty(shape, dtype=full(x.dtype))
            self._writes[kind] = self._stacks[kind].unbind(1)
        into = self._writes[kind][layer]
        if self.cfg.pool == "cls":
            into.copy_(x[:, 0])
        else:
            torch.mean(pooled_rows(self.cfg, x), 1, dtype=into.dtype, out=into)

    # What was seen

    @cached_property
    def weights(self) -> Float[Tensor, "batch pool_head row"]:
        """`a`: how much of each row each head of the pooling reads, over the scales of the LayerNorms behind."""
        weights = 1 / self.seen["ln_final.hook_scale"].mT
        if self.cfg.pool == "attention":
            weights = self.seen["pool.hook_pattern"].squeeze(2) * weights
        elif self.each:
            weights = weights.expand(-1, -1, self.n_rows) / self.n_rows
        weights = weights if self.last is None else weights / self.last[:, None, None]
        return weights if self.length is None else weights / self.length[:, None, None]

    @cached_property
    def reads(self) -> Float[Tensor, "batch layer pool_head row"]:
        """The same for heads, past the scale behind them; of all layers alike, and one, where there is no such scale."""
        weights = self.weights[:, None]
        return weights if self.scales is None else weights / self.scales[:, :, None]

    @property
    def n_rows(self) -> int:
        return len(range(self.cfg.n_tokens)[self.cfg.pooled_rows])

    @property
    def last(self) -> Float[Tensor, " batch"] | None:
        """The scale of the LayerNorm behind an attention pool, where there is one."""
        return self.seen["pool.ln_post.hook_scale"].flatten() if self.cfg.pool_norm else None

    @cached_property
    def scales(self) -> Float[Tensor, "batch layer row"] | None:
        """The scale of the LayerNorm behind the heads, where there is one."""
        if self._scale is not None:
            kept = [self.seen[f"blocks.{layer}.{self._scale}"] for layer in range(self.cfg.n_layers)]
            return wide(torch.stack(kept, dim=1).squeeze(-1))
        if not self.cfg.attn_norm:
            return None
        if self.each:
            variance = torch.stack([_variance(x.flatten(2)) for x in self._writes[Z]], dim=1)
        else:
            variance = _variance(self._stacks[Z].flatten(2))[..., None]
        return (variance + self.cfg.ln_eps).sqrt()

    def pooled(self, kind: str) -> Float[Tensor, "batch layer pool_head *part"]:
        """The weighted sums of rows of one kind of write, of every layer; what was kept of it is let go."""
        weights = self.reads if kind == Z else self.weights[:, None]
        writes = self._writes.pop(kind)
        part = writes[0].shape[-2:] if kind == Z else writes[0].shape[-1:]
        if not self.each:
            x = self._stacks.pop(kind).flatten(2)[:, :, None] * weights
        else:
            by_layer = weights.expand(-1, len(writes), -1, -1).unbind(1)
            x = torch.stack(
                [torch.bmm(a, wide(x.flatten(2))) for a, x in zip(by_layer, writes, strict=True)], dim=1
            )
        return x.unflatten(-1, part)

    def weighted(self, name: str) -> Float[Tensor, "batch pool_head d_model"]:
        """The weighted sum of the rows of the stream, as seen at a hook point."""
        return self.weights @ wide(self.seen[name])


def _variance(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows"]:
    x = wide(x)
    return (x - x.mean(-1, keepdim=True)).square().mean(-1)


@dataclass(frozen=True, eq=False)
class Terms:
    """A decomposition's tensors, and the heads' weighted z, which tokens are held against.

    Attributes:
        z: over the scale behind the heads, weighted by the rows; the value bias is in it.
        of_images: by the names of `Decomposition`'s fields.
    """

    z: Float[Tensor, "batch layer pool_head head d_head"]
    of_images: dict[str, Float[Tensor, "batch ..."]]


def terms_of(fixed: Frozen, rows: Rows, convention: Convention) -> Terms:
    """Coordinates, MLPs, embedding, pool and bias coordinates, each over `rows.length` (formulas: `decompclip.decomposition.maps`)."""
    read, write = fixed.read, fixed.write
    count = rows.weights.sum(-1)  # [batch pool_head]
    n_layers = len(write.W)
    count_heads = rows.reads.sum(-1).expand(-1, n_layers, -1)
    one = torch.ones_like(count[:, :1]) if rows.length is None else 1 / rows.length[:, None]
    z = rows.pooled(Z)
    scaled = one if rows.last is None else one / rows.last[:, None]
    constants = [scaled if name in read.scaled else one for name in read.constants]
    mlps = _term(fixed, rows.pooled(MLP))
    embed = _term(fixed, rows.weighted("blocks.0.hook_resid_pre"))
    pool = _pool_term(rows, one)
    if convention == "centred":
        moved = z - count_heads[..., None, None] * write.b_V[:, None]
        kinds = [count_heads.flatten(1)] if write.scaled else []
        kinds += [count[:, None].expand(-1, n_layers, -1).flatten(1)]
        bias_coords = torch.cat([*kinds, *constants], 1)
        found = {"coords": _coords(fixed, moved), "mlps": mlps, "embed": embed, "bias_coords": bias_coords}
        return Terms(z, {**found, "pool": pool})
    stream = wide(rows.seen[f"blocks.{n_layers - 1}.hook_resid_post"])
    mean = (rows.weights @ stream.mean(-1, keepdim=True))[..., 0]
    shared = sum(c * row for c, row in zip(constants, read.constants.values(), strict=True))
    share = (shared - read.finish(mean[..., None] * fixed.into.sum(1))) / (2 * n_layers + 1)
    found = {
        "coords": _shared_coords(fixed, z, count_heads, count, mean, one, share),
        "mlps": mlps + share[:, None],
        "embed": embed + share,
        "bias_coords": count.new_empty(len(count), 0),
    }
    return Terms(z, {**found, "pool": pool})


def _term(
    fixed: Frozen, stream: Float[Tensor, "batch *layer pool_head d_model"]
) -> Float[Tensor, "batch *layer d_embed"]:
    return fixed.read.finish(torch.einsum("...qd,qdp->...qp", stream, fixed.into))


def _pool_term(rows: Rows, one: Float[Tensor, "batch 1"]) -> Float[Tensor, "batch pool d_embed"]:
    if not rows.cfg.pool_mlp:
        return one.new_empty(len(one), 0, rows.cfg.d_embed)
    written = rows.seen["pool.hook_mlp_out"] * one[..., None]
    return written if rows.visual.proj is None else written @ wide(rows.visual.proj)


def _shared_coords(
    fixed: Frozen,
    z: Float[Tensor, "batch layer pool_head head d_head"],
    count_heads: Float[Tensor, "batch layer pool_head"],
    count: Float[Tensor, "batch pool_head"],
    mean: Float[Tensor, "batch pool_head"],
    one: Float[Tensor, "batch 1"],
    share: Float[Tensor, "batch d_embed"],
) -> Float[Tensor, "batch layer head coord"]:
    """Heads' coordinates in the paper's convention, with their shares of biases, mean and constants."""
    write = fixed.write
    n_layers, n_heads = write.W.shape[:2]
    if fixed.maps.direct:
        of_heads = torch.einsum("blq,ld->blqd", count_heads, write.head_bias) if write.scaled else 0
        biases = _term(fixed, of_heads + torch.einsum("bq,ld->blqd", count, write.bias)) + share[:, None]
        return _coords(fixed, z) + biases[:, :, None] / n_heads
    extras = [count_heads[..., 0]] if write.scaled else []
    extras += [x.expand(-1, n_layers) for x in (count, mean, one)]
    constants = torch.stack(extras, dim=-1)[:, :, None].expand(-1, -1, n_heads, -1)
    return torch.cat([z[:, :, 0], constants], dim=-1)


def _coords(
    fixed: Frozen, z: Float[Tensor, "batch layer pool_head head d_head"]
) -> Float[Tensor, "batch layer head coord"]:
    if fixed.maps.tokens is None:
        return z[:, :, 0]
    return fixed.read.finish(torch.einsum("blqhe,lhqep->blhqp", z, fixed.maps.tokens))


class DecompositionError(ArithmeticError):
    """The terms do not sum to what they are terms of."""


@dataclass(frozen=True, eq=False)
class TokenTerms:
    """Attention and values of the kept heads.

    Attributes:
        kept: which heads; the `kept_head` axis of the others goes through them in order.
        attention: of each head of the pooling (one, but for attention pools) the mean attention of the rows
            that it reads, by their weights; of a class token's tower, the class token's attention.
        values: past the value bias in the centred convention (a constant of the layer, no token's).
        scale: the sum of these weights: for a class token 1 / sigma, and 1 / ||R|| where normalized.
        image_size, patch_size: height and width, pixels: where patches lie. Files of older versions do not know it.
    """

    kept: Bool[Tensor, "layer head"]
    attention: Float[Tensor, "batch kept_head pool_head token"]
    values: Float[Tensor, "batch kept_head token d_head"]
    scale: Float[Tensor, "batch kept_head pool_head"]
    image_size: tuple[int, int] | None = None
    patch_size: tuple[int, int] | None = None

    def position(self, layer: int, head: int) -> int:
        """Where a head stands on the `kept_head` axis.

        Raises:
            LookupError: its tokens were not kept.
        """
        if not self.kept[layer, head]:
            raise LookupError(
                f"expected the tokens of heads[{layer}, {head}]; received a decomposition that kept those of "
                f"other heads; ask for it: decompose(images, tokens=heads[{layer}, {head}])"
            )
        return int(self.kept.flatten()[: layer * self.kept.shape[1] + head].sum())

    def only(self, layer: int, head: int) -> TokenTerms:
        """Of one head alone.

        Raises:
            LookupError: its tokens were not kept.
        """
        place = self.position(layer, head)
        kept = torch.zeros_like(self.kept)
        kept[layer, head] = True
        return replace(self.map(lambda x: x[:, place : place + 1]), kept=kept)

    def of_kept(self, x: Float[Tensor, "layer head ..."]) -> Float[Tensor, "kept_head ..."]:
        """Of something that all heads have, that of the kept ones."""
        return choose(x.flatten(0, 1), _places(self.kept.flatten().tolist()))

    @staticmethod
    def cat(parts: Sequence[TokenTerms]) -> TokenTerms:
        """The images of several, in order; the kept heads are those of the first."""
        joined = {
            n: torch.cat([getattr(part, n) for part in parts]) for n in ("attention", "values", "scale")
        }
        return replace(parts[0], **joined)

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenTerms:
        """The function applied to all that belongs to images."""
        attention, values, scale = map(function, (self.attention, self.values, self.scale))
        return replace(self, attention=attention, values=values, scale=scale)


def _places(kept: Sequence[bool]) -> list[int] | None:
    """Where the kept heads stand among all; None for all of them."""
    return None if all(kept) else [place for place, one in enumerate(kept) if one]


def choose(x: Tensor, places: list[int] | None, axis: int = 0) -> Tensor:
    """Some of an axis, or all: without asking a device how many a mask chooses, for which everything would wait."""
    return x if places is None else x.index_select(axis, torch.tensor(places).to(x.device))


class AttentionCapture:
    """Hooks that record the pooled row's attention, and the values, of some heads in one forward pass.

    What is kept of all heads lies in one tensor for each kind, head by head, so that one product serves all.
    """

    def __init__(self, visual: HookedViT, kept: Bool[Tensor, "layer head"]) -> None:
        self.visual, self.kept, self.cfg = visual, kept, visual.cfg
        marks: list[list[bool]] = kept.tolist()
        self.layers = [layer for layer, marked in enumerate(marks) if any(marked)]
        self.counts = [sum(marks[layer]) for layer in self.layers]
        self.heads = [_places(marks[layer]) for layer in self.layers]
        self.places = _places([mark for marked in marks for mark in marked])
        self.single = visual.cfg.pool == "cls"
        points = [
            f"blocks.{layer}.attn.hook_{x}" for layer in self.layers for x in ("attn_scores", "pattern")
        ]
        # Where somebody may edit the pattern, it is read; elsewhere made again, for the pooled rows.
        self.edited = any(visual.hook_dict[point].has_hooks() for point in points)
        self.seen: dict[str, Tensor] = {}
        self._slots: dict[str, Sequence[Tensor]] = {}
        self._q: Tensor | None = None

    @staticmethod
    def held(cfg: ViTConfig, heads: int) -> int:
        """How many numbers an image holds until the run ends, for so many heads; the result is not counted."""
        rows = len(range(cfg.n_tokens)[cfg.pooled_rows])
        return 0 if cfg.pool == "cls" else heads * cfg.d_head * (rows + cfg.n_tokens)

    def hooks(self) -> list[Hook]:
        """To be set for one forward pass."""
        turned = "rot_" if self.cfg.rope else ""
        read = (
            {"pattern": self._keep_pattern}
            if self.edited
            else {f"{turned}q": self._keep_q, f"{turned}k": self._keep_k}
        )
        return [
            (f"blocks.{layer}.attn.hook_{name}", partial(function, place=place))
            for place, layer in enumerate(self.layers)
            for name, function in {"v": self._keep_v, **read}.items()
        ]

    def _slot(self, name: str, place: int, like: Tensor, *shape: int) -> Float[Tensor, "head batch *shape"]:
        """Where a layer's heads go."""
        if name not in self.seen:
            whole = (sum(self.counts), len(like), *shape)
            self.seen[name] = like.new_empty(whole, dtype=full(like.dtype))
            self._slots[name] = self.seen[name].split(self.counts)
        return self._slots[name][place]

    def _of_kept(self, x: Float[Tensor, "batch row head *rest"], place: int) -> Tensor:
        return choose(x, self.heads[place], 2)

    def _keep_v(self, x: Tensor, hook: Any, place: int) -> None:
        slot = self._slot("v", place, x, x.shape[1], x.shape[3])
        slot.copy_(self._of_kept(x, place).permute(2, 0, 1, 3))

    def _keep_q(self, x: Tensor, hook: Any, place: int) -> None:
        rows = self._of_kept(pooled_rows(self.cfg, x), place)
        if self.single:
            self._q = wide(rows)
        else:
            self._slot("q", place, x, rows.shape[1], x.shape[3]).copy_(rows.permute(2, 0, 1, 3))

    def _keep_k(self, x: Tensor, hook: Any, place: int) -> None:
        k = self._of_kept(x, place)
        if self.single:
            slot = self._slot("scores", place, x, x.shape[1])
            assert self._q is not None, "a layer's queries come before its keys"
            torch.sum(k * self._q, -1, out=slot.permute(1, 2, 0))
        else:
            self._slot("k", place, x, x.shape[1], x.shape[3]).copy_(k.permute(2, 0, 1, 3))

    def _keep_pattern(self, x: Tensor, hook: Any, place: int) -> None:
        rows = choose(x[:, :, self.cfg.pooled_rows], self.heads[place], 1)
        self._slot("pattern", place, x, *rows.shape[2:]).copy_(rows.transpose(0, 1))

    def _bias(self, place: int) -> Float[Tensor, "head 1 row token"] | None:
        """What relative positions add to the scores of a layer."""
        layer = self.layers[place]
        bias = blocks(self.visual)[layer].attn.position_bias()
        if bias is None:
            return None
        return choose(wide(bias)[:, :, self.cfg.pooled_rows], self.heads[place], 1).transpose(0, 1)

    def _mixed(self, rows: Rows) -> Float[Tensor, "kept_head batch pool_head token"]:
        """The attention of the pooled rows, by their weights."""
        scale = self.cfg.d_head**-0.5
        if self.edited and self.single:
            return self.seen.pop("pattern")
        if self.single:
            scores = self.seen.pop("scores")[:, :, None].mul_(scale)
            found = [self._bias(place) for place in range(len(self.layers))]
            biases = [bias for bias in found if bias is not None]
            return (scores + torch.cat(biases) if biases else scores).softmax(-1)
        batch = len(rows.weights)
        reads = rows.reads / rows.reads.sum(-1, keepdim=True)
        if not rows.each:  # the weights are of the rows' mean
            reads = (reads / rows.n_rows).expand(-1, -1, -1, rows.n_rows)
        alike = rows.scales is None  # of all layers
        names = ["pattern"] if self.edited else ["q", "k"]
        lengths = [count * batch for count in self.counts]
        seen = [self.seen.pop(name).flatten(0, 1) for name in names]
        if not self.edited:
            seen = [seen[0].mul_(scale), seen[1].mT]
        mixed, spread = [], reads
        for place, parts in enumerate(zip(*(x.split(lengths) for x in seen), strict=True)):
            heads = self.counts[place]
            if place == 0 or not alike or heads != self.counts[place - 1]:
                read = reads[:, 0 if alike else self.layers[place]]
                spread = read.expand(heads, -1, -1, -1).flatten(0, 1)
            attention = parts[0]
            if not self.edited:
                scores, bias = torch.bmm(*parts), self._bias(place)
                if bias is not None:
                    scores = (scores.unflatten(0, (heads, -1)) + bias).flatten(0, 1)
                attention = scores.softmax(-1)
            mixed.append(torch.bmm(spread, attention))
        return torch.cat(mixed).unflatten(0, (sum(self.counts), batch))

    def terms(
        self,
        fixed: Frozen,
        rows: Rows,
        z: Float[Tensor, "batch layer pool_head head d_head"],
        convention: Convention,
        tolerance: float,
    ) -> TokenTerms:
        """What was recorded, once it is seen to sum to what the heads put out.

        Args:
            fixed: the tower's maps.
            rows: how much each row counts for the feature.
            z: what the heads put out, weighted by the rows.
            convention: of the values: with their bias, or without.
            tolerance: largest miss allowed, as a share of the largest entry of the layer.

        Raises:
            DecompositionError: it does not, because a hook edits a head's z or breaks its attention.
        """
        mixed, values = self._mixed(rows), self.seen.pop("v")
        totals = rows.reads.sum(-1).expand(-1, len(self.kept), -1)  # [batch layer pool_head]
        layer_of = [
            layer for layer, count in zip(self.layers, self.counts, strict=True) for _ in range(count)
        ]
        if len(z):
            z = z / totals[..., None, None]
            misses = torch.matmul(mixed, values) - choose(z.permute(1, 3, 0, 2, 4).flatten(0, 1), self.places)
            largest = choose(z.abs().amax((0, 2, 3, 4)), layer_of)
            smallest = torch.finfo(z.dtype).tiny
            error = float((misses.abs().amax((1, 2, 3)) / largest.clamp_min(smallest)).max())
            if not error <= tolerance:
                raise DecompositionError(
                    f"expected the tokens of each head to sum to its z within {tolerance:.1e}; received a miss of "
                    f"{error:.1e}: a hook edits hook_z; decompose that run without tokens"
                )
        if convention == "centred":
            if self.edited and ((mixed.sum(-1) - 1).abs() > tolerance).any():
                raise DecompositionError(
                    "expected attention that sums to one over tokens, so that the value bias is no token's; "
                    "received rows that a hook on hook_pattern changed; renormalise them there, or take "
                    'convention="paper"'
                )
            values -= choose(fixed.write.b_V.flatten(0, 1), self.places)[:, None, None]
        scale = choose(totals.transpose(0, 1), layer_of)
        attention, values, scale = (x.transpose(0, 1) for x in (mixed, values, scale))
        return TokenTerms(self.kept, attention, values, scale, self.cfg.image_size, self.cfg.patch_size)
