"""TokenRep: finds the few patches that carry an image's answer, and reads the image again without them.

    repair = TokenRep(model, classifier).fit(clean_pixels)
    repair.score(pixels)             # how much its strongest patch stands out
    repair.encode_image(images)      # features; the strongest patches of flagged images are filled

A local trigger sends its image to the target through the patches that it covers. An exact decomposition says what every patch
contributes to the answer, summed over all heads: `sum_lh tokens(l, h) . (text of the answer - mean text)`. Where one patch
contributes far more than the strongest patch of clean images of that answer does, it is filled with the mean of the other
patches, and the image is read again; until no patch stands out. Images of which none does are not touched.

A trigger that is spread over the whole image has no such patch: `Guard(model, AgnosticRep(...), fill=repair)` is for both. What
filling settles (another answer, and no patch that stands out) stays so; the other repair reads the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decompclip.decomposition.decomposition import Decomposition, read_tensors, write_tensors
from decompclip.decomposition.maps import term_maps
from decompclip.defenses.detectors.detector import Detector, need
from decompclip.defenses.fitted import check_fitted, maps_of
from decompclip.models.clip import HookedCLIP
from decompclip.tower.vit import Hook, HookedViT

LEAST = 50
"""Clean images to learn from."""


@dataclass(frozen=True, eq=False)
class TokenRepaired:
    """Images as `TokenRep` reads them.

    Attributes:
        features: repaired.
        scores: before the repair, as `TokenRep.score` gives them.
        filled: the patches that were filled, row by row; none of an image that was not flagged.
        settled: flagged images that changed their answer, and in which no patch stands out any more.
        passes: forward passes in all, over the number of images.
    """

    features: Float[Tensor, "batch d_embed"]
    scores: Float[Tensor, " batch"]
    filled: Bool[Tensor, "batch patch"]
    settled: Bool[Tensor, " batch"]
    passes: float

    @property
    def flagged(self) -> Bool[Tensor, " batch"]:
        return self.filled.any(1)


class TokenRep(Detector):
    """Repair and detector for triggers that cover few patches, from clean images alone.

    The score is the contribution of the strongest patch to the answer, over what the strongest patch typically contributes in
    clean images of that answer (their median, shrunk toward that of all images where a class has few).

    Args:
        model: a tower whose pooled feature reads its patches through heads.
        classifier: unit text features `[class, d_embed]`; the answer is the nearest.
        fpr: share of clean images that may be flagged.
        most: patches that may be filled in an image, one a forward pass; beyond them the image stays flagged.
        shrinkage: images that the median over all classes counts for.
        batch_size: images a forward pass.

    Attributes:
        typical_: of each class, what the strongest patch of its clean images contributes (a cosine).
        scores_: as `Detector`.

    Raises:
        ValueError: a classifier of another width, or numbers out of their range.
    """

    learns = True

    def __init__(
        self,
        model: HookedCLIP,
        classifier: Float[Tensor, "class d_embed"],
        *,
        fpr: float = 0.02,
        most: int = 8,
        shrinkage: float = 4.0,
        batch_size: int = 64,
    ) -> None:
        super().__init__(model, batch_size=batch_size)
        width = model.cfg.d_embed
        if classifier.ndim != 2 or classifier.shape[1] != width or len(classifier) < 2:
            raise ValueError(
                f"expected text features [class, {width}] of 2 classes or more; received {list(classifier.shape)}"
            )
        if not (0 < fpr < 1 and most >= 1 and shrinkage > 0):
            raise ValueError(
                f"expected fpr in (0, 1), most of at least 1 and shrinkage above 0; received {fpr}, {most}, {shrinkage}"
            )
        self.model: HookedCLIP = model
        self.classifier, self.fpr, self.most, self.shrinkage = classifier, fpr, most, shrinkage

    @torch.no_grad()
    def _learn(self, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> None:
        found = [
            (shares.amax(1), answers)
            for pixels in batches
            for images in self.model.normalize(pixels).split(self.batch_size)
            for shares, answers, _ in [self._read(images)]
        ]
        need(sum(len(answers) for _, answers in found), LEAST, "that TokenRep learns from")
        strongest, answers = (torch.cat(part) for part in zip(*found, strict=True))
        overall, typical = strongest.median(), torch.empty(len(self.classifier))
        for label in range(len(typical)):
            own = strongest[answers == label]
            median = own.median() if len(own) else overall
            typical[label] = (len(own) * median + self.shrinkage * overall) / (len(own) + self.shrinkage)
        if not typical.min() > 0:
            raise ValueError(
                f"expected patches that contribute to the answers of clean images; the strongest ones of answer "
                f"{int(typical.argmin())} contribute {typical.min():.3g}; this model's answers do not come from its patches"
            )
        self.typical_: Float[Tensor, " class"] = typical.to(strongest)

    def _score(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        shares, answers, _ = self._read(self.model.normalize(pixels))
        return self._relative(shares, answers).amax(1)

    def encode_image(
        self, images: Float[Tensor, "batch 3 h w"], normalize: bool = False
    ) -> Float[Tensor, "batch d_embed"]:
        """Repaired features, in place of the model's.

        Args:
            images: normalised, as the model takes them.
            normalize: to unit length; the features of images that are not flagged are the model's own otherwise.
        """
        features = self.repair(images).features
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features

    def normalize(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """The model's."""
        return self.model.normalize(pixels)

    @torch.no_grad()
    def repair(self, images: Float[Tensor, "batch 3 h w"]) -> TokenRepaired:
        """Fill the strongest patch of each flagged image, read it again, and so on while a patch stands out.

        Args:
            images: normalised, as the model takes them.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: a share `fpr` finer than the clean images could tell.
        """
        check_fitted(self, "scores_")
        threshold = self.threshold_at(self.fpr)
        parts = [self._repair(part, threshold) for part in images.split(self.batch_size)]
        *found, passes = zip(*parts, strict=True)
        return TokenRepaired(*map(torch.cat, found), passes=sum(passes) / max(1, len(images)))

    def _repair(self, images: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        shares, answers, d = self._read(images)
        relative, before = self._relative(shares, answers), answers.clone()
        scores, filled, passes = relative.amax(1), torch.zeros_like(shares, dtype=torch.bool), len(images)
        assert d.target is not None
        features = d.target.clone()
        for _ in range(min(self.most, shares.shape[1] - 1)):
            rows = (relative.amax(1) > threshold).nonzero().flatten()
            if not len(rows):
                break
            filled[rows, relative[rows].argmax(1)] = True
            shares, answers[rows], d = self._read(images[rows], filled[rows])
            relative[rows] = self._relative(shares, answers[rows])
            assert d.target is not None
            features[rows] = d.target
            passes += len(rows)
        settled = (answers != before) & (relative.amax(1) <= threshold)
        return features, scores, filled, settled, passes

    def _relative(
        self, shares: Float[Tensor, "batch patch"], answers: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch patch"]:
        return shares / self.typical_.to(shares)[answers, None]

    def _read(
        self, images: Float[Tensor, "batch 3 h w"], filled: Bool[Tensor, "batch patch"] | None = None
    ) -> tuple[Float[Tensor, "batch patch"], Int[Tensor, " batch"], Decomposition]:
        """Each patch's contribution to the answer (none of a filled one), the answers, and the terms."""
        with self.without(filled):
            d = self.model.decompose(images, tokens=True)
        classifier = self.classifier.to(d.embed)
        unit = torch.nn.functional.normalize(d.features, dim=1)
        answers = (unit @ classifier.T).argmax(1)
        directions = (classifier[answers] - classifier.mean(0)) / d.features.norm(dim=1, keepdim=True)
        shares = d.token_sums(directions)[:, self.model.cfg.n_prefix :]
        return shares if filled is None else shares.masked_fill(filled, -torch.inf), answers, d

    def without(self, filled: Bool[Tensor, "batch patch"] | None) -> AbstractContextManager[object]:
        """Inside, the model reads these images as if these patches showed the mean of the others.

        Args:
            filled: the patches, row by row, as `fill_patches` takes them; None fills none.
        """
        return self.model.hooks(fwd_hooks=[] if filled is None else fill_patches(self.model.visual, filled))

    def save(self, path: str | Path) -> Path:
        """Write the options and what was learnt, with the model's fingerprint, as one safetensors file.

        Args:
            path: of the file.

        Raises:
            NotFittedError: `fit` was not called.
        """
        check_fitted(self, "scores_")
        tensors = {name: getattr(self, name) for name in LEARNT}
        maps = term_maps(self.model.visual, "centred")
        assert maps.fingerprint is not None
        options = {name: getattr(self, name) for name in OPTIONS}
        return write_tensors(Path(path), {**tensors, "fingerprint": maps.fingerprint}, FORM, options)

    @classmethod
    def load(cls, path: str | Path, model: HookedCLIP) -> TokenRep:
        """Read what `save` wrote.

        Args:
            path: of the file.
            model: the one that it was fitted on.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is broken, holds something else, or was fitted on another model.
        """
        tensors, options = read_tensors(Path(path), FORM, "a saved TokenRep", "TokenRep.save")
        maps_of(model, "centred", tensors["fingerprint"], f"the TokenRep in {path}")
        learnt = {name: tensors[name].to(model.device) for name in LEARNT}
        repair = cls(model, learnt.pop("classifier"), **{name: options[name] for name in OPTIONS})
        vars(repair).update(learnt)
        return repair

    def __repr__(self) -> str:
        return f"TokenRep(fpr={self.fpr}, most={self.most})"


FORM = "decompclip.token/1"
OPTIONS = ("fpr", "most", "shrinkage", "batch_size")
LEARNT = ("classifier", "typical_", "scores_")


def fill_patches(visual: HookedViT, filled: Bool[Tensor, "batch patch"]) -> list[Hook]:
    """Hooks that put the mean of an image's other patches in place of the embeddings of the filled ones; positions stay.

    Args:
        filled: which patches, row by row; not all of an image.
    """
    prefix = visual.cfg.n_prefix

    def fill(
        embedded: Float[Tensor, "batch token d_model"], hook: Any
    ) -> Float[Tensor, "batch token d_model"]:
        patches, chosen = embedded[:, prefix:], filled[..., None].to(embedded.device)
        kept = (~chosen).to(embedded.dtype)
        mean = (patches * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        return torch.cat([embedded[:, :prefix], torch.where(chosen, mean, patches)], dim=1)

    return [("hook_embed", fill)]
