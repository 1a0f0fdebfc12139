"""Decomposition: an image feature as a sum of terms, one for each head, MLP and the embedding (docs/method.md, section 1).

Also: whether two holders of terms may be compared, and files of ours with a digest of what they hold.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, wraps
from html import escape
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from decompclip.decomposition.components import heads as all_heads, resolve
from decompclip.decomposition.maps import Convention, TermMaps, full_precision, pieces, temporary
from decompclip.decomposition.terms import TokenTerms
from decompclip.files import atomic_write

F = TypeVar("F", bound=Callable[..., Any])

FORMAT = "decompclip.decomposition/2"
SIZES = ("image_size", "patch_size")
TERMS = ("coords", "mlps", "embed", "pool", "bias_coords")


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Terms in the joint space that sum to the image features, for a batch of images.

    Heads are kept as coordinates: `heads = coords @ maps.heads`, formed only when asked for.
    Made by `decompclip.decomposition.capture.decompose` (`model.decompose(images)`).

    Attributes:
        coords: of the heads' terms; `coord` is d_head, or d_head + 3 in the paper's convention.
        mlps: terms of the MLPs.
        embed: term of the stream at the input of block 0.
        bias_coords: scales of the constant terms `maps.bias` (their names: `maps.bias_names`).
        pool: term of the attention pool's own MLP (SigLIP, PE); its axis is empty elsewhere, and need not be given.
        normalized: whether the terms were divided by the length of the feature, and so sum to a unit vector.
        target: the tower's own feature that the terms sum to; None after an edit.
        token_terms: what `tokens`, `token_logits` and `attention` read, for the heads asked for.
    """

    coords: Float[Tensor, "batch layer head coord"]
    mlps: Float[Tensor, "batch layer d_embed"]
    embed: Float[Tensor, "batch d_embed"]
    bias_coords: Float[Tensor, "batch bias"]
    maps: TermMaps
    normalized: bool
    target: Float[Tensor, "batch d_embed"] | None = None
    token_terms: TokenTerms | None = None
    pool: Float[Tensor, "batch pool d_embed"] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.pool is None:
            object.__setattr__(self, "pool", self.embed.new_empty(len(self.embed), 0, self.embed.shape[-1]))
        batch, (layers, heads, coord, d_embed) = len(self.coords), self.maps.heads.shape
        shapes = {
            "coords": (batch, layers, heads, coord),
            "mlps": (batch, layers, d_embed),
            "embed": (batch, d_embed),
            "bias_coords": (batch, len(self.maps.bias)),
            "target": (batch, d_embed),
            "pool": (batch, self.pool.shape[1], d_embed),
        }
        for name, expected in shapes.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != expected:
                raise ValueError(
                    f"expected {name} of shape {list(expected)}, as its maps and coords have it; received "
                    f"{list(value.shape)}; use the maps of the same model"
                )

    # What it is

    @property
    def convention(self) -> Convention:
        return self.maps.convention

    @property
    def n_layers(self) -> int:
        return self.maps.heads.shape[0]

    @property
    def n_heads(self) -> int:
        return self.maps.heads.shape[1]

    @property
    def has_pool(self) -> bool:
        """Whether the tower's attention pooling has an MLP of its own."""
        return bool(self.pool.shape[1])

    @property
    def d_embed(self) -> int:
        return self.maps.heads.shape[-1]

    def __len__(self) -> int:
        return len(self.coords)

    # Terms

    @property
    def heads(self) -> Float[Tensor, "batch layer head d_embed"]:
        """The heads' terms, formed anew at each call."""
        return self.maps.terms(self.coords)

    @property
    def bias(self) -> Float[Tensor, "batch d_embed"]:
        """The constant terms together."""
        with full_precision(self.embed):
            return self.bias_coords @ self.maps.bias

    @cached_property
    def features(self) -> Float[Tensor, "batch d_embed"]:
        """The sum of all terms; the image features."""
        others = self.mlps.sum(1) + self.embed + self.pool.sum(1) + self.bias
        return self.maps.total(self.coords) + others

    @property
    def sum_error(self) -> float:
        """Largest miss of the sum against the tower's own feature, as a share of that image's largest entry.

        Raises:
            ValueError: edited terms sum to no feature of the tower.
        """
        if self.target is None:
            raise ValueError(
                "expected a decomposition as the tower gave it; received an edited one, whose terms are not "
                "meant to sum to the tower's feature; read sum_error before the edit"
            )
        if not len(self):
            return 0.0
        misses = (self.features - self.target).abs().amax(1)
        return float((misses / self.target.abs().amax(1)).max())

    # Tokens

    def attention(
        self, layer: int | None = None, head: int | None = None
    ) -> Float[Tensor, "batch *kept_head token"]:
        """The pooled row's attention over source tokens (prefix tokens first, patches follow row by row).

        Where several rows are pooled it is their mean, by the weight with which each of them is read.

        Args:
            layer: of the head; from the end where negative. Without layer and head: all kept heads, in order.
            head: of that layer.

        Raises:
            LookupError: the head's tokens were not kept (IndexError: there is no such head).
            ValueError: a layer without a head.
        """
        terms = self._asked(layer, head)
        share = terms.scale / terms.scale.sum(2, keepdim=True)
        attention = torch.einsum("bkqn,bkq->bkn", terms.attention, share)
        return attention if layer is None else attention[:, 0]

    def tokens(self, layer: int, head: int) -> Float[Tensor, "batch token d_embed"]:
        """What each source token contributes to the head's term; the sum over tokens is the term.

        In the paper's convention the head's constants are shared equally among the tokens, as its code does.

        Args:
            layer: of the head; from the end where negative.
            head: of that layer.

        Raises:
            LookupError: the head's tokens were not kept (IndexError: there is no such head).
        """
        return self._contract(layer, head, None)

    def token_logits(
        self, text: Float[Tensor, "text d_embed"], layer: int | None = None, head: int | None = None
    ) -> Float[Tensor, "batch *kept_head token text"]:
        """Dot product of each token's contribution with text features, without forming the contributions.

        Args:
            text: features of texts by the model's own text tower.
            layer: of the head; from the end where negative. Without layer and head: all kept heads, in order, in one
                product.
            head: of that layer.

        Raises:
            LookupError: the head's tokens were not kept (IndexError: there is no such head).
            ValueError: the texts are of another width, or a layer without a head.
        """
        if text.ndim != 2 or text.shape[1] != self.d_embed:
            raise ValueError(
                f"expected text features [text, {self.d_embed}]; received {list(text.shape)}; encode the texts "
                "with the text tower of the same model"
            )
        return self._contract(layer, head, text)

    def token_sums(self, directions: Float[Tensor, "batch d_embed"]) -> Float[Tensor, "batch token"]:
        """What each source token contributes, through all kept heads together, to its image's own direction.

        The sum over heads of `tokens(layer, head) @ direction`, without forming the contributions.

        Args:
            directions: of each image; a text's feature, say.

        Raises:
            LookupError: no tokens were kept.
            ValueError: not one direction for each image.
        """
        if directions.shape != self.embed.shape:
            raise ValueError(
                f"expected one direction for each image, {list(self.embed.shape)}; received {list(directions.shape)}"
            )
        terms, maps = self._asked(None, None), self.maps
        with full_precision(self.embed):
            towards = directions.to(self.coords.dtype)
            if maps.direct:
                assert maps.tokens is not None and maps.out is not None
                read = torch.einsum("kqem,qmd,bd->bkqe", terms.of_kept(maps.tokens), maps.out, towards)
            else:
                heads = terms.of_kept(maps.heads)[:, : maps.d_head]
                read = torch.einsum("kcd,bd->bkc", heads, towards)[:, :, None]
            values = torch.einsum("bkne,bkqe->bkqn", terms.values, read)
            sums = torch.einsum("bkqn,bkqn,bkq->bn", terms.attention, values, terms.scale)
            if self.convention == "centred":
                return sums
            coords = terms.of_kept(self.coords.permute(1, 2, 0, 3))
            whole = torch.einsum("kbc,kcd,bd->b", coords, terms.of_kept(maps.heads), towards)
            return sums + (whole - sums.sum(1))[:, None] / sums.shape[1]  # constants: shared equally

    def _asked(self, layer: int | None, head: int | None) -> TokenTerms:
        """What was kept of all heads, or of one."""
        if layer is None and head is None:
            words, needed = "tokens=True)", None
        elif layer is None or head is None:
            raise ValueError(
                f"expected a layer and a head, or neither for all kept heads; received {layer} and {head}"
            )
        else:
            needed = resolve(all_heads[layer, head], self).heads.nonzero()[0].tolist()
            words = f"tokens=heads[{needed[0]}, {needed[1]}]), or tokens=True for all heads"
        if self.token_terms is None:
            raise LookupError(
                "expected a decomposition that kept its tokens; received one without; ask for them: "
                f"decompose(images, {words} (an edit of heads drops them)"
            )
        return self.token_terms if needed is None else self.token_terms.only(*needed)

    def _contract(
        self, layer: int | None, head: int | None, text: Float[Tensor, "text d_embed"] | None
    ) -> Float[Tensor, "batch *kept_head token out"]:
        """Tokens' contributions, or their products with texts: one product for as many heads as memory holds."""
        terms, maps = self._asked(layer, head), self.maps
        with full_precision(self.embed):
            text = None if text is None else text.to(maps.heads).T
            into = self._into(terms, text)
            d_head = terms.values.shape[-1]
            own = into if maps.direct else into[:, :d_head]
            # head by head: so they lie, and each head has one product for all images
            weights = (terms.attention * terms.scale[..., None]).permute(1, 0, 3, 2).contiguous()
            values = terms.values.transpose(0, 1)
            width = values[0].numel() * weights.shape[3] * values.element_size()
            parts = []
            for piece in pieces(len(values), width, temporary(values.device)):
                x = weights[piece, ..., None] * values[piece, :, :, None]
                parts.append(torch.bmm(x.flatten(3).flatten(1, 2), own[piece]))
            shares = (torch.cat(parts) if len(parts) > 1 else parts[0]).unflatten(1, values.shape[1:3])
            if self.convention == "paper":  # constants: shared equally
                coords = terms.of_kept(self.coords.permute(1, 2, 0, 3))
                if maps.direct:
                    rest = (coords if text is None else coords @ text) - shares.sum(2)
                else:
                    rest = coords[..., d_head:] @ into[:, d_head:]
                shares = shares + rest[:, :, None] / shares.shape[2]
        shares = shares.transpose(0, 1)
        return shares if layer is None else shares[:, 0]

    def _into(
        self, terms: TokenTerms, text: Float[Tensor, "d_embed text"] | None
    ) -> Float[Tensor, "kept_head coord out"]:
        """From what the pooling's heads read of a head's z to the joint space, or on to texts."""
        maps = self.maps
        if maps.direct:
            assert maps.tokens is not None and maps.out is not None
            out = maps.out if text is None else maps.out @ text
            return (terms.of_kept(maps.tokens) @ out).flatten(1, 2)
        written = terms.of_kept(maps.heads)
        return written if text is None else written @ text

    # Derived decompositions

    def edit(
        self,
        *,
        coords: Float[Tensor, "batch layer head coord"] | None = None,
        mlps: Float[Tensor, "batch layer d_embed"] | None = None,
        embed: Float[Tensor, "batch d_embed"] | None = None,
        pool: Float[Tensor, "batch pool d_embed"] | None = None,
    ) -> Decomposition:
        """The same images with other terms; itself where nothing is given.

        Args:
            coords: of the heads, of the shape of the field of the same name, as the others are.
            mlps: terms of the MLPs.
            embed: the term of the embedding.
            pool: terms of the attention pool.

        Raises:
            ValueError: a shape differs.
        """
        given = {"coords": coords, "mlps": mlps, "embed": embed, "pool": pool}
        changes = {name: x for name, x in given.items() if x is not None}
        if not changes:
            return self
        kept = self.token_terms if coords is None else None
        return self.with_fields(**changes, target=None, token_terms=kept)

    def with_fields(self, **changes: Any) -> Decomposition:
        """With other values of some fields, as `dataclasses.replace`; a plain decomposition, also of a `Store`."""
        kept = {f.name: getattr(self, f.name) for f in fields(Decomposition) if f.name not in changes}
        return Decomposition(**kept, **changes)

    def shards(self) -> Iterator[Decomposition]:
        """The images as they are kept: itself, where it is no `Store`."""
        yield self

    @staticmethod
    def cat(parts: Sequence[Decomposition]) -> Decomposition:
        """The images of several decompositions of one model, in order.

        Args:
            parts: decompositions of batches, in the order wanted.

        Raises:
            ValueError: there are none, or they are of different models or options.
        """
        if not parts:
            raise ValueError("expected at least one decomposition; received none")
        first = parts[0]
        if len(parts) == 1:
            return first
        for other in parts[1:]:
            same_types = (first.coords.dtype, first.maps.heads.dtype) == (
                other.coords.dtype,
                other.maps.heads.dtype,
            )
            if other.normalized != first.normalized or not same_types or not first.maps.matches(other.maps):
                raise ValueError(
                    "expected decompositions of one model with the same options; received different ones; "
                    "decompose all of them alike"
                )
        terms = [part.token_terms for part in parts if part.token_terms is not None]
        if any(not torch.equal(x.kept.cpu(), terms[0].kept.cpu()) for x in terms):
            raise ValueError(
                "expected decompositions that kept the tokens of the same heads; received different ones; decompose all "
                "of them with the same tokens="
            )
        token_terms = TokenTerms.cat(terms) if len(terms) == len(parts) else None
        whole = {
            f.name: torch.cat([getattr(part, f.name) for part in parts])
            for f in fields(first)
            if all(isinstance(getattr(part, f.name), Tensor) for part in parts)
        }
        return first.with_fields(**{"target": None, **whole}, token_terms=token_terms)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Decomposition:
        """Some of the images: a slice, a mask, indices, or a number (which keeps the batch axis).

        Raises:
            IndexError: there is no such image.
        """
        index = self._checked(index)
        return self._map(lambda x: x[index], self.maps)

    def _checked(self, index: Any) -> Any:
        """An index that keeps the batch axis; raises IndexError where it is of no image, or has axes of its own."""
        if getattr(index, "ndim", 1) > 1:
            raise IndexError(f"expected indices of one axis; received {list(index.shape)}; flatten them")
        if isinstance(index, slice | list) or getattr(index, "ndim", 0):
            return index
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an image in 0..{len(self) - 1}; received {index}")
        return [index]

    def to(self, *args: Any, **kwargs: Any) -> Decomposition:
        """On another device or in another dtype, as `torch.Tensor.to`.

        Args:
            *args: a device, a dtype, or both.
            **kwargs: as `torch.Tensor.to`.
        """

        return self._map(lambda x: x.to(*args, **kwargs), self.maps.to(*args, **kwargs))

    def _map(self, function: Callable[[Tensor], Tensor], maps: TermMaps) -> Decomposition:
        own = {f.name: getattr(self, f.name) for f in fields(Decomposition)}
        changed = {name: function(x) for name, x in own.items() if isinstance(x, Tensor)}
        token_terms = self.token_terms and self.token_terms.map(function)
        return self.with_fields(**changed, maps=maps, token_terms=token_terms)

    # Files

    def save(self, path: str | Path) -> Path:
        """Write to a safetensors file that stands alone: the maps are in it. Returns its path.

        Args:
            path: of the file to write.
        """
        tensors: dict[str, Tensor | None] = {
            **{name: getattr(self, name) for name in (*TERMS, "target")},
            **maps_stored(self.maps),
        }
        if self.token_terms is not None:
            tensors |= {
                f"tokens.{name}": x for name, x in vars(self.token_terms).items() if name not in SIZES
            }
        about = {
            **maps_facts(self.maps),
            "normalized": self.normalized,
            **{name: getattr(self.token_terms, name, None) for name in SIZES},
        }
        known = {name: x for name, x in tensors.items() if x is not None}
        return write_tensors(Path(path), known, FORMAT, about)

    @staticmethod
    def load(path: str | Path) -> Decomposition:
        """Read what `save` wrote.

        Args:
            path: of the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is broken, or holds something else.
        """
        tensors, about = read_tensors(Path(path), FORMAT, "a saved decomposition", "Decomposition.save")
        maps = maps_restored(tensors, about)
        tokens = {key[7:]: tensors.pop(key) for key in [*tensors] if key.startswith("tokens.")}
        sizes: dict[str, Any] = {name: tuple(about[name]) if about.get(name) else None for name in SIZES}
        if tokens:
            tokens["kept"] = tokens["kept"].to(torch.bool)
        return Decomposition(
            **tensors,
            maps=maps,
            normalized=bool(about["normalized"]),
            token_terms=TokenTerms(**tokens, **sizes) if tokens else None,
        )

    # Words

    def _facts(self) -> dict[str, str]:
        """What a reader wants to know first."""
        return {
            "images": str(len(self)),
            "heads": f"{self.n_layers} x {self.n_heads}",
            "MLPs": f"{self.n_layers}" + (", 1 of the pool" if self.has_pool else ""),
            "width": str(self.d_embed),
            "convention": self.convention,
            "sums to": "unit features" if self.normalized else "features",
            "tokens": "none kept"
            if self.token_terms is None
            else f"of {int(self.token_terms.kept.sum())} heads",
            "sum error": "edited" if self.target is None else f"{self.sum_error:.1e}",
        }

    def __repr__(self) -> str:
        return f"Decomposition({', '.join(f'{name}: {value}' for name, value in self._facts().items())})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in self._facts().items()
        )
        return f"<table><caption>Decomposition</caption>{rows}</table>"


