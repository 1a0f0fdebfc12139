"""Decomp-Rep repairs image features, Decomp-Det finds triggered images, by the heads that look infected.

Source: He et al. (ICML 2025), section 4, algorithm 1; docs/method.md, section 3. `fixed_heads` and `random_heads` are the
controls of their table 3: as many heads replaced, but others than an image's own flags name. Used as any restriction is:

    MeanAblate(heads[-1], moments).on(random_heads(repair.flags(d), repair.selector_.mask_, seed=0))(d)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from typing_extensions import Unpack

from decompclip.api import check_choice
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.decomposition import Decomposition, by_shards
from decompclip.defenses.fitted import check_fitted
from decompclip.defenses.selector import Clean, Judge, Judging, Selector
from decompclip.operators.ablation import MeanAblate, ZeroAblate
from decompclip.operators.intervention import Intervention, Where, both, check_where
from decompclip.operators.noise import RandomAblate, Scale
from decompclip.tower.vit import Hook, HookedViT

FillName = Literal["prototype", "zero", "random"]
Hint = Literal["local", "global"]
DetScore = Literal["count", "excess"]

GLOBAL_LAYERS = 5 / 12
"""The paper's repair for global triggers takes the MLPs of five layers of twelve."""


def late_mlps(n_layers: int) -> int:
    """How many of the last MLPs the repair for global triggers replaces: the paper's share of a tower's layers, at least one."""
    return round(n_layers * GLOBAL_LAYERS) or 1


class DecompRep(Judge, Intervention):
    """Replaces the flagged heads of each image by their prototypes: one rule for all images, clean or not.

        repair = DecompRep(similarity="cosine", threshold="quantile").fit(clean)
        repair(d).features

    For triggers that cover the whole image the paper replaces the last five MLPs of every image instead. That takes a
    hint about the attack: `DecompRep.paper(trigger="global")`.

    Args:
        fill: what stands in for a flagged head: its "prototype", "zero" (the paper's "w/ Abandon"), or "random"
            noise ("w/ Random Prototypes").
        scale: of the noise: "unit" as in the paper, anew for every image and head, or "matched": see `RandomAblate`.
        seed: of the noise.
        mlps: how many of the last MLPs are replaced by their means, in every image.
        judging: similarity, threshold, epsilon, quantile, components, convention: which heads are flagged: see
            `decompclip.defenses.selector.Selector`.

    Attributes:
        selector: with these options, not fitted.
        selector_: the fitted one, with `prototypes_` and `thresholds_`.
    """

    def __init__(
        self,
        *,
        fill: FillName = "prototype",
        scale: Scale = "unit",
        seed: int = 0,
        mlps: int = 0,
        **judging: Unpack[Judging],
    ) -> None:
        self.fill: FillName = fill
        self.scale: Scale = scale
        self.seed = seed
        self.mlps = mlps
        self.selector = Selector(**judging)

    @classmethod
    def paper(cls, *, epsilon: float = 0.002, trigger: Hint = "local") -> DecompRep:
        """Algorithm 1 as the authors' code runs it: dot product, last layer, one epsilon.

        Args:
            epsilon: flag at or below it.
            trigger: the hint: "local" (a patch) replaces heads; "global" (Blended, ISSBA) the last five MLPs, however
                many layers there are. In a tower of another depth than the paper's twelve layers
                `DecompRep(components=None, mlps=late_mlps(n_layers))` takes the same share.

        Raises:
            ValueError: an unknown trigger.
        """
        check_choice("trigger", trigger, Hint)
        if trigger == "global":
            return cls(epsilon=epsilon, convention="paper", components=None, mlps=5)
        return cls(epsilon=epsilon, convention="paper")

    def fit(self, clean: Clean) -> DecompRep:
        """Learn prototypes.

        Args:
            clean: clean images (the paper: 20 % of the evaluation set), decomposed at once or batch by batch, or
                their moments.

        Raises:
            ValueError: an unknown option, more MLPs than there are, or clean terms that do not fit the options: see
                `Selector.fit`.
        """
        check_choice("fill", self.fill, FillName)
        selector = self._fit(clean)
        most = len(selector.mask_)
        if not 0 <= self.mlps <= most:
            raise ValueError(
                f"expected to replace 0..{most} MLPs, as many as there are; received {self.mlps}"
            )
        self.selector_ = selector
        self._heads()  # an unusable scale shows here, not at the first image
        return self

    def flags(self, d: Decomposition) -> Where:
        """Which heads of which images are replaced.

        Args:
            d: terms of the images to judge.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: `d` is of another model, convention or normalization than the clean images.
        """
        check_fitted(self, "selector_")
        return self.selector_.flags(d)

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        """Repaired terms (direct mode).

        Raises:
            NotFittedError, ValueError: as `flags`.
        """
        flags, shape = self.flags(d), (len(d), d.n_layers, d.n_heads)
        check_where(where, shape, d.n_layers * (d.n_heads + 1) + 1 + d.pool.shape[1])
        repaired = self._mlps()(d, where=where) if self.mlps else d
        of_heads = (
            where[:, : shape[1] * shape[2]].view(shape) if where is not None and where.ndim == 2 else where
        )
        flags = both(flags, of_heads)
        # Noise may widen the coordinates to the terms themselves, so heads come last.
        return self._heads()(repaired, where=flags) if flags.any() else repaired

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        """The repair inside a forward pass (causal mode); which heads it replaces is known from a first pass:

            flags = repair.flags(model.decompose(images, normalize=True))
            with visual.hooks(repair.fwd_hooks(visual, where=flags)): ...

        Args:
            visual: the tower.
            where: the flags of a first pass.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: no `where`, or it was fitted without stream means.
        """
        check_fitted(self, "selector_")
        if where is None and self.selector_.mask_.any():
            raise ValueError(
                "expected where, the heads to replace, for they are known only once the image is decomposed; "
                "received none; pass where=repair.flags(model.decompose(images, ...)) of the same images"
            )
        judged = self.selector_.mask_.any()
        of_heads = self._heads().fwd_hooks(visual, where=where) if judged else []
        return of_heads + (self._mlps().fwd_hooks(visual, where=where) if self.mlps else [])

    def _own(self) -> dict[str, Any]:
        return {"fill": self.fill, "scale": self.scale, "seed": self.seed, "mlps": self.mlps}

    def _heads(self) -> Intervention:
        components = heads if self.selector_.components is None else self.selector_.components
        if self.fill == "zero":
            return ZeroAblate(components)
        if self.fill == "random":
            return RandomAblate(components, self.selector_.moments_, scale=self.scale, seed=self.seed)
        return MeanAblate(components, self.selector_.moments_)

    def _mlps(self) -> Intervention:
        return MeanAblate(mlps[-self.mlps :], self.selector_.moments_)


