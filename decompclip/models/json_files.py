"""JSON out of folders from strangers: objects whose fields are of the types that they are read as, or an error."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from decompclip.models.errors import CheckpointError

LARGEST = 64 << 20
"""Bytes of a JSON that are read; a tokenizer's of a million tokens has less."""

MOST = 2**31 - 1
"""No size is larger."""

LONGEST_SIDE = 1 << 14
"""Pixels; more are no image that a tower takes."""


@dataclass(frozen=True)
class Kind:
    """What a field may hold, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def _is_size(value: Any) -> bool:
    return is_whole(value) and value > 0


def is_side(value: Any) -> bool:
    """Whether it is a side of an image or patch in pixels."""
    return _is_size(value) and value <= LONGEST_SIDE


def _is_list(value: Any, holds: Callable[[Any], bool], length: int | None = None) -> bool:
    return isinstance(value, list | tuple) and length in (None, len(value)) and all(map(holds, value))


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
NUMBER = Kind("a finite number", is_number)
POSITIVE = Kind("a number above 0", lambda value: is_number(value) and value > 0)
EPSILON = Kind("a number above 0 and below 1", lambda value: is_number(value) and 0 < value < 1)
WHOLE = Kind("a whole number from 0", is_whole)
SIZE = Kind("a whole number above 0", _is_size)
SIDES = Kind(
    f"a whole number from 1 to {LONGEST_SIDE}, or two of them",
    lambda value: is_side(value) or _is_list(value, is_side, 2),
)
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))
TEXTS = Kind("a list of texts", lambda value: _is_list(value, TEXT.holds))
OBJECTS = Kind("a list of objects", lambda value: _is_list(value, OBJECT.holds))
MEAN = Kind("three finite numbers", lambda value: _is_list(value, is_number, 3))
STD = Kind(
    "three numbers from 1e-6 to 1e6",
    lambda value: _is_list(value, lambda x: is_number(x) and 1e-6 <= x <= 1e6, 3),
)


def between(low: float, high: float) -> Kind:
    return Kind(f"a number from {low:g} to {high:g}", lambda value: is_number(value) and low <= value <= high)


def either(*kinds: Kind) -> Kind:
    return Kind(
        ", or ".join(kind.words for kind in kinds), lambda value: any(kind.holds(value) for kind in kinds)
    )


def may_be_null(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


def one_of(*values: str) -> Kind:
    return Kind(f"one of {', '.join(map(repr, values))}", lambda value: value in values)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: there is no regular file, it cannot be read or holds none, or what no writer of configurations writes: NaN, text that is no Unicode,
            thousands of levels, more than 64 MiB.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a FIFO would be waited for without end
            raise ValueError("it is a folder, FIFO or device, expected a regular file")
        if about.st_size > LARGEST:
            raise ValueError(f"it has {about.st_size:,} bytes; expected {LARGEST:,} at most")
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()  # half of a pair of surrogates is no text
    except RecursionError as error:
        raise CheckpointError(f"{path} is no JSON of a model: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}; copy or download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} holds {type(found).__name__}, expected an object; copy or download it again"
        )
    return found


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON's")


def check_fields(
    found: Mapping[str, Any], kinds: Mapping[str, Kind], *, source: str, closed: bool = False
) -> None:
    """Check that each field that is there holds what it is read as.

    Args:
        kinds: by the field's name.
        source: the file and the part of it, for the errors.
        closed: no other field may be there.

    Raises:
        CheckpointError: one does not.
    """
    for name, kind in kinds.items():
        if name in found and not kind.holds(found[name]):
            raise CheckpointError(
                f"{source}: expected {name} to be {kind.words}; received {shown(found[name])}; mend it, or copy or "
                "download the file again"
            )
    if closed and (odd := sorted(set(found) - set(kinds))):
        raise CheckpointError(
            f"{source}: expected no fields but open_clip's own; received {', '.join(map(shown, odd[:4]))}, which it "
            f"does not know; take {'it' if len(odd) == 1 else 'them'} out"
        )


def part(found: Mapping[str, Any], name: str, *, source: str) -> dict[str, Any]:
    """The object under a name; an empty one where there is none, or null.

    Raises:
        CheckpointError: it is something else.
    """
    check_fields(found, {name: may_be_null(OBJECT)}, source=source)
    return dict(found.get(name) or {})


def shown(value: Any) -> str:
    """A value out of JSON in a few characters."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value) if isinstance(value, str | int | float | bool | None) else _in_short(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _in_short(value: Any) -> str:
    if isinstance(value, list | tuple) and all(isinstance(x, str | int | float | None) for x in value[:5]):
        return json.dumps(list(value[:5]))
    return f"a {type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__
