"""load: from a name, a pretrained tag or a local checkpoint to a HookedCLIP."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import nn

from decompclip.models.checkpoint import load_weights, read_checkpoint, sha256
from decompclip.models.clip import HookedCLIP
from decompclip.models.config import Activation
from decompclip.models.convert import convert_open_clip, refuse_unsupported
from decompclip.models.errors import UnknownModelError
from decompclip.models.tokenizer import WordTokenizer
from decompclip.models.zoo import bundled, load_bundled

RANDOM = "random"
"""The `pretrained` that asks for seeded random weights, for tests and benchmarks."""

_PACKAGES = ("decompclip", "torch", "transformer_lens", "open_clip_torch")


def load(
    name: str,
    *,
    pretrained: str | None = None,
    checkpoint: str | Path | None = None,
    activation: Activation | Literal["auto"] = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HookedCLIP:
    """A CLIP whose image tower is hooked.

    Args:
        name: a bundled model (`decompclip.bundled()`), or an architecture of open_clip (`open_clip.list_models()`).
        pretrained: a tag of open_clip's for that architecture, downloaded if need be; `"random"` for seeded
            random weights.
        checkpoint: a local weights file instead: safetensors, or torch's format as open_clip, CleanCLIP and
            BadCLIP write it. No code in it is ever run.
        activation: of the MLPs. `"auto"` follows the pretrained tag; a checkpoint does not say it, and then the
            architecture's name decides (`ViT-B-32-quickgelu` or `ViT-B-32`), with a warning.

    Raises:
        UnknownModelError: no such model or tag, or neither weights nor a tag were named.
        UnsupportedTowerError: the image tower has no exact decomposition here.
        CheckpointError, FileNotFoundError: the checkpoint is missing, broken, unsafe or of another model.
        ConnectionError: the pretrained weights could not be fetched.
    """
    if activation not in ("auto", *get_args(Activation)):
        raise ValueError(f"activation {activation!r} is not one of {('auto', *get_args(Activation))}")
    if name in bundled() and checkpoint is None:
        if pretrained is not None:
            raise UnknownModelError(
                f"{name!r} is bundled with its weights; leave pretrained={pretrained!r} out"
            )
        model = _load_bundled(name, activation)
    else:
        model = _load_open_clip(name, pretrained, checkpoint, activation)
    return model.to(device=device, dtype=dtype).eval()


def _load_bundled(name: str, activation: str) -> HookedCLIP:
    source, card = load_bundled(name)
    own = "quick_gelu" if card["architecture"].get("quick_gelu") else "gelu"
    if activation not in ("auto", own):
        raise ValueError(
            f"expected activation {own!r}, with which {name!r} was trained; received {activation!r}"
        )
    tokenizer = WordTokenizer(tuple(card["tokenizer"]["words"]), card["tokenizer"]["context_length"])
    preprocess = PreprocessCfg(**card["preprocess"])
    facts = {
        "pretrained": "bundled",
        "sha256": card["sha256"],
        "activation": own,
        "activation_source": "card",
    }
    return _assemble(name, source, tokenizer, preprocess, card["templates"]["shape"], facts)


def _load_open_clip(
    name: str, pretrained: str | None, checkpoint: str | Path | None, activation: str
) -> HookedCLIP:
    config = open_clip.get_model_config(name)
    if config is None:
        known = [*bundled(), *open_clip.list_models()]
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        raise UnknownModelError(
            f"there is no model {name!r}; nearest: {', '.join(map(repr, near)) or 'none'}; "
            "`decompclip.bundled()` and `open_clip.list_models()` list all"
        )
    refuse_unsupported(name, config)
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
            f"there are no pretrained weights {pretrained!r} for {name!r}; its tags: {listed}"
            f"{f'; nearest: {near[0]}' if near else ''}"
        )
    chosen, reason = _activation(name, config, pretrained, checkpoint, activation)
    facts: dict[str, Any] = {"pretrained": pretrained, "activation": chosen, "activation_source": reason}
    source = _build(name, pretrained, chosen)
    if checkpoint is not None:
        weights = read_checkpoint(checkpoint)
        load_weights(source, weights, name=name, path=checkpoint)
        facts |= {"checkpoint": str(checkpoint), "sha256": sha256(checkpoint)}
    templates = list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    preprocess = PreprocessCfg(**source.visual.preprocess_cfg)  # type: ignore[union-attr,arg-type]
    return _assemble(name, source, open_clip.get_tokenizer(name), preprocess, templates, facts)


def _activation(
    name: str, config: dict[str, Any], pretrained: str | None, checkpoint: str | Path | None, activation: str
) -> tuple[str, str]:
    """The activation to take, and what decided it."""
    of_name = "quick_gelu" if config.get("quick_gelu") else "gelu"
    if activation != "auto":
        return activation, "argument"
    if pretrained is not None and pretrained != RANDOM:
        quick = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
        return ("quick_gelu" if quick else of_name), "pretrained tag"
    base = name.removesuffix("-quickgelu")
    twins = [twin for twin in (base, f"{base}-quickgelu") if twin in open_clip.list_models()]
    if checkpoint is not None and len(twins) == 2:
        warnings.warn(
            f"{checkpoint} does not say which activation it was trained with; {of_name!r} was taken, after the name "
            f"{name!r}. Weights that descend from OpenAI's need 'quick_gelu', most others 'gelu', and the wrong one "
            "costs accuracy: pass activation='quick_gelu' or 'gelu' to choose.",
            stacklevel=4,
        )
    return of_name, "model name"


def _build(name: str, pretrained: str | None, activation: str) -> nn.Module:
    """open_clip's model; with random weights where no tag is given."""
    tag = None if pretrained == RANDOM else pretrained
    config = open_clip.get_model_config(name) or {}
    override: dict[str, Any] = (
        {"quick_gelu": activation == "quick_gelu"} if config.get("quick_gelu", False) else {}
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _told_otherwise():
            torch.manual_seed(0)
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")  # the choice above has settled it
            return open_clip.create_model(
                name,
                pretrained=tag,
                force_quick_gelu=activation == "quick_gelu",
                require_pretrained=tag is not None,
                **override,
            )
    except (OSError, RuntimeError) as error:
        if tag is None:
            raise
        raise ConnectionError(
            f"the weights {name} / {tag} could not be fetched: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else ''}; download them where there is a "
            "network, and pass checkpoint=PATH"
        ) from error


@contextmanager
def _told_otherwise() -> Iterator[None]:
    """Keep open_clip from telling that the model is random, where a checkpoint follows or it was asked for."""
    root = logging.getLogger()

    def keep(record: logging.LogRecord) -> bool:
        return "No pretrained weights loaded" not in record.getMessage()

    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


def _assemble(
    name: str,
    source: nn.Module,
    tokenizer: Any,
    preprocess: PreprocessCfg,
    templates: Any,
    facts: dict[str, Any],
) -> HookedCLIP:
    visual = convert_open_clip(source.visual)  # type: ignore[arg-type]
    source._modules["visual"] = None  # its weights live on in `visual` alone
    versions = {package: version(package) for package in _PACKAGES}
    return HookedCLIP(
        visual,
        source,
        name=name,
        tokenizer=tokenizer,
        preprocess=image_transform_v2(preprocess, is_train=False),  # type: ignore[arg-type]
        mean=preprocess.mean,
        std=preprocess.std,
        templates=templates,
        provenance={"name": name, "checkpoint": None, "sha256": None, **facts, "versions": versions},
    )
