"""Files are whole or not there; a folder has one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from decompclip import files
from decompclip.files import FolderInUse, alone_in, atomic_folder, atomic_write, sweep, write_json, write_text

WRITERS: dict[str, Callable[[Path], object]] = {
    "plain": lambda path: path.write_bytes(bytes(10_000_000)),
    "torch": lambda path: torch.save({"a": torch.zeros(2_000_000)}, path),
    "safetensors": lambda path: save_file({"a": torch.zeros(2_000_000)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, small_files: None, writer: str) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with (
        pytest.raises(
            OSError, match=r"expected to write .*file; received: .*; what was there is as it was; make room"
        ),
        atomic_write(path) as partial,
    ):
        WRITERS[writer](partial)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"
    with pytest.raises(OSError, match="make room"), atomic_folder(tmp_path, "manifest") as partial:
        WRITERS[writer](partial / "large")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_error_in_the_block_that_tells_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere") as error, atomic_write(tmp_path / "file"):
        (tmp_path / "elsewhere").read_text()
    assert error.value.errno == errno.ENOENT
    with pytest.raises(RuntimeError, match="^shape$"), atomic_write(tmp_path / "file"):
        raise RuntimeError("shape")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "file"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, writer: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "file") as partial:
            WRITERS[writer](partial)
        with atomic_folder(tmp_path / "folder", "manifest") as partial:
            WRITERS[writer](partial / "weights")
            write_text(partial / "manifest", "")
    finally:
        os.umask(before)
    for path in (tmp_path / "file", tmp_path / "folder" / "weights", tmp_path / "folder" / "manifest"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_link_stays_a_link_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "after"
    code = "from decompclip.files import write_text; write_text('/dev/stdout', 'said')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"said"
    assert not Path("/dev/stdout").resolve().is_file() or Path("/dev/stdout").is_symlink()
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        write_text(tmp_path, "")


def test_texts_that_are_no_utf_8_are_written_and_json_reads_them_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "file.json", {name: [name, 0.5]})
    assert json.loads((tmp_path / "file.json").read_text(encoding="utf-8")) == {name: [name, 0.5]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", float("nan"))
    assert "caf" in (tmp_path / "file.json").read_text(encoding="utf-8")


KILLED = """
import os, signal, sys
from pathlib import Path
from decompclip.files import atomic_folder, atomic_write, alone_in
folder = Path(sys.argv[1])
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
with alone_in(folder), atomic_write(folder / "other") as other, atomic_folder(folder, "manifest") as partial:
    other.write_text("half")
    for name in ("a", "b", "manifest"):
        (partial / name).write_text("new")
    place, moves = os.replace, int(sys.argv[2])
    def replace(*names):
        global moves
        if not moves: die()
        moves -= 1
        place(*names)
    os.replace = replace
"""


@pytest.mark.parametrize("moves", range(4))
def test_a_folder_is_whole_when_its_manifest_is_there(tmp_path: Path, moves: int) -> None:
    with atomic_folder(tmp_path, "manifest") as partial:
        for name in ("a", "b", "manifest"):
            (partial / name).write_text("old")
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(moves)], check=False)
    assert run.returncode == -signal.SIGKILL
    if (tmp_path / "manifest").exists():
        assert len({(tmp_path / name).read_text() for name in ("a", "b", "manifest")}) == 1
    assert not (tmp_path / "manifest").exists() or moves == 3
    assert not (tmp_path / "other").exists()
    assert list(tmp_path.glob(".*.partial"))
    with alone_in(tmp_path):  # the lock of the dead is free, and what it left goes
        assert not list(tmp_path.glob(".*.partial"))


def test_only_what_the_dead_left_is_swept(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "mine") as mine, atomic_folder(tmp_path, "m") as folder:
        (tmp_path / "data.partial").write_text("somebody's own")
        sweep(tmp_path)
        assert mine.exists() and folder.exists()
        (folder / "m").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.partial", "m", "mine"]


def test_a_second_process_is_told_who_is_there(tmp_path: Path) -> None:
    code = f"from decompclip.files import alone_in\nwith alone_in({str(tmp_path)!r}): pass"
    with alone_in(tmp_path):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert run.returncode == 1
        assert f"expected to be alone in writing to {tmp_path}; process {os.getpid()} on " in run.stderr
        with pytest.raises(FolderInUse, match="wait until it is done"), alone_in(tmp_path):
            pass
        with alone_in(tmp_path, name="file.json"):  # a file of it is another thing
            pass
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [path.name for path in tmp_path.iterdir()] == [".decompclip.lock"]


def test_two_that_write_one_folder_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one and the manifest of the other would be a folder that looks whole."""
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    code = f"""
import time
from decompclip.files import atomic_folder, write_text
with atomic_folder({str(tmp_path)!r}, "manifest") as partial:
    for name in ("a", "manifest"):
        write_text(partial / name, "first")
    print("inside", flush=True)
    input()
"""
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout is not None and first.stdout.readline() == b"inside\n"
    with pytest.raises(FolderInUse, match="manifest; process"), atomic_folder(tmp_path, "manifest"):
        raise AssertionError("let in")
    monkeypatch.setattr(files, "PATIENCE", 60)
    assert first.stdin is not None
    first.stdin.write(b"\n")
    first.stdin.flush()
    with atomic_folder(tmp_path, "manifest") as partial:  # waits
        for name in ("a", "manifest"):
            write_text(partial / name, "second")
    assert first.wait() == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a": "second",
        "manifest": "second",
    }


