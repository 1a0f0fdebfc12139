"""Where heads look, and what they contribute from there: maps over the patches of images (docs/method.md, section 4).

    attention_maps(model, images, heads[-1])                         the pooled row's attention
    contribution_maps(model, images, "a star", heads[-1])            what each patch adds to the similarity to a text
    contribution_maps(model, images, "a star", against="a ring")     ... to the difference of two similarities
    contribution_maps(d, texts)                                      ... to many texts, of a decomposition with tokens
    rollout(model, images)                                           the attention of all layers, multiplied

Attention says where a head looks; only the contribution says what that does to the answer. Contribution maps are those
of He et al., Figure 3.

Attention rollout (Abnar and Zuidema, 2020) is the baseline that knows of attention alone: the patterns of all layers,
each averaged over its heads and mixed with the identity for the residual stream. It cannot tell heads apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from torch import Tensor

from decompclip.api import check_choice
from decompclip.data.pixels import bytes_of
from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import Components, heads as all_heads, resolve
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention, pieces, room
from decompclip.decomposition.terms import TokenTerms
from decompclip.operators.inputs import Images, image_batches
from decompclip.operators.parts import image_names, named
from decompclip.operators.scores import Text, direction, label as label_of
from decompclip.operators.tokens import MapKind, TokenMaps
from decompclip.tower.config import ViTConfig
from decompclip.tower.vit import Hook, HookedViT, tower

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP


BATCH = 64


def attention_maps(
    model: HookedViT | HookedCLIP,
    images: Images,
    components: Components = all_heads,
    *,
    names: Sequence[str] | None = None,
    pictures: bool = True,
    batch_size: int = BATCH,
) -> TokenMaps:
    """The pooled row's attention over tokens, head by head; each map and its prefix tokens sum to one.

    Args:
        model: a model, or its image tower.
        images: as the tower takes them: a tensor, batches, or a source such as `FolderSource`.
        components: heads, such as `heads[-1]` or `heads[11, [4, 10]]`; all by default.
        names: of the images, for figures and tables; their numbers by default.
        pictures: keep the images (8 bits a channel) for overlays; a bare tower's are not known.
        batch_size: of the forward passes.

    Returns:
        One map a head and image.

    Raises:
        ValueError: no images, names of another number, or components that are no heads.
        IndexError: the model has no such head.
    """
    parts = _read(model, images, components, lambda d: d.attention(), {}, pictures, batch_size)
    cfg = tower(model).cfg
    return lay_out(cfg, parts, "attention", names, heads=heads_of(cfg, components))


@overload
def contribution_maps(
    model: HookedViT | HookedCLIP,
    images: Images,
    toward: Text,
    components: Components = ...,
    *,
    against: Text | None = ...,
    normalize: bool = ...,
    convention: Convention = ...,
    label: str | None = ...,
    names: Sequence[str] | None = ...,
    pictures: bool = ...,
    batch_size: int = ...,
) -> TokenMaps: ...
@overload
def contribution_maps(
    d: Decomposition,
    texts: Float[Tensor, "text d_embed"],
    /,
    *,
    label: Sequence[str] | None = ...,
    names: Sequence[str] | None = ...,
) -> Iterator[TokenMaps]: ...
def contribution_maps(
    model: HookedViT | HookedCLIP | Decomposition,
    images: Images,
    toward: Text | None = None,
    components: Components = all_heads,
    *,
    against: Text | None = None,
    normalize: bool = True,
    convention: Convention = "centred",
    label: str | Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    pictures: bool = True,
    batch_size: int = BATCH,
) -> TokenMaps | Iterator[TokenMaps]:
    """What each token adds, through each head, to the similarity of image and text.

    The sum over the tokens of a head is its term's dot product with the text; over all components, the
    similarity itself (a cosine, unless `normalize` is off).

    Toward many texts, `contribution_maps(d, texts)` takes a decomposition that kept its tokens
    (`model.decompose(images, normalize=True, tokens=heads[-1])`) and text features `[text, d_embed]`. It gives the
    maps of one text after another, of all kept heads; as many texts share one product as memory allows. There,
    `label` is a name for each text, and of the options only `names` has a meaning.

    Args:
        model: a model, or its image tower.
        images: as the tower takes them: a tensor, batches, or a source such as `FolderSource`.
        toward: a text, several texts whose mean is taken, or a direction `[d_embed]`.
        components: heads; all by default.
        against: another, whose unit feature is subtracted: contributions to the difference of the two.
        normalize: divide by the length of the image feature.
        convention: of the terms; in the paper's, each token also carries a share of the head's constants.
        label: name of the direction; by default the texts.
        names: of the images, for figures and tables; their numbers by default.
        pictures: keep the images (8 bits a channel) for overlays.
        batch_size: of the forward passes.

    Returns:
        One map a head and image.

    Raises:
        ValueError: as `attention_maps`; or a direction of another width, no text, a text for a bare tower.
        IndexError: the model has no such head.
    """
    if isinstance(model, Decomposition):
        if toward is not None or not isinstance(images, Tensor) or isinstance(label, str):
            raise ValueError(
                "expected text features [text, d_embed], and a label for each of them, beside a decomposition; received "
                "something else; for texts or images in words pass the model: contribution_maps(model, images, text)"
            )
        return _toward_each(model, images, label, names)
    if toward is None:
        raise ValueError(
            "expected something that images are mapped toward; received none; pass a text or a direction"
        )
    if label is not None and not isinstance(label, str):
        raise ValueError(f"expected one label for one direction; received {label!r}; pass a string")
    along = direction(model, toward, against)
    label = label_of(toward, against) if label is None else label

    def read(d: Decomposition) -> Tensor:
        return d.token_logits(along[None].to(d.embed))[..., 0]

    options = {"normalize": normalize, "convention": convention}
    parts = _read(model, images, components, read, options, pictures, batch_size)
    cfg = tower(model).cfg
    return lay_out(cfg, parts, "contribution", names, heads=heads_of(cfg, components), toward=label)


def _toward_each(
    d: Decomposition,
    texts: Float[Tensor, "text d_embed"],
    label: Sequence[str] | None,
    names: Sequence[str] | None,
) -> Iterator[TokenMaps]:
    """Checked at once; the maps come as they are asked for."""
    terms = d.token_terms
    if terms is None or terms.image_size is None or terms.patch_size is None:
        raise LookupError(
            "expected a decomposition that kept its tokens, and knows where they lie; received one without; "
            "decompose the images (again): decompose(images, tokens=heads[-1])"
        )
    if texts.ndim != 2 or texts.shape[1] != d.d_embed or not len(texts) or not len(d):
        raise ValueError(
            f"expected text features [text, {d.d_embed}] and images, one of each at least; received "
            f"{list(texts.shape)} and {len(d)} images; encode the texts with the model's own text tower"
        )
    words = named(label, tuple(f"text {number}" for number in range(len(texts))), "label", "texts")
    return _each(d, terms, texts, words, image_names(names, len(d)))


def _each(
    d: Decomposition,
    terms: TokenTerms,
    texts: Float[Tensor, "text d_embed"],
    words: Sequence[str],
    images: tuple[str, ...],
) -> Iterator[TokenMaps]:
    image_size, patch_size = cast(tuple[int, int], terms.image_size), cast(tuple[int, int], terms.patch_size)
    rows, columns = (size // patch for size, patch in zip(image_size, patch_size, strict=True))
    heads = tuple((layer, head) for layer, head in terms.kept.nonzero().tolist())
    # in bytes of a text: the product, its copy, and the copy on the CPU
    for piece in pieces(len(texts), 12 * terms.attention[:, :, 0].numel(), room(d.embed.device)):
        found = d.token_logits(texts[piece].to(d.embed)).float().permute(3, 1, 0, 2).cpu().contiguous()
        prefix, patches = found.split([found.shape[-1] - rows * columns, rows * columns], dim=-1)
        laid = patches.unflatten(-1, (rows, columns))
        for word, of_patches, of_prefix in zip(words[piece], laid.unbind(0), prefix.unbind(0), strict=True):
            yield TokenMaps(
                of_patches, of_prefix, "contribution", heads, image_size, patch_size, images, toward=word
            )


Read = tuple[Float[Tensor, "map batch token"], UInt8[Tensor, "batch h w 3"] | None]


def pictures_of(
    model: HookedViT | HookedCLIP, images: Float[Tensor, "batch 3 h w"]
) -> UInt8[Tensor, "batch h w 3"] | None:
    """The pixels that a model's input was made of; None for a bare tower, which does not know its scale."""
    if isinstance(model, HookedViT):
        return None
    return bytes_of(model.denormalize(images.cpu()))


