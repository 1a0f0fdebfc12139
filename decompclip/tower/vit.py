"""HookedViT: the one forward pass through an image tower, with a hook point at every step.

Names are TransformerLens' (`blocks.3.attn.hook_z`, `ln_final.hook_scale`), so that its idioms carry over.
Activations that a fused kernel never forms (attention scores, pattern, per-head results, LayerNorm's
scale) are computed only while somebody listens to their hook point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.slice import Slice

from decompclip.tower.cache import ViTCache, nearest_names
from decompclip.tower.config import ViTConfig, tower_facts
from decompclip.tower.layers import AttentionPool, Block, LayerNorm

Hook = tuple[str | Callable[..., bool], Callable[..., Any]]
"""A hook point's name, or a choice among names, and what to do there; as TransformerLens takes them."""


@runtime_checkable
class HasTower(Protocol):
    """A model with an image tower, such as a CLIP."""

    @property
    def visual(self) -> HookedViT: ...


def tower(model: HookedViT | HasTower) -> HookedViT:
    """The image tower of a model, or the tower itself; TypeError where there is none."""
    visual = model if isinstance(model, HookedViT) else getattr(model, "visual", None)
    if not isinstance(visual, HookedViT):
        raise TypeError(
            f"expected a model or image tower, as decompclip.load gives it; received {type(model).__name__}: {str(model)[:60]!r}; "
            "load it first"
        )
    return visual


class Causal(Protocol):
    """Anything that can say which hooks carry it out."""

    def fwd_hooks(self, visual: HookedViT, /) -> Sequence[Hook]: ...


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of anybody's: TransformerLens' on hook points, PyTorch's on any."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


