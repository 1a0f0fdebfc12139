"""What a diagnosis says: faults in order, each with its evidence and its remedy; and everything that was compared."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from decompclip.intervals import Paired, Rate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


Severity = Literal["error", "warning"]
Unit = Literal["%", "points", ""]

FEWEST = 20
"""Images below which nothing is said about classes, and no model is called in order."""


@dataclass(frozen=True)
class Measurement:
    """One number, and its 95 % interval where it has one. Shares and their differences are kept in 0..1."""

    what: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: Unit = ""

    @classmethod
    def of(cls, what: str, rate: Rate) -> Measurement:
        """A share of images."""
        return cls(what, rate.value, rate.low, rate.high, "%")

    def __str__(self) -> str:
        def word(value: float) -> str:
            return f"{100 * value:{'+' if self.unit == 'points' else ''}.1f}" if self.unit else f"{value:.4g}"

        interval = "" if self.low is None or self.high is None else f" [{word(self.low)}, {word(self.high)}]"
        return f"{self.what} {word(self.value)}{f' {self.unit}' if self.unit else ''}{interval}"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        check: which check found it.
        what: the fault, in a sentence.
        remedy: what to do.
        evidence: the numbers that show it.
        severity: "error" where results are wrong or much worse for it, else "warning".
    """

    check: str
    what: str
    remedy: str
    evidence: tuple[Measurement, ...] = ()
    severity: Severity = "error"

    def __str__(self) -> str:
        shown = f" ({'; '.join(map(str, self.evidence))})" if self.evidence else ""
        return f"{self.severity}: {self.what}{shown}. Remedy: {self.remedy}."


@dataclass(frozen=True)
class Comparison:
    """The model run in another way, on the same images.

    Attributes:
        check, name: what was changed, and to what.
        accuracy: in that way.
        difference: to the accuracy of the model as it is, image by image.
        interval: of that difference; those of all comparisons hold together with 95 %.
    """

    check: str
    name: str
    accuracy: Rate
    difference: Paired
    interval: tuple[float, float]

    @property
    def evidence(self) -> Measurement:
        return Measurement("difference", self.difference.value, *self.interval, "points")


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        model: its name.
        images, classes: how many there were.
        accuracy: zero-shot, as the model is, with the labels as they were given.
        chance: accuracy that answers and labels of these frequencies would have if they had nothing to do
            with one another.
        findings: what is wrong, the gravest first; empty for a model in order, and for images too few.
        comparisons: every other way in which the model was run.
        noticeable: the least loss of accuracy that these images would show, if other settings would win it back;
            None if they are too few to show any.
        unchecked: what could not be checked, and why.
    """

    model: str
    images: int
    classes: int
    accuracy: Rate
    chance: float
    findings: tuple[Fault, ...]
    comparisons: tuple[Comparison, ...]
    noticeable: float | None
    unchecked: tuple[str, ...] = ()

    @property
    def enough(self) -> bool:
        """Whether there were images enough to call a model in order."""
        return self.images >= FEWEST

    @property
    def ok(self) -> bool:
        """Whether nothing was found, on images enough to find it."""
        return self.enough and not self.findings

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = {name: getattr(self, name) for name in ("model", "images", "classes", "ok", "enough")}
        comparisons = [
            {
                "check": other.check,
                "name": other.name,
                "accuracy": other.accuracy.to_dict(),
                "difference": asdict(other.evidence),
            }
            for other in self.comparisons
        ]
        return facts | {
            "accuracy": self.accuracy.to_dict(),
            "chance": self.chance,
            "noticeable": self.noticeable,
            "findings": [asdict(fault) for fault in self.findings],
            "comparisons": comparisons,
            "unchecked": list(self.unchecked),
        }

    def to_frame(self) -> pd.DataFrame:
        """One row a number of evidence (or a fault, where it has none), in order."""
        import pandas as pd

        rows = [
            (fault.severity, fault.check, fault.what)
            + ((shown.what, shown.value, shown.low, shown.high) if shown else (None,) * 4)
            + (fault.remedy,)
            for fault in self.findings
            for shown in (fault.evidence or (None,))
        ]
        columns = ["severity", "check", "what", "evidence", "value", "low", "high", "remedy"]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    def figure(self) -> go.Figure:
        """The accuracy of each way in which the model was run, with its interval."""
        from decompclip.figures.scatter import PERCENT, Panel, Point, point_panels

        rates = {"as it is": self.accuracy} | {way.name: way.accuracy for way in self.comparisons}
        points = [Point.of(rate.to_dict()) for rate in rates.values()]
        axis = "zero-shot accuracy, %; dotted: chance"
        panel = Panel("", axis, {"accuracy": points}, PERCENT, 100 * self.chance)
        return point_panels(list(rates), [panel], bars="95 % interval")

    def _head(self) -> str:
        n = len(self.findings)
        count = f"{n} finding{'' if n == 1 else 's'}"
        if not n:
            count = "no finding" if self.enough else "too few images to say"
        images = f"{self.images} image{'' if self.images == 1 else 's'}"
        last = f"chance {100 * self.chance:.1f} %" if self.enough else f"expected at least {FEWEST} images"
        return (
            f"Diagnosis of {self.model!r}: {count}; zero-shot accuracy {self.accuracy} on {images} of "
            f"{self.classes} classes ({last})"
        )

    def _tail(self) -> Iterator[str]:
        if self.noticeable is None:
            yield "too few images to notice settings that cost accuracy: give more"
        else:
            yield f"settings that cost less than {100 * self.noticeable:.1f} points would not be noticed with so many images"
        yield from (f"not checked: {reason}" for reason in self.unchecked)

    def __repr__(self) -> str:
        return "\n".join([self._head(), *(f"  {line}" for line in (*self.findings, *self._tail()))])

    def _repr_html_(self) -> str:
        def row(tag: str, *cells: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        rows = [
            row("td", fault.severity, fault.what, "; ".join(map(str, fault.evidence)), fault.remedy)
            for fault in self.findings
        ]
        table = f"<table>{row('th', 'severity', 'finding', 'evidence', 'remedy')}{''.join(rows)}</table>"
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self._tail())
        return f"<p>{html.escape(self._head())}</p>{table if rows else ''}<ul>{notes}</ul>"
