"""open_clip's pretrained tags and their weights; the Hugging Face hub is asked once whether it answers."""

from __future__ import annotations

import difflib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, cast

import open_clip
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.pretrained import download_pretrained

from decompclip.display import some
from decompclip.models.errors import UnknownModelError, first_line

SECONDS = 5.0


def reachable(repository: str) -> bool:
    """Whether the hub answers a question about a repository, be the answer "no such thing"."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(repository, timeout=SECONDS)
    except HfHubHTTPError:
        return True
    except Exception:  # whatever the HTTP library of the day raises where there is no network
        return False
    return True


@contextmanager
def asked_once(repository: str | None) -> Iterator[None]:
    """Inside, downloads from the hub fail at once, or come from its cache, where it cannot be reached.

    huggingface_hub retries five times, about 23 s for every file, also for files that it has in its cache. The switch
    is the one that `HF_HUB_OFFLINE=1` sets; huggingface_hub reads it at import, so here it is set for a while.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or (repository is not None and not reachable(repository))
    try:
        with _nobody_asked():
            yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _nobody_asked() -> Iterator[None]:
    """Inside, transformers refuses code that comes with a model where it would ask on the standard input to run it.

    open_clip does not say `trust_remote_code=False` where it builds a text tower, and has no option for it.
    """
    # open_clip imports it if it is there
    transformers: Any = sys.modules.get("transformers.dynamic_module_utils")
    before = getattr(transformers, "TIME_OUT_REMOTE_CODE", 0)
    try:
        if transformers is not None:
            transformers.TIME_OUT_REMOTE_CODE = 0
        yield
    finally:
        if transformers is not None:
            transformers.TIME_OUT_REMOTE_CODE = before


_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


def check_tag(name: str, tag: str) -> None:
    """Check that an architecture has this tag.

    Raises:
        UnknownModelError: it has not; the nearest are offered.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        near = difflib.get_close_matches(tag, tags, n=3, cutoff=0.4)
        raise UnknownModelError(
            f"there are no pretrained weights {tag!r} for {name!r}; nearest: {', '.join(near) or 'none'}; its "
            f"tags: {listed(name)}"
        )


def listed(name: str) -> str:
    """The tags of an architecture, in words."""
    return some(open_clip.list_pretrained_tags_by_model(name), 8)


def preprocess_of(name: str, tag: str | None = None) -> dict[str, Any]:
    """The preprocessing that a tag's weights were trained with; without a tag, what all of the name's agree on."""
    tags = [tag] if tag else open_clip.list_pretrained_tags_by_model(name)
    found: list[dict[str, Any]] = []
    for config in (open_clip.get_pretrained_cfg(name, each) for each in tags):
        one = {key: config[key] for key in _PREPROCESS if config.get(key) is not None}
        if one not in found:
            found.append(one)
    return found[0] if len(found) == 1 else {}


def fetch(name: str, tag: str) -> Path:
    """The file of a tag's weights, downloaded if need be.

    Raises:
        ConnectionError: it could not be had; where the hub does not answer, that shows at once.
    """
    config = open_clip.get_pretrained_cfg(name, tag)
    try:
        with asked_once(_repository(config)):
            return Path(download_pretrained(config))
    except (OSError, RuntimeError) as error:
        raise _unreachable(name, tag, error) from error


def create(
    name: str, tag: str, *, quick_gelu: bool, image_size: tuple[int, int] | None = None
) -> CLIP | CustomTextCLIP | CoCa:
    """open_clip's model with the weights of a tag that was fetched.

    Raises:
        ConnectionError: what its text tower needs besides could not be had.
    """
    try:
        # Built with weights that are then replaced: their draws leave no trace.
        with (
            asked_once(_repository(open_clip.get_pretrained_cfg(name, tag))),
            warnings.catch_warnings(),
            _quiet_about_downloads(),
            torch.random.fork_rng(devices=[]),
        ):
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")  # the choice has settled it
            model = open_clip.create_model(
                name,
                pretrained=tag,
                quick_gelu=quick_gelu,
                force_image_size=image_size,
                require_pretrained=True,
            )
            return cast("CLIP | CustomTextCLIP | CoCa", model)
    except (OSError, RuntimeError) as error:
        raise _unreachable(name, tag, error) from error


def _repository(config: dict[str, Any]) -> str | None:
    """Where on the hub the weights lie; None where open_clip takes them from elsewhere."""
    where = "" if "file" in config else config.get("hf_hub", "")
    return (
        str(PurePosixPath(where if where.endswith("/") else PurePosixPath(where).parent)) if where else None
    )


def _unreachable(name: str, tag: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"the weights {name} / {tag} could not be fetched ({first_line(error)}); download them where there is a network, "
        "and pass checkpoint=PATH"
    )


@contextmanager
def _quiet_about_downloads() -> Iterator[None]:
    """Keep the error that follows from standing beside open_clip's log of the same."""
    root = logging.getLogger()
    root.addFilter(_tells_more)
    try:
        yield
    finally:
        root.removeFilter(_tells_more)


def _tells_more(record: logging.LogRecord) -> bool:
    return "Failed to download weights" not in record.getMessage()
