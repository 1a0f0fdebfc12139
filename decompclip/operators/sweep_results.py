"""What sweeps find: predictions by setting, scored, tabled and drawn on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Int
from torch import Tensor

from decompclip.decomposition.components import Components, embed, heads, mlps
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


def shares(
    predictions: Labels, before: Labels, labels: Labels | None, target: int | None
) -> dict[str, float]:
    """Shares of the images: `changed`, `accuracy` where there are labels, `target` where there is one.

    Raises:
        ValueError: not one label for each image.
    """
    if labels is not None and labels.shape != before.shape:
        raise ValueError(
            f"expected a label for each of {len(before)} images; received {list(labels.shape)}; keep the order of "
            "the data"
        )
    found = {"changed": predictions != before}
    if labels is not None:
        found["accuracy"] = predictions == labels.to(predictions)
    if target is not None:
        found["target"] = predictions == target
    return {name: float(hits.double().mean()) for name, hits in found.items()}


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """Predictions under ablation of ever other layers.

    Attributes:
        predictions: by setting, one for each layer.
        scheme: at setting l, "forward" ablates layers 0..l, "backward" l..L-1, "separate" l alone.
        fill: what stands in for the ablated terms.
        before: predictions with nothing ablated, which tables and figures compare with.
        entry: whether setting 0 is the stream's entry, so that setting l + 1 is layer l.
    """

    predictions: Int[Tensor, "layer batch"]
    kind: Kind
    scheme: Scheme
    fill: FillKind
    before: Labels | None = None
    entry: bool = False

    def components(self, layer: int) -> Components:
        """What setting `layer` ablates."""
        if self.entry:
            after = {
                "forward": slice(layer),
                "backward": slice(max(0, layer - 1), None),
                "separate": layer - 1,
            }
            if layer == 0:
                return embed | mlps if self.scheme == "backward" else embed
            rest = mlps[after[self.scheme]]
            return embed | rest if self.scheme == "forward" else rest
        layers = {"forward": slice(layer + 1), "backward": slice(layer, None), "separate": layer}[self.scheme]
        return (heads if self.kind == "heads" else mlps)[layers]

    def to_frame(self, labels: Labels | None = None, target: int | None = None) -> pd.DataFrame:
        """One row a setting: layer, components, and shares of the images as `SweepTable.to_frame` has them.

        Raises:
            ValueError: not one label for each image.
        """
        import pandas as pd

        rows = [
            {
                "layer": layer,
                "components": repr(self.components(layer)),
                **shares(self[layer], self._before, labels, target),
            }
            for layer in range(len(self))
        ]
        return pd.DataFrame(rows)

    def figure(self, labels: Labels | None = None, target: int | None = None) -> go.Figure:
        """Curves over layers: `changed`, or accuracy and the target's share where asked for."""
        alone = SweepTable(self._before, {(self.kind, self.scheme): self}, None, self.fill)
        return alone.figure(labels, target)

    @property
    def _before(self) -> Labels:
        if self.before is None:
            raise ValueError(
                "expected a sweep that knows the predictions before it; received one without; take it from "
                "ablation_sweep"
            )
        return self.before

    def __len__(self) -> int:
        return len(self.predictions)

    def __getitem__(self, layer: int) -> Int[Tensor, " batch"]:
        return self.predictions[layer]

    def __repr__(self) -> str:
        settings, images = self.predictions.shape
        return (
            f"Sweep({self.fill}-ablation of {self.kind}, {self.scheme}: {settings} settings, {images} images)"
        )

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, float_format="{:.3f}".format)


@dataclass(frozen=True, eq=False, repr=False)
class HeadSweep:
    """Predictions with every head ablated alone.

    Attributes:
        before: predictions with nothing ablated.
    """

    predictions: Int[Tensor, "layer head batch"]
    fill: FillKind
    before: Labels

    def __getitem__(self, place: tuple[int, int]) -> Int[Tensor, " batch"]:
        return self.predictions[place]

    def to_frame(self, labels: Labels | None = None, target: int | None = None) -> pd.DataFrame:
        """One row a head: layer, head, and shares of the images as `SweepTable.to_frame` has them.

        Raises:
            ValueError: not one label for each image.
        """
        import pandas as pd

        layers, n_heads, _ = self.predictions.shape
        rows = [
            {"layer": layer, "head": head, **shares(self[layer, head], self.before, labels, target)}
            for layer in range(layers)
            for head in range(n_heads)
        ]
        return pd.DataFrame(rows)

    def figure(self, labels: Labels | None = None, target: int | None = None) -> go.Figure:
        """A map of the heads: the share of images that each changes; with labels, or else a target, by how much
        their share falls (or, below 0, rises)."""
        from decompclip.figures.heatmaps import matrix

        frame = self.to_frame(labels, target)
        column = "accuracy" if labels is not None else "changed" if target is None else "target"
        layers, n_heads, _ = self.predictions.shape
        values = frame[column].to_numpy().reshape(layers, n_heads)
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

    def __repr__(self) -> str:
        layers, n_heads, images = self.predictions.shape
        return f"HeadSweep({self.fill}-ablation of {layers} x {n_heads} heads, each alone: {images} images)"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, float_format="{:.3f}".format, max_rows=60)


