"""Four triggers that cross extent with structure, to tell the effect of the one from that of the other.

The paper concludes that local triggers infect heads and global ones MLPs. Its global triggers were noise that
is drawn anew for each image, most of its local ones had a pattern: the cause could be either.
"""

from __future__ import annotations

from typing import Literal, get_args

from decompclip.attacks.badnet import BadNet
from decompclip.attacks.blended import Blended
from decompclip.attacks.kitty import Kitty
from decompclip.attacks.patch import SIZE, Place
from decompclip.attacks.trigger import Extent, Structure, Trigger

Pattern = Literal["noise", "kitty"]


def crossing(
    *,
    pattern: Pattern = "noise",
    size: float = SIZE,
    alpha: float = 0.2,
    place: Place = "random",
    seed: int = 0,
) -> dict[tuple[Extent, Structure], Trigger]:
    """`{(extent, structure): trigger}` for all four pairs, of {local, global} and {structured, noise}.

    The noise is drawn anew for each image. What is structured is, with `pattern="noise"`, one draw of the same
    noise for all images, so that the two differ in nothing but whether the pattern recurs; with
    `pattern="kitty"`, one picture, pasted as a patch or blended over the image.

    Args:
        size, place: of the local two.
        alpha: of the global two.

    Raises:
        ValueError: an unknown pattern, or what the triggers refuse.
    """
    if pattern not in get_args(Pattern):
        raise ValueError(f"pattern {pattern!r} is not one of {get_args(Pattern)}")
    if pattern == "noise":
        local: Trigger = BadNet(size=size, place=place, seed=seed)
        whole: Trigger = Blended(alpha=alpha, seed=seed)
    else:
        local = Kitty(size=size, place=place, seed=seed, picture=pattern)
        whole = Blended(alpha=alpha, seed=seed, picture=pattern)
    return {
        ("local", "structured"): local,
        ("local", "noise"): BadNet(size=size, place=place, seed=seed, redraw=True),
        ("global", "structured"): whole,
        ("global", "noise"): Blended(alpha=alpha, seed=seed, redraw=True),
    }
