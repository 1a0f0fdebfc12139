"""Descriptions of components by texts (`TextSpan`), and what is lost when only those are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.decomposition.components import Components
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import one_thread
from decompclip.decomposition.moments import Moments
from decompclip.display import Result
from decompclip.operators.parts import Head, Part, part_at, parts_of
from decompclip.operators.scores import ClassScore

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class TextSpan(Result):
    """The descriptions of one component, in the order in which they were picked.

    Attributes:
        part: the component.
        texts: fewer than were asked for where these explain all there is.
        indices: their numbers in the pool.
        variance_explained: share of the component's variance that the texts so far account for.
        rank: dimension of the space that the texts were projected on.
        mean: of the terms.
        directions: orthonormal; the first p span what the first p texts (projected) span.
        features: of the texts, as `role_change` compares them.
        n_images: behind the moments.
    """

    part: Part
    texts: tuple[str, ...]
    indices: tuple[int, ...]
    variance_explained: Float[Tensor, " pick"]
    rank: int
    mean: Float[Tensor, " d_embed"]
    directions: Float[Tensor, "pick d_embed"]
    features: Float[Tensor, "pick d_embed"]
    n_images: int

    @property
    def explained(self) -> float:
        """Share of the variance that all the texts together account for."""
        return self.share(len(self))

    def share(self, n_texts: int) -> float:
        """Share of the variance that the first `n_texts` texts account for."""
        used = self.variance_explained[: max(0, n_texts)]
        return float(used[-1]) if len(used) else 0.0

    def reconstruct(
        self, terms: Float[Tensor, "batch d_embed"], n_texts: int | None = None
    ) -> Float[Tensor, "batch d_embed"]:
        """The terms as their mean and the first `n_texts` descriptions (all, if None) give them."""
        kept = self.directions[:n_texts].to(terms)
        mean = self.mean.to(terms)
        return mean + (terms - mean) @ kept.mT @ kept

    def to_frame(self) -> pandas.DataFrame:
        """A row a text: component, pick, text, its number in the pool, variance explained so far."""
        import pandas

        return pandas.DataFrame(
            {
                "component": str(self.part),
                "pick": range(1, len(self) + 1),
                "text": self.texts,
                "index": self.indices,
                "variance_explained": self.variance_explained.tolist(),
            }
        )

    def figure(self) -> go.Figure:
        """The texts beside the variance that they explain."""
        from decompclip.figures.bars import bar_rows

        so_far = self.variance_explained.tolist()
        added = [share - before for share, before in zip(so_far, [0.0, *so_far], strict=False)]
        return bar_rows(
            self.texts,
            {"variance added": added},
            unit="share of the variance added (beside the bars: cumulative)",
            notes=[f"added, with those above {share:.1%}" for share in so_far],
            texts=[f"{share:.0%}" for share in so_far],
            percent=True,
            ends=(0.0, 1.15 * max(added, default=1.0)),
            title=str(self.part),
        )

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __repr__(self) -> str:
        first = ", ".join(map(repr, self.texts[:3]))
        more = f", ... {len(self)} texts" if len(self) > 3 else ""
        return f"TextSpan({self.part}: {first}{more}; {self.explained:.0%} of the variance)"


@dataclass(frozen=True, repr=False)
class ReconstructionAccuracy(Result):
    """Zero-shot accuracy with components as they are, as their texts give them, and at their means.

    Attributes:
        plain: of the features as the tower gives them.
        reconstructed: with the components replaced by their text reconstructions.
        mean_ablated: with the components replaced by their means, which is a reconstruction of no texts.
    """

    plain: float
    reconstructed: float
    mean_ablated: float
    n_texts: int | None
    n_images: int

    def to_frame(self) -> pandas.DataFrame:
        import pandas

        rows = {"as they are": self.plain, "from texts": self.reconstructed, "means": self.mean_ablated}
        return pandas.DataFrame({"components": rows.keys(), "accuracy": rows.values()})

    def figure(self) -> go.Figure:
        """The three accuracies as bars."""
        from decompclip.figures.bars import bar_rows

        frame = self.to_frame()
        return bar_rows(
            frame["components"].tolist(),
            {"accuracy": frame["accuracy"].tolist()},
            unit="zero-shot accuracy",
            texts=[f"{share:.1%}" for share in frame["accuracy"]],
            percent=True,
            ends=(0.0, 1.1),
            row_height=36,
        )

    def __repr__(self) -> str:
        texts = "all" if self.n_texts is None else str(self.n_texts)
        return (
            f"ReconstructionAccuracy({self.plain:.1%} as they are, {self.reconstructed:.1%} from {texts} texts, "
            f"{self.mean_ablated:.1%} with means; {self.n_images} images)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class TextSpans(Result):
    """The descriptions of several components.

    Attributes:
        means: means of all terms, which reconstructions stand on.
        settings: how the picks were made.
    """

    spans: tuple[TextSpan, ...]
    means: Moments
    settings: dict[str, Any] = field(default_factory=dict)

    largest = "variance_explained"

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[TextSpan]:
        return iter(self.spans)

    @overload
    def __getitem__(self, which: Components) -> TextSpans: ...
    @overload
    def __getitem__(self, which: tuple[int, Head]) -> TextSpan: ...
    def __getitem__(self, which: Components | tuple[int, Head]) -> TextSpan | TextSpans:
        """The spans of some components, `spans[heads[-1]]`, or of one by its place: `spans[11, 4]`, `spans[11, "mlp"]`.

        Raises:
            IndexError: there is no such component in the tower.
            KeyError: one of them was not described.
        """
        components = which if isinstance(which, Components) else part_at(*which)
        described = {span.part: span for span in self.spans}
        named = parts_of(components, self.means)
        missing = [str(part) for part in named if part not in described]
        if missing:
            raise KeyError(
                f"expected components that were described ({len(self)} are); received {missing[0]}"
                f"{f' and {len(missing) - 1} others' if missing[1:] else ''}, which were not; run textspans on them"
            )
        chosen = tuple(described[part] for part in named)
        return replace(self, spans=chosen) if components is which else chosen[0]

    @property
    def explained(self) -> Float[Tensor, " component"]:
        """Share of each component's variance that its texts account for."""
        return torch.tensor([span.explained for span in self.spans], dtype=torch.float64)

    def reconstruct(self, d: Decomposition, n_texts: int | None = None) -> Decomposition:
        """The decomposition with the described components as their means and first `n_texts` texts give them.

        Heads are edited in their coordinates: exact up to what directions of the joint space they can reach.

        Raises:
            ValueError: `d` is of another model, convention or normalization.
        """
        self.means.check(d)
        edited = {name: getattr(d, name).clone() for name in {span.part.field for span in self.spans}}
        for span in self.spans:
            name, at = span.part.field, span.part.place
            terms = edited[name]
            place = (slice(None), *at)
            if name != "coords" or d.maps.direct:
                terms[place] = span.reconstruct(terms[place], n_texts)
                continue
            written = d.maps.heads[at].double()
            kept = span.directions[:n_texts].to(written)
            mean = self.means.coords[at].to(written)
            spread = (terms[place].to(written) - mean) @ (written @ kept.mT)
            with one_thread():
                back = torch.linalg.pinv(written)
            terms[place] = (mean + spread @ kept @ back).to(terms)
        return d.edit(**edited)

    def accuracy(
        self,
        d: Decomposition,
        classifier: Float[Tensor, "class d_embed"],
        labels: Int[Tensor, " batch"],
        n_texts: int | None = None,
    ) -> ReconstructionAccuracy:
        """Zero-shot accuracy when the described components are replaced by their text reconstructions.

        Raises:
            ValueError: there are no images, or `d`, the classifier and the labels do not fit each other.
        """
        if not len(d) or labels.shape != (len(d),) or classifier.shape[1:] != (d.d_embed,):
            raise ValueError(
                f"expected images with one label each and a classifier [class, {d.d_embed}]; received {len(d)} images, "
                f"labels {list(labels.shape)}, classifier {list(classifier.shape)}; take all three of one model and "
                "one data set"
            )

        right = ClassScore(classifier, labels, metric="accuracy")

        def score(x: Decomposition) -> float:
            return float(right(x.features).mean())

        return ReconstructionAccuracy(
            plain=score(d),
            reconstructed=score(self.reconstruct(d, n_texts)),
            mean_ablated=score(self.reconstruct(d, 0)),
            n_texts=n_texts,
            n_images=len(d),
        )

    def to_frame(self) -> pandas.DataFrame:
        """The tables of all components, one below the other."""
        import pandas

        return pandas.concat([span.to_frame() for span in self.spans], ignore_index=True)

    def _shown(self) -> pandas.DataFrame:
        """One row a component."""
        import pandas

        rows = [(str(span.part), "; ".join(span.texts[:5]), span.explained) for span in self.spans]
        return pandas.DataFrame(rows, columns=["component", "first texts", "variance_explained"])

    def figure(self, n_texts: int = 3) -> go.Figure:
        """How much of each component's variance its first `n_texts` texts explain; which they are on hovering.

        So few, because as many texts as a head has dimensions explain all of it.
        """
        import numpy as np

        from decompclip.figures.heatmaps import matrix
        from decompclip.figures.theme import escaped

        places = {
            (span.part.layer, span.part.head): span for span in self.spans if span.part.layer is not None
        }
        rows = sorted({layer for layer, _ in places})
        columns = sorted({head for _, head in places}, key=lambda head: (head is None, head))  # the MLP last
        cells = [[places.get((row, column)) for column in columns] for row in rows]
        words = [
            ["" if span is None else "<br>".join(map(escaped, span.texts[:n_texts])) for span in row]
            for row in cells
        ]
        return matrix(
            np.array([[np.nan if span is None else span.share(n_texts) for span in row] for row in cells]),
            rows=[str(row) for row in rows],
            columns=["MLP" if column is None else str(column) for column in columns],
            unit=f"variance in {n_texts} texts",
            hover="layer %{y}, head %{x}: %{z:.1%}<br>%{customdata}",
            notes=np.array(words),
            x="head",
            y="layer",
            upward=True,
            percent=True,
        )

    def __repr__(self) -> str:
        words = ", ".join(f"{name}: {value}" for name, value in self.settings.items())
        return f"TextSpans({len(self)} components; {words})"
