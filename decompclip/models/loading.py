"""load: from a name, a pretrained tag or a local checkpoint to a HookedCLIP."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import open_clip
import torch
from open_clip.pretrained import download_pretrained

from decompclip.models.checkpoint import check_fit, read_checkpoint, sha256
from decompclip.models.clip import HookedCLIP
from decompclip.models.config import Activation
from decompclip.models.convert import oddities, refuse
from decompclip.models.errors import UnknownModelError
from decompclip.models.spec import ModelSpec, versions
from decompclip.models.zoo import bundled, card, load_bundled, spec_of

RANDOM = "random"
"""The `pretrained` that asks for seeded random weights: for tests and benchmarks."""


def load(
    name: str,
    *,
    pretrained: str | None = None,
    checkpoint: str | Path | None = None,
    activation: Activation | Literal["auto"] = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HookedCLIP:
    """A CLIP whose image tower is hooked, in evaluation mode.

    Args:
        name: a bundled model (`decompclip.bundled()`), or an architecture of open_clip (`open_clip.list_models()`).
        pretrained: one of open_clip's tags for that architecture, downloaded if need be; `"random"` for seeded
            random weights.
        checkpoint: a local weights file instead: safetensors, or torch's format as open_clip, CleanCLIP and
            BadCLIP write it. No code in it is ever run.
        activation: of the MLPs. `"auto"` follows the pretrained tag; a checkpoint does not say it, and then the
            architecture's name decides (`ViT-B-32-quickgelu` or `ViT-B-32`), with a warning. The choice and its
            reason are kept in `provenance`.
        device, dtype: where to, and in what; by default the CPU and fp32.

    Raises:
        UnknownModelError: no such model or tag, or neither weights nor a tag were named.
        UnsupportedTowerError: the image tower has no exact decomposition here.
        CheckpointError: the checkpoint is missing, broken, unsafe or of another model.
        ConnectionError: the pretrained weights could not be fetched.
        ValueError: an unknown activation, or one that a bundled model was not trained with.
    """
    if activation not in ("auto", *get_args(Activation)):
        raise ValueError(f"activation {activation!r} is not one of {('auto', *get_args(Activation))}")
    if name in bundled():
        model = _bundled(name, pretrained, checkpoint, activation)
    else:
        model = _of_open_clip(name, pretrained, checkpoint, activation)
    return model.to(device=device, dtype=dtype).eval()


def _bundled(name: str, pretrained: str | None, checkpoint: str | Path | None, activation: str) -> HookedCLIP:
    if pretrained is not None and checkpoint is not None:
        raise UnknownModelError(f"expected pretrained= or checkpoint= for {name!r}, not both")
    if pretrained not in (None, RANDOM):
        raise UnknownModelError(f"{name!r} is bundled with its weights; leave pretrained={pretrained!r} out")
    spec = spec_of(card(name))
    if activation not in ("auto", spec.activation):
        raise ValueError(
            f"expected activation {spec.activation!r}, with which {name!r} was trained; received {activation!r}"
        )
    if pretrained is None and checkpoint is None:
        return load_bundled(name)
    return _filled(spec, pretrained, checkpoint, "card")


def _of_open_clip(
    name: str, pretrained: str | None, checkpoint: str | Path | None, activation: str
) -> HookedCLIP:
    elsewhere = ":" in name  # "hf-hub:...", of which open_clip would ask the network
    config = None if elsewhere else open_clip.get_model_config(name)
    if config is None:
        near = difflib.get_close_matches(name, [*bundled(), *open_clip.list_models()], n=4, cutoff=0.5)
        raise UnknownModelError(
            f"there is no model {name!r}; nearest: {', '.join(map(repr, near)) or 'none'}; `decompclip.bundled()` "
            "and `open_clip.list_models()` list all. Weights from elsewhere: download them, and pass the name of their "
            "architecture with checkpoint=PATH"
        )
    refuse(name, oddities(config["vision_cfg"]))
    _check_weights_named(name, pretrained, checkpoint)
    chosen, reason = _activation(name, config, pretrained, checkpoint, activation)
    if pretrained in (None, RANDOM):
        spec = ModelSpec(
            name=name, architecture=config, tokenizer=open_clip.get_tokenizer(name)
        ).with_activation(chosen)
        return _filled(spec, pretrained, checkpoint, reason)
    model, weights = _fetched(name, pretrained, chosen)
    return HookedCLIP.from_open_clip(
        model,
        tokenizer=open_clip.get_tokenizer(name),
        provenance=_provenance(name, pretrained, None, chosen, reason) | {"sha256": sha256(weights)},
        copy=False,
    )


def _check_weights_named(name: str, pretrained: str | None, checkpoint: str | Path | None) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    listed = f"{', '.join(tags[:8]) or 'none'}{f' and {len(tags) - 8} more' if len(tags) > 8 else ''}"
    if (pretrained is None) == (checkpoint is None):
        raise UnknownModelError(
            f"expected either pretrained= or checkpoint= for {name!r}; received {'both' if pretrained else 'neither'}; "
            f"its pretrained tags: {listed}"
        )
    if pretrained is not None and pretrained not in (*tags, RANDOM):
        near = difflib.get_close_matches(pretrained, tags, n=3, cutoff=0.4)
        raise UnknownModelError(
            f"there are no pretrained weights {pretrained!r} for {name!r}; nearest: {', '.join(near) or 'none'}; its "
            f"tags: {listed}"
        )


def _activation(
    name: str,
    config: Mapping[str, Any],
    pretrained: str | None,
    checkpoint: str | Path | None,
    activation: str,
) -> tuple[Activation, str]:
    """The activation to take, and what decided it."""
    of_name: Activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    if activation != "auto":
        return ("quick_gelu" if activation == "quick_gelu" else "gelu"), "argument"
    if pretrained not in (None, RANDOM):
        quick = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
        return ("quick_gelu" if quick else of_name), "pretrained tag"
    return of_name, "model name"


def _tell_the_guess(name: str, checkpoint: str | Path, taken: str) -> None:
    base = name.removesuffix("-quickgelu")
    if {base, f"{base}-quickgelu"} <= set(open_clip.list_models()):
        warnings.warn(
            f"{checkpoint} does not say which activation it was trained with; {taken!r} was taken, after the name "
            f"{name!r}. Weights that descend from OpenAI's need 'quick_gelu', most others 'gelu', and the wrong one "
            "costs accuracy: pass activation='quick_gelu' or activation='gelu' to choose.",
            stacklevel=5,
        )


def _filled(
    spec: ModelSpec, pretrained: str | None, checkpoint: str | Path | None, reason: str
) -> HookedCLIP:
    """A model of `spec` with the checkpoint's weights, or with random ones."""
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    model = spec.build()
    if state is not None:
        check_fit(model, state, source=str(checkpoint), name=spec.name)
        model.load_state_dict({key: value.float() for key, value in state.items()})
    if checkpoint is not None and reason == "model name":
        _tell_the_guess(spec.name, checkpoint, spec.activation)
    return spec.hook(model, _provenance(spec.name, pretrained, checkpoint, spec.activation, reason))