@dataclass(frozen=True, eq=False, repr=False)
class SweepTable:
    """All sweeps over a data set.

    Attributes:
        before: predictions with nothing ablated.
        sweeps: by kind of component and scheme.
        each_head: every head alone; None where not asked for.
        fill: what stands in for the ablated terms.
    """

    before: Int[Tensor, " batch"]
    sweeps: Mapping[tuple[Kind, Scheme], Sweep]
    each_head: HeadSweep | None
    fill: FillKind

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, key: tuple[Kind, Scheme]) -> Sweep:
        return self.sweeps[key]

    def to_frame(
        self, labels: Int[Tensor, " batch"] | None = None, target: int | None = None
    ) -> pd.DataFrame:
        """One row a setting: kind, scheme, layer, head (none but for heads alone), components, and shares of the
        images: `changed` (another class than before), `accuracy` (of `labels`), `target` (the class `target`).

        Raises:
            ValueError: not one label for each image.
        """
        import pandas as pd

        rows = [
            {**about, **shares(predictions, self.before, labels, target)}
            for about, predictions in self._settings()
        ]
        frame = pd.DataFrame(rows)
        return frame.astype({"layer": "Int64", "head": "Int64"})

    def figure(self, labels: Int[Tensor, " batch"] | None = None, target: int | None = None) -> go.Figure:
        """Curves over layers, one panel for each sweep, with 95 % Wilson intervals; dashed: the model as it is.

        Args:
            labels: the images' classes; without them (and without a target) the share of changed answers is drawn.
            target: a class whose share is drawn.
        """
        from decompclip.figures.curves import sweep_panels
        from decompclip.figures.scatter import Point
        from decompclip.figures.theme import ACCURACY, CONTROL, SUCCESS

        hits = {}
        if labels is not None:
            hits["accuracy"] = labels, True, replace(ACCURACY, label=SHARES["accuracy"])
        if target is not None:
            hits["target"] = target, True, replace(SUCCESS, label=SHARES["target"])
        hits = hits or {"changed": (self.before, False, replace(CONTROL, label=SHARES["changed"]))}

        def point(predictions: Tensor, answer: Tensor | int, same: bool) -> Point:
            return Point.of(Rate.of((predictions == answer) == same).to_dict())

        panels = {
            sweep_title(kind, scheme, len(sweep)): {
                style: [point(setting, answer, same) for setting in sweep.predictions]
                for answer, same, style in hits.values()
            }
            for (kind, scheme), sweep in self.sweeps.items()
        }
        before = {style: point(self.before, answer, same).value for answer, same, style in hits.values()}
        return sweep_panels(panels, before)

    def _settings(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        nothing: dict[str, Any] = {"kind": "none", "scheme": "none", "layer": None, "head": None}
        yield {**nothing, "components": ""}, self.before
        for (kind, scheme), sweep in self.sweeps.items():
            for layer in range(len(sweep)):
                about = {"kind": kind, "scheme": scheme, "layer": layer, "head": None}
                yield {**about, "components": repr(sweep.components(layer))}, sweep[layer]
        if self.each_head is not None:
            layers, n_heads, _ = self.each_head.predictions.shape
            for layer in range(layers):
                for head in range(n_heads):
                    about = {"kind": "heads", "scheme": "alone", "layer": layer, "head": head}
                    yield {**about, "components": repr(heads[layer, head])}, self.each_head[layer, head]

    def __repr__(self) -> str:
        settings = sum(len(sweep) for sweep in self.sweeps.values())
        more = (
            "" if self.each_head is None else f" and {self.each_head.predictions[..., 0].numel()} heads alone"
        )
        return f"SweepTable({self.fill}-ablation: {settings} settings{more}, {len(self)} images)"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, float_format="{:.3f}".format)
