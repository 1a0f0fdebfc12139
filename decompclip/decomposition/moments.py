"""Moments: mean and scatter of every component over a data set, streamed in fp64 and mergeable.

Everything is in coordinates, where a head's term has d_head numbers; `heads` maps the means on demand.
Merging is Chan, Golub and LeVeque's (1983): no sum of squares, which cancels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.decomposition import (
    TERMS,
    Decomposition,
    batches,
    check_options,
    maps_facts,
    maps_restored,
    maps_stored,
    read_tensors,
    write_tensors,
)
from decompclip.decomposition.maps import Convention, TermMaps
from decompclip.tower.vit import HasTower, Hook, HookedViT, tower

FORMAT = "decompclip.moments/1"
SCATTERED = TERMS[:4]


@dataclass(frozen=True, eq=False)
class StreamMeans:
    """Means of what components write to the stream, at each token position: the fills of causal mode."""

    z: Float[Tensor, "layer token head d_head"]
    mlp_out: Float[Tensor, "layer token d_model"]
    embed: Float[Tensor, "token d_model"]
    pool: Float[Tensor, "1 d_pool"] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Moments:
    """First and second moments of a data set's decompositions.

    Attributes:
        count: number of images.
        coords, mlps, embed, pool, bias_coords: means of the fields of the same name of `Decomposition`, fp64.
        scatter: sums of outer products about the mean, by field ("coords": [layer head coord coord],
            "mlps": [layer d_embed d_embed], "embed": [d_embed d_embed], "pool": [pool d_embed d_embed]); None where not asked for.
        streams: means of the raw stream writes, for causal mode; None where not asked for.
    """

    count: int
    coords: Float[Tensor, "layer head coord"]
    mlps: Float[Tensor, "layer d_embed"]
    embed: Float[Tensor, " d_embed"]
    pool: Float[Tensor, "pool d_embed"]
    bias_coords: Float[Tensor, " bias"]
    maps: TermMaps
    normalized: bool
    scatter: dict[str, Tensor] | None = None
    streams: StreamMeans | None = None

    @staticmethod
    def of(d: Decomposition | Iterable[Decomposition], *, second: bool = True) -> Moments:
        """The moments of one batch; of several, and of a `Store`, those of all together.

        Args:
            d: the batch.
            second: whether to keep second moments.

        Raises:
            ValueError: a batch is empty, its terms are not finite, or batches are of different models or options.
        """
        parts = (Moments._of(part, second) for part in batches(d))
        first = next(parts, None)
        if first is None:
            raise ValueError("expected decompositions; received none; check the image source")
        return reduce(Moments.merge, parts, first)

    @staticmethod
    def _of(d: Decomposition, second: bool) -> Moments:
        if not len(d):
            raise ValueError(
                "expected a decomposition of at least one image; received an empty one; check the image source"
            )
        check_finite(d)
        wide = {name: double(getattr(d, name)) for name in TERMS}
        means = {name: x.mean(0) for name, x in wide.items()}
        scatter = None
        if second:
            scatter = {name: _scatter(wide[name] - means[name]) for name in SCATTERED}
        form: dict[str, Any] = {"maps": d.maps, "normalized": d.normalized}
        return Moments(len(d), **means, **form, scatter=scatter)

    def merge(self, other: Moments) -> Moments:
        """The moments of the union. What only one side has (second moments, stream means) is dropped.

        Args:
            other: moments of other images.

        Raises:
            ValueError: the other's are of another convention, normalization or model.
        """
        self.check(other)
        count = self.count + other.count
        weight = other.count / count
        device = self.coords.device
        delta = {name: getattr(other, name).to(device) - getattr(self, name) for name in TERMS}
        means = {name: getattr(self, name) + weight * delta[name] for name in TERMS}
        scatter = streams = None
        if self.scatter is not None and other.scatter is not None:
            between = self.count * weight
            scatter = {
                name: self.scatter[name]
                + other.scatter[name].to(device)
                + between * _scatter(delta[name][None])
                for name in SCATTERED
            }
        if self.streams is not None and other.streams is not None:
            pairs = (
                (n, x, getattr(other.streams, n)) for n, x in vars(self.streams).items() if x is not None
            )
            streams = replace(self.streams, **{n: a + weight * (b.to(a.device) - a) for n, a, b in pairs})
        return replace(self, count=count, **means, scatter=scatter, streams=streams)

    @staticmethod
    def fit(
        model: HookedViT | HasTower,
        batches: Iterable[Float[Tensor, "_ 3 h w"]],
        *,
        convention: Convention = "centred",
        normalize: bool = False,
        second: bool = True,
        stream: bool = True,
    ) -> Moments:
        """The moments of a data set, one forward pass a batch.

        Args:
            model: a tower, or a model with one.
            batches: images as the tower takes them (past the model's normalisation).
            convention: as `model.decompose` takes it.
            normalize: as `model.decompose` takes it.
            second: whether to keep second moments.
            stream: whether to keep stream means, which causal mean-ablation needs.

        Raises:
            ValueError: there are no images.
        """
        visual = tower(model)
        if isinstance(batches, Tensor):
            raise ValueError(
                f"expected batches of images, one after another; received one tensor {list(batches.shape)}; a single "
                "batch is [images]"
            )

        def one(images: Tensor) -> Moments:
            means: dict[str, Tensor] = {}
            with visual.hooks(fwd_hooks=_stream_hooks(visual, means) if stream else []):
                d = decompose(visual, images, convention=convention, normalize=normalize)
            moments = Moments.of(d, second=second)
            return replace(moments, streams=_streams(means, visual.cfg.n_layers)) if stream else moments

        parts = (one(images) for images in batches)
        first = next(parts, None)
        if first is None:
            raise ValueError("expected batches of images; received none; check the image source")
        return reduce(Moments.merge, parts, first)

    def to(self, device: str | torch.device) -> Moments:
        """On another device, all in fp64 but the maps."""

        def moved(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: moved(part) for name, part in x.items()}
            if isinstance(x, StreamMeans):
                return StreamMeans(**moved(vars(x)))
            return x.to(device) if isinstance(x, Tensor | TermMaps) else x

        return Moments(**moved(vars(self)))

    def save(self, path: str | Path, **about: Any) -> Path:
        """Write to a safetensors file that stands alone: the maps are in it, and what was kept. Its size does not depend on the images.

        Args:
            path: of the file.
            about: facts for JSON that `load` has no use for.
        """
        parts = {"scatter": self.scatter, "streams": self.streams and vars(self.streams)}
        tensors: dict[str, Tensor | None] = {
            "count": torch.tensor(self.count),
            **{name: getattr(self, name) for name in TERMS},
            **{f"{kind}.{name}": x for kind, part in parts.items() for name, x in (part or {}).items()},
            **maps_stored(self.maps),
        }
        known = {name: x for name, x in tensors.items() if x is not None}
        facts = {**maps_facts(self.maps), "normalized": self.normalized, **about}
        return write_tensors(Path(path), known, FORMAT, facts)

    @staticmethod
    def load(path: str | Path) -> Moments:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is broken, or holds something else.
        """
        tensors, about = read_tensors(Path(path), FORMAT, "saved moments", "Moments.save")
        kinds: dict[str, dict[str, Tensor]] = {"scatter": {}, "streams": {}}
        for kind, part in kinds.items():
            for key in [key for key in tensors if key.startswith(f"{kind}.")]:
                part[key.removeprefix(f"{kind}.")] = tensors.pop(key)
        return Moments(
            int(tensors.pop("count")),
            maps=maps_restored(tensors, about),
            **tensors,
            normalized=bool(about["normalized"]),
            scatter=kinds["scatter"] or None,
            streams=StreamMeans(**kinds["streams"]) if kinds["streams"] else None,
        )

    def check(self, other: Moments | Decomposition) -> None:
        """Hold others' terms to be comparable with these moments.

        Args:
            other: what is to be compared.

        Raises:
            ValueError: they are of another convention, normalization, shape or model.
        """
        check_options(self, other)
        self.check_model(other.maps)

    def check_model(self, maps: TermMaps) -> None:
        """Hold a model's maps to be those that these moments were fitted under.

        Args:
            maps: of the model.

        Raises:
            ValueError: they are of another shape, or of other weights.
        """
        ours, theirs = list(self.maps.heads.shape), list(maps.heads.shape)
        if ours != theirs:
            raise ValueError(
                f"expected terms of a model with maps [layer, head, coord, d_embed] = {ours}, as these moments "
                f"have it; received {theirs}; fit the moments on the model they are used with"
            )
        if not self.maps.matches(maps):
            raise ValueError(
                "expected terms of the model that these moments were fitted on; received those of a model of the "
                "same shape with other weights; fit the moments on the model they are used with"
            )

    @property
    def n_layers(self) -> int:
        return self.coords.shape[0]

    @property
    def n_heads(self) -> int:
        return self.coords.shape[1]

    @property
    def has_pool(self) -> bool:
        """Whether the tower's attention pooling has an MLP of its own."""
        return bool(len(self.pool))

    @property
    def heads(self) -> Float[Tensor, "layer head d_embed"]:
        """The heads' mean terms."""
        return self.maps.terms(self.coords)

    @property
    def features(self) -> Float[Tensor, " d_embed"]:
        """The mean feature: the sum of the mean terms."""
        return (
            self.heads.sum((0, 1))
            + self.mlps.sum(0)
            + self.embed
            + self.pool.sum(0)
            + self.bias_coords @ self.maps.bias.double()
        )

    def covariance(self, field: str) -> Float[Tensor, "*part coord coord"]:
        """The mean of outer products of "coords", "mlps", "embed" or "pool" about the mean (divided by the count).

        Args:
            field: "coords", "mlps", "embed" or "pool".

        Raises:
            ValueError: second moments were not kept.
        """
        if self.scatter is None:
            raise ValueError(
                "expected moments with second moments; received means alone; fit them with second=True"
            )
        return self.scatter[field] / self.count

    def __repr__(self) -> str:
        layers, heads, _ = self.coords.shape
        kept = [name for name, x in (("second", self.scatter), ("streams", self.streams)) if x is not None]
        form = f"{self.maps.convention}{', normalized' if self.normalized else ''}"
        return f"Moments({self.count} images, {layers} x {heads} heads, {form}; {' and '.join(['means', *kept])})"


def check_finite(d: Decomposition, first: int = 0) -> None:
    """Hold terms to be numbers: one nan would make all statistics of its component nan.

    Args:
        first: images that went before, for the number in the message.

    Raises:
        ValueError: a term is nan or infinite.
    """
    bad = torch.zeros(len(d), dtype=torch.bool)
    for name in TERMS:
        bad |= ~getattr(d, name).flatten(1).isfinite().all(1).cpu()
    if bad.any():
        raise ValueError(
            f"expected finite terms; received nan or inf in those of {int(bad.sum())} images, first of image "
            f"{first + int(bad.nonzero()[0])}; leave these images out, or decompose in fp32"
        )


def double(x: Tensor) -> Tensor:
    """In fp64; on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _scatter(x: Float[Tensor, "batch *part coord"]) -> Float[Tensor, "*part coord coord"]:
    return torch.einsum("b...r,b...s->...rs", x, x)


def _stream_hooks(visual: HookedViT, means: dict[str, Tensor]) -> list[Hook]:
    def keep(x: Tensor, hook: Any) -> None:
        means[hook.name] = double(x.detach()).mean(0)

    layers = range(visual.cfg.n_layers)
    each = [f"blocks.{layer}.{name}" for layer in layers for name in ("attn.hook_z", "hook_mlp_out")]
    pool = ["pool.hook_mlp_out"] if visual.cfg.pool_mlp else []
    return [(name, keep) for name in ("blocks.0.hook_resid_pre", *each, *pool)]


def _streams(means: dict[str, Tensor], n_layers: int) -> StreamMeans:
    z, mlp_out = (
        torch.stack([means[f"blocks.{layer}.{name}"] for layer in range(n_layers)])
        for name in ("attn.hook_z", "hook_mlp_out")
    )
    return StreamMeans(z, mlp_out, means["blocks.0.hook_resid_pre"], means.get("pool.hook_mlp_out"))