class HookedViT(HookedRootModule):
    """An image tower: images to features in the joint space.

    Built by `decompclip.load` from a source model's weights; parity with the source is tested.

    Attributes:
        stem: the source's own network of convolutions, where `cfg.stem` says so; the stream starts behind it.
    """

    def __init__(self, config: ViTConfig, stem: nn.Module | None = None) -> None:
        super().__init__()
        if (config.stem == "conv") != (stem is not None):
            raise ValueError(
                f"expected {'a stem module' if stem is None else 'no stem module'} for stem={config.stem!r}"
            )
        self.cfg = config
        d = config.d_model

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.normal_(torch.empty(shape), std=d**-0.5))

        self.stem = stem
        self.W_E = None if stem else drawn(d, 3, *config.patch_size)
        self.b_E = nn.Parameter(torch.zeros(d)) if config.patch_bias and not stem else None
        self.prefix = drawn(config.n_prefix, d) if config.n_prefix else None
        self.W_pos = drawn(config.n_tokens, d) if config.pos else None
        rope = torch.zeros(2, config.n_patches, config.d_head) if config.rope else None
        self.register_buffer("rope", rope)
        self.ln_pre = LayerNorm(d, config.ln_eps) if config.ln_pre else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_final = LayerNorm(d, config.ln_eps)
        self.pool = AttentionPool(config) if config.pool == "attention" else None
        self.proj = drawn(config.d_pool, config.d_embed) if config.projection else None
        self.b_proj = nn.Parameter(torch.zeros(config.d_embed)) if config.proj_bias else None
        self.hook_embed = HookPoint()
        if config.pos:
            self.hook_pos_embed = HookPoint()
        self.hook_ln_pre = HookPoint()
        self.setup()

    def __repr__(self) -> str:
        return f"HookedViT({', '.join(tower_facts(self.cfg))})"

    @property
    def last_block_hooked(self) -> bool:
        """Whether somebody listens in the last block, and may want rows there that are not pooled."""
        return any(hooked(module) for module in self.blocks[-1].modules())

    @property
    def device(self) -> torch.device:
        return self.ln_final.w.device

    @property
    def dtype(self) -> torch.dtype:
        return self.ln_final.w.dtype

    def forward(
        self,
        images: Float[Tensor, "batch 3 h w"] | Float[Tensor, "batch token d_model"],
        *,
        pooled_rows: bool | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """Image features, not normalised.

        With class-token pooling only token 0 of the last block reaches the feature. Its other rows are
        computed when a hook in that block may want them; `pooled_rows=True` says that the hooks read
        token 0 alone.

        Args:
            images: normalised, of the tower's size; with `start_at_layer`, the stream at that block's input.
            pooled_rows: whether the last block may compute token 0 alone; by default where no hook there wants more.
            start_at_layer: the first block to run, from the end where negative; as in TransformerLens.
            stop_at_layer: the first block not to run: the stream at its input is returned (`n_layers`: at the last
                block's end), `[batch token d_model]`.

        Raises:
            IndexError: there is no such block, or none is left to run.
            ValueError: the images are not `[batch, 3, h, w]` of the tower's size, or the stream not `[batch, token, d_model]`.
        """
        first, end = self._span(start_at_layer, stop_at_layer)
        x = self._embed(images) if start_at_layer is None else self._stream(images)
        if pooled_rows is None:
            pooled_rows = not self.last_block_hooked
        pooled_rows = pooled_rows and self.cfg.pool == "cls" and stop_at_layer is None
        for layer in range(first, end):
            last = layer == self.cfg.n_layers - 1
            x = self.blocks[layer](x, self.rope, pooled_row_only=pooled_rows and last)
        return x if stop_at_layer is not None else self.read(x)

    def read(self, stream: Float[Tensor, "batch row d_model"]) -> Float[Tensor, "batch d_embed"]:
        """The feature of the stream at the tower's end: what is pooled of it, past the last LayerNorm and projection.

        Args:
            stream: rows of the residual stream behind the last block.
        """
        return self.read_rows(stream[:, self.cfg.pooled_rows])

    def read_rows(self, rows: Float[Tensor, "batch row d_model"]) -> Float[Tensor, "batch d_embed"]:
        """The feature, were these the pooled rows.

        Args:
            rows: of the residual stream behind the last block.
        """
        pooled = self._pool(rows)
        features = pooled if self.proj is None else pooled @ self.proj
        return features if self.b_proj is None else features + self.b_proj

    def _span(self, start: int | None, stop: int | None) -> tuple[int, int]:
        """The first block to run, and the first not to."""
        n = self.cfg.n_layers
        first, end = 0 if start is None else start, n if stop is None else stop
        first, end = (layer + n if layer < 0 else layer for layer in (first, end))
        if not 0 <= first <= end <= n or (start is not None and first == n):
            raise IndexError(
                f"expected start_at_layer in 0..{n - 1} and stop_at_layer from there to {n}, or -{n}..-1 from the end; "
                f"received {start} and {stop}; the tower has {n} layers"
            )
        return first, end

    def _stream(self, x: Tensor) -> Float[Tensor, "batch token d_model"]:
        expected = [self.cfg.n_tokens, self.cfg.d_model]
        if list(x.shape[1:]) != expected:
            raise ValueError(
                f"expected with start_at_layer the stream [batch, {expected[0]}, {expected[1]}]; received "
                f'{list(x.shape)}; take cache["resid_pre", layer], or what stop_at_layer returned'
            )
        return x

    def _embed(self, images: Tensor) -> Float[Tensor, "batch token d_model"]:
        """The stream at the input of block 0."""
        self._check(images)
        if self.stem is not None:
            patches = self.stem(images)
        else:
            assert self.W_E is not None
            patches = F.conv2d(images, self.W_E, self.b_E, stride=self.cfg.patch_size)
            patches = rearrange(patches, "b d rows columns -> b (rows columns) d")
        if self.prefix is not None:
            patches = torch.cat([self.prefix.to(patches.dtype).expand(len(images), -1, -1), patches], dim=1)
        x = self.hook_embed(patches)
        if self.W_pos is not None:
            x = x + self.hook_pos_embed(self.W_pos.to(x.dtype).expand_as(x))
        return self.hook_ln_pre(x if self.ln_pre is None else self.ln_pre(x))

    def _pool(self, rows: Float[Tensor, "batch row d_model"]) -> Float[Tensor, "batch d_pool"]:
        if self.pool is not None:
            return self.pool(self.ln_final(rows))
        if self.cfg.ln_final == "pooled":
            rows = rows.mean(dim=1, keepdim=True)  # a token axis, as at every other hook
        return self.ln_final(rows).mean(dim=1)

    def _check(self, images: Tensor) -> None:
        expected = (3, *self.cfg.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"expected images [batch, {', '.join(map(str, expected))}], got {list(images.shape)}; "
                "pass them through the model's `preprocess` first"
            )

    def check_hooks(self, hooks: Sequence[Hook]) -> None:
        """Hold hooks to be on points that the tower has.

        Args:
            hooks: pairs of a name, or a function that chooses names, and the hook.

        Raises:
            KeyError: they are not; the nearest names are offered.
        """
        self._check_names([name for name, _ in hooks])

    def _check_names(self, names: object) -> None:
        """Raises KeyError where a name, or one of several, is no hook point's; a choice among names may choose none."""
        for name in [names] if isinstance(names, str) else names if isinstance(names, list | tuple) else ():
            if isinstance(name, str) and name not in self.hook_dict:
                near = nearest_names(name, self.hook_dict)
                raise KeyError(
                    f"no hook point {name!r} in this tower of {self.cfg.n_layers} layers; "
                    f"nearest: {', '.join(near) or 'none'}. `visual.hook_dict` lists all"
                )

    @contextmanager
    def hooks(
        self, fwd_hooks: Sequence[Hook] = (), bwd_hooks: Sequence[Hook] = (), *args: Any, **options: Any
    ) -> Iterator[HookedViT]:
        """Hooks that come off at the end, as in TransformerLens. Raises as `check_hooks`.

        Args:
            fwd_hooks: run in the forward pass: pairs of a name, or a function that chooses names, and the hook.
            bwd_hooks: likewise in the backward pass.
            *args: of transformer_lens's `hooks`.
            **options: likewise.
        """
        self.check_hooks([*fwd_hooks, *bwd_hooks])
        with super().hooks(list(fwd_hooks), list(bwd_hooks), *args, **options):
            yield self

    def add_hook(self, name: str | Callable[[str], bool], hook: Any, *args: Any, **options: Any) -> None:
        """A hook that stays until `reset_hooks`, as in TransformerLens. Raises as `check_hooks`.

        Args:
            name: of a hook point, or a function that chooses names.
            hook: `hook(activation, hook=point)`; what it returns takes the activation's place.
            *args: of transformer_lens's `add_hook`.
            **options: likewise.
        """
        self.check_hooks([(name, hook)])
        super().add_hook(name, hook, *args, **options)

    def get_caching_hooks(self, names_filter: Any = None, *args: Any, **options: Any) -> Any:
        """As in TransformerLens.

        Args:
            names_filter: a name, several, or a function that chooses; None caches all.
            *args: of transformer_lens's `get_caching_hooks`.
            **options: likewise.

        Raises:
            KeyError: a name that is no hook point's; the nearest are offered.
            ValueError: `pos_slice`, with which a cache would hold rows that the pooled row's scales do not belong to.
        """
        self._check_names(names_filter)
        if Slice.unwrap(options.get("pos_slice")).mode != "identity":
            raise ValueError(
                "expected a cache of all positions; received pos_slice; leave it out, and choose positions when you read the "
                "cache: `cache.decompose_resid(pos_slice=0)`, or `cache[name][:, position]`"
            )
        return super().get_caching_hooks(names_filter, *args, **options)

    def add_caching_hooks(self, names_filter: Any = None, *args: Any, **options: Any) -> dict[str, Tensor]:
        """As in TransformerLens. Raises KeyError as `check_hooks`.

        Args:
            names_filter: as `get_caching_hooks`.
            *args: of transformer_lens's `add_caching_hooks`.
            **options: likewise.
        """
        self._check_names(names_filter)
        return super().add_caching_hooks(names_filter, *args, **options)

    def run_with_cache(self, *args: Any, **kwargs: Any) -> tuple[Float[Tensor, "batch ..."], ViTCache]:
        """Features and a typed cache of activations (`names_filter`, `device`... as in TransformerLens).

        Args:
            *args: the images.
            **kwargs: of transformer_lens's `run_with_cache`: `names_filter`, `device`...

        Raises:
            KeyError, ValueError: as `get_caching_hooks`.
        """
        remove_batch_dim = kwargs.get("remove_batch_dim", False)
        features, cache = super().run_with_cache(*args, **kwargs)
        return features, ViTCache(cache, self, has_batch_dim=not remove_batch_dim)
