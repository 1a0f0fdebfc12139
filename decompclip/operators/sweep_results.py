"""Results of sweeps: predictions by setting, scored, tabled and drawn on demand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Int
from torch import Tensor

from decompclip.decomposition.components import Components, embed, heads, mlps
from decompclip.display import Result
from decompclip.intervals import Rate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


Kind = Literal["heads", "mlps"]
Scheme = Literal["forward", "backward", "separate"]
FillKind = Literal["mean", "zero"]
Labels = Int[Tensor, " batch"]

SHARES = {
    "accuracy": "Taken for their own class",
    "target": "Taken for the target",
    "changed": "Taken for another class than before",
}
"""What the columns of shares mean, in words."""


def sweep_title(kind: Kind, scheme: Scheme, n_layers: int) -> str:
    """What the settings of a sweep ablate, x being the setting."""
    layers = {
        "forward": "layers 0 to x",
        "backward": f"layers x to {n_layers - 1}",
        "separate": "layer x alone",
    }
    return f"{'heads' if kind == 'heads' else 'MLPs'}, {layers[scheme]}"


class SweepResult(Result):
    """What all results of sweeps share: the predictions before, and a table over their settings."""

    before: Labels

    @abstractmethod
    def _settings(self) -> Iterator[tuple[dict[str, Any], Labels]]:
        """What each setting is, and its predictions."""

    def to_frame(self, labels: Labels | None = None, target: int | None = None) -> pd.DataFrame:
        """One row a setting: kind, scheme, layer, head, components, and shares of the images.

        The shares are `changed` (another class than before), `accuracy` (with labels) and `target` (with a target).

        Args:
            labels: the images' classes, in the order of the data.
            target: a class.

        Raises:
            ValueError: not one label for each image.
        """
        import pandas as pd

        labels, rows = self._checked(labels), []
        for setting, predictions in self._settings():
            hits = {"changed": predictions != self.before}
            if labels is not None:
                hits["accuracy"] = predictions == labels
            if target is not None:
                hits["target"] = predictions == target
            rows.append(setting | {name: float(hit.double().mean()) for name, hit in hits.items()})
        return pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64"})

    def _checked(self, labels: Labels | None) -> Labels | None:
        """On the predictions' device. Raises as `to_frame`."""
        if labels is not None and labels.shape != self.before.shape:
            raise ValueError(
                f"expected a label for each of {len(self.before)} images; received {list(labels.shape)}; keep the "
                "order of the data"
            )
        return None if labels is None else labels.to(self.before)


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(SweepResult):
    """Predictions of a sweep: each setting ablates other layers.

    Attributes:
        predictions: by setting, one for each layer.
        scheme: at setting l, "forward" ablates layers 0..l, "backward" l..L-1, "separate" l alone.
        fill: what stands in for the ablated terms.
        before: predictions with nothing ablated.
        entry: whether setting 0 is the stream's entry, so that setting l + 1 is layer l.
    """

    predictions: Int[Tensor, "layer batch"]
    kind: Kind
    scheme: Scheme
    fill: FillKind
    before: Labels
    entry: bool = False

    def components(self, layer: int) -> Components:
        """What setting `layer` ablates."""
        layer -= self.entry
        first = max(layer, 0)
        which = {"forward": slice(layer + 1), "backward": slice(first, None), "separate": first}[self.scheme]
        named = (heads if self.kind == "heads" else mlps)[which]
        if not self.entry or (layer >= 0 and self.scheme != "forward"):
            return named
        return embed | named if layer >= 0 or self.scheme == "backward" else embed

    def figure(self, labels: Labels | None = None, target: int | None = None) -> go.Figure:
        """The curve over layers; arguments as `SweepTable.figure`."""
        alone = SweepTable(self.before, {(self.kind, self.scheme): self}, None, self.fill)
        return alone.figure(labels, target)

    def _settings(self) -> Iterator[tuple[dict[str, Any], Labels]]:
        for layer, predictions in enumerate(self.predictions):
            about = {"kind": self.kind, "scheme": self.scheme, "layer": layer, "head": None}
            yield {**about, "components": repr(self.components(layer))}, predictions

    def __len__(self) -> int:
        return len(self.predictions)

    def __getitem__(self, layer: int) -> Labels:
        return self.predictions[layer]

    def __repr__(self) -> str:
        settings, images = self.predictions.shape
        return (
            f"Sweep({self.fill}-ablation of {self.kind}, {self.scheme}: {settings} settings, {images} images)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class HeadSweep(SweepResult):
    """Predictions with every head ablated alone.

    Attributes:
        fill: what stands in for the ablated terms.
        before: predictions with nothing ablated.
    """

    predictions: Int[Tensor, "layer head batch"]
    fill: FillKind
    before: Labels

    def figure(self, labels: Labels | None = None, target: int | None = None) -> go.Figure:
        """A map of the heads: the share of images that each changes, or by how much it lowers a share.

        Args:
            labels: the images' classes; drawn is by how much accuracy falls (below 0: rises).
            target: a class; drawn, where there are no labels, is by how much its share falls.
        """
        from decompclip.figures.heatmaps import matrix

        layers, n_heads, _ = self.predictions.shape
        column = "accuracy" if labels is not None else "changed" if target is None else "target"
        values = self.to_frame(labels, target)[column].to_numpy().reshape(layers, n_heads)
        falls = column != "changed"
        if falls:
            right = self.before == (target if labels is None else labels.to(self.before))
            values = float(right.double().mean()) - values
        return matrix(
            100 * values,
            rows=[str(layer) for layer in range(layers)],
            columns=[str(head) for head in range(n_heads)],
            unit=f"{'fall of: ' if falls else ''}{SHARES[column].lower()}, %",
            hover="layer %{y}, head %{x}: %{z:.1f} %",
            scale="diverging" if falls else "sequential",
            x="head",
            y="layer",
            upward=True,
        )

    def _settings(self) -> Iterator[tuple[dict[str, Any], Labels]]:
        for layer, of_layer in enumerate(self.predictions):
            for head, predictions in enumerate(of_layer):
                about = {"kind": "heads", "scheme": "alone", "layer": layer, "head": head}
                yield {**about, "components": repr(heads[layer, head])}, predictions

    def __getitem__(self, place: tuple[int, int]) -> Labels:
        return self.predictions[place]

    def __repr__(self) -> str:
        layers, n_heads, images = self.predictions.shape
        return f"HeadSweep({self.fill}-ablation of {layers} x {n_heads} heads, each alone: {images} images)"


@dataclass(frozen=True, eq=False, repr=False)
class SweepTable(SweepResult):
    """All sweeps over a data set.

    Attributes:
        before: predictions with nothing ablated.
        sweeps: by kind of component and scheme.
        each_head: every head alone; None where not asked for.
        fill: what stands in for the ablated terms.
    """

    before: Labels
    sweeps: Mapping[tuple[Kind, Scheme], Sweep]
    each_head: HeadSweep | None
    fill: FillKind

    def figure(self, labels: Labels | None = None, target: int | None = None) -> go.Figure:
        """Curves over layers, one panel for each sweep, with 95 % Wilson intervals; dashed: the model as it is.

        Args:
            labels: the images' classes; without them (and without a target) the share of changed answers is drawn.
            target: a class whose share is drawn.

        Raises:
            ValueError: not one label for each image.
        """
        from decompclip.figures.curves import sweep_panels
        from decompclip.figures.scatter import Point
        from decompclip.figures.theme import ACCURACY, CONTROL, SUCCESS

        answers = {}
        if (labels := self._checked(labels)) is not None:
            answers[replace(ACCURACY, label=SHARES["accuracy"])] = labels
        if target is not None:
            answers[replace(SUCCESS, label=SHARES["target"])] = target
        changed = not answers
        answers = answers or {replace(CONTROL, label=SHARES["changed"]): self.before}

        def points(settings: Iterable[Tensor], answer: Tensor | int) -> list[Point]:
            return [Point.of(Rate.of((setting == answer) != changed).to_dict()) for setting in settings]

        panels = {
            sweep_title(kind, scheme, len(sweep)): {
                style: points(sweep.predictions, answer) for style, answer in answers.items()
            }
            for (kind, scheme), sweep in self.sweeps.items()
        }
        before = {style: points([self.before], answer)[0].value for style, answer in answers.items()}
        return sweep_panels(panels, before)

    def _settings(self) -> Iterator[tuple[dict[str, Any], Labels]]:
        nothing = {"kind": "none", "scheme": "none", "layer": None, "head": None, "components": ""}
        yield nothing, self.before
        for sweep in (*self.sweeps.values(), *([] if self.each_head is None else [self.each_head])):
            yield from sweep._settings()

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, key: tuple[Kind, Scheme]) -> Sweep:
        return self.sweeps[key]

    def __repr__(self) -> str:
        settings = sum(map(len, self.sweeps.values()))
        alone = 0 if self.each_head is None else self.each_head.predictions[..., 0].numel()
        more = f" and {alone} heads alone" if alone else ""
        return f"SweepTable({self.fill}-ablation: {settings} settings{more}, {len(self)} images)"
