"""The Hugging Face hub, asked once whether it answers, and not again where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
