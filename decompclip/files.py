"""Files that are whole or not there, and places that one process writes to at a time. Every room may import this.

What is written goes under a temporary name beside its place, onto the disk, and then takes the place in one step: a kill or a
full disk leaves what was there before. A folder of several files is whole when its manifest is there, which comes last.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import shlex
import shutil
import stat
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

PARTIAL = ".partial"
LOCK = ".decompclip.lock"
CHECKPOINT = "checkpoint.pt"
"""What `decompclip finetune` goes on from, beside the model that it wrote: nothing loads a folder's model from it."""
PATIENCE = 10.0
"""Seconds to wait for another's files to come into a folder."""

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_NUMBERS = itertools.count()
_OPEN: set[str] = set()  # names that this process writes under now
_STREAMS = tuple(Path(place) for place in ("/dev", "/dev/fd", "/proc/self/fd"))


class FolderInUse(OSError):
    """Another process writes there; says which."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """The path to write to in the block; at its end the file is on the disk and takes the place of `path`.

    Permissions follow the umask, whatever the writer does. What killed runs left of the same file is removed. A pipe or a
    device is written to as it is.

    Raises:
        OSError: the file cannot be written, also where a library says so in an exception of its own; what was there stays.
    """
    path = Path(path)
    if path.parent in _STREAMS or (path.exists() and not path.is_file() and not path.is_dir()):
        yield path
        return
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write; {path} is a folder; name a file in it")
    path = Path(os.path.realpath(path))  # a link stays a link
    with _as_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        partial = _partial(path)
        try:
            _OPEN.add(partial.name)
            partial.touch(exist_ok=False)
            mode = stat.S_IMODE(partial.stat().st_mode)
            yield partial
            os.chmod(partial, mode)  # some writers make a private file of their own
            _onto_disk(partial)
            os.replace(partial, path)
            _onto_disk(path.parent)
        finally:
            partial.unlink(missing_ok=True)
            _OPEN.discard(partial.name)


def write_text(path: str | Path, text: str) -> Path:
    """Text in UTF-8, whole or not at all; what is no character (of file names) as a backslash and its number."""
    with atomic_write(path) as partial:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """JSON that reads back as it was; numbers that are none (nan) are refused."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def digest(value: Any) -> str:
    """A short digest of a JSON value: files that belong together carry the same."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def atomic_folder(folder: str | Path, manifest: str) -> Iterator[Path]:
    """A folder to write files into in the block; at its end they come into `folder` together.

    The old manifest goes before the first of them, the new one comes after the last: a folder with a manifest is whole. Who
    writes the same folder meanwhile is waited for.

    Raises:
        FolderInUse: for longer than `PATIENCE`.
        OSError: as `atomic_write`; what was in the folder stays.
    """
    folder = Path(folder)
    with _as_os_error(folder), alone_in(folder, name=manifest, patience=PATIENCE):
        sweep(folder, manifest)
        partial = _partial(folder / manifest)
        try:
            _OPEN.add(partial.name)
            partial.mkdir()
            # what the umask gives a file: a folder's mode without the bits to enter it
            mode = stat.S_IMODE(partial.stat().st_mode) & 0o666
            yield partial
            names = sorted(file.relative_to(partial) for file in partial.rglob("*") if file.is_file())
            for name in names:
                os.chmod(partial / name, mode)
                _onto_disk(partial / name)
            names.remove(Path(manifest))
            (folder / manifest).unlink(missing_ok=True)
            _onto_disk(folder)
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial / name, folder / name)
            _onto_disk(folder)
            os.replace(partial / manifest, folder / manifest)
            _onto_disk(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            _OPEN.discard(partial.name)


def sweep(folder: Path, name: str = "") -> None:
    """Remove what killed runs left of the file `name`, or of every file of `folder`."""
    start = f".{_short(name)}."
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in list(entries):
            if not entry.name.endswith(PARTIAL) or (name and not entry.name.startswith(start)):
                continue
            host, _, rest = entry.name.removesuffix(PARTIAL).rpartition(".")[2].partition("-")
            number = rest.partition("-")[0]
            if host != _HOST or not number.isdecimal() or entry.name in _OPEN or _lives(int(number)):
                continue
            with suppress(OSError):
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def check_folder(folder: Path, what: str, *, empty: bool = False) -> None:
    """Raises OSError where a command cannot write `what` to `folder`, or with `empty` where files are there already.

    Hidden ones do not count: a killed run leaves some.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"expected a folder to write {what} to with --out; {folder} is a file")
    above = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise PermissionError(
            f"expected a folder to write {what} to with --out; {above} cannot be written to"
        )
    if empty and folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise FileExistsError(
            f"expected an empty or a new folder with --out; {folder} holds files; name another"
        )


