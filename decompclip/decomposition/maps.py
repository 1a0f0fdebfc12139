"""The fixed linear maps from the stream to the joint space, for every way of pooling (docs/method.md, section 1).

With the scales of LayerNorms and the attention of a pooling query frozen at what they were for an image,
the feature is affine in the last stream `x [row d_model]`. For pooling head q (one, but for attention pools)

    R = sum_q (sum_n a[q, n] x[n]) @ A[q] @ B[q]  +  constants

    class token          a = 1 / sigma                  A = C gamma P                    B = 1
    mean of rows         a = 1 / (N sigma[n])           (sigma of the mean row, where it is normalised last)
    attention pool       a = attention[q, n] / sigma[n] A = C gamma W_V[q]               B = W_O[q] P

`C` subtracts the mean over d_model. CoCa's second LayerNorm is frozen too: `a` is over its scale as well, and
`B = W_O[q] C gamma' P`.

A head's term is a few numbers of the image, its coordinates, times a matrix of the model (`TermMaps`). A class token's
or a mean's heads are

    centred   sum_n a[n] (z[n] - b_V) / s[n]             @ W A                       A past C
    paper     sum_n a[n] [z[n] / s[n], 1, mean(x[n])], 1 @ [W A; b / H; -sum(A) / k; constants / k]

with `s` the scale of a LayerNorm behind the heads (1 without) and `k = (2 L + 1) H` equal shares of the
stream's mean and of the constants. The left factor has d_head (+ 3 or 4) numbers where the term has d_embed:
means, Grams and products are taken there, exactly. Behind an attention pool a head's term depends on the
image through as many weighted sums of z as the pool has heads: there the coordinates are the term itself.

Also here is what all work on terms shares: its precision, its threads, and the memory that it may take.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary
from zlib import crc32

import psutil
import torch
from jaxtyping import Float
from torch import Tensor, nn

from decompclip.api import check_choice
from decompclip.tower.layers import blocks
from decompclip.tower.vit import HookedViT


def full(dtype: torch.dtype) -> torch.dtype:
    """The type that terms of such numbers are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is so already."""
    return x.to(full(x.dtype))


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of `x`: terms are exact where the tower itself is not."""
    return torch.autocast(x.device.type, enabled=False)


@dataclass(frozen=True, eq=False)
class Readout:
    """From the pooled stream to the feature.

    Attributes:
        into: `A`, not centred; its columns sum to `total` over d_model.
        out: `B`; None where it is the identity.
        constants: by name, what is added whatever the image; "scaled" ones are over the scale of CoCa's
            last LayerNorm.
    """

    into: Float[Tensor, "pool_head d_model d_mid"]
    out: Float[Tensor, "pool_head d_mid d_embed"] | None
    constants: dict[str, Float[Tensor, " d_embed"]]
    scaled: frozenset[str]

    @property
    def centred(self) -> Float[Tensor, "pool_head d_model d_mid"]:
        return self.into - self.into.mean(1, keepdim=True)

    def finish(self, mid: Float[Tensor, "*part pool_head d_mid"]) -> Float[Tensor, "*part d_embed"]:
        """`B`, summed over the pooling's heads."""
        if self.out is None:
            return mid.squeeze(-2)
        return mid.flatten(-2) @ self.out.flatten(0, 1)


@torch.no_grad()
def readout(visual: HookedViT) -> Readout:
    """The maps of a tower with its present weights, in fp32 at least."""
    gamma, beta = wide(visual.ln_final.w), wide(visual.ln_final.b)
    pool = visual.pool
    proj = torch.eye(visual.cfg.d_pool).to(gamma) if visual.proj is None else wide(visual.proj)
    constants = {} if visual.b_proj is None else {"proj bias": wide(visual.b_proj)}
    if pool is None:
        return Readout(
            (gamma[:, None] * proj)[None], None, {"ln_final bias": beta @ proj, **constants}, frozenset()
        )
    W_V, W_O = wide(pool.W_V), wide(pool.W_O)
    end = proj
    if pool.ln_post is not None:
        constants["pool ln_post bias"] = wide(pool.ln_post.b) @ proj
        end = wide(pool.ln_post.w)[:, None] * proj
        end = end - end.mean(0)
    values = torch.einsum("d,qde->qe", beta, W_V) + wide(pool.b_V)
    gathered = torch.einsum("qe,qed->d", values, W_O) + wide(pool.b_O)
    scaled = frozenset({"pool bias"} if pool.ln_post is not None else ())
    return Readout(gamma[:, None] * W_V, W_O @ end, {"pool bias": gathered @ end, **constants}, scaled)


