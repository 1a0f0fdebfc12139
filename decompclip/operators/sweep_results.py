"""What sweeps find: predictions by setting, scored, tabled and drawn on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Int
from torch import Tensor

from decompclip.cache.components import Components, heads, mlps

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Kind = Literal["heads", "mlps"]
Scheme = Literal["forward", "backward", "separate"]
FillKind = Literal["mean", "zero"]


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """Predictions under ablation of ever other layers.

    Attributes:
        predictions: by setting, one for each layer.
        scheme: at setting l, "forward" ablates layers 0..l, "backward" l..L-1, "separate" l alone.
        fill: what stands in for the ablated terms.
    """

    predictions: Int[Tensor, "layer batch"]
    kind: Kind
    scheme: Scheme
    fill: FillKind

    def components(self, layer: int) -> Components:
        """What setting `layer` ablates."""
        layers = {"forward": slice(layer + 1), "backward": slice(layer, None), "separate": layer}[self.scheme]
        return (heads if self.kind == "heads" else mlps)[layers]

    def __len__(self) -> int:
        return len(self.predictions)

    def __getitem__(self, layer: int) -> Int[Tensor, " batch"]:
        return self.predictions[layer]

    def __repr__(self) -> str:
        settings, images = self.predictions.shape
        return (
            f"Sweep({self.fill}-ablation of {self.kind}, {self.scheme}: {settings} settings, {images} images)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class HeadSweep:
    """Predictions with every head ablated alone."""

    predictions: Int[Tensor, "layer head batch"]
    fill: FillKind

    def __getitem__(self, place: tuple[int, int]) -> Int[Tensor, " batch"]:
        return self.predictions[place]

    def __repr__(self) -> str:
        layers, n_heads, images = self.predictions.shape
        return f"HeadSweep({self.fill}-ablation of {layers} x {n_heads} heads, each alone: {images} images)"


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

        if labels is not None and labels.shape != self.before.shape:
            raise ValueError(
                f"expected a label for each of {len(self)} images; received {list(labels.shape)}; keep the order of "
                "the data"
            )

        def shares(predictions: Tensor) -> dict[str, float]:
            found = {"changed": predictions != self.before}
            if labels is not None:
                found["accuracy"] = predictions == labels.to(predictions)
            if target is not None:
                found["target"] = predictions == target
            return {name: float(hits.double().mean()) for name, hits in found.items()}

        rows = [{**about, **shares(predictions)} for about, predictions in self._settings()]
        frame = pd.DataFrame(rows)
        return frame.astype({"layer": "Int64", "head": "Int64"})

    def figure(self, labels: Int[Tensor, " batch"] | None = None, target: int | None = None) -> go.Figure:
        """Curves over layers, one panel for each sweep."""
        from decompclip.figures.sweeps import sweep_curves

        return sweep_curves(self, labels, target)

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
