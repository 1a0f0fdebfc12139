"""Indices of component expressions: what may stand in the brackets, how it reads, and what it names."""

from __future__ import annotations

Index = int | slice | tuple[int, ...] | None  # None: all


def checked(index: object) -> Index:
    """An index in the form that expressions keep.

    Raises:
        TypeError: it is no number, slice or list of numbers.
    """
    if isinstance(index, slice):
        return None if index == slice(None) else index
    if isinstance(index, int) and not isinstance(index, bool):
        return index
    if isinstance(index, list | range) and all(isinstance(i, int) for i in index):
        return tuple(index)
    raise TypeError(f"expected a number, a slice or a list of numbers as index; received {index!r}")


def positions(index: Index, size: int, axis: str, whole: object) -> list[int]:
    """The numbers in 0..size-1 that an index of the expression `whole` names.

    Raises:
        IndexError: it lies outside.
    """
    per = "" if axis == "layer" else " a layer"
    if index is None:
        return list(range(size))
    if isinstance(index, slice):
        chosen = list(range(size))[index]
        bounds = [bound for bound in (index.start, index.stop) if bound is not None]
        if not chosen and any(abs(bound) > size or bound == size == index.start for bound in bounds):
            raise IndexError(
                f"expected {axis}s in 0..{size - 1} (or -{size}..-1 from the end); received {whole!r}, which names "
                f"none of the tower's {size} {axis}s{per}"
            )
        return chosen
    numbers = (index,) if isinstance(index, int) else index
    for number in numbers:
        if not -size <= number < size:
            raise IndexError(
                f"expected a {axis} in 0..{size - 1} (or -{size}..-1 from the end); received {axis} {number} in "
                f"{whole!r}; the tower has {size} {axis}s{per}"
            )
    return [number % size for number in numbers]


def show(index: Index) -> str:
    """An index as it is written."""
    if index is None:
        return ":"
    if isinstance(index, slice):
        ends = ["" if part is None else str(part) for part in (index.start, index.stop)]
        return ":".join(ends if index.step is None else [*ends, str(index.step)])
    return str(index) if isinstance(index, int) else str(list(index))


def show_all(index: object) -> str:
    """What stood in the brackets, as it is written."""
    parts = index if isinstance(index, tuple) else (index,)
    return ", ".join(show(part) if isinstance(part, slice) else repr(part) for part in parts)