def check_terms(data: object) -> None:
    """Raise a TypeError where images, a model or another thing stands in a decomposition's place."""
    if not isinstance(data, Decomposition):
        raise TypeError(
            f"expected a decomposition, as model.decompose(images) gives; received a {type(data).__name__}"
        )


def batches(data: Decomposition | Iterable[Decomposition]) -> Iterator[Decomposition]:
    """Decompositions one after another: of several, of one, or of a `Store`, which is read shard by shard.

    Raises:
        TypeError: images, a model or another thing in their place, or among them.
    """
    for d in data if isinstance(data, Iterable) else [data]:
        check_terms(d)
        yield from d.shards()


def by_shards(method: F) -> F:
    """A method that gives a row for each image of a decomposition: of a `Store`, shard by shard."""

    @wraps(method)
    def run(self: Any, d: Decomposition, *args: Any, **options: Any) -> Tensor:
        return torch.cat([method(self, part, *args, **options) for part in d.shards()])

    return cast(F, run)


def maps_stored(maps: TermMaps) -> dict[str, Tensor | None]:
    """The tensors of maps, for a file."""
    # Behind an attention pool the maps of heads are views of one identity.
    heads = maps.heads[:1, :1] if maps.direct else maps.heads
    others = {f"maps.{name}": getattr(maps, name) for name in ("bias", "tokens", "out", "fingerprint")}
    return {"maps.heads": heads, **others}