def _read(
    model: HookedViT | HookedCLIP,
    images: Images,
    components: Components,
    read: Callable[[Decomposition], Float[Tensor, "batch map token"]],
    options: dict,
    pictures: bool,
    batch_size: int,
) -> Iterator[Read]:
    """One forward pass a batch; of each, what `read` says of all chosen heads."""
    for batch in image_batches(images, batch_size=batch_size, device=model.device):
        take = partial(decompose, model) if isinstance(model, HookedViT) else model.decompose
        d = take(batch, tokens=components, **options)
        values = read(d).float().transpose(0, 1).cpu()
        yield values, pictures_of(model, batch) if pictures else None


def heads_of(cfg: ViTConfig, components: Components) -> tuple[tuple[int, int], ...]:
    """(layer, head) of the chosen heads, in order.

    Raises:
        ValueError: something else is chosen too, or nothing is.
        IndexError: the tower has no such head.
    """
    mask = resolve(components, cfg)
    if mask.beside_heads or not mask.heads.any():
        raise ValueError(
            f"expected attention heads, which have tokens, such as heads[-1]; received {components!r}; leave the "
            "other components out"
        )
    return tuple((layer, head) for layer, head in mask.heads.nonzero().tolist())


def lay_out(
    cfg: ViTConfig,
    parts: Iterable[Read],
    kind: MapKind,
    names: Sequence[str] | None,
    *,
    heads: tuple[tuple[int, int], ...] = (),
    toward: str = "",
) -> TokenMaps:
    """Tokens of batches as maps: prefix tokens apart, patches row by row.

    Raises:
        ValueError: there are no images, or names of another number.
    """
    read = list(parts)
    count = sum(values.shape[1] for values, _ in read)
    if not count:
        raise ValueError("expected at least one image; received none; check the image source")
    tokens = torch.cat([values for values, _ in read], dim=1)
    pictures = [kept for _, kept in read if kept is not None]
    return TokenMaps(
        patches=rearrange(tokens[..., cfg.n_prefix :], "m b (r c) -> m b r c", r=cfg.grid[0]),
        prefix=tokens[..., : cfg.n_prefix],
        kind=kind,
        heads=heads,
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        names=image_names(names, count),
        toward=toward,
        pictures=torch.cat(pictures) if pictures else None,
    )


