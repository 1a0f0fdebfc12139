"""Every variant of image tower, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Activation = Literal["gelu", "quick_gelu"]
Pool = Literal["cls"]


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Shape and variant of an image tower.

    TransformerLens' helpers read `n_layers`, `n_heads`, `normalization_type` and `attn_only` from it.

    Attributes:
        image_size: height and width of the input, pixels.
        patch_size: height and width of a patch, pixels.
        d_embed: width of the joint image-text space.
        activation: of the MLPs; OpenAI's weights were trained with `quick_gelu`.
        ln_pre: whether a LayerNorm stands before block 0.
        layer_scale: whether each block's attention and MLP outputs are scaled per channel.
        pool: which rows of the last stream become the image's feature.
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
    ln_eps: float = 1e-5
    ln_pre: bool = True
    layer_scale: bool = False
    pool: Pool = "cls"

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation {self.activation!r} is not one of {get_args(Activation)}")
        if self.pool not in get_args(Pool):
            raise ValueError(f"pool {self.pool!r} is not one of {get_args(Pool)}")
        if self.n_heads * self.d_head != self.d_model:
            raise ValueError(
                f"{self.n_heads} heads of width {self.d_head} do not fill a stream of {self.d_model}"
            )
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            if size < patch:
                raise ValueError(f"a patch of {self.patch_size} does not fit an image of {self.image_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def n_tokens(self) -> int:
        """Patches and the class token."""
        return self.grid[0] * self.grid[1] + 1

    @property
    def normalization_type(self) -> str:
        return "LN"

    @property
    def attn_only(self) -> bool:
        return False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