@dataclass(frozen=True, eq=False)
class Writing:
    """What heads write to the stream, as linear maps of their z, once norms behind them are frozen.

    Attributes:
        W: z over the layer's `scale` to the stream, past LayerScale.
        head_bias: written over that scale whatever the heads do, value biases aside.
        bias: written whatever the scale.
        scaled: whether there is such a scale: a LayerNorm across the heads, or behind attention.
    """

    W: Float[Tensor, "layer head d_head d_model"]
    b_V: Float[Tensor, "layer head d_head"]
    head_bias: Float[Tensor, "layer d_model"]
    bias: Float[Tensor, "layer d_model"]
    scaled: bool


@torch.no_grad()
def writing(visual: HookedViT) -> Writing:
    """The maps of a tower with its present weights, in fp32 at least."""
    post, across = visual.cfg.norm == "post", visual.cfg.attn_norm
    W, head_bias, bias = [], [], []
    for block in blocks(visual):
        written, constant = wide(block.attn.W_written), wide(block.attn.b_written)
        of_heads, fixed = torch.zeros_like(constant), constant
        if post:
            gain = wide(block.ln1.w)
            written = (written - written.mean(-1, keepdim=True)) * gain
            of_heads, fixed = (constant - constant.mean()) * gain, wide(block.ln1.b)
        scale = 1.0 if block.ls1 is None else wide(block.ls1)
        W.append(written * scale)
        head_bias.append(of_heads * scale)
        bias.append(fixed * scale)
    b_V = torch.stack([wide(block.attn.b_V) for block in blocks(visual)])
    return Writing(torch.stack(W), b_V, torch.stack(head_bias), torch.stack(bias), post or across)


PAIRS = 8
"""Products taken of each weight: one alone misses an edit of one neuron among hundreds in one case of five; eight see it."""


@torch.no_grad()
def fingerprint(visual: HookedViT) -> Float[Tensor, " number"]:
    """Numbers by which a tower is known again: which model statistics belong to.

    Of each weight (and buffer): its products with fixed random pairs of vectors, over its own length, and the logarithm
    of that length; then the configuration, which decides what the weights compute (GELU or QuickGELU), and the
    precision. They stay the same up to rounding when a model is moved or cast, and change with any training.

    Returns:
        The numbers, on the CPU, in fp64.
    """
    weights = [x.detach() for x in (*visual.parameters(), *visual.buffers()) if x.is_floating_point()]
    matrices = [x.flatten(1) if x.ndim > 1 else x.reshape(-1, 1) for x in weights]
    draws = torch.Generator().manual_seed(0)
    longest = max(max(x.shape) for x in matrices)
    left, right = torch.randn(2, PAIRS, longest, generator=draws)
    numbers = []
    for matrix in matrices:
        x = matrix if matrix.dtype == torch.float64 else matrix.float()
        u, v = left[:, : x.shape[0]].to(x), right[:, : x.shape[1]].to(x)
        length = x.norm().clamp_min(1e-12)
        numbers += [torch.einsum("pm,mk,pk->p", u, x, v) / length, length.log()[None]]
    what = float(crc32(json.dumps(visual.cfg.to_dict(), sort_keys=True).encode()))
    ends = torch.tensor([what, torch.finfo(visual.dtype).eps], dtype=torch.float64)
    return torch.cat([torch.cat(numbers).cpu().double(), ends])


