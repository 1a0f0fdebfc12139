"""Guard: a model that repairs or rejects suspicious images while it runs, and the folder that it is saved to.

    guard = Guard(model, DecompRep(...).fit(clean))
    guard.encode_image(images)               # in place of model.encode_image(images)
    guard = decompclip.load("repaired/")     # what `save_guard(guard, "repaired/")` wrote

One forward pass: it is decomposed, the terms are edited (direct mode), and their sum is the feature. With `fill`, patches that
carry the answer alone are found first, and the pass does not see them.

In the folder the model lies one level down on purpose: open_clip, which knows no repair, refuses the folder instead of
serving the model unrepaired. `guard.json` is written last.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from decompclip.decomposition.components import heads
from decompclip.decomposition.decomposition import Decomposition, HasTerms
from decompclip.decomposition.maps import Convention
from decompclip.defenses.agnostic import AgnosticRep
from decompclip.defenses.decomp import DecompRep, random_heads
from decompclip.defenses.fitted import DetectorLike
from decompclip.display import Result
from decompclip.files import write_json
from decompclip.models.checkpoint import sha256
from decompclip.models.clip import HookedCLIP
from decompclip.models.folders import GUARD, GUARDED, save_model
from decompclip.models.json_files import read_json
from decompclip.models.loading import load as load_model
from decompclip.operators.ablation import MeanAblate
from decompclip.operators.intervention import Composition, Intervention

if TYPE_CHECKING:
    import pandas as pd

    from decompclip.defenses.detectors.token_rep import TokenRep

P = ParamSpec("P")

PASSED = (
    *("visual", "text", "cfg", "name", "provenance", "device", "dtype"),
    *("tokenizer", "tokenize", "encode_text", "logit_scale", "context_length"),
    *("preprocess", "pixels", "preprocess_cfg", "normalize", "mean", "std", "image_size"),
    *("zero_shot_classifier", "class_names", "templates"),
)
"""What a guard hands on from its model as it is."""


@dataclass(frozen=True, eq=False)
class GuardResult(Result):
    """Features of a batch, and which images to reject.

    Attributes:
        features: repaired, as `Guard.encode_image` gives them.
        rejected: which images the detector finds suspicious; none without a detector.
        scores: the detector's, higher for more suspicious; None without one.
    """

    features: Float[Tensor, "batch d_embed"]
    rejected: Bool[Tensor, " batch"]
    scores: Float[Tensor, " batch"] | None

    def __len__(self) -> int:
        return len(self.features)

    def to_frame(self) -> pd.DataFrame:
        """One row an image: its place in the batch, whether it is rejected, and its score."""
        import pandas as pd

        scores = None if self.scores is None else self.scores.tolist()
        return pd.DataFrame({"image": range(len(self)), "rejected": self.rejected.tolist(), "score": scores})

    def __repr__(self) -> str:
        return f"GuardResult({len(self)} images, {int(self.rejected.sum())} rejected)"


class Guard:
    """A model whose image features are repaired. Text features and all else that zero-shot code needs are the model's.

    Args:
        model: the guard holds no copy of it.
        defense: an edit of terms, such as `DecompRep` or `MeanAblate(...)`; None repairs nothing.
        fill: a fitted `TokenRep`. Images that change their answer when patches are filled, until none stands out, stay so; the
            defense edits the others, as they came. It takes one forward pass to look, and one for each patch filled.
        reject: a fitted detector of terms, such as `DecompDet`; `check` says which images it finds suspicious.

    Attributes:
        convention: of the terms that both were fitted on; "centred" where they do not know.
        normalized: whether those terms sum to unit features; True where they do not know.

    Raises:
        TypeError: `defense` is no intervention, or `reject` no detector.
        ValueError: neither a defense nor a detector, or the two were fitted on terms of different conventions or
            normalizations; or `fill` is of another model.
    """

    def __init__(
        self,
        model: HookedCLIP,
        defense: Intervention | None = None,
        *,
        fill: TokenRep | None = None,
        reject: DetectorLike[Decomposition] | None = None,
    ) -> None:
        if defense is None and fill is None and reject is None:
            raise ValueError(
                "expected a defense, a TokenRep to fill patches by, a detector to reject by, or several; received none"
            )
        if defense is not None and not isinstance(defense, Intervention):
            raise TypeError(
                f"expected an intervention that repairs; received a {type(defense).__name__}; a detector goes to "
                "reject="
            )
        if reject is not None and not isinstance(reject, DetectorLike):
            raise TypeError(
                f"expected a detector of terms, with fit, score and predict; received a {type(reject).__name__}"
            )
        if fill is not None and fill.model is not model:
            raise ValueError(
                f"expected a TokenRep of this model; received {fill!r} of {fill.model.name!r}; fit it anew"
            )
        self.model = model
        self.defense = defense
        self.fill = fill
        self.reject = reject
        fitted = [*_fitted(defense), *_fitted(reject)]
        self.convention: Convention = _agreed("convention", [x.maps.convention for x in fitted], "centred")
        self.normalized: bool = _agreed("normalization", [x.normalized for x in fitted], True)

    def encode_image(
        self, images: Float[Tensor, "batch 3 h w"], normalize: bool = False
    ) -> Float[Tensor, "batch d_embed"]:
        """Repaired features. No gradient is kept. A feature that no repair touches is the model's own, in its scale.

        Args:
            images: as `model.encode_image` takes them.
            normalize: whether to give unit features.

        Raises:
            ValueError: images of another size, or a defense that was fitted on another model.
        """
        if self.fill is not None and self.defense is None:
            return self.fill.encode_image(images, normalize)
        filled, settled = self._filled(images)
        return self._repaired(*self._terms(images, filled), settled, normalize)

    def check(self, images: Float[Tensor, "batch 3 h w"], normalize: bool = False) -> GuardResult:
        """Repaired features, and which images the detector rejects, from one forward pass.

        Args:
            images: as `model.encode_image` takes them.
            normalize: whether to give unit features.

        Raises:
            ValueError: as `encode_image`.
            NotFittedError: the defense or the detector was not fitted.
        """
        filled, settled = self._filled(images)
        d, length = self._terms(images, filled)
        features = self._repaired(d, length, settled, normalize)
        if self.reject is None:
            return GuardResult(features, torch.zeros(len(d), dtype=torch.bool, device=features.device), None)
        return GuardResult(features, self.reject.predict(d), self.reject.score(d).to(d.embed))

    def __call__(
        self, image: Float[Tensor, "batch 3 h w"], text: Tensor
    ) -> tuple[Float[Tensor, "batch d_embed"], Float[Tensor, "text d_embed"], Float[Tensor, ""]]:
        """Unit features and the factor to logits, as an open_clip model gives them."""
        texts = self.model.encode_text(text, normalize=True)
        return self.encode_image(image, normalize=True), texts, self.model.logit_scale.exp()

    def __getattr__(self, name: str) -> Any:
        if name in PASSED:
            return getattr(self.model, name)
        raise AttributeError(
            f"a Guard has no {name!r}; what it passes through: {', '.join(sorted(PASSED))}; all else is "
            "guard.model's, unguarded"
        )

    def __repr__(self) -> str:
        others = {"fill": self.fill, "reject": self.reject}
        said = "".join(f", {name}={part!r}" for name, part in others.items() if part is not None)
        return f"Guard({self.model.name!r}, {self.defense!r}{said})"

    @torch.no_grad()
    def _filled(self, images: Tensor) -> tuple[Bool[Tensor, "batch patch"] | None, Bool[Tensor, " batch"]]:
        """The patches to fill, and the images that the defense leaves, since filling has settled them."""
        if self.fill is None:
            return None, torch.zeros(len(images), dtype=torch.bool, device=images.device)
        found = self.fill.repair(images)
        return found.filled & (found.settled[:, None] | (self.defense is None)), found.settled

    @torch.no_grad()
    def _terms(
        self, images: Tensor, filled: Bool[Tensor, "batch patch"] | None
    ) -> tuple[Decomposition, Float[Tensor, "batch 1"]]:
        """Terms, and what they are to be multiplied by."""
        with nullcontext() if self.fill is None else self.fill.without(filled):
            d = self.model.decompose(images, convention=self.convention)
        if not self.normalized:
            return d, d.embed.new_ones(len(d), 1)
        assert d.target is not None
        length = d.target.norm(dim=-1, keepdim=True)
        return _over(d, length[:, 0]), length

    @torch.no_grad()
    def _repaired(self, d: Decomposition, length: Tensor, settled: Tensor, normalize: bool) -> Tensor:
        edited = d if self.defense is None else self.defense(d)
        # the tower's own feature, where there is nothing to add up: no rounding of the sum
        own, other = (x.features if x.target is None else x.target for x in (d, edited))
        features = torch.where(settled[:, None], own, other)
        features = F.normalize(features, dim=-1) if normalize else features * length
        return features.to(self.model.dtype)


def _over(d: Decomposition, length: Float[Tensor, " batch"]) -> Decomposition:
    """What `decompose(..., normalize=True)` gives, from terms that sum to features of that length."""
    return replace(d._map(lambda x: x / length.view(-1, *[1] * (x.ndim - 1)), d.maps), normalized=True)


def _fitted(part: object) -> list[HasTerms]:
    """What in a defense or a detector knows the form of terms that it was fitted on."""
    if part is None or isinstance(part, HasTerms):
        return [] if part is None else [part]
    if isinstance(part, Composition):
        return [found for step in part.steps for found in _fitted(step)]
    names = ("edit", "moments", "moments_", "selector_", "detector_", "terms_")
    return [found for name in names for found in _fitted(getattr(part, name, None))]


def _agreed(what: str, found: list[Any], default: Any) -> Any:
    """What all were fitted on."""
    if len({*found}) > 1:
        raise ValueError(
            f"expected a defense and a detector of one {what} of terms; received {sorted({*map(str, found)})}; fit both on "
            "decompositions with the same options"
        )
    return next(iter(found), default)


FORMAT = "decompclip.guard/1"
REPAIRS = {"DecompRep": DecompRep, "AgnosticRep": AgnosticRep}


def save_guard(guard: Guard, folder: str | Path) -> Path:
    """Write a guard's model and its repairs; returns the folder.

    Args:
        guard: one that repairs by `AgnosticRep`, `DecompRep` or `TokenRep`, and does not reject.
        folder: to write; `decompclip.load(folder)` reads it.

    Raises:
        ValueError: a guard that rejects too, or repairs by another thing.
        NotFittedError: a repair was not fitted.
        OSError: the folder cannot be written to.
    """
    if guard.reject is not None or not isinstance(guard.defense, AgnosticRep | DecompRep | None):
        raise ValueError(
            f"expected a guard that repairs by AgnosticRep, DecompRep or TokenRep alone; received {guard!r}; an edit that is "
            "the same for every image folds into the weights: `bake`"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / GUARD).unlink(missing_ok=True)
    save_model(guard.model, folder / GUARDED)
    repairs = {type(part).__name__: part for part in (guard.fill, guard.defense) if part is not None}
    about = {
        "format": FORMAT,
        "repairs": {name: sha256(part.save(folder / _file(name))) for name, part in repairs.items()},
        "convention": guard.convention,
        "normalized": guard.normalized,
    }
    write_json(folder / GUARD, about)
    return folder


def load_guard(folder: str | Path, **options: Any) -> Guard:
    """Read what `save_guard` wrote.

    Args:
        folder: that it wrote.
        options: of `decompclip.models.loading.load`, for the model.

    Raises:
        ValueError: another format or repair, a repair that was changed since, or one of another model.
        CheckpointError: as `decompclip.models.loading.load`.
    """
    from decompclip.defenses.detectors.token_rep import TokenRep  # scikit-learn's neighbours: slow to import

    folder = Path(folder)
    about, known = read_json(folder / GUARD), {**REPAIRS, "TokenRep": TokenRep}
    named = about.get("repairs")
    if about.get("format") != FORMAT or not (
        isinstance(named, dict) and named and known.keys() >= named.keys()
    ):
        raise ValueError(
            f"expected a guard of format {FORMAT} with repairs among {', '.join(known)}; {folder / GUARD} has "
            f"format {about.get('format')!r} and repairs {named!r}; write it with save_guard"
        )
    for name, digest in named.items():
        path = folder / _file(name)
        if not path.is_file() or sha256(path) != digest:
            raise ValueError(
                f"expected the repair that {folder / GUARD} names; {path} is missing, or was changed since; repair the model "
                "again"
            )
    model = load_model(folder / GUARDED, **options)
    parts = {name: known[name].load(folder / _file(name), model) for name in named}
    fill = parts.pop("TokenRep", None)
    return Guard(model, next(iter(parts.values()), None), fill=fill)


def _file(repair: str) -> str:
    return f"{repair}.safetensors"


def _or_guard(load: Callable[P, HookedCLIP]) -> Callable[P, HookedCLIP]:
    """`load` that opens folders of `save_guard` too. A guard stands in a model's place, for type checkers as well."""

    @wraps(load)
    def either(*args: P.args, **options: P.kwargs) -> Any:
        name = args[0] if args else options.get("name")
        if isinstance(name, str | Path) and (Path(name) / GUARD).is_file():
            options.pop("name", None)
            return load_guard(name, *args[1:], **options)
        return load(*args, **options)

    return either


