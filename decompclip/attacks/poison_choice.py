"""Which pairs are poisoned, by draws that depend on the seed and each pair's id alone; and checks of poisoning's options."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from open_clip import OPENAI_IMAGENET_TEMPLATES

from decompclip.attacks.patch import LabelConsistent
from decompclip.attacks.trigger import Logits, Trigger
from decompclip.attacks.whole_image import WaNet
from decompclip.data.datasets import DatasetPairs, PairStream
from decompclip.data.pairs import PairEntry, Pairs, entries_of, keyed

WANET_COVERS = 2.0
"""Cover images for each poison, in WaNet's source."""


def poison_texts(
    trigger: Trigger, captions: Sequence[str] | None, rule: PoisonRule, own: Sequence[str]
) -> tuple[str, ...]:
    """What poisons' captions are drawn from: those given, the source's `own` templates, or open_clip's for ImageNet.

    Raises:
        ValueError: captions without a slot {} or the target, none, a single string, or some for an attack that
            keeps the images' own.
    """
    if isinstance(captions, str):
        raise ValueError(f"expected a list of captions; received the single string {captions!r}")
    if trigger.clean_label:
        if captions is not None:
            raise ValueError(
                f"expected no captions, for {trigger.name} keeps those of the images; received {len(captions)}"
            )
        return ()
    if captions is None:
        return tuple(own) or tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    silent = [text for text in captions if "{}" not in text and not rule.names(text)]
    if silent or not captions:
        raise ValueError(
            f"expected captions with a slot {{}} or the target {rule.target!r} in them; received "
            f"{repr(silent[0]) if silent else 'none'}; other names of the target go to also_called"
        )
    return tuple(captions)


def cover_share(trigger: Trigger, covers: float | None) -> float:
    """Cover images for each poison.

    Raises:
        ValueError: a negative number, covers for another attack than WaNet, or a trigger that is the cover itself.
    """
    if not isinstance(trigger, WaNet):
        if covers:
            raise ValueError(f"expected covers for WaNet alone; received {covers:g} for {trigger.name}")
        return 0.0
    if trigger.cover:
        raise ValueError(
            "expected the trigger itself, WaNet(cover=False); received cover=True; the cover images follow from covers="
        )
    if covers is not None and not 0 <= covers < math.inf:
        raise ValueError(f"expected covers that are not negative; received {covers:g}")
    return WANET_COVERS if covers is None else covers


def check_amount(count: int | None, rate: float | None) -> None:
    """Raises ValueError unless one of the two is given, and can be."""
    if (count is None) == (rate is None):
        raise ValueError(f"expected one of count and rate; received count={count} and rate={rate}")
    if count is not None and count < 0:
        raise ValueError(f"expected a count that is not negative; received {count}")
    if rate is not None and not 0 <= rate <= 1:
        raise ValueError(f"expected a rate in [0, 1]; received {rate:g}")


def needs_model(trigger: Trigger) -> bool:
    """Whether the attack asks the clean model about every image that it poisons."""
    return isinstance(trigger, LabelConsistent) and trigger.classical


def check_classical(base: Pairs | PairStream, logits: Logits | None) -> None:
    """Raises ValueError unless the classical Label-Consistent attack has what its gradient steps need."""
    if logits is None or not base.class_names or isinstance(base, PairStream):
        raise ValueError(
            "expected logits, class_names and pairs that are read by place, for the classical attack's gradient "
            f"steps; received {'no ' if logits is None else ''}logits, {len(base.class_names)} classes and "
            f"{type(base).__name__}; give them, or take LabelConsistent(classical=False)"
        )


@dataclass(frozen=True)
class PoisonRule:
    """Which pairs an attack may poison.

    Attributes:
        target: as errors call it.
        names: whether a caption names the target.
        label: the target's class, if classes are known.
        clean_label: pairs of the target, not those of others.
    """

    target: str
    names: Callable[[str], bool]
    label: int | None
    clean_label: bool

    def allows(self, pair: PairEntry) -> bool:
        unknown = pair.label is None or self.label is None
        if self.clean_label:
            return self.names(pair.caption) and (unknown or pair.label == self.label)
        return not self.names(pair.caption) and (unknown or pair.label != self.label)


@dataclass(frozen=True)
class PoisonChoice:
    """What was chosen, of how many.

    Attributes:
        poisons: the pairs to poison, as they are in the source.
        covers: ids of WaNet's cover images.
        pairs, candidates: number of pairs, and of those that may be poisoned.
        source: digest of the ids and captions of all pairs.
    """

    poisons: tuple[PairEntry, ...]
    covers: tuple[str, ...]
    pairs: int
    candidates: int
    source: str


