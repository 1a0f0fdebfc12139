"""What a command says: of names, of signals, and of the time that is left."""

from __future__ import annotations

import os
import signal
from itertools import count

import pytest
import typer

from decompclip import display
from decompclip.attacks.registry import TRIGGERS as REGISTRY
from decompclip.cli.console import first_process, plain_errors, progress as shown, say
from decompclip.cli.options import TRIGGERS, most, sized
from decompclip.display import span


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_what_is_kept(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    # a job that a shell started in the background ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before, cleared = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(typer.Exit) as end, plain_errors(lambda: "half of it is kept") as held:
        held.callback(cleared.append, "lock")
        os.kill(os.getpid(), number)
    assert end.value.exit_code == code
    assert capsys.readouterr().err == f"stopped by {number.name}: half of it is kept\n"
    assert cleared == ["lock"]
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(typer.Exit), plain_errors():
        os.kill(os.getpid(), number)
    assert "nothing was written; run the same again" in capsys.readouterr().err


def test_what_a_launcher_left_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank among one is the first process; what is no number is refused, by commands that ask for it."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    with plain_errors(shared=True):
        assert first_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with plain_errors(shared=True):
        assert not first_process()
    for name in ("RANK", "WORLD_SIZE"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "none")
            with plain_errors():
                assert first_process()
            with pytest.raises(typer.Exit), plain_errors(shared=True):
                pass
        assert f"expected a whole number in the environment variable {name}" in capsys.readouterr().err


def test_names_are_printable_in_lines_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9") + "\u202e\x1b[2J\nerror: none"
    seen = "caf\\xe9\\u202e\\x1b[2J"
    say(name)
    say(name, lines=True)
    assert capsys.readouterr().out == f"{seen}\\nerror: none\n{seen}\nerror: none\n"
    with pytest.raises(typer.Exit), plain_errors():
        raise ValueError(name)
    assert capsys.readouterr().err == f"error: {seen} error: none\n"


def test_where_there_is_no_terminal_a_line_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticks = count()
    monkeypatch.setattr(display.time, "monotonic", lambda: float(next(ticks)))
    with shown() as track:
        assert list(track(iter(range(40)), "work\n[x]", 40)) == list(range(40))
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "work\\n[x]"
    assert lines == [
        "work\\n[x]: 5 of 40, 0:35 left",
        "work\\n[x]: 15 of 40, 0:25 left",
        "work\\n[x]: 35 of 40, 0:05 left",
        "work\\n[x]: all 40 in 0:40",
    ]


def test_spans() -> None:
    assert [span(s) for s in (0, 45.4, 725, 11045)] == ["0:00", "0:45", "12:05", "3:04:05"]


def test_a_limit_is_a_number_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert (most("20"), most(20), most("all"), most(None)) == (20, 20, None, None)
    assert capsys.readouterr().err == ""
    assert most("0") is None
    assert (
        capsys.readouterr().err
        == "note: --limit 0 is now --limit all; the old spelling goes with the next release\n"
    )
    with pytest.raises(typer.BadParameter, match="expected a number of images, or all; received -1"):
        most("-1")


def test_a_data_set_may_say_how_many_of_its_images() -> None:
    assert sized("shapes:500", 20) == ("shapes", 500)
    assert sized("shapes:badnet", 20) == ("shapes:badnet", 20) and sized("photos/", None) == ("photos/", None)


def test_the_triggers_that_are_checked_are_the_registry_s() -> None:
    assert sorted(REGISTRY) == list(TRIGGERS)