def same_model(ours: Float[Tensor, " number"], theirs: Float[Tensor, " number"]) -> bool:
    """Whether two fingerprints are of one model, in whatever precision."""
    if ours.shape != theirs.shape or ours[-2] != theirs[-2]:
        return False
    # Casting to fp16 moves a number by about its epsilon, 1e-3; sums in another order by 1e-6.
    allowed = max(1e-5, 4 * float(torch.maximum(ours[-1], theirs[-1])))
    return bool((ours[:-2] - theirs[:-2]).abs().max() <= allowed)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch works with one thread.

    For factorisations of batches of small matrices: with several threads MKL's LU of such a batch fails or does not end,
    its eigenvalues and singular values take a hundred times as long when processors are busy, and digits differ. With
    one they take fractions of a second.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Convention = Literal["centred", "paper"]


def check_convention(convention: str) -> None:
    """Raises ValueError unless `convention` is a known one."""
    check_choice("convention", convention, Convention)


@dataclass(frozen=True, eq=False)
class TermMaps:
    """Maps from coordinates to terms, shared by all decompositions of a model.

    Attributes:
        heads: of each head; `coord` is d_head, and more in the paper's convention. The identity, as a view,
            where the coordinates are the terms.
        bias: the constants that the image scales (or, for some, does not).
        bias_names: "attn_bias 0", ..., "ln_final bias"; none in the paper's convention, which shares them out.
        extras: how many of a head's coordinates are shares of constants, not of its z.
        tokens: behind an attention pool, what its heads read of a head's z; None elsewhere.
        out: and the way from there to the joint space.
        fingerprint: of the tower's weights (`decompclip.decomposition.maps`); None where unknown.
    """

    heads: Float[Tensor, "layer head coord d_embed"]
    bias: Float[Tensor, "bias d_embed"]
    bias_names: tuple[str, ...]
    convention: Convention
    extras: int = 0
    tokens: Float[Tensor, "layer head pool_head d_head d_mid"] | None = None
    out: Float[Tensor, "pool_head d_mid d_embed"] | None = None
    fingerprint: Float[Tensor, " weight"] | None = None

    def __post_init__(self) -> None:
        check_convention(self.convention)

    @property
    def d_head(self) -> int:
        return self.heads.shape[2] - self.extras if self.tokens is None else self.tokens.shape[3]

    @property
    def direct(self) -> bool:
        """Whether coordinates are the terms themselves."""
        return self.tokens is not None

    @cached_property
    def grams(self) -> Float[Tensor, "layer head coord coord"]:
        """Dot products of terms as products of coordinates: `term_i . term_j = c_i @ gram @ c_j`."""
        return self.heads if self.direct else self.heads @ self.heads.mT

    def terms(
        self, coords: Float[Tensor, "*batch layer head coord"]
    ) -> Float[Tensor, "*batch layer head d_embed"]:
        """Heads' terms of their coordinates."""
        if self.direct:
            return coords
        with full_precision(coords):
            return torch.einsum("...lhr,lhrd->...lhd", coords, self.heads.to(coords))

    def total(self, coords: Float[Tensor, "batch layer head coord"]) -> Float[Tensor, "batch d_embed"]:
        """The sum of all heads' terms, without forming them."""
        with full_precision(coords):
            return coords.sum((1, 2)) if self.direct else coords.flatten(1) @ self.heads.flatten(0, 2)

    def matches(self, other: TermMaps) -> bool:
        """Whether coordinates under `other` mean the same as under these maps: one model, one convention."""
        if self is other:
            return True
        if self.convention != other.convention or self.heads.shape != other.heads.shape:
            return False
        if self.fingerprint is not None and other.fingerprint is not None:
            return same_model(self.fingerprint, other.fingerprint)
        theirs = other.heads.to(self.heads)
        return bool((self.heads - theirs).abs().max() <= 1e-3 * self.heads.abs().max())

    def to(self, *args: Any, **kwargs: Any) -> TermMaps:
        """On another device or in another dtype, as `torch.Tensor.to`; itself where nothing changes."""
        # The identity is a view of one, not a copy a head.
        own: dict[str, Any] = {"heads": self.heads[0, 0] if self.direct else self.heads, "bias": self.bias}
        own |= {"tokens": self.tokens, "out": self.out}
        moved: dict[str, Any] = {
            name: None if x is None else x.to(*args, **kwargs) for name, x in own.items()
        }
        if all(moved[name] is x for name, x in own.items()):
            return self
        moved["heads"] = moved["heads"].expand(self.heads.shape)
        return replace(self, **moved)

    def __repr__(self) -> str:
        layers, heads, coord, d_embed = self.heads.shape
        return f"TermMaps({self.convention}: {layers} layers x {heads} heads, {coord} -> {d_embed})"