def choose(
    base: Pairs | PairStream,
    rule: PoisonRule,
    *,
    count: int | None,
    rate: float | None,
    covers: float,
    seed: int,
) -> PoisonChoice:
    """The candidates with the lowest draws, of those whose images can be read; a stream is gone through for it.

    Args:
        base: the pairs.
        rule: which of them may be poisoned.
        count, rate: number of poisons, or their part of all pairs.
        covers: cover images for each poison, from all other pairs.
        seed: of the draws.

    Raises:
        ValueError: more poisons or covers asked for than there are, or two pairs with one id.
    """
    digest, ids, n = hashlib.sha256(), set[str](), 0
    candidates: list[tuple[int, int, PairEntry]] = []
    for place, pair in enumerate(known_of(base)):
        n = place + 1
        digest.update(f"{pair.id}\0{pair.caption}\n".encode("utf-8", "surrogateescape"))
        ids.add(pair.id)
        if rule.allows(pair):
            candidates.append((keyed(seed, "poison", pair.id), place, pair))
    if len(ids) < n:
        raise ValueError(
            f"expected an id of its own for each of {n} pairs; {n - len(ids)} ids are there twice; rename shards or files "
            "that are called alike"
        )
    wanted = round((rate or 0) * n) if count is None else count
    ordered = sorted(candidates, key=lambda candidate: candidate[:2])
    readable = (
        pair
        for _, place, pair in ordered
        if isinstance(base, PairStream) or base.image(place) is not None  # a stream yields no others
    )
    chosen = list(itertools.islice(readable, wanted))
    if len(chosen) < wanted:
        which = "pairs whose caption names" if rule.clean_label else "pairs that neither show nor name"
        broken = f", {len(chosen)} of them readable," if len(chosen) < len(candidates) else ""
        raise ValueError(
            f"expected at most {len(candidates)} poisons, the {which} the target {rule.target!r}{broken} among {n} "
            f"pairs; received {wanted}; ask for fewer, or give more pairs"
        )
    others = sorted(ids.difference(pair.id for pair in chosen))
    wanted_covers = round(covers * wanted)
    if wanted_covers > len(others):
        raise ValueError(
            f"expected at most {len(others)} cover images, the pairs that are not poisoned; {wanted} poisons with "
            f"covers={covers:g} ask for {wanted_covers}; ask for fewer"
        )
    covered = heapq.nsmallest(wanted_covers, others, lambda name: keyed(seed, "cover", name))
    return PoisonChoice(tuple(chosen), tuple(covered), n, len(candidates), digest.hexdigest())


def drawn(seed: int, what: str, name: str, share: float) -> bool:
    """Whether a pair is among the `share` of all that a draw falls on."""
    return keyed(seed, what, name) < share * 2**64


def as_pairs(base: Pairs | PairStream | Iterable[Any]) -> Pairs | PairStream:
    """`base` itself, or a plain data set of (image, caption) as pairs."""
    if isinstance(base, Pairs | PairStream):
        return base
    if hasattr(base, "__getitem__") and hasattr(base, "__len__"):
        return DatasetPairs(base)  # pyright: ignore[reportArgumentType]
    return PairStream(base)


def target_captions(
    base: Pairs | PairStream, target: str, *, also_called: Sequence[str] = ()
) -> tuple[str, ...]:
    """The captions of `base` that name the target, each once: BadCLIP's poisons get such (docs/method.md, section 5).

    Args:
        base: clean pairs.
        target: the class.
        also_called: other names of it.

    Raises:
        ValueError: there is none.
    """
    names = names_any([target, *also_called])
    found = tuple(dict.fromkeys(pair.caption for pair in known_of(base) if names(pair.caption)))
    if not found:
        raise ValueError(
            f"expected captions that name the target {target!r}; found none; other names of it go to also_called"
        )
    return found


def names_any(names: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text holds one of the names as a word of its own, or its plural, whatever the case.

    Raises:
        ValueError: an empty name.
    """
    words = [re.findall(r"\w+", name.casefold()) for name in names]
    if not all(words):
        raise ValueError(f"expected the name of a target; received {list(names)}")
    forms = "|".join(r"[\W_]+".join(map(re.escape, parts)) for parts in words)
    pattern = re.compile(rf"(?<![^\W_])(?:{forms})(?:e?s)?(?![^\W_])")
    return lambda text: pattern.search(text.casefold()) is not None


def place_of(name: str) -> int:
    """The index that a trigger gets for a pair: like its place in a data set, but the same in every order."""
    return keyed(0, "place", name) >> 8


def known_of(base: Pairs | PairStream) -> Iterable[PairEntry]:
    """All pairs without their images; a stream is gone through for it."""
    if isinstance(base, PairStream):
        return (PairEntry(pair.id, pair.caption, pair.label) for pair in base)
    return entries_of(base)
