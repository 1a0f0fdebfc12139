"""Second-order effects of neurons: what they do through the heads of later layers (Gandelsman et al., ICLR 2025).

    found = second_order(model, images, neurons[9])     principal directions in words
    found.mean_ablate(model, images)                    the images' terms with these effects at their means

A neuron `n` of layer `l` adds `p[i, n] w[n]` to the stream at token `i`. Later heads read it there, and write it to what is pooled:

    effect[n] = sum_(l' > l, h) c[l', h, n] w[n] C gain(ln1) W_V[l', h] W_O[l', h] A
    c[l', h, n] = sum_i a[l', h, i] p[i, n] / s[l', i]

with `a` the pooled row's attention over the scale of the last LayerNorm, `s` that of `ln1`, and `A` the map to the joint space
(`decompclip.decomposition.maps`, which also says what `a` is where several rows are pooled, or heads of an attention pool read them).

Exact for what is held at its values for each image: attention, scales of LayerNorms (and the feature's length, if that is one),
and what MLPs put out. Then the network is linear in what the neuron writes, and this is the part of it that goes through one head:
neither the neuron's own term (`neuron_terms`) nor paths through several heads. What a neuron does to attention, to scales and
through later MLPs is left out; `AblateNeurons` in causal mode has all of it.

No `[image, token, neuron, d]` is formed: images leave `c`, with a number a path and neuron, and these leave their moments.

Where this differs from the paper: its principal direction is that of the 100 images in which the effect is farthest from its
mean, with the sign that most of them have. Here the direction is that of all images, and its sign that of
`sum_i |e[i]|^2 e[i]` along it (`e`: the effect past its mean), a third moment, in which the strong images count most. Both come
exactly from one pass over images. Words have weights by non-negative least squares: they name the side of the sign alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.api import check_count
from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import Components, heads
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import (
    Frozen,
    frozen,
    full_precision,
    one_thread,
    pieces,
    room,
    same_model,
    temporary,
    wide,
)
from decompclip.display import Result
from decompclip.operators.inputs import Images, TextFeatures, image_batches
from decompclip.operators.neurons import check_linear, neuron_places, neuron_writes
from decompclip.operators.weights import COHERENCE, show_words, text_pool, words_of
from decompclip.tower.layers import blocks
from decompclip.tower.vit import HasTower, Hook, HookedViT, tower

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP


SHOWN = 30
"""Neurons drawn, those with the largest effects."""

ROUNDING = 8
"""Times the precision: what varies by less, beside the feature's length or its own mean, has no direction."""


