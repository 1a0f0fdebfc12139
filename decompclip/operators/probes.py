"""Linear probes: which property of an image a component's term encodes.

In a world whose images carry their properties (`decompclip.data.shapes`), a component's role need not be guessed.
`decompclip.operators.naming` tells whether TEXTSPAN's words name the same property.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from decompclip.decomposition.components import Components, heads as all_heads
from decompclip.decomposition.decomposition import Decomposition, batches
from decompclip.intervals import wilson
from decompclip.operators.parts import ByPart, Part, Points

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from sklearn.base import ClassifierMixin


COPY = 1e-5
"""Relative distance of features under which two images are one, decomposed in different batches."""


@dataclass(frozen=True, eq=False, repr=False)
class Probes(ByPart):
    """How well each property can be read off each part, on images held out.

    Attributes:
        parts: the components probed.
        properties: names.
        accuracy: share of the held-out images whose value is predicted.
        chance: share that the most frequent value of the training images gets.
        explained: share of the part's variance that lies between the means of the property's values (all images;
            adjusted for their number, so that it is zero on average for a part that knows nothing of it).
        counts: images trained on, and held out.
    """

    parts: tuple[Part, ...]
    properties: tuple[str, ...]
    accuracy: Float[Tensor, "part property"]
    chance: Float[Tensor, " property"]
    explained: Float[Tensor, "part property"]
    counts: tuple[int, int]
    seed: int
    n_layers: int
    n_heads: int

    largest = "gain"

    @property
    def gain(self) -> Float[Tensor, "part property"]:
        """Accuracy between chance (0) and all (1)."""
        return (self.accuracy - self.chance) / (1 - self.chance).clamp_min(1e-9)

    def heads(self, name: str) -> Float[Tensor, "layer head"]:
        """Gain of single heads for one property; nan where not probed.

        Raises:
            ValueError: there is no such property.
        """
        if name not in self.properties:
            raise ValueError(f"expected a property of {self.properties}; received {name!r}")
        return self._grid(self.gain[:, self.properties.index(name)])[0]

    def to_frame(self) -> pd.DataFrame:
        """One row a part and property, with Wilson's 95 % interval of the accuracy."""
        import pandas as pd

        held_out = self.counts[1]
        rows: list[dict[str, Any]] = []
        for i, part in enumerate(self.parts):
            for j, name in enumerate(self.properties):
                accuracy = float(self.accuracy[i, j])
                low, high = wilson(accuracy, held_out)
                row = {"part": str(part), "property": name, "accuracy": accuracy, "low": low, "high": high}
                row |= {"chance": float(self.chance[j]), "gain": float(self.gain[i, j])}
                rows.append(row | {"explained": float(self.explained[i, j])})
        return pd.DataFrame(rows)

    def figure(self) -> go.Figure:
        """Gain, parts by properties."""
        from decompclip.figures.heatmaps import matrix

        return matrix(
            self.gain.clamp_min(0).numpy(),
            rows=[str(part) for part in self.parts],
            columns=self.properties,
            unit="accuracy, from chance (0) to all (1)",
            hover="%{y}, %{x}: %{customdata[0]:.1%} of images held out, %{customdata[1]:.1%} of variance",
            notes=torch.stack([self.accuracy, self.explained], dim=-1).numpy(),
            top=1.0,
            row_height=18,
            x_above=True,
        )

    def __repr__(self) -> str:
        trained, held_out = self.counts
        return (
            f"Probes({len(self.parts)} parts, {', '.join(self.properties)}; trained on {trained} images, scored on "
            f"{held_out})"
        )