@dataclass(frozen=True, eq=False)
class Frozen:
    """A tower's fixed maps, of which `TermMaps` are made, and its terms (`decompclip.decomposition.capture`)."""

    read: Readout
    write: Writing
    into: Float[Tensor, "pool_head d_model d_mid"]
    maps: TermMaps


# A model's maps, while the model lives and its weights stay as they are.
_CACHE: WeakKeyDictionary[HookedViT, dict[Convention, tuple[WatchedWeights, Frozen]]] = WeakKeyDictionary()


def frozen(visual: HookedViT, convention: Convention) -> Frozen:
    """The fixed maps of a tower, built once for its present weights; in fp32 at least.

    Raises:
        ValueError: an unknown convention.
    """
    check_convention(convention)
    kept = _CACHE.setdefault(visual, {})
    if convention not in kept or not kept[convention][0].are_those_of(visual):
        # Plain tensors, whatever mode the caller is in: they serve later calls.
        with torch.inference_mode(False), full_precision(visual.ln_final.w):
            kept[convention] = (WatchedWeights.of(visual), _build(visual, convention))
    return kept[convention][1]


@dataclass(frozen=True, eq=False)
class WatchedWeights:
    """What a module's weights were, to ask whether they are so still: two operations, whatever their number.

    An optimizer's step raises a parameter's version; moves and casts change its address; and the sample of the numbers
    shows what is written past autograd (`.data`), unless that spares every one of them.

    Attributes:
        marks: address, version and type of each weight.
        views: some numbers of each, seen where they lie. They hold the weights' memory until they are asked again.
        sample: what these numbers were.
    """

    marks: list[tuple[int, int | None, torch.dtype]]
    views: list[Tensor]
    sample: Tensor

    @staticmethod
    @torch.no_grad()
    def of(module: nn.Module) -> WatchedWeights:
        """The present weights."""
        views = [_spread(p.detach()) for p in module.parameters()]
        return WatchedWeights(_marks(module), views, torch.cat(views) if views else torch.zeros(0))

    @torch.no_grad()
    def are_those_of(self, module: nn.Module) -> bool:
        """Whether they stayed."""
        if self.marks != _marks(module):
            return False
        return not self.views or torch.equal(torch.cat(self.views), self.sample)


def _marks(module: nn.Module) -> list[tuple[int, int | None, torch.dtype]]:
    return [(p.data_ptr(), None if p.is_inference() else p._version, p.dtype) for p in module.parameters()]


