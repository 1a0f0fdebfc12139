"""What the command line of `diagnose` checks before it loads a model, and before it runs one."""

from __future__ import annotations

from pathlib import Path

import torch

from decompclip.audit.collect import WORLD, open_classes, own_classes
from decompclip.data.sources import open_images
from decompclip.diagnosis.pictures import labelled
from decompclip.models.bundled import bundled
from decompclip.models.clip import HookedCLIP
from decompclip.models.text import ImageOnly, MissingTextError, NoTokenizer


def class_names(model: str, classes: Path | None, images: str) -> tuple[str, ...]:
    """The classes, without a look at weights; and whether the images are there and bring their labels.

    Raises:
        ValueError: nobody knows the classes, or no folder is named after one.
        FileNotFoundError, NotADirectoryError: no such file of classes or folder of images.
    """
    of_dataset = images.split(":", maxsplit=1)[0] == WORLD
    known = own_classes(model) if classes is None else ()
    if not (known or classes or of_dataset):
        raise ValueError(
            f"expected --classes, a text file with one class a line; received none, and only bundled and saved models know "
            f"theirs; bundled are {', '.join(bundled())}"
        )
    names = known or open_classes(classes, images)
    if not of_dataset and not labelled(open_images(images, lambda _: torch.zeros(3, 1, 1), names)):
        raise ValueError(
            f"expected a sub-folder of images for each class in --images; received {images}, where no folder is named after "
            f"one; name them as the classes are: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        )
    return names


def check_text(clip: HookedCLIP) -> None:
    """Check that texts can be asked of a model.

    Raises:
        MissingTextError: they cannot; says why, and what to give MODEL instead.
    """
    lacking = clip.text if isinstance(clip.text, ImageOnly) else clip.tokenizer
    if isinstance(lacking, ImageOnly | NoTokenizer):
        part = "text tower" if isinstance(clip.text, ImageOnly) else "tokenizer"
        raise MissingTextError(
            f"expected a model with its text side, which turns class names into answers; received {clip.name!r}, whose "
            f"{part} is not there: {lacking.why}"
        )
