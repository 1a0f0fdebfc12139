"""Weights out of torch's zip archives, OpenAI's TorchScript among them: checked before they are unpacked, never run."""

from __future__ import annotations

import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decompclip.models.errors import CheckpointError, first_line

MOST_MEMBERS = 1 << 20
_PIECE = 1 << 20


def members_of(path: Path) -> list[zipfile.ZipInfo]:
    """What an archive says that it holds.

    Raises:
        ValueError: no archive that can be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except Exception as error:  # zipfile trips over odd fields in many ways
        raise ValueError(
            f"it is no zip archive that can be read ({error or type(error).__name__})"
        ) from error


def check_archive(path: Path) -> None:
    """Check an archive as `torch.save` and `torch.jit.save` write it; its members are read once, in pieces.

    torch writes members plain, one behind the other, each with a checksum that it does not look at when it loads.
    Only the source code in a TorchScript archive is compressed, which nobody here reads.

    Raises:
        ValueError: a member that is compressed, larger than its place in the file, there twice, or not as it was
            written; or no archive that can be read.
    """
    members = [member for member in members_of(path) if "/code/" not in member.filename]
    _check_sizes(members, path.stat().st_size)
    if not any(member.CRC for member in members):
        return  # written after torch.serialization.set_crc32_options(False): there is nothing to check
    with zipfile.ZipFile(path) as archive:
        for member in members:
            try:
                with archive.open(member) as content:
                    while content.read(_PIECE):
                        pass
            except Exception as error:
                raise ValueError(
                    f"its member {member.filename!r} is not as it was written ({error})"
                ) from error


def _check_sizes(members: list[zipfile.ZipInfo], whole: int) -> None:
    if len(members) > MOST_MEMBERS:
        raise ValueError(f"it has {len(members):,} members; expected {MOST_MEMBERS:,} at most")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(
                f"its member {member.filename!r} is compressed, {member.compress_size:,} bytes that unpack to "
                f"{member.file_size:,}; torch compresses no weights"
            )
    if (claimed := sum(member.file_size for member in members)) > whole:
        raise ValueError(f"its members are said to have {claimed:,} bytes, in a file of {whole:,}")
    seen: set[str] = set()
    for member in members:
        if member.filename in seen:
            raise ValueError(f"its member {member.filename!r} is there twice")
        seen.add(member.filename)


# Why not `torch.jit.load(path).state_dict()`: it compiles the archive's code and rebuilds its objects, for which a
# class may bring a `__setstate__` of its own: code of the file's author, run while loading. The tensors need none
# of that. They lie as plain bytes beside `data.pkl`, a pickle that says which goes where; `pickletools` splits it
# into opcodes, and the loop below knows those that torch's writer uses and calls nothing that the file names.

OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's own files carry among the weights."""

_STORED = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = {f"torch.jit._pickle build_{kind}list" for kind in ("int", "double", "bool", "tensor")}
_MARK = object()


@dataclass(eq=False)
class _Shell:
    """An object of the archive: what it holds, and nothing that it does."""

    holds: dict[str, Any] = field(default_factory=dict)


DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    RuntimeError,  # NotImplementedError and RecursionError among them
    OSError,
    ArithmeticError,
    AssertionError,
    EOFError,
    MemoryError,
    struct.error,
)
"""What reading an archive that is not as torch writes it may raise."""

MOST_PICKLED = 64 * 2**20
"""Bytes of `data.pkl` that are read; those of the largest CLIPs have some hundred thousand."""


