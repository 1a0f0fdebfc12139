"""Draws that hang on a pair's name alone, and captions made of templates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def keyed(seed: int, what: str, name: str) -> int:
    """A draw in 0 .. 2**64 - 1 that hangs on these alone: whatever the order in which pairs come, and on
    whatever machine or process."""
    digest = hashlib.sha256(f"{seed}\0{what}\0{name}".encode("utf-8", "surrogateescape"))
    return int.from_bytes(digest.digest()[:8], "big")


def template_caption(class_name: str, templates: Sequence[str], *, seed: int, name: str) -> str:
    """A random one of the templates, filled with the class; `name` is the pair's."""
    return templates[keyed(seed, "caption", name) % len(templates)].replace("{}", class_name)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError unless there is a template, and a slot {} in each."""
    if isinstance(templates, str):
        raise ValueError(f"expected a list of templates; received the single string {templates!r}")
    bare = [template for template in templates if "{}" not in template]
    if bare or not templates:
        found = f"{bare[0]!r} without one" if bare else "none"
        raise ValueError(
            f"expected caption templates with a slot {{}} for the class's name; received {found}; the plainest is "
            '"a photo of a {}."'
        )
    return tuple(templates)


def content_name(image: Float[Tensor, "3 h w"], caption: str) -> str:
    """A name for a pair that has none: a digest of its pixels and caption."""
    pixels = image.detach().cpu().contiguous().float().numpy()
    return hashlib.sha256(pixels.tobytes() + caption.encode("utf-8", "surrogateescape")).hexdigest()[:24]