@contextmanager
def alone_in(folder: str | Path, *, name: str = "", patience: float = 0) -> Iterator[None]:
    """Nobody else who asks for it writes to `folder` (or to the file `name` in it) during the block.

    The operating system lets go of the lock when its holder ends, however it ends. What killed runs left is removed. Functions
    that write to a folder for long take it themselves, so that a call from Python is as safe as a command; one process does not
    get it twice either.

    Args:
        folder: where to.
        name: of the file; empty for the folder.
        patience: seconds to wait for another to be done.

    Raises:
        FolderInUse: somebody does; the message says who.
        OSError: the folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    lock = _lock(folder, name)
    holder = lock.with_suffix(".holder")
    what = folder / name if name else folder
    held, made = FileLock(str(lock)), set[Path]()
    try:
        try:
            _enter(held, folder, made, patience)
        except Timeout:
            raise FolderInUse(
                f"expected to be alone in writing to {what}; {_who(holder)} does so now; wait until it is done, end it, or "
                "name another place"
            ) from None
        sweep(folder, name)
        me = {
            "process": os.getpid(),
            "host": platform.node(),
            "command": shlex.join([Path(sys.argv[0] or "python").name, *sys.argv[1:]]),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        with suppress(OSError):  # it only serves the message
            holder.write_text(json.dumps(me), encoding="utf-8")
        yield
    finally:
        if held.is_locked:
            with suppress(OSError):
                holder.unlink(missing_ok=True)
                # beside somebody's file nothing is left, nor in a folder that came for nothing. It goes while it is held: who
                # waits then finds that what it opened has gone, and asks anew
                if name or (made and [file.name for file in folder.iterdir()] == [lock.name]):
                    lock.unlink(missing_ok=True)
            held.release()
        with suppress(OSError):  # only what is empty goes
            for above in sorted(made, reverse=True):
                above.rmdir()


def _enter(held: BaseFileLock, folder: Path, made: set[Path], patience: float) -> None:
    """Hold the lock, and note which folders were `made` for it. Another who made them may remove them while this one waits."""
    end = time.monotonic() + patience
    for left in reversed(range(100)):
        try:
            made.update(above for above in (folder, *folder.parents) if not above.exists())
            folder.mkdir(parents=True, exist_ok=True)
            held.acquire(timeout=max(0, end - time.monotonic()))
            return
        except (FileNotFoundError, FileExistsError):  # what mkdir says of a folder that goes meanwhile
            if not left:
                raise


def holder_of(folder: Path, name: str = "") -> str:
    """What `alone_in` wrote of who holds a folder, or the file `name` in it; empty where nobody does."""
    try:
        return _lock(folder, name).with_suffix(".holder").read_text(encoding="utf-8")
    except OSError:
        return ""


def _lock(folder: Path, name: str) -> Path:
    return folder / (f".{_short(name)}.lock" if name else LOCK)


def _short(name: str) -> str:
    """A name that others can be made of, as long as a file's may be; another for each."""
    return name if len(name) <= 40 else f"{name[:31]}-{digest(name)[:8]}"


def _who(holder: Path) -> str:
    try:
        known = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {known['process']} on {known['host']} ({known['command']}, since {known['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun
        return "another process"


def _partial(path: Path) -> Path:
    return path.with_name(f".{_short(path.name)}.{_HOST}-{os.getpid()}-{next(_NUMBERS)}{PARTIAL}")


def _lives(process: int) -> bool:
    """Whether a process of this machine may still write; this one's names are known, and an old one may have had its number."""
    if process == os.getpid():
        return False
    if os.name == "nt":  # where asking is ending
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _onto_disk(path: Path) -> None:
    """What was written survives a loss of power too; a file system that cannot say so of a folder is believed."""
    folder = path.is_dir()
    with suppress(*([OSError] if folder else [])):
        file = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(file)
        finally:
            os.close(file)


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Whatever shows that `path` cannot be written is an OSError that names it, and says what to do."""
    try:
        yield
    except Exception as error:
        cause = _cause(error, path)
        if cause is None:
            raise
        kept = "what was there is as it was" if path.exists() else "nothing is there yet"
        words = str(getattr(cause, "strerror", None) or cause).splitlines()[0]
        kind = type(cause) if isinstance(cause, OSError) else OSError
        found: Any = kind(
            f"expected to write {path}; received: {words}; {kept}; make room on the disk, or name a place that can be written "
            "to, and run the same again"
        )
        found.errno, found.explained = getattr(cause, "errno", None), True
        raise found from error


def _cause(error: BaseException, path: Path) -> BaseException | None:
    """The failure to write behind an exception; None for an exception about something else."""
    if isinstance(error, OSError):
        name = error.filename
        ours = name is None or PARTIAL in str(name) or str(name) in (str(path), str(path.parent))
        ours = ours or Path(str(name)).suffix == ".lock"
        return error if error.errno is not None and ours and not hasattr(error, "explained") else None
    if type(error).__name__ == "SafetensorError":  # by its name, so that nothing heavy is imported here
        return error
    if isinstance(error, RuntimeError):  # torch's writer
        behind: BaseException | None = error
        while (behind := behind.__context__) is not None:
            if isinstance(behind, OSError):
                return behind
        return error if "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error) else None
    return None