@dataclass(frozen=True, eq=False)
class Paths:
    """From neurons of one layer through the heads of later layers to the joint space: a path a head, and head of the pool.

    Attributes:
        written: what each neuron writes to the stream.
        read: and what each later head reads of that, head after head.
    """

    visual: HookedViT
    fixed: Frozen
    layer: int
    index: Int[Tensor, " neuron"]
    written: Float[Tensor, "neuron d_model"]
    read: Float[Tensor, "later d_model d_head"]

    @staticmethod
    def named(visual: HookedViT, chosen: Components) -> Paths:
        """Raises as `second_order`."""
        check_linear(visual)
        layers, index = neuron_places(chosen, visual)
        layer, last = int(layers[0]), visual.cfg.n_layers - 1
        if not last:
            raise ValueError(
                "expected a tower of two layers or more, heads of a later one being what a second-order effect goes through; received one of 1"
            )
        if len(layers.unique()) > 1 or layer == last:
            named = ", ".join(map(str, layers.unique().tolist()))
            raise ValueError(
                f"expected neurons of one layer with heads behind it, of 0..{last - 1}; received neurons of layers {named} of "
                f"{last + 1}; ask for one layer at a time (the last one has its own terms alone: neuron_terms)"
            )
        return Paths.of(visual, layer, index)

    @staticmethod
    def of(visual: HookedViT, layer: int, index: Int[Tensor, " neuron"]) -> Paths:
        """In the order given."""
        read = []
        for block in blocks(visual)[layer + 1 :]:
            gained = wide(block.attn.W_V) * wide(block.ln1.w)[:, None]
            read.append(gained - gained.mean(1, keepdim=True))
        written = neuron_writes(visual, torch.full_like(index, layer), index)
        return Paths(visual, frozen(visual, "centred"), layer, index, written, torch.cat(read))

    def seen(
        self, images: Float[Tensor, "batch 3 h w"], normalize: bool
    ) -> tuple[Decomposition, Float[Tensor, "batch path token"], Float[Tensor, "batch token neuron"]]:
        """Terms, how much each path takes of what a token's neurons write, and the neurons' activations."""
        visual, kept = self.visual, {}
        later = range(self.layer + 1, visual.cfg.n_layers)

        def keep(x: Tensor, hook: Any) -> None:
            kept[hook.name] = wide(x)

        def keep_neurons(x: Tensor, hook: Any) -> None:
            kept["post"] = wide(x[..., self.index.to(x.device)])

        hooks: list[Hook] = [(f"blocks.{at}.ln1.hook_scale", keep) for at in later]
        hooks += [(f"blocks.{self.layer}.mlp.hook_post", keep_neurons)]
        with visual.hooks(fwd_hooks=hooks):
            images = images.to(visual.device, visual.dtype)
            d = decompose(visual, images, normalize=normalize, tokens=heads[self.layer + 1 :])
        scales = torch.stack([kept[name] for name, _ in hooks[:-1]], dim=1)[..., 0]  # [batch later token]
        scales = scales.repeat_interleave(visual.cfg.n_heads, dim=1)
        terms = d.token_terms
        assert terms is not None
        weights = terms.attention * terms.scale[..., None] / scales[:, :, None]
        return d, weights.flatten(1, 2), kept["post"]

    @property
    def number(self) -> int:
        """Of paths."""
        return len(self.read) * (1 if self.fixed.read.out is None else len(self.fixed.read.out))

    def coords(
        self, images: Float[Tensor, "batch 3 h w"], normalize: bool
    ) -> tuple[Float[Tensor, "batch path neuron"], Float[Tensor, " batch"]]:
        """`c`, and the features' lengths."""
        d, weights, post = self.seen(images, normalize)
        with full_precision(post):
            return weights @ post, d.features.norm(dim=1)

    def maps(self, which: slice) -> Float[Tensor, "path neuron d_embed"]:
        """What `c` is multiplied by, of some of the neurons."""
        with full_precision(self.written):
            return self.onward((self.written[which] @ self.read)[:, None])

    def onward(self, z: Float[Tensor, "later pool_head row d_head"]) -> Float[Tensor, "path row d_embed"]:
        """From what reaches a later head's z to the joint space, path by path."""
        maps, first = self.fixed.maps, self.layer + 1
        if maps.tokens is None:
            return z[:, 0] @ maps.heads[first:].flatten(0, 1)
        assert maps.out is not None
        return (z @ maps.tokens[first:].flatten(0, 1) @ maps.out).flatten(0, 1)


class PathMoments:
    """Moments of `c` over images, batch after batch; of size [neuron path path], whatever the images.

    Attributes:
        mean, squares: of `c`, and the sum of `x x^T`, where `x` is `c` past its mean.
        lean: the sum of `(x G x) x`; `G` has the products of the paths' maps, so that `x G x` is the square of the effect's length.
        length: the features' mean length.

    Raises:
        ValueError: memory holds no moments of so many neurons and paths.
    """

    def __init__(self, paths: Paths) -> None:
        n, each, like = len(paths.index), paths.number, paths.written
        size, free = 2 * n * each * each * like.element_size(), room(like.device)
        if size > free:
            raise ValueError(
                f"expected neurons whose moments over {each} paths fit in {free / 2**30:.1f} GiB; received {n}, which "
                f"take {size / 2**30:.1f}; name fewer, such as neurons[layer, :{max(1, n * free // size)}]"
            )
        self.count, self.length = 0, 0.0
        self.mean, self.lean = like.new_zeros(n, each), like.new_zeros(n, each)
        self.squares, self.gram = like.new_zeros(n, each, each), like.new_empty(n, each, each)
        with full_precision(like):
            for piece in _slices(paths):
                maps = paths.maps(piece).transpose(0, 1)
                self.gram[piece] = maps @ maps.mT

    def add(self, coords: Float[Tensor, "batch path neuron"], lengths: Float[Tensor, " batch"]) -> None:
        """By the update of Chan et al. (1983), which does not subtract large numbers from each other, and its like for `lean`."""
        old, batch = self.count, len(coords)
        self.count += batch
        weight = batch / self.count
        mean = coords.mean(0).T
        x = coords.permute(2, 0, 1) - mean[:, None]
        delta = mean - self.mean
        with full_precision(coords):
            far = self.gram @ delta[..., None]
            apart = (far[..., 0] * delta).sum(1, keepdim=True)  # the square of the length between the means
            square = (x @ self.gram * x).sum(2)
            # sum_i (y G y) y with y = x + a is lean + a sum_i (x G x) + 2 (sum_i x x^T) G a + n (a G a) a: a for the old images, and the new
            before = (self.squares.flatten(1)[:, None] @ self.gram.flatten(1)[..., None])[..., 0]
            back, on = -weight, 1 - weight
            self.lean += (square[:, None] @ x)[:, 0]
            self.lean += (back * before + on * square.sum(1, keepdim=True)) * delta
            self.lean += 2 * (back * (self.squares @ far) + on * (x.mT @ (x @ far)))[..., 0]
            self.lean += (old * back**3 + batch * on**3) * apart * delta
            self.squares.baddbmm_(x.mT, x)
            self.squares.baddbmm_(delta[:, :, None], delta[:, None], alpha=old * weight)
        self.mean += delta * weight
        self.length += (float(lengths.mean()) - self.length) * weight