def probe(
    d: Decomposition | Iterable[Decomposition],
    properties: Mapping[str, Int[Tensor, " batch"]],
    *,
    components: Components = all_heads,
    held_out: float = 0.3,
    estimator: ClassifierMixin | None = None,
    groups: Int[Tensor, " batch"] | None = None,
    seed: int = 0,
) -> Probes:
    """Train a linear probe of every property on every component's term, and score it on images held out.

    Args:
        d: a decomposition, or a stream of batches.
        properties: the index of each property's value, one an image, in the order of `d`; for instance
            `vars(batch.attributes)` of the Shapes world.
        components: which.
        held_out: share of images to score on, the same for all.
        estimator: an untrained scikit-learn classifier; by default logistic regression on scaled coordinates.
        groups: a number for each image; those of one number (crops of one photograph, say) are all trained on or all
            held out. Images whose features are the same are one group in any case: a copy would tell the answer.
        seed: of the split.

    Returns:
        Accuracy of every property on every component.

    Raises:
        IndexError: a component that the tower does not have.
        ValueError: no properties, values that are not one for each image, a property of one value only, or a
            split that leaves either side without images.
    """
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features: list[Tensor] = []

    def seen() -> Iterator[Decomposition]:
        for part in batches(d):
            features.append(part.features.detach().cpu())
            yield part

    points = Points.of(seen(), components)
    labels = _labels(properties, len(points))
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed)).numpy()
    cut = round(len(points) * (1 - held_out))
    if not 0 < cut < len(points):
        raise ValueError(
            f"expected images to train on and to hold out; received {len(points)} images and held_out={held_out}; "
            "add images, or choose a share between 0 and 1"
        )
    train, test = _split(order, cut, _groups(torch.cat(features), groups))
    if not len(test):
        raise ValueError(
            f"expected different images to train on and to hold out; received {len(points)} copies of the same; add images"
        )
    for name, y in labels.items():
        if len(set(y[train].tolist())) < 2:
            raise ValueError(
                f"expected at least two values of {name!r} among the {cut} images to train on; received "
                f"{sorted(set(y[train].tolist()))}; add images, or leave the property out"
            )
    model = estimator or make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))

    accuracy = torch.zeros(len(points.parts), len(labels), dtype=torch.float64)
    explained = torch.zeros_like(accuracy)
    for i in range(len(points.parts)):
        x = points[i].double().cpu().numpy()
        for j, y in enumerate(labels.values()):
            fitted: Any = clone(model)
            fitted.fit(x[train], y[train])
            accuracy[i, j] = float((fitted.predict(x[test]) == y[test]).mean())
            explained[i, j] = _explained(x, y)
    modes = [np.bincount(y[train]).argmax() for y in labels.values()]
    chance = [float((y[test] == mode).mean()) for y, mode in zip(labels.values(), modes, strict=True)]
    return Probes(
        parts=points.parts,
        properties=tuple(labels),
        accuracy=accuracy,
        chance=torch.tensor(chance, dtype=torch.float64),
        explained=explained,
        counts=(len(train), len(test)),
        seed=seed,
        n_layers=points.maps.heads.shape[0],
        n_heads=points.maps.heads.shape[1],
    )


def _split(order: np.ndarray, cut: int, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first `cut` of the order, and the rest; a group goes where its first image does."""
    _, first, group = np.unique(groups[order], return_index=True, return_inverse=True)
    trained = first[group] < cut
    return order[trained], order[~trained]


def _groups(features: Float[Tensor, "image d_embed"], given: Tensor | None) -> np.ndarray:
    """One number for images that are copies of each other, or that are given as belonging together."""
    n, x = len(features), features.double().numpy()
    if given is not None and tuple(given.shape) != (n,):
        raise ValueError(
            f"expected groups as one number for each of {n} images; received {list(given.shape)}; give them in the "
            "order of the images"
        )
    # Copies have one place on any line, but for the rounding of other batches: neighbours on it are compared whole.
    along = x @ np.random.default_rng(0).standard_normal(x.shape[1])
    order = np.argsort(along)
    steps = np.linalg.norm(np.diff(x[order], axis=0), axis=1)
    same = steps <= COPY * np.linalg.norm(x[order[1:]], axis=1)
    links = [(order[:-1][same], order[1:][same])]
    if given is not None:
        values = given.cpu().numpy()
        by_value = np.argsort(values)
        alike = np.diff(values[by_value]) == 0
        links.append((by_value[:-1][alike], by_value[1:][alike]))
    rows, columns = (np.concatenate(ends) for ends in zip(*links, strict=True))
    return connected_components(coo_array((np.ones(len(rows)), (rows, columns)), shape=(n, n)))[1]


def _labels(properties: Mapping[str, Tensor], count: int) -> dict[str, np.ndarray]:
    if not properties:
        raise ValueError(
            "expected at least one property; received none; name them as {'colour': indices, ...}"
        )
    for name, values in properties.items():
        if tuple(values.shape) != (count,):
            raise ValueError(
                f"expected one value of {name!r} for each of {count} images; received {list(values.shape)}; give "
                "them in the order of the images"
            )
    return {name: values.cpu().numpy() for name, values in properties.items()}


def _explained(x: np.ndarray, y: np.ndarray) -> float:
    """Adjusted share of variance between groups: `1 - (within / (n - k)) / (total / (n - 1))`."""
    size = np.square(x).sum()
    x = x - x.mean(0)
    groups = [x[y == value] for value in np.unique(y)]
    total = np.square(x).sum()
    between = sum(len(group) * np.square(group.mean(0)).sum() for group in groups)
    n, k = len(x), len(groups)
    if total <= 1e-20 * size or n <= k:  # all images alike, but for rounding
        return 0.0
    return float(1 - (total - between) / (n - k) * (n - 1) / total)