def test_a_folder_that_nothing_was_written_to_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError), alone_in(tmp_path / "a" / "b"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with alone_in(tmp_path / "a" / "b"):
        write_text(tmp_path / "a" / "b" / "file", "")
    assert (tmp_path / "a" / "b" / "file").exists()


def test_who_waits_makes_the_folder_anew_where_its_maker_fails(tmp_path: Path) -> None:
    place, inside = tmp_path / "a" / "b", threading.Event()

    def fail() -> None:
        with suppress(ValueError), alone_in(place):
            inside.set()
            time.sleep(0.3)  # the other waits meanwhile
            raise ValueError

    first = threading.Thread(target=fail)
    first.start()
    inside.wait()
    with alone_in(place, patience=60):
        write_text(place / "file", "")
    first.join()
    assert (place / "file").exists()


CROWD = """
import os, sys, time
from pathlib import Path
from decompclip.files import alone_in
folder, mark = Path(sys.argv[1]), Path(sys.argv[2])
for turn in range(40):
    with alone_in(folder, name=sys.argv[3], patience=60):
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        time.sleep(0.001)
        mark.unlink()
"""


@pytest.mark.parametrize("name", ["", "file"])
def test_of_many_that_wait_one_is_inside(tmp_path: Path, name: str) -> None:
    """Whose lock is removed at the end, with the folder that was made for it."""
    args = [sys.executable, "-c", CROWD, str(tmp_path / "a" / "b"), str(tmp_path / "mark"), name]
    crowd = [subprocess.Popen(args, stderr=subprocess.PIPE) for _ in range(3)]
    assert [(process.communicate()[1], process.returncode) for process in crowd] == [(b"", 0)] * 3
    assert not list(tmp_path.rglob(".*.lock")) or not name


def test_a_lock_that_went_is_not_held(tmp_path: Path) -> None:
    """What somebody waits with is open before it goes: two would be inside."""
    flock, went = fcntl.flock, []

    def late(file: int, how: int) -> None:
        if how & fcntl.LOCK_EX and not went:
            went.append(how)
            (tmp_path / ".file.lock").unlink()  # by its holder, who is done
        flock(file, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with alone_in(tmp_path, name="file", patience=5):
            assert went
            with pytest.raises(FolderInUse), alone_in(tmp_path, name="file"):
                raise AssertionError("let in")
    assert list(tmp_path.iterdir()) == []


def test_files_with_long_names_have_locks_and_leavings_of_their_own(tmp_path: Path) -> None:
    one, other = (f"{'sweep-of-a-learning-rate-and-a-batch-size-' * 2}seed-{seed}.pt" for seed in (0, 1))
    with (
        alone_in(tmp_path, name=one),
        alone_in(tmp_path, name=other),
        atomic_write(tmp_path / other) as partial,
    ):
        assert len({lock.name for lock in tmp_path.glob(".*.lock")}) == 2
        with pytest.raises(FolderInUse, match=f"{one}; process"), alone_in(tmp_path, name=one):
            pass
        left = partial.with_name(partial.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-"))  # of the dead
        left.touch()
        sweep(tmp_path, one)
        assert left.exists()
        sweep(tmp_path, other)
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == [other]
    long = "x" * 250
    write_text(tmp_path / long, "")
    with alone_in(tmp_path, name=long):
        pass
