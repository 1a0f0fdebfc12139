"""Names that moved or were renamed: the old one works for one more release, with a warning. Every room may import this."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def still_found(
    module: str, places: Mapping[str, str], others: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """A `__getattr__` for `module` that finds its old names.

        __getattr__ = still_found(__name__, {"decompclip.data.pairs": "Pairs old_name=new_name"})

    Args:
        module: `__name__` of the module that had the names.
        places: by the module that has them now, names with blanks between; `old=new` where the name is another.
        others: the module's `__getattr__` for all other names, if it has one.
    """
    found = {}
    for place, names in places.items():
        for name in names.split():
            old, _, new = name.partition("=")
            found[old] = (place, new or old)

    def find(name: str) -> Any:
        if name not in found:
            if others is None:
                raise AttributeError(f"module {module!r} has no attribute {name!r}")
            return others(name)
        place, new = found[name]
        warnings.warn(
            f"{module}.{name} is now {place}.{new}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(place), new)

    return find