class DecompDet(Judge):
    """Counts an image's flagged heads: higher is more suspicious.

        detector = DecompDet().fit(clean)
        auroc(detector.score(clean_test), detector.score(suspect))

    Args:
        score: "count" of flagged heads (the paper), or "excess": how far they are below their thresholds, summed in
            clean standard deviations of each head's similarity.
        zeta: the highest score that is no cause for suspicion.
        judging: similarity, threshold, epsilon, quantile, components, convention: which heads are flagged: see
            `decompclip.defenses.selector.Selector`.

    Attributes:
        selector: with these options, not fitted.
        selector_: the fitted one, with `prototypes_` and `thresholds_`.
    """

    def __init__(
        self, *, score: DetScore = "count", zeta: int | float = 5, **judging: Unpack[Judging]
    ) -> None:
        self.kind: DetScore = score
        self.zeta = zeta
        self.selector = Selector(**judging)

    @classmethod
    def paper(cls, *, epsilon: float = 0.002) -> DecompDet:
        """As the authors' code runs it: dot product, last layer, one epsilon, more than five heads.

        Args:
            epsilon: flag at or below it.
        """
        return cls(epsilon=epsilon, convention="paper")

    def fit(self, clean: Clean) -> DecompDet:
        """Learn prototypes.

        Args:
            clean: as `DecompRep.fit`.

        Raises:
            ValueError: an unknown option, or clean terms that do not fit the options: see `Selector.fit`.
        """
        check_choice("score", self.kind, DetScore)
        self.selector_ = self._fit(clean, deviations=self.kind == "excess")
        return self

    @by_shards
    def score(self, d: Decomposition) -> Shaped[Tensor, " batch"]:
        """The number of flagged heads of each image, or their summed excess.

        Args:
            d: terms of the images to judge.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: `d` is of another model, convention or normalization than the clean images.
        """
        check_fitted(self, "selector_")
        found = self.selector_.excess(d) if self.kind == "excess" else self.selector_.flags(d)
        return found.sum((1, 2))

    def predict(self, d: Decomposition) -> Bool[Tensor, " batch"]:
        """Which images are suspicious: those that score above `zeta`.

        Args:
            d: as `score`.

        Raises:
            NotFittedError, ValueError: as `score`.
        """
        return self.score(d) > self.zeta

    def _own(self) -> dict[str, Any]:
        return {"score": self.kind, "zeta": self.zeta}


def fixed_heads(flags: Bool[Tensor, "batch layer head"], count: int) -> Bool[Tensor, "layer head"]:
    """The heads that are flagged most often; of equals, the first.

    For images: `fixed.expand(len(images), -1, -1)`.

    Raises:
        ValueError: more heads than are ever flagged, or none.
    """
    often = flags.sum(0).flatten()
    ever = int((often > 0).sum())
    if not 0 < count <= ever:
        raise ValueError(f"expected a count in 1..{ever}, of heads that are ever flagged; received {count}")
    fixed = torch.zeros_like(often, dtype=torch.bool)
    fixed[often.argsort(descending=True, stable=True)[:count]] = True
    return fixed.view(flags.shape[1:])


def random_heads(
    flags: Bool[Tensor, "batch layer head"], judged: Bool[Tensor, "layer head"], *, seed: int
) -> Bool[Tensor, "batch layer head"]:
    """As many heads of each image as are flagged in it, drawn from those that are judged.

    Raises:
        ValueError: an image has more flags than there are heads to draw from.
    """
    wanted, there = flags.flatten(1).sum(1), int(judged.sum())
    if len(flags) and int(wanted.max()) > there:
        raise ValueError(
            f"expected at most {there} flags an image, one for each judged head; received {int(wanted.max())}; pass "
            "the mask of the selector that flagged them"
        )
    draws = torch.rand(flags.flatten(1).shape, generator=torch.Generator().manual_seed(seed)).to(flags.device)
    draws = draws.masked_fill(~judged.flatten().to(flags.device), torch.inf)
    rank = draws.argsort(1).argsort(1)
    return (rank < wanted[:, None]).view(flags.shape)