@dataclass(frozen=True, eq=False, repr=False)
class SecondOrder(Result):
    """What neurons of a layer do through later heads, over images.

    Attributes:
        layer, index: which neurons.
        mean: their mean effects, in the joint space.
        direction: of each neuron the unit vector along which its effect varies most over images, with the sign of the side on
            which it is strong (see `decompclip.operators.second_order`; of the mean effect, where neither side is stronger).
            Zero where the effect varies by no more than rounding of features does.
        spread: root mean square length of the effect past its mean.
        share: of the square of the spread, what lies along the direction: 1 where the effect is of rank one, 0 without one.
        words: texts with their weights, none negative, whose combination comes near the direction, the heaviest first; none
            of a tower without a text tower, or where there is no direction.
        fidelity: cosine of the two; nan without texts.
        coords: the mean of `c`, which mean-ablation fills in.
        n_images: behind the numbers.
        normalized: whether features are of length one.
        model: fingerprint of the tower.
    """

    layer: int
    index: Int[Tensor, " neuron"]
    mean: Float[Tensor, "neuron d_embed"]
    direction: Float[Tensor, "neuron d_embed"]
    spread: Float[Tensor, " neuron"]
    share: Float[Tensor, " neuron"]
    words: tuple[tuple[tuple[str, float], ...], ...]
    fidelity: Float[Tensor, " neuron"]
    coords: Float[Tensor, "path neuron"]
    n_images: int
    normalized: bool
    model: Float[Tensor, " weight"] | None

    largest = "spread"

    @property
    def labels(self) -> list[str]:
        """A name for each neuron."""
        return [f"neurons[{self.layer}, {i}]" for i in self.index.tolist()]

    def top(self, k: int = 10) -> SecondOrder:
        """The k neurons whose effects vary most, those first.

        Raises:
            ValueError: k is no whole number of at least 1.
        """
        check_count(k, "neurons")
        return self.select(self.spread.argsort(descending=True, stable=True)[:k].tolist())

    def select(self, places: Sequence[int]) -> SecondOrder:
        """Those of some neurons, by their places.

        Raises:
            ValueError: no places.
        """
        at = list(places)
        if not at:
            raise ValueError("expected places of neurons; received none; name at least one")
        names = ("index", "mean", "direction", "spread", "share", "fidelity")
        own = {name: getattr(self, name)[at] for name in names}
        words = tuple(self.words[i] for i in at)
        return replace(self, **own, words=words, coords=self.coords[:, at])

    def to_frame(self) -> pd.DataFrame:
        """One row a neuron: layer, neuron, spread, share, length of the mean effect, fidelity, texts."""
        import pandas as pd

        columns = {"spread": self.spread, "share": self.share, "mean": self.mean.norm(dim=1)}
        own: dict[str, Any] = {"layer": self.layer, "neuron": self.index.numpy()}
        own |= {name: x.numpy() for name, x in (columns | {"fidelity": self.fidelity}).items()}
        return pd.DataFrame(own | {"texts": [show_words(words) for words in self.words]})

    def figure(self) -> go.Figure:
        """The neurons whose effects vary most, and how much of that is along one direction."""
        from decompclip.figures.bars import bar_rows

        top = self.top(SHOWN)
        rows = [
            f"{label}: {words[0][0]}" if words else label
            for label, words in zip(top.labels, top.words, strict=True)
        ]
        along = (top.spread * top.share.sqrt()).tolist()
        return bar_rows(
            rows,
            {"whole effect": top.spread.tolist(), "along its direction": along},
            unit="length of the effect past its mean",
            notes=[show_words(words) for words in top.words],
            row_height=26,
        )

    @torch.no_grad()
    def effects(
        self, model: HookedViT | HasTower, images: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch neuron d_embed"]:
        """The effects in some images, whole: `top(k)` of them first, where neurons are many.

        Args:
            model: the same one.
            images: a batch as the tower takes it.

        Raises:
            ValueError: another model.
        """
        paths = self._paths(model)
        coords, _ = paths.coords(images, self.normalized)
        with full_precision(coords):
            return torch.einsum("bpn,pnd->bnd", coords, paths.maps(slice(None)))

    @torch.no_grad()
    def project(
        self, model: HookedViT | HasTower, images: Images, *, batch_size: int = 32
    ) -> Float[Tensor, "image neuron"]:
        """How far each image moves each neuron's effect along its direction, from the mean.

        Args:
            model: the same one.
            images: as `second_order` takes them.
            batch_size: images at a time.

        Raises:
            ValueError: another model, or no images.
        """
        paths, own = self._paths(model), []
        with full_precision(paths.written):
            for piece in _slices(paths):
                direction = self.direction[piece].to(paths.written)
                own.append(torch.einsum("pnd,nd->pn", paths.maps(piece), direction))
        along, mean = torch.cat(own, dim=1), self.coords.to(paths.written)
        batches = image_batches(images, batch_size=batch_size, device=paths.visual.device)
        found = [((paths.coords(x, self.normalized)[0] - mean) * along).sum(1).cpu() for x in batches]
        if not found:
            raise ValueError("expected images; received none; check the image source")
        return torch.cat(found)

    @torch.no_grad()
    def mean_ablate(self, model: HookedViT | HasTower, images: Float[Tensor, "batch 3 h w"]) -> Decomposition:
        """Terms of images whose neurons do through later heads what they do on average; all else is as it was.

        The neurons' own terms stay, and each later head's term changes by what it had of them.

        Args:
            model: the same one.
            images: a batch as the tower takes it.

        Raises:
            ValueError: another model.
        """
        paths = self._paths(model)
        d, weights, post = paths.seen(images, self.normalized)
        with full_precision(post):
            mean = self.coords.to(post) @ paths.written
            change = (mean - weights @ (post @ paths.written)).unflatten(1, (len(paths.read), -1))
            z = torch.einsum("bkqd,kde->bkqe", change, paths.read)
            if d.maps.direct:
                each = paths.onward(z.permute(1, 2, 0, 3)).unflatten(0, z.shape[1:3])
                z = each.sum(1).transpose(0, 1)[:, :, None]  # a coordinate there is one of the term's
        coords = d.coords.clone()
        coords[:, self.layer + 1 :] += z[:, :, 0].unflatten(1, (-1, d.n_heads))
        return d.edit(coords=coords)

    def _paths(self, model: HookedViT | HasTower) -> Paths:
        visual = tower(model)
        theirs = frozen(visual, "centred").maps.fingerprint
        if self.model is not None and theirs is not None and not same_model(self.model, theirs):
            raise ValueError(
                f"expected the model whose neurons these are; received one of other weights beside {self!r}; ask for its own "
                "by second_order"
            )
        return Paths.of(visual, self.layer, self.index)

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        best = self.top(1)
        words = f" ({show_words(best.words[0][:2])})" if best.words[0] else ""
        return (
            f"SecondOrder({len(self)} neurons of layer {self.layer}, {self.n_images} images; most by {best.labels[0]}, "
            f"{float(best.spread[0]):.3g}{words})"
        )


@torch.no_grad()
def second_order(
    model: HookedCLIP | HookedViT,
    images: Images,
    chosen: Components,
    *,
    texts: TextFeatures | Sequence[str] | Path | None = None,
    n_texts: int = 5,
    coherence: float = COHERENCE,
    normalize: bool = False,
    batch_size: int = 32,
) -> SecondOrder:
    """What neurons do through the heads of later layers: mean effects, principal directions over images, and their words.

    Attention, scales of LayerNorms and outputs of MLPs are held at each image's own values: see
    `decompclip.operators.second_order`, also for where directions, signs and words differ from the paper's.

    Args:
        model: a CLIP; or an image tower, whose directions get no words.
        images: as the tower takes them: `[batch 3 h w]`, batches, or a source. They are streamed.
        chosen: neurons of one layer: `neurons[9]`, `neurons[9, [5, 7]]`.
        texts: as `textspan` takes them; by default its pool for this model and the model's class names.
        n_texts: at most so many a direction.
        coherence: as `decompclip.operators.weights.weight_directions` has it.
        normalize: whether effects are on unit features, whose length is held too.
        batch_size: images at a time.

    Returns:
        The effects, neuron by neuron, on the CPU.

    Raises:
        IndexError: a layer or neuron that the tower does not have.
        ValueError: other components than neurons of one layer with heads behind it; a tower that normalises what its MLPs put
            out; fewer than two images; texts for a tower alone, or too few; more neurons than memory holds moments of.
    """
    visual = tower(model)
    paths, pool = Paths.named(visual, chosen), None
    if isinstance(model, HookedViT):
        if texts is not None:
            raise ValueError(
                "expected a CLIP with texts; received an image tower; pass the model, or no texts"
            )
    else:
        pool = text_pool(model, texts, n_texts)
    moments = PathMoments(paths)
    for batch in image_batches(images, batch_size=batch_size, device=visual.device):
        moments.add(*paths.coords(batch, normalize))
    if moments.count < 2:
        raise ValueError(
            f"expected at least two images, over which effects vary; received {moments.count}; check the image source"
        )
    parts = [_principal(paths, moments, piece) for piece in _slices(paths)]
    mean, direction, spread, share = (torch.cat(own).cpu() for own in zip(*parts, strict=True))
    words: list[tuple[tuple[str, float], ...]] = [()] * len(mean)
    fidelity = torch.full_like(spread, torch.nan)
    if pool is not None:
        words, fidelity = words_of(direction, pool, n_texts, coherence)
    return SecondOrder(
        layer=paths.layer,
        index=paths.index.cpu(),
        mean=mean,
        direction=direction,
        spread=spread,
        share=share,
        words=tuple(words),
        fidelity=fidelity,
        coords=moments.mean.T.cpu(),
        n_images=moments.count,
        normalized=normalize,
        model=paths.fixed.maps.fingerprint,
    )


def _slices(paths: Paths) -> list[slice]:
    """Neurons in as few slices as their maps and covariances may take memory: fp64, and what is at work beside."""
    number, width = paths.number, paths.fixed.maps.heads.shape[-1]
    return list(
        pieces(len(paths.index), number * (width * 3 + number * 4) * 8, temporary(paths.written.device))
    )


def _principal(paths: Paths, moments: PathMoments, which: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean effects, their directions, spreads and shares: a covariance in the joint space by one over paths, in fp64."""
    maps = paths.maps(which).double().transpose(0, 1)  # [neuron path d_embed]
    mean = torch.einsum("np,npd->nd", moments.mean[which].double(), maps)
    with one_thread():
        values, vectors = torch.linalg.eigh(moments.squares[which].double() / moments.count)
        rows = (vectors * values.clamp_min(0).sqrt()[:, None]).mT @ maps  # rows.T @ rows: the covariance
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
    square = rows.square().sum((1, 2))
    spread = square.sqrt()
    direction = torch.nn.functional.normalize(torch.einsum("np,npd->nd", vectors[..., -1], rows))
    lean = torch.einsum("np,npd->nd", moments.lean[which].double() / moments.count, maps)
    side, eps = (lean * direction).sum(1), torch.finfo(moments.squares.dtype).eps
    side = torch.where(side.abs() > eps**0.5 * spread**3, side, (mean * direction).sum(1))
    told = spread > ROUNDING * eps * mean.norm(dim=1).clamp_min(moments.length)
    direction = direction * torch.copysign(told.to(side), side)[:, None]
    share = (values[:, -1] / square.clamp_min(torch.finfo(square.dtype).tiny)).clamp_max(1) * told
    return mean, direction, spread, share
