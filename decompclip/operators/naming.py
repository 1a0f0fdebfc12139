"""Which property texts name, and whether it is the one that a probe finds: TEXTSPAN checked against the truth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import eq
from typing import TYPE_CHECKING, Literal, SupportsFloat

import numpy as np

from decompclip.api import check_choice
from decompclip.display import Result
from decompclip.intervals import Rate
from decompclip.operators.parts import Part, position
from decompclip.operators.probes import Probes

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


Vocabulary = Mapping[str, Sequence[str]]
"""Properties and each one's values in words, as `decompclip.data.shapes.PROPERTIES`."""

By = Literal["accuracy", "explained"]

NOTHING = "none"
"""Stands for the property of texts that name none more than the others."""


@dataclass(frozen=True, repr=False)
class Naming(Result):
    """How much texts speak of each property.

    Attributes:
        shares: (weighted) share of the texts that name a value of the property.
        usual: the same of the pool's texts; zero without a pool.
        values: the values named, each once, in the order of the texts.
    """

    shares: Mapping[str, float]
    usual: Mapping[str, float]
    values: Mapping[str, tuple[str, ...]]

    @property
    def property(self) -> str:
        """The one named more than usual by most; "none" where none is, or two are equally."""
        excess = {name: self.shares[name] - self.usual[name] for name in self.shares}
        first, *others = sorted(excess, key=lambda name: -excess[name])
        tied = any(excess[first] - excess[other] < 1e-9 for other in others)
        return NOTHING if tied or excess[first] <= 0 else first

    def to_frame(self) -> pd.DataFrame:
        """One row a property."""
        import pandas as pd

        names = list(self.shares)
        columns = {
            "property": names,
            "share": [self.shares[name] for name in names],
            "usual": [self.usual[name] for name in names],
            "values": [", ".join(self.values[name]) for name in names],
        }
        return pd.DataFrame(columns)

    def figure(self) -> go.Figure:
        """The shares as bars, each beside the pool's."""
        from decompclip.figures.bars import bar_rows

        frame = self.to_frame()
        return bar_rows(
            frame["property"].tolist(),
            {"these texts": frame["share"].tolist(), "their pool": frame["usual"].tolist()},
            unit="share of texts that name a value",
            notes=frame["values"].tolist(),
            percent=True,
            row_height=44,
        )

    def __repr__(self) -> str:
        return f"Naming({self.property}: {', '.join(f'{name} {x:.0%}' for name, x in self.shares.items())})"


def named_property(
    texts: Sequence[str],
    vocabulary: Vocabulary,
    *,
    pool: Sequence[str] | None = None,
    weights: Iterable[SupportsFloat] | None = None,
) -> Naming:
    """Which property texts name, by its values' words: "a small red object" names size and colour.

    Args:
        texts: for instance what TEXTSPAN picked for a head.
        vocabulary: for instance `decompclip.data.shapes.PROPERTIES`.
        pool: the texts that they were picked from. What all texts name (captions nearly always name a shape)
            says nothing: counted is what exceeds the pool's share.
        weights: of the texts, for instance the variance that each explains; by default all count alike.

    Returns:
        The shares of texts that name each property.

    Raises:
        ValueError: no texts or no vocabulary, a property without values, a single string for a list, or weights that are
            not one for each text, negative or all zero.
    """
    for name, found in (("texts", texts), ("pool", pool)):
        if found is not None and (isinstance(found, str) or not len(found)):
            raise ValueError(f"expected a list of at least one text as {name}; received {found!r}")
    if not vocabulary:
        raise ValueError("expected properties and their values, as PROPERTIES; received none")
    for name, words in vocabulary.items():
        if isinstance(words, str) or not words or not all(words):
            raise ValueError(f"expected a list of the values of {name!r} in words; received {words!r}")
    counted = None if weights is None else list(map(float, weights))
    if counted is not None and (len(counted) != len(texts) or min(counted) < 0 or not sum(counted) > 0):
        raise ValueError(
            f"expected one weight for each of {len(texts)} texts, none negative, not all zero; received "
            f"{len(counted)} weights; leave weights out for equal ones"
        )
    values = {name: _mentions(texts, words) for name, words in vocabulary.items()}
    usual = {name: _mentions(pool or (), words) for name, words in vocabulary.items()}
    return Naming(
        shares={name: float(np.average(list(map(bool, m)), weights=counted)) for name, m in values.items()},
        usual={name: sum(map(bool, found)) / len(found) if found else 0.0 for name, found in usual.items()},
        values={name: tuple(dict.fromkeys(v for m in found for v in m)) for name, found in values.items()},
    )