Fuse = Literal["mean", "max", "min"]


@torch.no_grad()
def rollout(
    model: HookedViT | HookedCLIP,
    images: Images,
    *,
    fuse: Fuse = "mean",
    residual: float = 0.5,
    names: Sequence[str] | None = None,
    pictures: bool = True,
    batch_size: int = BATCH,
) -> TokenMaps:
    """How much of each token flows into the pooled rows; one map an image, which with its prefix sums to one.

    Layers are multiplied as they come: one `[token, token]` an image is held, whatever the depth. Where
    several rows are pooled, they count alike.

    Args:
        model: a model, or its image tower.
        images: as the tower takes them: a tensor, batches, or a source such as `FolderSource`.
        fuse: how the heads of a layer become one pattern; rows are normalised again.
        residual: share of a token that stays where it is, in [0, 1].
        names: of the images, for figures and tables; their numbers by default.
        pictures: keep the images (8 bits a channel) for overlays.
        batch_size: of the forward passes.

    Returns:
        One map an image.

    Raises:
        ValueError: an unknown `fuse`, a residual outside [0, 1], no images, or names of another number.
    """
    check_choice("fuse", fuse, Fuse)
    if not 0 <= residual <= 1:
        raise ValueError(f"expected a residual in [0, 1], a share; received {residual}")
    parts = (
        (_flow(model, batch, fuse, residual)[None], pictures_of(model, batch) if pictures else None)
        for batch in image_batches(images, batch_size=batch_size, device=model.device)
    )
    return lay_out(tower(model).cfg, parts, "rollout", names)


def _flow(
    model: HookedViT | HookedCLIP, images: Tensor, fuse: Fuse, residual: float
) -> Float[Tensor, "batch token"]:
    visual = tower(model)
    flow: Tensor | None = None

    def mix(pattern: Tensor, hook: Any) -> None:
        nonlocal flow
        one = reduce(pattern.float(), "b h q k -> b q k", fuse)
        one = (1 - residual) * one / one.sum(-1, keepdim=True)
        one.diagonal(dim1=-2, dim2=-1).add_(residual)
        flow = one if flow is None else one @ flow

    hooks: list[Hook] = [(f"blocks.{layer}.attn.hook_pattern", mix) for layer in range(visual.cfg.n_layers)]
    with visual.hooks(fwd_hooks=hooks):
        visual(images) if isinstance(model, HookedViT) else model.encode_image(images)
    assert flow is not None
    return flow[:, visual.cfg.pooled_rows].mean(1).cpu()