def _pickled(archive: zipfile.ZipFile, name: str) -> bytes:
    entry = archive.getinfo(name)
    # torch never compresses it; a small file that inflates to fill the memory is no archive of its
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > MOST_PICKLED:
        raise ValueError(f"{name} is compressed, or larger than {MOST_PICKLED:,} bytes")
    return archive.read(entry)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip archive with code in it, as `torch.jit.save` writes."""
    try:
        names = [member.filename for member in members_of(path)]
    except ValueError:
        return False  # no archive, or reading it says what is wrong
    return any("/code/" in name or name.endswith("/constants.pkl") for name in names)


def is_of_openai(path: Path) -> bool:
    """Whether a file is an archive with OpenAI's numbers in it: their models were trained with QuickGELU."""
    if not is_torchscript(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            pickled = _pickled(archive, names[0]) if len(names) == 1 else b""
    except DAMAGED:
        return False  # reading it says what is wrong
    return all(number.encode() in pickled for number in OPENAI_NUMBERS)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of an archive by name, as its `state_dict` would give them (and attributes that are tensors).

    Raises:
        CheckpointError: the archive is damaged, or its pickle asks for more than torch's writer does.
    """
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(names) != 1:
                raise ValueError(f"it has {len(names)} files data.pkl")
            folder = names[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
                raise ValueError("its numbers are big-endian")
            root = _Reader(archive, folder).read(_pickled(archive, names[0]))
            if not isinstance(root, _Shell):
                raise ValueError("it holds no module")
            return dict(_tensors(root, set()))
    except _UnknownCall as error:
        raise CheckpointError(
            f"{path} is a TorchScript archive whose pickle would call {str(error)!r}, which torch's writer never "
            "does. Refused, nothing was run"
        ) from None
    except DAMAGED as error:
        raise CheckpointError(
            f"the TorchScript archive {path} ({path.stat().st_size:,} bytes) is truncated or damaged: "
            f"{first_line(error)}; copy or download it again "
            "and compare its size and SHA-256 with the source's"
        ) from error


class _UnknownCall(Exception):
    """The pickle names a function that no archive of torch's needs."""


class _Reader:
    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self.archive = archive
        self.folder = folder
        self.storages: dict[str, Tensor] = {}
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self, pickled: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("its pickle does not end")

    def _step(self, opcode: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        match opcode:
            case "PROTO":
                pass
            case "GLOBAL":
                push(argument)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                push(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                push({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[opcode])
            case "MARK":
                push(_MARK)
            case "TUPLE":
                push(tuple(self._to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode[-1])
                items = tuple(self.stack[-n:])
                del self.stack[-n:]
                push(items)
            case "APPEND":
                item = pop()
                self.stack[-1].append(item)
            case "APPENDS":
                items = self._to_mark()
                self.stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                pairs = [pop(-2), pop()] if opcode == "SETITEM" else self._to_mark()
                self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "BINPERSID":
                push(self._storage(pop()))
            case "NEWOBJ":
                pop()
                name = pop()
                if not str(name).startswith("__torch__"):
                    raise _UnknownCall(str(name).replace(" ", "."))
                push(_Shell())
            case "BUILD":
                state = pop()
                self.stack[-1].holds.update(state if isinstance(state, Mapping) else {})
            case "REDUCE":
                arguments = pop()
                push(_call(pop(), arguments))
            case _:
                raise ValueError(f"its pickle has the opcode {opcode}, which torch's writer does not use")

    def _to_mark(self) -> list[Any]:
        mark = len(self.stack) - 1
        while self.stack[mark] is not _MARK:  # an IndexError where there is none
            mark -= 1
        items = self.stack[mark + 1 :]
        del self.stack[mark:]
        return items

    def _storage(self, persistent: tuple[Any, ...]) -> Tensor:
        """A storage as a flat tensor; `("storage", "torch FloatStorage", key, device, length)` names it."""
        _, kind, key, _, length = persistent
        if key not in self.storages:
            dtype = _STORED[str(kind).removeprefix("torch ")]
            entry = self.archive.getinfo(f"{self.folder}data/{key}")
            if entry.file_size != length * dtype.itemsize:
                raise ValueError(f"{entry.filename} does not hold {length} numbers of {dtype}")
            content = bytearray(self.archive.read(entry))
            self.storages[key] = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
        return self.storages[key]


def _call(name: Any, arguments: tuple[Any, ...]) -> Any:
    if name == "torch._utils _rebuild_tensor_v2":
        storage, offset, size, stride, *_ = arguments
        return torch.as_strided(storage, size, stride, offset)  # a RuntimeError outside the storage
    if name == "torch._utils _rebuild_parameter":
        return arguments[0]
    if name == "collections OrderedDict":
        return {}
    if name in _LISTS or name == "torch.jit._pickle restore_type_tag":
        return arguments[0]
    raise _UnknownCall(str(name).replace(" ", "."))


def _tensors(shell: _Shell, seen: set[int], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    # A module may know its parent; and one that hangs in two places is listed once, or a few levels would never end.
    seen.add(id(shell))
    for name, value in shell.holds.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Shell) and id(value) not in seen:
            yield from _tensors(value, seen, f"{prefix}{name}.")
