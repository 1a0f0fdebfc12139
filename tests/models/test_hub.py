"""The hub is asked once, and where it does not answer, nothing waits for it."""

from __future__ import annotations

import time

import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from decompclip.models import tags as hub


class Hub:
    """Answers by raising, and counts how often it was asked."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.asked: list[str] = []

    def __call__(self) -> Hub:
        return self

    def model_info(self, repository: str, *, timeout: float) -> None:
        assert timeout <= 10
        self.asked.append(repository)
        if self.error:
            raise self.error


class Refusal(HfHubHTTPError):
    """The hub's own "no such thing", less the HTTP response that it carries."""

    def __init__(self) -> None:
        Exception.__init__(self, "404")


@pytest.mark.parametrize("error", [None, Refusal(), ConnectionError("no network"), TimeoutError()])
def test_any_answer_is_an_answer(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    answers = error is None or isinstance(error, Refusal)
    fake = Hub(error)
    monkeypatch.setattr(hub, "HfApi", fake)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub.asked_once("a/b"):
        assert constants.HF_HUB_OFFLINE is not answers
        with hub.asked_once("a/b"):  # inside, where it did not answer, it is not asked again
            assert constants.HF_HUB_OFFLINE is not answers
    assert not constants.HF_HUB_OFFLINE
    assert len(fake.asked) == (2 if answers else 1)


def test_the_switch_is_put_back_after_an_error_and_left_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Hub(ConnectionError())
    monkeypatch.setattr(hub, "HfApi", fake)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(KeyError), hub.asked_once("a/b"):
        raise KeyError
    assert not constants.HF_HUB_OFFLINE
    with hub.asked_once(None):
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub.asked_once("a/b"), hub.asked_once(None):
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE
    assert fake.asked == ["a/b"]


def test_inside_a_download_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Hub(ConnectionError()))
    start = time.monotonic()
    with hub.asked_once("nobody/nothing"), pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("nobody/nothing", "model.safetensors")
    assert time.monotonic() - start < 2
