"""A guarded model as a folder: the model in a sub-folder, its repair beside it, and `guard.json`, which comes last.

The model lies one level down on purpose: open_clip, which knows no repair, refuses the folder instead of serving the model
unrepaired.

    guard = decompclip.load("repaired/")     # a Guard; guard.encode_image is repaired
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from decompclip.decomposition.components import heads
from decompclip.decomposition.decomposition import read_tensors
from decompclip.decomposition.maps import same_model, term_maps
from decompclip.decomposition.moments import TERMS, Moments
from decompclip.defenses.agnostic_det import DISTANCES, AgnosticDet, Expected
from decompclip.defenses.agnostic_rep import AgnosticRep
from decompclip.defenses.decomp_rep import DecompRep, random_heads
from decompclip.defenses.distances import ClassDistance, Extrapolation
from decompclip.defenses.guard import Guard
from decompclip.defenses.selector import check_fitted
from decompclip.files import atomic_write, write_json
from decompclip.models.checkpoint import sha256
from decompclip.models.clip import HookedCLIP
from decompclip.models.folders import GUARD, GUARDED, save_model
from decompclip.models.json_files import read_json
from decompclip.models.loading import load as load_model
from decompclip.operators.ablation import MeanAblate

AGNOSTIC_FORMAT = "decompclip.agnostic/1"
GUARD_FORMAT = "decompclip.guard/1"
REPAIR = "repair.safetensors"
_DETECTOR = ("mean_", "deviation_", "spread_", "scores_", "offsets_")
_EXTRAPOLATION = ("mean_in", "mean_out", "weights")

if TYPE_CHECKING:
    from decompclip.models.loading import load
else:
    # A guard stands in a model's place, so that type checkers see what `load` of names and files gives, with its options.
    def load(name: str | Path | nn.Module, **options: Any) -> HookedCLIP | Guard:
        """A model by name, path or from memory, as `decompclip.models.loading.load`; or a folder of `save_guard`.

        Such a folder gives a `Guard`, which hands on what zero-shot code asks of a model; its `encode_image` is repaired.

        Args:
            name: also a folder that `save_guard` or `decompclip repair` wrote.
            options: `pretrained`, `checkpoint`, `activation`, `text`, `tokenizer`, `device`, `dtype`, ... of that function.

        Raises:
            As `decompclip.models.loading.load`; ValueError: a repair that was changed, or is another model's.
        """
        if isinstance(name, nn.Module) or not (Path(name) / GUARD).is_file():
            return load_model(name, **options)
        return load_guard(name, **options)


def save_guard(guard: Guard, folder: str | Path) -> Path:
    """Write a guard's model and its repair; returns the folder.

    Raises:
        ValueError: a guard that rejects too, or repairs by another thing than `AgnosticRep` or `DecompRep`.
        NotFittedError: the repair was not fitted.
        OSError: the folder cannot be written to.
    """
    if guard.reject is not None or not isinstance(guard.defense, AgnosticRep | DecompRep):
        raise ValueError(
            f"expected a guard that repairs by AgnosticRep or DecompRep alone; received {guard!r}; an edit that is the same "
            "for every image folds into the weights: `bake`"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / GUARD).unlink(missing_ok=True)
    save_model(guard.model, folder / GUARDED)
    path = folder / REPAIR
    if isinstance(guard.defense, DecompRep):
        guard.defense.save(path)
    else:
        save_agnostic(guard.defense, path)
    about = {
        "format": GUARD_FORMAT,
        "repair": type(guard.defense).__name__,
        "sha256": sha256(path),
        "convention": guard.convention,
        "normalized": guard.normalized,
    }
    write_json(folder / GUARD, about)
    return folder


def load_guard(folder: str | Path, **options: Any) -> Guard:
    """Read what `save_guard` wrote.

    Args:
        options: of `decompclip.models.loading.load`, for the model.

    Raises:
        ValueError: another format or repair, a repair that was changed since, or one of another model.
        CheckpointError: as `decompclip.models.loading.load`.
    """
    folder = Path(folder)
    about = read_json(folder / GUARD)
    readers = {"DecompRep": DecompRep.load, "AgnosticRep": load_agnostic}
    if about.get("format") != GUARD_FORMAT or about.get("repair") not in readers:
        raise ValueError(
            f"expected a guard of format {GUARD_FORMAT} with a repair among {', '.join(readers)}; {folder / GUARD} has "
            f"format {about.get('format')!r} and repair {about.get('repair')!r}; write it with save_guard"
        )
    path = folder / REPAIR
    if not path.is_file() or sha256(path) != about.get("sha256"):
        raise ValueError(
            f"expected the repair that {folder / GUARD} names; {path} is missing, or was changed since; repair the model again"
        )
    model = load_model(folder / GUARDED, **options)
    defense = readers[about["repair"]](path, model)
    return Guard(model, defense, convention=about.get("convention"), normalized=bool(about.get("normalized")))


def save_agnostic(repair: AgnosticRep, path: str | Path) -> Path:
    """Write the options and what was learnt, with the fingerprint of the model, as one safetensors file.

    Raises:
        NotFittedError: `fit` was not called.
        ValueError: the terms that it was fitted on do not know their model.
    """
    check_fitted(repair, "detector_")
    detector, expected, moments = repair.detector_, repair.detector_.expected_, repair.moments_
    if moments.maps.fingerprint is None:
        raise ValueError(
            "expected moments that know their model; received some without a fingerprint; fit on terms of decompose"
        )
    tensors: dict[str, Tensor] = {"classifier": repair.classifier, "fingerprint": moments.maps.fingerprint}
    tensors |= {name: getattr(detector, name) for name in _DETECTOR}
    tensors |= {f"moments.{name}": getattr(moments, name) for name in TERMS}
    tensors |= {f"extrapolation.{name}": getattr(expected.extrapolation, name) for name in _EXTRAPOLATION}
    for view, distance in expected.distances.items():
        tensors |= {f"{view}.means": distance.means, f"{view}.whitener": distance.whitener}
    about = {
        "options": {name: getattr(repair, name) for name in ("budget", "cut", "folds", "seed")},
        "cut": expected.cut,
        "count": moments.count,
        "normalized": moments.normalized,
        "convention": moments.maps.convention,
    }
    with atomic_write(path) as partial:
        save_file(
            {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()},
            partial,
            metadata={"format": AGNOSTIC_FORMAT, "about": json.dumps(about)},
        )
    return Path(path)


def load_agnostic(path: str | Path, model: HookedCLIP) -> AgnosticRep:
    """Read what `save_agnostic` wrote, for the model that it was fitted on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, holds something else, or belongs to another model.
    """
    tensors, about = read_tensors(Path(path), AGNOSTIC_FORMAT, "a saved AgnosticRep", "save_agnostic")
    maps = term_maps(model.visual, about["convention"])
    if maps.fingerprint is None or not same_model(tensors["fingerprint"], maps.fingerprint.cpu()):
        raise ValueError(
            f"expected the model that the repair in {path} was fitted on; received another one; fit anew on clean images of "
            "this model"
        )
    at = {name: x if model.device.type == "mps" else x.to(model.device) for name, x in tensors.items()}
    repair = AgnosticRep(at["classifier"], **about["options"])
    detector = AgnosticDet(repair.classifier, cut=repair.cut, folds=repair.folds, seed=repair.seed)
    for name in _DETECTOR:
        setattr(detector, name, at[name])
    detector.maps_ = maps
    detector.expected_ = Expected(
        {view: ClassDistance(at[f"{view}.means"], at[f"{view}.whitener"]) for view in DISTANCES},
        Extrapolation(**{name: at[f"extrapolation.{name}"] for name in _EXTRAPOLATION}),
        about["cut"],
    )
    repair.detector_ = detector
    means: dict[str, Any] = {name: at[f"moments.{name}"] for name in TERMS}
    repair.moments_ = Moments(about["count"], **means, maps=maps, normalized=about["normalized"])
    return repair


class AtRandom:
    """The control of a guard: as much is replaced in as many images, or heads of an image, but drawn at random.

    Args:
        seed: of the draws.
    """

    def __init__(self, guard: Guard, *, seed: int = 0) -> None:
        self.guard, self.normalize = guard, guard.normalize
        self._draws = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Unit features."""
        defense = self.guard.defense
        d = self.guard.model.decompose(images, convention=self.guard.convention, normalize=True)
        order = torch.randperm(len(d), generator=self._draws).to(d.embed.device)
        if isinstance(defense, AgnosticRep):
            last = defense.turn(d)[order]
            futures = defense.detector_.expected_.extrapolation(defense.detector_.look(d).before)
            there = torch.arange(len(d), device=last.device)
            return torch.where((last < d.n_layers - 1)[:, None], futures[there, last].to(d.embed), d.features)
        assert isinstance(defense, DecompRep)
        mask = defense.selector_.mask_
        seed = int(torch.randint(2**31, (), generator=self._draws))
        chosen = random_heads(defense.flags(d), mask, seed=seed)
        return MeanAblate(heads, defense.selector_.moments_).on(chosen)(d).features