def maps_facts(maps: TermMaps) -> dict[str, Any]:
    """What a file says about maps beside their tensors."""
    return {"convention": maps.convention, "bias_names": maps.bias_names, "extras": maps.extras}


def maps_restored(tensors: dict[str, Tensor], about: Mapping[str, Any]) -> TermMaps:
    """The maps of a file, taken out of its tensors."""
    kept = {key[5:]: tensors.pop(key) for key in [*tensors] if key.startswith("maps.")}
    if "tokens" in kept:
        kept["heads"] = kept["heads"].expand(*kept["tokens"].shape[:2], -1, -1)
    return TermMaps(
        **kept,
        bias_names=tuple(about["bias_names"]),
        convention=cast(Convention, about["convention"]),
        extras=about["extras"],
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], form: str, about: Mapping[str, Any]) -> Path:
    """Write tensors and facts about them, whole or not at all, with a digest of both."""
    stored = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
    text = json.dumps(about)
    metadata = {"format": form, "about": text, "sha256": _digest(stored, text)}
    with atomic_write(path) as partial:
        save_file(stored, partial, metadata=metadata)
        _in_order(partial)
    return path


def _in_order(path: Path) -> None:
    """Equal content gives equal bytes: safetensors writes metadata in another order each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length, "the same header in another order"
        file.seek(8)
        file.write(text)


def _digest(tensors: Mapping[str, Tensor], about: str) -> str:
    """SHA-256 of names, types, shapes and numbers, and of the facts about them."""
    found = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        x = tensors[name]
        found.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        found.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_tensors(path: Path, form: str, what: str, writer: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of ours, and what it says about them.

    Args:
        form: the format that its metadata must name.
        what, writer: what such a file holds and what writes it, for the errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, not as it was written, or holds something else. Files of older versions have no
            digest; their numbers are taken as they are.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected {what}; received {path}, which is no file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"expected a safetensors file; received {path}, which cannot be read ({error}); save it again"
        ) from error
    if metadata.get("format") != form:
        raise ValueError(
            f"expected a file of format {form}; received {path} of format {metadata.get('format', 'unknown')}; "
            f"write it with {writer}"
        )
    text = metadata.get("about", "")
    if "sha256" in metadata and metadata["sha256"] != _digest(tensors, text):
        raise ValueError(
            f"expected {path} as it was written; received other numbers than its digest is of: it was changed or damaged; "
            "copy it again, or save it again"
        )
    return tensors, json.loads(text)


@runtime_checkable
class HasTerms(Protocol):
    """What holds terms, or numbers made of them: decompositions, moments, points."""

    @property
    def maps(self) -> TermMaps: ...
    @property
    def normalized(self) -> bool: ...


def check_options(first: HasTerms, second: HasTerms) -> None:
    """Raises ValueError unless terms of both are of one convention and one length."""
    for name, ours, theirs in (
        ("convention", first.maps.convention, second.maps.convention),
        ("normalize", first.normalized, second.normalized),
    ):
        if ours != theirs:
            raise ValueError(
                f"expected terms with {name}={ours!r}, as those before; received {name}={theirs!r}; "
                "decompose all images with the same options"
            )


def check_alike(first: HasTerms, second: HasTerms) -> None:
    """Raises ValueError unless terms of both are comparable: one model, one convention, one length."""
    check_options(first, second)
    if not first.maps.matches(second.maps):
        raise ValueError(
            f"expected terms of one model; received those of another ({first.maps!r} and {second.maps!r}, or other "
            "weights); decompose all images with the same model"
        )
