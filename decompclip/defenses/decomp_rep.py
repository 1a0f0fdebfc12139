"""Decomp-Rep: repair image features by replacing the heads that look infected (docs/method.md, section 3).

Source: He et al. (ICML 2025), section 4 and algorithm 1, lines 4 to 9.

Controls for Decomp-Rep: as many heads replaced, but not the ones that an image's own flags name (Table 3).

Source: He et al. (ICML 2025), section 4, table 3, "fixed" and "random" heads. Used as any restriction is:

    MeanAblate(heads[-1], moments).on(random_heads(repair.flags(d), repair.selector_.mask_, seed=0))(d)
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor
from typing_extensions import Unpack

from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.defenses.selector import (
    Clean,
    Judging,
    Selector,
    check_fitted,
    describe,
    load_selector,
    save_selector,
    visual_of,
)
from decompclip.models.clip import HookedCLIP
from decompclip.operators.ablation import MeanAblate, ZeroAblate
from decompclip.operators.intervention import Intervention, Where, both, check_where
from decompclip.operators.noise import RandomAblate, Scale
from decompclip.tower.vit import Hook, HookedViT

FillName = Literal["prototype", "zero", "random"]
Trigger = Literal["local", "global"]

GLOBAL_LAYERS = 5 / 12
"""The paper's repair for global triggers takes the MLPs of five layers of twelve."""


def late_mlps(n_layers: int) -> int:
    """How many of the last MLPs the repair for global triggers replaces: the paper's share of a tower's layers, at least one."""
    return round(n_layers * GLOBAL_LAYERS) or 1


class DecompRep(Intervention):
    """Replaces the flagged heads of each image by their prototypes: one rule for all images, clean or not.

        repair = DecompRep(similarity="cosine", threshold="quantile").fit(clean)
        repair(d).features

    For triggers spread over the whole image the paper replaces the last five MLPs of every image instead, and so
    must be told the kind of attack: `DecompRep.paper(trigger="global")`.

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

    selector_: Selector

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
    def paper(cls, *, epsilon: float = 0.002, trigger: Trigger = "local") -> DecompRep:
        """Algorithm 1 as the authors' code runs it: dot product, last layer, one epsilon.

        Args:
            trigger: the hint that it needs: "local" (a patch): heads; "global" (Blended, ISSBA): the last five MLPs,
                however many layers there are; of towers of other depths than the paper's twelve, `mlps=late_mlps(n)` takes
                the same share.

        Raises:
            ValueError: an unknown trigger.
        """
        if trigger not in get_args(Trigger):
            raise ValueError(f"expected a trigger of {get_args(Trigger)}; received {trigger!r}")
        if trigger == "global":
            return cls(epsilon=epsilon, convention="paper", components=None, mlps=5)
        return cls(epsilon=epsilon, convention="paper")

    def fit(self, clean: Clean) -> DecompRep:
        """Learn prototypes from clean images (the paper: 20 % of the evaluation set), at once or batch by batch.

        Raises:
            ValueError: an unknown option, more MLPs than there are, or clean terms that do not fit the options: see
                `Selector.fit`.
        """
        if self.fill not in get_args(FillName):
            raise ValueError(f"expected a fill of {get_args(FillName)}; received {self.fill!r}")
        selector = copy(self.selector).fit(clean)
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

    def save(self, path: str | Path) -> Path:
        """Write the options and what was learnt, with the fingerprint of the model, as one safetensors file.

        Raises:
            NotFittedError: `fit` was not called.
        """
        check_fitted(self, "selector_")
        own = {name: getattr(self, name) for name in ("fill", "scale", "seed", "mlps")}
        return save_selector(self.selector_, Path(path), "DecompRep", own)

    @classmethod
    def load(cls, path: str | Path, model: HookedCLIP | HookedViT) -> DecompRep:
        """Read what `save` wrote; judged heads come back by their numbers.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is broken, holds something else, or was fitted on another model.
        """
        selector, own = load_selector(Path(path), visual_of(model), "DecompRep")
        repair = cls(**own)
        repair.selector, repair.selector_ = selector, selector
        return repair

    def _heads(self) -> Intervention:
        components = heads if self.selector_.components is None else self.selector_.components
        if self.fill == "zero":
            return ZeroAblate(components)
        if self.fill == "random":
            return RandomAblate(components, self.selector_.moments_, scale=self.scale, seed=self.seed)
        return MeanAblate(components, self.selector_.moments_)

    def _mlps(self) -> Intervention:
        return MeanAblate(mlps[-self.mlps :], self.selector_.moments_)

    def __repr__(self) -> str:
        return describe(self, self.selector, {"fill": "prototype", "scale": "unit", "seed": 0, "mlps": 0})


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
