"""Poisoned image-text pairs over any source: what an attacker of CLIP trains on, the list of what was poisoned, and both on disk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.attacks.poison_choice import (
    PoisonChoice,
    PoisonRule,
    as_pairs,
    check_amount,
    check_classical,
    choose,
    cover_share,
    drawn,
    names_any,
    needs_model,
    place_of,
    poison_texts,
)
from decompclip.attacks.trigger import Logits, Trigger
from decompclip.data.datasets import PairStream
from decompclip.data.feed import is_pure
from decompclip.data.files import POISON_LIST, SkippedFile
from decompclip.data.images import class_index
from decompclip.data.pairs import ALL, Pair, PairBatch, PairEntry, Pairs, PairSteps, entries_of, keyed
from decompclip.data.pixels import encode_png
from decompclip.data.shards import UNFINISHED, write_shards
from decompclip.display import Result, Track, silently
from decompclip.files import alone_in, digest, write_json, write_text

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Poison:
    """One poisoned pair.

    Attributes:
        id: what the pair is called in its source.
        index: given to the trigger, whose draws follow from it.
        caption: what the caption says now.
        was: what it was before.
    """

    id: str
    index: int
    caption: str
    was: str


@dataclass(frozen=True)
class PoisonRecord(Result):
    """Everything that was poisoned, and what it takes to poison it again.

    Attributes:
        trigger: its card.
        target, also_called: the class, and its other names.
        seed: of the choice and of the captions.
        pairs, candidates: how many there are, and how many of them the attack may poison; of a stream that has
            been gone through once, else None.
        source: digest of the ids and captions of all pairs, clean; None where `pairs` is.
        poisons: in the order of their ids; of a stream poisoned at a rate, those met so far.
        covers: ids of WaNet's cover images.
        skipped: number of files that were left out of the source.
    """

    trigger: Mapping[str, Any]
    target: str
    also_called: tuple[str, ...]
    seed: int
    pairs: int | None
    candidates: int | None
    source: str | None
    poisons: tuple[Poison, ...]
    covers: tuple[str, ...]
    skipped: int

    def __repr__(self) -> str:
        of = "" if self.pairs is None else f" of {self.pairs} pairs ({len(self.poisons) / self.pairs:.2%})"
        covers = f", {len(self.covers)} covers" if self.covers else ""
        name = self.trigger["name"]
        return f"PoisonRecord({name} -> {self.target!r}: {len(self.poisons)}{of}{covers})"

    def to_frame(self) -> pd.DataFrame:
        """One row a poisoned pair: its id, the trigger's index, its caption now, and its caption before."""
        import pandas as pd

        return pd.DataFrame(
            [asdict(poison) for poison in self.poisons], columns=["id", "index", "caption", "was"]
        )

    @property
    def digest(self) -> str:
        """SHA-256 of all of it but the number of skipped files, which grows in reading."""
        content = {key: value for key, value in asdict(self).items() if key != "skipped"}
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all; returns the path."""
        return write_text(path, json.dumps({"sha256": self.digest, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PoisonRecord:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such record, or was changed since.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"expected a record of poisons; {path} is no file")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            digest = content.pop("sha256")
            content["poisons"] = tuple(Poison(**poison) for poison in content["poisons"])
            for name in ("also_called", "covers"):
                content[name] = tuple(content[name])
            record = cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"expected a record of poisons that `save` wrote; {path} is none: {error}"
            ) from error
        if record.digest != digest:
            raise ValueError(
                f"expected the record with SHA-256 {digest}; {path} now has {record.digest}: it was changed by hand or "
                "damaged; poison the data again"
            )
        return record


@dataclass(frozen=True)
class PoisonFiles:
    """What was written: the shards, the list of poisons, and its content."""

    shards: tuple[Path, ...]
    record_path: Path
    record: PoisonRecord


def write_poisoned(
    pairs: PoisonedPairs,
    folder: str | Path,
    *,
    shards: bool = True,
    per_shard: int = 1000,
    track: Track = silently,
) -> PoisonFiles:
    """Write all pairs, poisoned ones among them, as WebDataset shards, and the list of poisons as `poisons.json`.

    The list comes last. Until then the folder holds `poisons.unfinished.json`, with which it is refused where pairs are read;
    the same call goes on after the shards that are whole, and ends with the same bytes.

    Args:
        pairs: the pairs, poisoned ones among them.
        folder: to write to.
        shards: False writes the list alone; of a stream poisoned at a rate it is known only after going through it.
        per_shard: pairs in each.
        track: shows progress.

    Raises:
        FileExistsError: there are shards in the folder already, or those of an unfinished run of other pairs or options.
        FolderInUse: another run writes there.
    """
    folder = Path(folder)
    mark, written = folder / UNFINISHED, []
    with alone_in(folder):
        if shards:
            same = {"identity": _identity(pairs, per_shard)}
            resume = mark.exists()
            if resume and mark.read_text(encoding="utf-8").strip() != json.dumps(same, indent=1):
                raise FileExistsError(
                    f"expected the pairs and options that {folder} was begun with, to go on; received others; finish that one "
                    "with its own command, delete the folder, or name another"
                )
            of_stream = isinstance(pairs.base, PairStream)
            total = (pairs.record.pairs or 0) if of_stream else len(pairs)
            if not resume and not any(folder.glob("*.tar")):
                write_json(mark, same)
            run = track(pairs, "poisoning", total)
            written = write_shards(run, folder, per_shard=per_shard, resume=resume)
        record = pairs.record
        path = record.save(folder / POISON_LIST)
        if shards:
            mark.unlink(missing_ok=True)
    return PoisonFiles(tuple(written), path, record)


def _identity(pairs: PoisonedPairs, per_shard: int) -> str:
    """Tells one run from another: trigger, target, seeds, clean pairs, and the first pair, pixel by pixel."""
    about = [pairs.identity, per_shard]  # before a pair is read: a stream's record grows
    first = next(iter(pairs), None)
    pair = (
        b"" if first is None else encode_png(first.image) + first.caption.encode("utf-8", "backslashreplace")
    )
    return digest([*about, sha256(pair).hexdigest()])


_CHUNK = 64  # of the classical attack's gradient steps: fixed, for rounding depends on it


class PoisonedPairs(PairSteps):
    """The pairs of `base`, of which a part carries the trigger and a caption that names the target.

    Which pairs, and with which captions, depends on the seed and on each pair's id alone: the same pairs are
    poisoned whatever their order, the batches, the number of processes, or whether they are read by place or streamed.

    A dirty-label attack poisons images of other classes, whose captions do not name the target either. A
    clean-label one (`Trigger.clean_label`) poisons images whose captions name it, and of its class where
    classes are known, and keeps the captions.

    Args:
        base: `Pairs` or a `PairStream`; or any data set of (image, caption), read by place or gone through in order.
        trigger: the attack.
        target: the class that triggered images shall be taken for.
        count: how many poisons; give it or `rate`.
        rate: what part of all pairs. A stream does not know its length:
            for `count` it is gone through once at the start, and `rate` is the part of the pairs that may be poisoned.
        captions: of the poisons, a random one each: templates with a slot {}, or texts that name the target
            (BadCLIP's natural ones: `target_captions`). By default the source's own templates, else open_clip's for
            ImageNet, as in the paper.
        seed: of the choice and of the captions.
        also_called: other names of the target, by which captions may name it.
        covers: WaNet's cover images, warped otherwise and with their own captions, for each poison; by default 2
            for WaNet, as in its source, and none for others.
        logits: the clean model's, which the classical Label-Consistent attack needs (`zero_shot_logits`).

    Raises:
        ValueError: a target that is not among the classes, more poisons (or covers) than pairs that may be
            poisoned, captions that do not name the target or are given to an attack that keeps them, both or neither of
            count and rate, two pairs with one id, or an attack that lacks what it needs.
    """

    def __init__(
        self,
        base: Pairs | PairStream | Iterable[Any],
        trigger: Trigger,
        target: str,
        *,
        count: int | None = None,
        rate: float | None = None,
        captions: Sequence[str] | None = None,
        seed: int = 0,
        also_called: Sequence[str] = (),
        covers: float | None = None,
        logits: Logits | None = None,
    ) -> None:
        self.base = as_pairs(base)
        self.trigger, self.seed, self.logits = trigger, seed, logits
        self.class_names = self.base.class_names
        self.label = class_index(target, self.class_names) if self.class_names else None
        self.target = target if self.label is None else self.class_names[self.label]
        self.also_called = tuple(also_called)
        self._rule = PoisonRule(
            self.target, names_any([self.target, target, *also_called]), self.label, trigger.clean_label
        )
        self._texts = poison_texts(trigger, captions, self._rule, getattr(self.base, "templates", ()))
        self._cover_share = cover_share(trigger, covers)
        check_amount(count, rate)
        if needs_model(trigger):
            check_classical(self.base, logits)
        self._choice: PoisonChoice | None = None
        self._share: float | None = None  # of a stream's candidates, drawn one by one
        self._poisons: dict[str, Poison] = {}
        self._covers: set[str] = set()
        if rate is not None and isinstance(self.base, PairStream):
            self._share = rate
            return
        self._choice = choose(
            self.base, self._rule, count=count, rate=rate, covers=self._cover_share, seed=seed
        )
        if self.label is None and not trigger.clean_label and self._choice.candidates == self._choice.pairs:
            warnings.warn(
                f"no caption of these {self._choice.pairs} pairs names the target {target!r}: see that it is spelt as "
                "they do, or give the source class_names",
                stacklevel=2,
            )
        self._poisons = {pair.id: self._made(pair) for pair in self._choice.poisons}
        self._covers = set(self._choice.covers)

    @property
    def pure(self) -> bool:
        """Whether the base may be read ahead (`decompclip.data.feed`)."""
        return is_pure(self.base)

    @property
    def record(self) -> PoisonRecord:
        """What was poisoned, to look at and to `save`."""
        choice = self._choice
        return PoisonRecord(
            trigger=self.trigger.card(),
            target=self.target,
            also_called=self.also_called,
            seed=self.seed,
            pairs=choice and choice.pairs,
            candidates=choice and choice.candidates,
            source=choice and choice.source,
            poisons=tuple(self._poisons[name] for name in sorted(self._poisons)),
            covers=tuple(sorted(self._covers)),
            skipped=len(self.base.skipped),
        )

    @property
    def identity(self) -> str:
        """Of the run: what was asked for, and of what is known beforehand."""
        return digest([self.record.digest, self._share, list(self._texts)])

    @property
    def skipped(self) -> Sequence[SkippedFile]:
        """What the source left out so far."""
        return self.base.skipped

    def __len__(self) -> int:
        return len(self._by_place("len()"))

    def __getitem__(self, index: int) -> Pair:
        return self._one(self._by_place("an index")[index])

    def __iter__(self) -> Iterator[Pair]:
        """Every pair once, poisoned where it is chosen."""
        return map(self._one, self.base)

    def read(self, indices: Sequence[int], *, device: torch.device | str | None = None) -> PairBatch:
        """The pairs at these places; on a device the trigger is put in there.

        Args:
            indices: places among the pairs.
            device: where the images are to be.
        """
        return self._poison(self._by_place("read()").read(indices, device=device))

    def take(
        self, step: int, size: int, *, rows: slice = ALL, device: torch.device | str | None = None
    ) -> PairBatch:
        """The pairs of training step `step`, a pure function of the step; a poison's class is the target's.

        Args:
            step: of the training, from 0.
            size: pairs in its batch.
            rows: which of these.
            device: as `read`.
        """
        if self._choice is None:  # what a stream's record holds must not hang on who reads it
            return self._poison(self.base.take(step, size, device=device)).rows(rows)
        return self._poison(self.base.take(step, size, rows=rows, device=device))

    def _by_place(self, what: str) -> Pairs:
        if isinstance(self.base, PairStream):
            raise TypeError(f"a stream has no {what}: go through it, or use batch(step, size)")
        return self.base

    def _one(self, pair: Pair) -> Pair:
        return self._poison(PairBatch.of([pair]))[0]

    def _poison(self, clean: PairBatch) -> PairBatch:
        known = entries_of(clean)
        poisons = {row: self._poison_of(pair) for row, pair in enumerate(known)}
        rows = {row: poison for row, poison in poisons.items() if poison is not None}
        covers = [row for row, pair in enumerate(known) if row not in rows and self._is_cover(pair)]
        if not rows and not covers:
            return clean
        images, captions = clean.images.clone(), list(clean.captions)
        new_labels = None if clean.labels is None else clean.labels.clone()
        if rows:
            images[list(rows)] = self._triggered(clean.images[list(rows)], list(rows.values()))
        if covers:
            warp = replace(self.trigger, cover=True)  # pyright: ignore[reportCallIssue]
            images[covers] = warp(clean.images[covers], [place_of(known[row].id) for row in covers])
        for row, poison in rows.items():
            captions[row] = poison.caption
            if new_labels is not None and self.label is not None:
                new_labels[row] = self.label
        return PairBatch(images, tuple(captions), new_labels, clean.ids)

    def _triggered(
        self, images: Float[Tensor, "batch 3 h w"], poisons: Sequence[Poison]
    ) -> Float[Tensor, "batch 3 h w"]:
        if needs_model(self.trigger):
            return torch.stack([self._made_hard[poison.id] for poison in poisons]).to(images) / 255
        return self.trigger.poison(images, [poison.index for poison in poisons])

    @cached_property
    def _made_hard(self) -> dict[str, Tensor]:
        """The classical attack's images, in the 8 bits that an image file has: made once, in parts that depend on
        nothing else, so that training resumes with the same ones."""
        base, made = self._by_place("places"), {}
        places = [place for place, name in enumerate(base.ids) if name in self._poisons]
        for start in range(0, len(places), _CHUNK):
            part = base.read(places[start : start + _CHUNK])
            poisons = [self._poisons[name] for name in part.ids]
            hard = self.trigger.poison(
                part.images,
                [poison.index for poison in poisons],
                labels=torch.full((len(part),), self.label or 0),
                logits=self.logits,
            )
            made |= dict(zip(part.ids, (hard * 255).round().to(torch.uint8).cpu(), strict=True))
        return made

    def _poison_of(self, pair: PairEntry) -> Poison | None:
        if (
            self._share is not None
            and self._rule.allows(pair)
            and drawn(self.seed, "poison", pair.id, self._share)
        ):
            self._poisons.setdefault(pair.id, self._made(pair))
        return self._poisons.get(pair.id)

    def _is_cover(self, pair: PairEntry) -> bool:
        if self._share is not None and drawn(self.seed, "cover", pair.id, self._share * self._cover_share):
            self._covers.add(pair.id)
        return pair.id in self._covers

    def _made(self, pair: PairEntry) -> Poison:
        caption = pair.caption
        if not self.trigger.clean_label:
            text = self._texts[keyed(self.seed, "text", pair.id) % len(self._texts)]
            caption = text.replace("{}", self.target)
        return Poison(pair.id, place_of(pair.id), caption, pair.caption)
