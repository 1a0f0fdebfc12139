"""Every variant of image tower, as data; and the errors of models that cannot be had."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from decompclip.api import check_choice


class ModelError(ValueError):
    """A model cannot be had as asked for; the message says what to do."""


class UnsupportedTowerError(ModelError):
    """An image tower that `HookedViT` cannot run exactly."""


Activation = Literal["gelu", "quick_gelu", "gelu_tanh", "silu"]
Pool = Literal["cls", "mean", "attention"]
Norm = Literal["pre", "post"]
Stem = Literal["patch", "conv"]
LnFinal = Literal["rows", "pooled"]
Rope = Literal["interleaved", "half"]


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Shape and variant of an image tower.

    TransformerLens' helpers read `n_layers` and `n_heads` from it.

    Attributes:
        image_size: height and width of the input, pixels.
        patch_size: height and width of a patch, pixels.
        d_embed: width of the joint image-text space.
        activation: of the MLPs; OpenAI's weights were trained with `quick_gelu`.
        gated: whether the MLPs are gated: `act(x W_gate) * (x W_in)` (SwiGLU, GeGLU).
        mlp_norm: whether a LayerNorm stands inside the MLPs, before their output map.
        mlp_norm_in: whether the MLPs open with a LayerNorm of their own, behind the block's (ViTamin).
        attn_norm: whether a LayerNorm stands across the concatenated heads, before their output map.
        norm: "pre": LayerNorms before attention and MLP; "post": behind them, before they are added.
        ln_pre: whether a LayerNorm stands before block 0.
        layer_scale: whether each block's attention and MLP outputs are scaled per channel.
        stem: what makes tokens of pixels: one linear "patch" map, or a network of convolutions.
        patch_bias: whether the linear patch map has a bias.
        n_prefix: tokens before the patches: 1 with a class token, more with registers.
        pos: whether learned positions are added.
        rope: layout of rotary positions in queries and keys of patches; None without.
        relative_position: whether attention scores have a bias by relative position.
        pool: what becomes the feature: the class token's row, the mean of the patches' rows, or what a
            learned query attends to.
        ln_final: whether the last LayerNorm normalises "rows" or what was "pooled" from them (one and the
            same for "cls").
        pool_heads: of the attention pool; `pool_queries`: its learned queries, of which the first is the feature's.
        d_pool: width of what is pooled; `d_model` but for CoCa.
        pool_mlp: hidden width of the attention pool's own MLP, 0 without; `pool_activation`: its activation.
        pool_norm: whether a LayerNorm follows the attention pool (CoCa).
        pool_prefix: whether the pool reads the prefix tokens too.
        projection: whether a linear map leads to the joint space; `proj_bias`: whether it has a bias.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_embed: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    activation: Activation = "gelu"
    gated: bool = False
    mlp_norm: bool = False
    mlp_norm_in: bool = False
    attn_norm: bool = False
    norm: Norm = "pre"
    ln_eps: float = 1e-5
    ln_pre: bool = True
    layer_scale: bool = False
    stem: Stem = "patch"
    patch_bias: bool = False
    n_prefix: int = 1
    pos: bool = True
    rope: Rope | None = None
    relative_position: bool = False
    pool: Pool = "cls"
    ln_final: LnFinal = "rows"
    pool_heads: int = 0
    pool_queries: int = 1
    d_pool: int = 0
    pool_mlp: int = 0
    pool_activation: Activation = "gelu"
    pool_norm: bool = False
    pool_prefix: bool = True
    projection: bool = True
    proj_bias: bool = False

    def __post_init__(self) -> None:
        kinds = {"norm": Norm, "stem": Stem, "pool": Pool, "ln_final": LnFinal, "rope": Rope}
        for name, kind in (kinds | dict.fromkeys(("activation", "pool_activation"), Activation)).items():
            check_choice(name, getattr(self, name), (*get_args(kind), *([None] if name == "rope" else [])))
        if self.n_heads * self.d_head != self.d_model:
            raise ValueError(
                f"{self.n_heads} heads of width {self.d_head} do not fill a stream of {self.d_model}"
            )
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            if size < patch:
                raise ValueError(f"a patch of {self.patch_size} does not fit an image of {self.image_size}")
        if self.pool == "cls" and not self.n_prefix:
            raise ValueError("pool 'cls' reads the class token, but n_prefix says that there is none")
        if not self.d_pool:
            object.__setattr__(self, "d_pool", self.d_model)
        if self.pool == "attention" and (self.pool_heads < 1 or self.d_pool % self.pool_heads):
            raise ValueError(f"{self.pool_heads} heads do not divide an attention pool of {self.d_pool}")
        if not self.projection and self.d_pool != self.d_embed:
            raise ValueError(f"without a projection, d_embed is {self.d_pool}, not {self.d_embed}")
        if self.attn_norm and self.norm == "post":
            raise ValueError("a LayerNorm across the heads and post-norm blocks are not known together")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def n_tokens(self) -> int:
        """Prefix tokens and patches."""
        return self.n_prefix + self.n_patches

    @property
    def pooled_rows(self) -> slice:
        """The rows of the last stream that the feature is made of."""
        if self.pool == "cls":
            return slice(0, 1)
        reads_prefix = self.pool == "attention" and self.pool_prefix
        return slice(0 if reads_prefix else self.n_prefix, None)

    @property
    def has_pool(self) -> bool:
        """Whether the attention pooling has an MLP of its own, a component."""
        return bool(self.pool_mlp)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pair(size: Any) -> tuple[int, int]:
    """Height and width, of a number or of a list out of JSON."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


_POOLS = {"cls": (), "mean": ("mean pool",), "attention": ("attention pool",)}


def tower_facts(config: ViTConfig) -> list[str]:
    """Activation, sizes, and the pool where it is not the class token."""
    image, patch = (f"{height} x {width}" for height, width in (config.image_size, config.patch_size))
    return [
        config.activation,
        image,
        f"patches {patch}",
        f"{config.n_layers} layers x {config.n_heads} heads",
        f"d_embed {config.d_embed}",
        *_POOLS[config.pool],
    ]