def _mentions(texts: Sequence[str], values: Sequence[str]) -> list[list[str]]:
    """Of each text the values that stand in it as whole words, longer values before those inside them."""
    ordered = sorted(values, key=len, reverse=True)
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, ordered)) + r")\b", re.IGNORECASE)
    return [[match.lower() for match in pattern.findall(text)] for text in texts]


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Result):
    """Whether the texts of each part name the property that a probe says it encodes.

    Attributes:
        parts: those that encode something at all.
        probed: the property that the probe finds best.
        named: the property that the texts name; "none" where they do not decide.
        kappa: Cohen's: 0 where agreement is what the frequencies of both alone would give, 1 where it is
            complete; nan where one property alone occurs.
        left_out: parts with texts whose probes stay under the bar.
        by: the probes' score that was used.
    """

    parts: tuple[Part, ...]
    probed: tuple[str, ...]
    named: tuple[str, ...]
    kappa: float
    left_out: tuple[Part, ...]
    by: By

    @property
    def agree(self) -> list[bool]:
        """Whether both name one property, part by part."""
        return list(map(eq, self.probed, self.named))

    @property
    def count(self) -> int:
        """Parts where both agree."""
        return sum(self.agree)

    @property
    def share(self) -> float:
        return self.count / len(self.parts)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        rate = Rate(self.count, len(self.parts))
        return rate.low, rate.high

    def to_frame(self) -> pd.DataFrame:
        """One row a part."""
        import pandas as pd

        names = [str(part) for part in self.parts]
        return pd.DataFrame({"part": names, "probed": self.probed, "named": self.named, "agree": self.agree})

    def figure(self) -> go.Figure:
        """How often each probed property goes with each named one."""
        from decompclip.figures.heatmaps import matrix

        rows = sorted(set(self.probed))
        columns = [*rows, *sorted(set(self.named) - set(rows))]
        counts = np.zeros((len(rows), len(columns)))
        for probed, named in zip(self.probed, self.named, strict=True):
            counts[rows.index(probed), columns.index(named)] += 1
        return matrix(
            counts,
            rows=rows,
            columns=columns,
            unit="parts",
            hover="probe: %{y}, texts: %{x}: %{z} parts",
            x="named by the texts",
            y="found by the probe",
            numbers=True,
        )

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"Agreement({self.count} of {len(self.parts)} parts, {100 * self.share:.0f} % [{100 * low:.0f}, "
            f"{100 * high:.0f}], kappa {self.kappa:.2f}; {len(self.left_out)} parts encode too little)"
        )


def agreement(
    probes: Probes,
    texts: Mapping[str, Sequence[str]],
    vocabulary: Vocabulary,
    *,
    pool: Sequence[str] | None = None,
    weights: Mapping[str, Sequence[float]] | None = None,
    by: By = "explained",
    least: float = 0.2,
) -> Agreement:
    """Compare what probes find with what texts name, part by part.

    Args:
        probes: of the components.
        texts: by part ("heads[5, 2]"), what TEXTSPAN picked for it, the most important first.
        vocabulary: values of the probed properties in words.
        pool: see `named_property`.
        weights: by part, one for each text, as the variance that TEXTSPAN gains by it; by default all texts count
            alike.
        by: "explained": the property that explains most of the part's variance, which is what TEXTSPAN goes by;
            "accuracy": the one that is predicted best, be its share of the variance ever so small.
        least: score (share of variance, or gain of accuracy) that a part must reach to count: what encodes
            nothing has no truth to name.

    Returns:
        The property found and the property named, component by component.

    Raises:
        KeyError: a part that was not probed, or has no weights.
        ValueError: no texts, an unknown score, a vocabulary of other properties, or no part over the bar.
    """
    from sklearn.metrics import cohen_kappa_score

    check_choice("by", by, By)
    if set(vocabulary) != set(probes.properties):
        raise ValueError(
            f"expected a vocabulary of the probed properties {probes.properties}; received {tuple(vocabulary)}; "
            "probe all of them, or leave out the rest"
        )
    scores = probes.explained if by == "explained" else probes.gain
    places = {name: position(probes.parts, name) for name in texts}
    kept = {name: i for name, i in places.items() if scores[i].max() >= least}
    if not kept:
        raise ValueError(
            f"expected a part that encodes some property with a score of {least}; received {len(places)} parts with "
            "less; lower least="
        )
    probed = [probes.properties[int(scores[i].argmax())] for i in kept.values()]
    named = [
        named_property(
            texts[name], vocabulary, pool=pool, weights=None if weights is None else weights[name]
        ).property
        for name in kept
    ]
    varied = len({*probed, *named}) > 1
    return Agreement(
        parts=tuple(probes.parts[i] for i in kept.values()),
        probed=tuple(probed),
        named=tuple(named),
        kappa=float(cohen_kappa_score(probed, named)) if varied else float("nan"),
        left_out=tuple(probes.parts[i] for name, i in places.items() if name not in kept),
        by=by,
    )
