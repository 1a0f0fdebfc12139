"""What a configuration asks for, held against the weights that lie beside it, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from decompclip.models.errors import CheckpointError, ModelError

MOST_ROWS = 1 << 16
"""Patches of an image, or positions of a text: of their square a mask or an attention map may be made."""

GENEROUS = 16


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The sizes that a configuration gives of a transformer.

    Attributes:
        mlp_ratio: the MLP's width as a multiple of the stream's.
        rows: vectors as wide as the stream that are looked up: positions, words of a vocabulary.
        longest: the most tokens that go through it.
    """

    name: str
    layers: int
    width: int
    mlp_ratio: float
    rows: int
    longest: int

    @property
    def numbers(self) -> float:
        """How many weights it has, but for the small ones."""
        return self.layers * (4 + 2 * self.mlp_ratio) * self.width**2 + self.rows * self.width


def towers_of(architecture: Mapping[str, Any], *, text: bool) -> list[Tower]:
    """The native towers of a configuration of open_clip's; those of other packages have fixed sizes.

    Args:
        text: with those of texts.
    """
    found = []
    vision = architecture["vision_cfg"]
    if siglip := vision.get("siglip_tower"):
        patches = patches_of(vision["image_size"], siglip["patch_size"])
        told = {"layers": siglip["depth"], "width": siglip["embed_dim"], "mlp_ratio": siglip["mlp_ratio"]}
        found.append(_tower("siglip_tower", told, 0, rows=patches, longest=patches))
    elif not vision.get("timm_model_name") and isinstance(vision.get("layers", 12), int):
        patches = patches_of(vision.get("image_size", 224), vision.get("patch_size", 16))
        found.append(_tower("vision_cfg", vision, 768, rows=patches, longest=patches))
    for name in ("text_cfg", "multimodal_cfg") if text else ():
        words = architecture.get(name)
        if words and not words.get("hf_model_name"):
            longest = words.get("context_length", 77)
            # the decoder of captions has no vocabulary of its own to look up
            looked_up = words.get("vocab_size", 49408) if name == "text_cfg" else 0
            found.append(_tower(name, words, 512, rows=longest + looked_up, longest=longest))
    return found


def _tower(name: str, part: Mapping[str, Any], width: int, *, rows: int, longest: int) -> Tower:
    return Tower(
        name=name,
        layers=part.get("layers", 12),
        width=part.get("width", width),
        mlp_ratio=part.get("mlp_ratio", 4.0),
        rows=rows,
        longest=longest,
    )


def patches_of(image: int | list[int], patch: int | list[int]) -> int:
    """How many patches an image of that size is cut into."""
    sides, cuts = ([size, size] if isinstance(size, int) else size for size in (image, patch))
    return (sides[0] // cuts[0]) * (sides[1] // cuts[1])


def check_sizes(towers: list[Tower], state: Mapping[str, Tensor], *, source: str) -> None:
    """Check that weights as many as a configuration asks for are there, without building anything.

    Raises:
        CheckpointError: they are not; or a tower for more tokens than any has.
    """
    held = sum(x.numel() for x in state.values())
    for tower in towers:
        if tower.longest > MOST_ROWS:
            raise CheckpointError(
                f"{source}, {tower.name}: expected {MOST_ROWS:,} tokens at most; received sizes that make {tower.longest:,}"
            )
        if tower.layers > len(state):
            raise CheckpointError(
                f"{source}, {tower.name}: expected the layers of the weights beside it; received {tower.layers:,} layers, "
                f"and {len(state):,} weights in all; give each model its own configuration"
            )
        if tower.numbers > GENEROUS * held:  # what is missing in an honest file is told by name, later
            raise CheckpointError(
                f"{source}, {tower.name}: expected the sizes of the weights beside it; received {tower.layers:,} layers of "
                f"width {tower.width:,} and {tower.rows:,} rows, {tower.numbers:,.0f} numbers where the weights have "
                f"{held:,}; give each model its own configuration"
            )


@contextmanager
def out_of(source: str) -> Iterator[None]:
    """Whatever goes wrong inside while a stranger's files become a model is a `CheckpointError` that names them.

    Explicit checks come first and say more; this is for the combinations that open_clip, timm or torch refuse.
    """
    try:
        yield
    except (ModelError, ConnectionError):
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise CheckpointError(
            f"{source} cannot be made into a model: {first}; its configuration and its weights are none that fit together"
        ) from error