load = _or_guard(load_model)


class AtRandom:
    """The control of a guard: as much is replaced in as many images, or heads or patches of an image, but drawn at random.

    Args:
        guard: that repairs by `AgnosticRep`, `DecompRep` or `TokenRep`.
        seed: of the draws.
    """

    def __init__(self, guard: Guard, *, seed: int = 0) -> None:
        self.guard, self.normalize = guard, guard.normalize
        self._draws = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Features, of terms as the guard reads them."""
        guard, defense = self.guard, self.guard.defense
        order = torch.randperm(len(images), generator=self._draws).to(images.device)
        filled, settled = guard._filled(images)
        d, _ = guard._terms(images, None if filled is None else self._elsewhere(filled[order]))
        if defense is None:
            return d.features
        own = d if filled is None else guard._terms(images, filled)[0]
        if isinstance(defense, AgnosticRep):
            touched = (defense.flags(own) & ~settled)[order]
            return torch.where(touched[:, None], defense.without_answer(d.features), d.features)
        assert isinstance(defense, DecompRep)
        mask = defense.selector_.mask_
        seed = int(torch.randint(2**31, (), generator=self._draws))
        flags = defense.flags(own) & ~settled[:, None, None]
        chosen = random_heads(flags, mask, seed=seed)
        return MeanAblate(heads, defense.selector_.moments_).on(chosen)(d).features

    def _elsewhere(self, filled: Bool[Tensor, "batch patch"]) -> Bool[Tensor, "batch patch"]:
        """As many patches of each image, at random places."""
        places = torch.rand(filled.shape, generator=self._draws).argsort(1).to(filled.device)
        return filled.gather(1, places)
