"""Repair without a hint about the attack: go back to before the image's story changed.

Our own. A backdoor lets early layers see what is there and has later ones say something else. So where an image
is unlike clean ones (`AgnosticDet`), look at what the feature should have become, by the clean images, given what layers
0..l had found (`Extrapolation`). The deepest l at which that is another class than the one in the end is where
the story changed: all that later layers say is replaced by what was to be expected.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.defenses.agnostic_det import AgnosticDet
from decompclip.defenses.selector import check_fitted
from decompclip.operators.intervention import Intervention, Where
from decompclip.tower.vit import Hook, HookedViT


class AgnosticRep(Intervention):
    """Replaces, in images that are unlike clean ones, what is said after the story changed.

        repair = AgnosticRep(model.zero_shot_classifier(class_names)).fit(clean)
        repair(model.decompose(images, normalize=True)).features

    Args:
        classifier: as `AgnosticDet`.
        budget: share of clean images that may be touched.
        cut, folds, seed: as `AgnosticDet`.

    Attributes:
        detector_: which images are touched.
        moments_: means of the terms, the prototypes that replaced heads get.
    """

    detector_: AgnosticDet
    moments_: Moments

    def __init__(
        self,
        classifier: Float[Tensor, "class d_embed"],
        *,
        budget: float = 0.01,
        cut: int | None = None,
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        self.classifier = classifier
        self.budget = budget
        self.cut = cut
        self.folds = folds
        self.seed = seed

    def fit(self, clean: Decomposition | Iterable[Decomposition]) -> AgnosticRep:
        """Learn from clean images of all classes; batches are looked at one by one.

        Raises:
            ValueError: as `AgnosticDet.fit`, or too few images for the budget.
        """
        parts = [clean] if isinstance(clean, Decomposition) else clean
        moments: list[Moments] = []

        def counted() -> Iterable[Decomposition]:
            for part in parts:
                new = Moments.of(part, second=False)
                moments[:] = [moments[0].merge(new)] if moments else [new]
                yield part

        detector = AgnosticDet(self.classifier, cut=self.cut, folds=self.folds, seed=self.seed).fit(counted())
        detector.threshold_at(self.budget)
        self.detector_, self.moments_ = detector, moments[0]
        return self

    def turn(self, d: Decomposition) -> Int[Tensor, " batch"]:
        """The last layer that is trusted in each image; the model's last one where nothing is replaced.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: as `AgnosticDet.look`.
        """
        return self._turn(d)[0]

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        """Terms whose later part is what clean images would have gone on with (direct mode).

        Heads after the turn become prototypes; the MLPs after it share what the extrapolation says beyond the
        prototypes. `where` restricts images: one in which it names no component stays as it is.

        Raises:
            NotFittedError, ValueError: as `turn`.
        """
        last, expected = self._turn(d)
        if where is not None:
            last = torch.where(where.flatten(1).any(1), last, d.n_layers - 1)
        layers = torch.arange(d.n_layers, device=d.embed.device)
        after = layers > last[:, None]
        if not after.any():
            return d
        means = self.moments_
        coords = torch.where(after[..., None, None], means.coords.to(d.coords), d.coords)
        mlps = torch.where(after[..., None], means.mlps.to(d.mlps), d.mlps)
        pool = torch.where(after.any(1)[:, None, None], means.pool.to(d.pool), d.pool)
        edited = d.edit(coords=coords, mlps=mlps, pool=pool)
        rest = torch.where(after.any(1)[:, None], expected - edited.features, 0)
        share = after.to(rest) / after.sum(1, keepdim=True).clamp_min(1)
        return edited.edit(mlps=mlps + share[..., None] * rest[:, None])

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        """Raises ValueError: what is expected of an image is a feature; there is no stream that leads to it."""
        raise ValueError(
            "expected direct mode, repair(model.decompose(images, normalize=True)); AgnosticRep has no causal mode; "
            "`Guard` runs it inside encode_image"
        )

    def _turn(self, d: Decomposition) -> tuple[Int[Tensor, " batch"], Float[Tensor, "batch d_embed"]]:
        """The last trusted layer, and the feature expected from there."""
        check_fitted(self, "detector_")
        detector = self.detector_
        seen = detector.look(d)
        flagged = detector.score_of(seen) > detector.threshold_at(self.budget)
        futures = detector.expected_.extrapolation(seen.before)[:, :-1]
        said = (futures @ self.classifier.to(futures).T).argmax(-1)
        other: Bool[Tensor, "batch layer"] = (said != seen.classes[:, None]) & flagged[:, None]
        places = torch.arange(other.shape[1], device=other.device)
        deepest = torch.where(other, places, -1).amax(1)
        turned = deepest >= 0
        expected = futures[torch.arange(len(d), device=other.device), deepest.clamp_min(0)].to(d.embed)
        return torch.where(turned, deepest, d.n_layers - 1), expected

    def __repr__(self) -> str:
        return f"AgnosticRep(budget={self.budget})"
