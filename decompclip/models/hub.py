"""The Hugging Face hub, asked once whether it answers, and not again where it does not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

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
    transformers: Any = sys.modules.get(
        "transformers.dynamic_module_utils"
    )  # open_clip imports it if it is there
    before = getattr(transformers, "TIME_OUT_REMOTE_CODE", 0)
    try:
        if transformers is not None:
            transformers.TIME_OUT_REMOTE_CODE = 0
        yield
    finally:
        if transformers is not None:
            transformers.TIME_OUT_REMOTE_CODE = before