def _spread(x: Tensor) -> Float[Tensor, " number"]:
    """Some 16 numbers between a tensor's first and last, as a view, in whatever order it lies."""
    if not x.numel():
        return x.flatten()
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    step = max(1, reach // 16)
    return x.as_strided(((reach - 1) // step + 1,), (step,))


def term_maps(visual: HookedViT, convention: Convention) -> TermMaps:
    """The maps of a tower's terms.

    Raises:
        ValueError: an unknown convention.
    """
    return frozen(visual, convention).maps


@torch.no_grad()
def _build(visual: HookedViT, convention: Convention) -> Frozen:
    read, write = readout(visual), writing(visual)
    into = read.centred if convention == "centred" else read.into
    bias, names = (
        _bias(read, write, into)
        if convention == "centred"
        else (write.bias.new_empty(0, visual.cfg.d_embed), ())
    )
    mark = fingerprint(visual)
    if read.out is not None:
        tokens = torch.einsum("lhed,qdp->lhqep", write.W, into)
        eye = torch.eye(visual.cfg.d_embed).to(write.W).expand(*write.W.shape[:2], -1, -1)
        maps = TermMaps(eye, bias, names, convention, tokens=tokens, out=read.out, fingerprint=mark)
        return Frozen(read, write, into, maps)
    heads, extras = write.W @ into[0], 0
    if convention == "paper":
        added = _extras(visual, read, write)
        heads = torch.cat([heads, added[:, None].expand(-1, heads.shape[1], -1, -1)], dim=2)
        extras = added.shape[1]
    maps = TermMaps(heads, bias, names, convention, extras, fingerprint=mark)
    return Frozen(read, write, into, maps)


def _bias(read: Readout, write: Writing, into: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Constant terms: of each layer (and pooling head) what heads write whatever they attend to, then the readout's."""
    values = torch.einsum("lhe,lhed->ld", write.b_V, write.W)
    kinds = {"attn_bias": values + write.head_bias, "attn_norm_bias": write.bias}
    if not write.scaled:
        kinds = {"attn_bias": values + write.bias}
    rows, names = [], []
    for kind, written in kinds.items():
        mid = torch.einsum("ld,qdp->lqp", written, into)
        rows.append((mid if read.out is None else torch.einsum("lqp,qpd->lqd", mid, read.out)).flatten(0, 1))
        heads = [""] if read.out is None else [f" through pool head {q}" for q in range(len(into))]
        names += [f"{kind} {layer}{head}" for layer in range(len(written)) for head in heads]
    return torch.cat([*rows, torch.stack(list(read.constants.values()))]), (*names, *read.constants)


def _extras(visual: HookedViT, read: Readout, write: Writing) -> Float[Tensor, "layer extra d_embed"]:
    """What the paper's convention adds to a head: its shares of biases, of the stream's mean, and of constants."""
    n_heads = visual.cfg.n_heads
    shares = (2 * visual.cfg.n_layers + 1) * n_heads
    into = read.into[0]
    mean = (-into.sum(0) / shares).expand(len(write.bias), -1)
    constants = (sum(read.constants.values(), into.new_zeros(())) / shares).expand_as(mean)
    of_heads = [write.head_bias @ into / n_heads] if write.scaled else []
    return torch.stack([*of_heads, write.bias @ into / n_heads, mean, constants], dim=1)


SHARE = 4
"""One part in so many of the memory at hand may be taken: the run itself, and others, need the rest."""

CACHED = 2**26
"""Bytes of a temporary that a CPU's caches still serve; more at once is no faster there."""


def room(device: torch.device) -> int:
    """Bytes that may be taken on a device, a quarter of those at hand."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + own) // SHARE
    return min([psutil.virtual_memory().available, *_allowed()]) // SHARE


def temporary(device: torch.device) -> int:
    """Bytes of what is dropped at once: on an accelerator, where each piece costs a launch, all that may be taken."""
    return min(room(device), CACHED) if device.type == "cpu" else room(device)


def pieces(count: int, size: int, budget: int) -> Iterator[slice]:
    """`count` things of `size` bytes each in as few slices as fit the budget, all about as long; one thing at least."""
    length = max(1, min(count, budget // max(size, 1)))
    number = -(-count // length)
    for piece in range(number):
        yield slice(piece * count // number, (piece + 1) * count // number)


def _allowed() -> list[int]:
    """What a container's limit leaves, where there is one (Linux, cgroup 2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{name}").read_text("ascii") for name in ("max", "current"))
        return [max(0, int(limit) - int(used))]
    except (OSError, ValueError):  # no such files, or "max": no limit
        return []
