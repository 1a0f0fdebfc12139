"""What functions of all rooms do with names: old ones work for one more release, with a warning; choices and counts are checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from numbers import Integral
from typing import Any, ParamSpec, TypeVar, get_args

P = ParamSpec("P")
R = TypeVar("R")


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


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keyword arguments that have a new name: `@renamed(old="new")`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old in kwargs:
                    message = f"{function.__name__}({old}=...) is now {new}=; the old name goes with the next release"
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def check_choice(name: str, value: object, choices: Any) -> None:
    """Check an argument that is one of a few.

    Args:
        name: of the argument.
        value: what was given.
        choices: a `Literal`, or a tuple.

    Raises:
        ValueError: it is none of them.
    """
    known = choices if isinstance(choices, tuple) else get_args(choices)
    if value not in known:
        raise ValueError(f"expected {name} of {known}; received {value!r}")


def check_count(k: object, of: str, name: str = "k") -> None:
    """Check how many of something are asked for.

    Args:
        k: what was given.
        of: what they are.
        name: of the argument.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    if not isinstance(k, Integral) or isinstance(k, bool) or k < 1:
        raise ValueError(f"expected {name} to be a whole number of {of}, at least 1; received {k!r}")
