"""Where heads look, and what they contribute from there: maps over the patches of images (docs/method.md, section 4).

    attention_maps(model, images, heads[-1])                         the pooled row's attention
    contribution_maps(model, images, "a star", heads[-1])            what each patch adds to the similarity to a text
    contribution_maps(model, images, "a star", against="a ring")     ... to the difference of two similarities
    rollout(model, images)                                           the attention of all layers, multiplied

Attention says where a head looks; only the contribution says what that does to the answer. Contribution maps are those
of He et al., Figure 3.

Attention rollout (Abnar and Zuidema, 2020) is the baseline that knows of attention alone: the patterns of all layers,
each averaged over its heads and mixed with the identity for the residual stream. It cannot tell heads apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from torch import Tensor

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import Components, heads as all_heads, resolve
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention
from decompclip.operators.inputs import Images, image_batches
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
    parts = _read(model, images, components, lambda d, *head: d.attention(*head), {}, pictures, batch_size)
    cfg = tower(model).cfg
    return lay_out(cfg, parts, "attention", names, heads=heads_of(cfg, components))


def contribution_maps(
    model: HookedViT | HookedCLIP,
    images: Images,
    toward: Text,
    components: Components = all_heads,
    *,
    against: Text | None = None,
    normalize: bool = True,
    convention: Convention = "centred",
    label: str | None = None,
    names: Sequence[str] | None = None,
    pictures: bool = True,
    batch_size: int = BATCH,
) -> TokenMaps:
    """What each token adds, through each head, to the similarity of image and text.

    The sum over the tokens of a head is its term's dot product with the text; over all components, the
    similarity itself (a cosine, unless `normalize` is off).

    Args:
        toward: a text, several texts whose mean is taken, or a direction `[d_embed]`.
        against: another, whose unit feature is subtracted: contributions to the difference of the two.
        normalize: divide by the length of the image feature.
        convention: of the terms; in the paper's, each token also carries a share of the head's constants.
        label: name of the direction; by default the texts.
        model, images, components, names, pictures, batch_size: as `attention_maps`.

    Returns:
        One map a head and image.

    Raises:
        ValueError: as `attention_maps`; or a direction of another width, no text, a text for a bare tower.
        IndexError: the model has no such head.
    """
    along = direction(model, toward, against)
    label = label_of(toward, against) if label is None else label

    def read(d: Decomposition, layer: int, head: int) -> Tensor:
        return d.token_logits(along[None].to(d.embed), layer, head)[..., 0]

    options = {"normalize": normalize, "convention": convention}
    parts = _read(model, images, components, read, options, pictures, batch_size)
    cfg = tower(model).cfg
    return lay_out(cfg, parts, "contribution", names, heads=heads_of(cfg, components), toward=label)


Read = tuple[Float[Tensor, "map batch token"], UInt8[Tensor, "batch h w 3"] | None]


def pictures_of(
    model: HookedViT | HookedCLIP, images: Float[Tensor, "batch 3 h w"]
) -> UInt8[Tensor, "batch h w 3"] | None:
    """The pixels that a model's input was made of; None for a bare tower, which does not know its scale."""
    if isinstance(model, HookedViT):
        return None
    return rearrange((255 * model.denormalize(images.cpu())).round().to(torch.uint8), "b c h w -> b h w c")


def _read(
    model: HookedViT | HookedCLIP,
    images: Images,
    components: Components,
    read: Callable[[Decomposition, int, int], Tensor],
    options: dict,
    pictures: bool,
    batch_size: int,
) -> Iterator[Read]:
    """One forward pass a batch; of each, what `read` says of every chosen head."""
    chosen = heads_of(tower(model).cfg, components)
    for batch in image_batches(images, batch_size=batch_size):
        take = partial(decompose, model) if isinstance(model, HookedViT) else model.decompose
        d = take(batch, tokens=components, **options)
        values = torch.stack([read(d, layer, head).float().cpu() for layer, head in chosen])
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
    if names is not None and len(names) != count:
        raise ValueError(f"expected a name for each of {count} images; received {len(names)} names")
    return TokenMaps(
        patches=rearrange(tokens[..., cfg.n_prefix :], "m b (r c) -> m b r c", r=cfg.grid[0]),
        prefix=tokens[..., : cfg.n_prefix],
        kind=kind,
        heads=heads,
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        names=tuple(names or map(str, range(count))),
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
        fuse: how the heads of a layer become one pattern; rows are normalised again.
        residual: share of a token that stays where it is, in [0, 1].
        model, images, names, pictures, batch_size: as `attention_maps`.

    Returns:
        One map an image.

    Raises:
        ValueError: an unknown `fuse`, a residual outside [0, 1], no images, or names of another number.
    """
    if fuse not in get_args(Fuse):
        raise ValueError(f"expected fuse of {get_args(Fuse)}; received {fuse!r}")
    if not 0 <= residual <= 1:
        raise ValueError(f"expected a residual in [0, 1], a share; received {residual}")
    parts = (
        (_flow(model, batch, fuse, residual)[None], pictures_of(model, batch) if pictures else None)
        for batch in image_batches(images, batch_size=batch_size)
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