def _fetched(name: str, tag: str, activation: str) -> tuple[torch.nn.Module, Path]:
    """open_clip's model with the weights of a tag, and the file that they lie in."""
    quick = activation == "quick_gelu"
    try:
        # Built with weights that are then replaced: their draws leave no trace.
        with warnings.catch_warnings(), _quiet_about_downloads(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")  # the choice has settled it
            model = open_clip.create_model(name, pretrained=tag, quick_gelu=quick, require_pretrained=True)
        return model, Path(download_pretrained(open_clip.get_pretrained_cfg(name, tag)))
    except (OSError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(
            f"the weights {name} / {tag} could not be fetched ({first}); download them where there is a network, "
            "and pass checkpoint=PATH"
        ) from error


@contextmanager
def _quiet_about_downloads() -> Iterator[None]:
    """Keep the error that follows from standing beside open_clip's log of the same."""
    root = logging.getLogger()
    root.addFilter(_tells_more)
    try:
        yield
    finally:
        root.removeFilter(_tells_more)


def _tells_more(record: logging.LogRecord) -> bool:
    return "Failed to download weights" not in record.getMessage()


def _provenance(
    name: str, pretrained: str | None, checkpoint: str | Path | None, activation: str, reason: str
) -> dict[str, Any]:
    return {
        "name": name,
        "pretrained": pretrained,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "sha256": None if checkpoint is None else sha256(Path(checkpoint)),
        "activation": activation,
        "activation_source": reason,
        "versions": versions(),
    }
