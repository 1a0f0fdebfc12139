"""load: from a name, a pretrained tag, a local file or folder, or a model in memory to a HookedCLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from decompclip.api import check_choice
from decompclip.files import CHECKPOINT
from decompclip.models.architecture import check_sizes, out_of, towers_of
from decompclip.models.bundled import bundled, card, load_bundled, spec_of
from decompclip.models.checkpoint import bare, digest, read_checkpoint, sha256, without_others
from decompclip.models.clip import HookedCLIP
from decompclip.models.errors import ModelError, UnknownModelError, first_line, warn_caller
from decompclip.models.fit import (
    check_fit,
    conform,
    image_size_words,
    is_of_transformers,
    models_like,
    with_positions_of,
)
from decompclip.models.folders import (
    CONFIG,
    GUARD,
    GUARDED,
    check_saved,
    configuration_in,
    is_of_open_clip,
    open_clip_folder,
    other_weights,
    weights_of_open_clip,
)
from decompclip.models.hugging_face import Text, from_transformers, read_folder
from decompclip.models.names import known_name
from decompclip.models.spec import Choice, ModelSpec, OpenCLIP
from decompclip.models.tags import asked_once, check_tag, create, fetch, listed, preprocess_of
from decompclip.models.text import (
    WITHOUT_TEXT,
    ImageOnly,
    MissingTextError,
    NoTokenizer,
    Tokenizer,
    clip_tokenizer,
    image_side,
    tokenizer_of,
)
from decompclip.models.torchscript import is_of_openai
from decompclip.tower.config import Activation
from decompclip.tower.families import oddities, refuse


def _check_options(name: Any, dtype: Any, image_size: Any) -> None:
    if not isinstance(name, str | Path | nn.Module):
        raise UnknownModelError(
            f"expected a name, a path, or a model of open_clip's or transformers'; received {name!r}, "
            f"of type {type(name).__name__}"
        )
    sizes = (image_size,) * 2 if isinstance(image_size, int) else image_size
    if sizes is not None and not (
        isinstance(sizes, tuple) and len(sizes) == 2 and all(isinstance(x, int) and x > 0 for x in sizes)
    ):
        raise ValueError(
            f"expected image_size as a number of pixels, or height and width; received {image_size!r}"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        known = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else None
        example = known if isinstance(known, torch.dtype) and known.is_floating_point else torch.float16
        raise ValueError(
            f"expected a dtype of torch's for floating point; received {dtype!r}; pass dtype={example}"
        )


def check_device(device: str | torch.device | None) -> None:
    """Check that tensors can lie there.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        gpus = torch.cuda.device_count()
        here = ["cpu", *(f"cuda:{i}" for i in range(gpus))] + ["mps"] * torch.backends.mps.is_available()
        reason = str(error).splitlines()[0].split(". ")[0]
        if isinstance(error, TypeError) or reason.startswith("Expected one of"):
            reason = "torch knows no device of that name; a GPU's is 'cuda'"
        raise ValueError(
            f"expected a device that can be used here ({', '.join(here)}); received {str(device)!r}: {reason}"
        ) from error


def _from_memory(model: nn.Module, *, text: bool = True, tokenizer: Tokenizer | None = None) -> HookedCLIP:
    """Hook a model that is in memory, wrapped or not; it is left as it is."""
    model = bare(model)
    source: Any = model
    if isinstance(getattr(getattr(source, "config", None), "model_type", None), str):
        return from_transformers(model, tokenizer=tokenizer, text=text)
    if isinstance(model, HookedCLIP) or not hasattr(source, "visual") or not hasattr(source, "encode_text"):
        raise UnknownModelError(
            f"expected a name, a path, or a model of open_clip's or transformers'; received a {type(model).__name__}"
        )
    if not text:
        alone = ImageOnly.of(source, why=WITHOUT_TEXT)
        return HookedCLIP.from_open_clip(alone, tokenizer=NoTokenizer(WITHOUT_TEXT))
    own = clip_tokenizer(
        context_length=getattr(source, "context_length", None) or 77,
        vocabulary=getattr(source, "vocab_size", None) or 0,
        where="the model in memory",
    )
    return HookedCLIP.from_open_clip(model, tokenizer=tokenizer or own)


RANDOM = "random"
"""The `pretrained` that asks for seeded random weights: for tests and benchmarks."""


def load(
    name: str | Path | nn.Module,
    *,
    pretrained: str | None = None,
    checkpoint: str | Path | None = None,
    activation: Choice = "auto",
    image_size: int | tuple[int, int] | None = None,
    prefix: str | None = None,
    text: Text = "auto",
    tokenizer: Tokenizer | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HookedCLIP:
    """A CLIP whose image tower is hooked, in evaluation mode.

    Args:
        name: a bundled model (`decompclip.bundled()`); an architecture of open_clip (`open_clip.list_models()`);
            the path of a folder with a `CLIPModel` or `SiglipModel` of Hugging Face transformers, their image
            towers alone, or a model of open_clip's; of a file of weights whose architecture its shapes tell; or a model of
            open_clip's or transformers' in memory, which is left as it is. Names are found whatever their case,
            hyphens and underscores. `decompclip.load` takes folders of `save_guard` too, and gives a `Guard`.
        pretrained: one of open_clip's tags for that architecture, downloaded if need be; `"random"` for seeded
            random weights.
        checkpoint: local weights instead: safetensors, torch's format as open_clip, CleanCLIP, BadCLIP and RoCLIP
            write it, OpenAI's archives, or such a folder. No code in it is ever run.
        activation: of the MLPs. `"auto"` follows the pretrained tag or config.json; most checkpoints do not
            say it, and then the architecture's name decides (`ViT-B-32-quickgelu` or `ViT-B-32`), with a
            warning. The choice and its reason are kept in `provenance`.
        image_size: pixels of the images (height and width), where they shall be others than the name's: positions are
            interpolated as open_clip's `force_image_size` does it, unless the checkpoint has as many; kept in `provenance`.
        prefix: which copy to take of a checkpoint that holds several, a student and its teacher for instance.
        text: whether to have the text tower; by default as far as it can be had: where it needs a download
            or a package that is not there, the image tower is loaded alone, with a warning. Asking such a
            model about texts explains what is missing. Bundled models always bring theirs.
        tokenizer: a function from a list of texts to token ids, in place of the model's own.
        device: where to; by default the CPU, and for a model in memory its own.
        dtype: in what; by default fp32, and for a model in memory its own.

    Raises:
        UnknownModelError: no such model or tag, or neither weights nor a tag were named.
        UnsupportedTowerError: the image tower has no exact decomposition here.
        CheckpointError: the checkpoint is missing, broken, unsafe or of another model.
        MissingTextError: `text=True`, and its text tower cannot be had.
        ConnectionError: the pretrained weights could not be fetched.
        ValueError: an unknown activation, or one that a bundled model was not trained with; a device that is not
            here; no dtype of torch's.
    """
    check_choice("activation", activation, Choice)
    _check_options(name, dtype, image_size)
    check_device(device)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    asked = _Asked(pretrained, checkpoint, activation, size, prefix, text)
    with torch.inference_mode(False):  # weights that can be differentiated, whatever mode the caller is in
        model = _found(name, asked, tokenizer)
        if tokenizer is not None and not isinstance(name, nn.Module):
            model.tokenizer = tokenizer
        return model.to(device=device, dtype=dtype).eval()


@dataclass(frozen=True)
class _Asked:
    """The options of `load` that say which weights, in what form."""

    pretrained: str | None
    checkpoint: str | Path | None
    activation: Choice
    image_size: tuple[int, int] | None
    prefix: str | None
    text: Text

    def read(self, path: Path) -> dict[str, Tensor]:
        return read_checkpoint(path, prefix=self.prefix)

    def provenance(
        self,
        name: str,
        activation: tuple[str, str],
        files: Sequence[Path],
        folder: Path | None,
        resized: str | None,
    ) -> dict[str, Any]:
        """What a model is made of: `files` of weights, and of a folder what lies beside them."""
        beside = [] if folder is None else configuration_in(folder)
        left = [] if folder is None else other_weights(folder, files)
        sums = {path: sha256(path) for path in (*files, *beside)}
        if others := [name for name in left if name != CHECKPOINT]:
            warn_caller(
                f"{', '.join(path.name for path in files)} {'is' if len(files) == 1 else 'are'} read, as open_clip and "
                f"transformers do; in {folder} there lie other weights too, which are not looked at: {', '.join(others[:5])}"
            )
        return {
            "name": name,
            "pretrained": self.pretrained,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "sha256": digest({path: sums[path] for path in files}) if files else None,
            "files": {path.name: found for path, found in sums.items()},
            "files_not_read": left,
            "activation": activation[0],
            "activation_source": activation[1],
            **({} if resized is None else {"image_size": resized}),
            **({} if self.prefix is None else {"prefix": self.prefix}),
        }


def _found(name: str | Path | nn.Module, asked: _Asked, tokenizer: Tokenizer | None) -> HookedCLIP:
    if isinstance(name, nn.Module):
        if replace(asked, text="auto") != _Asked(None, None, "auto", None, None, "auto"):
            raise UnknownModelError(
                "a model in memory has its weights, its activation and its image size; leave pretrained=, checkpoint=, "
                "activation=, image_size= and prefix= out"
            )
        return _from_memory(name, text=asked.text is not False, tokenizer=tokenizer)
    if asked.prefix is not None and asked.checkpoint is None and not Path(name).exists():
        raise UnknownModelError(f"expected prefix={asked.prefix!r} with a checkpoint; received none")
    if not Path(name).exists() or name in bundled():
        name = known_name(str(name))
        return _bundled(name, asked) if name in bundled() else _of_open_clip(name, asked)
    if name in open_clip.list_models():
        return _of_open_clip(str(name), asked)
    return _of_path(Path(name), asked)


def _of_path(path: Path, asked: _Asked) -> HookedCLIP:
    if asked.pretrained is not None or asked.checkpoint is not None:
        raise UnknownModelError(f"{path} has its weights; leave pretrained= and checkpoint= out")
    if (path / GUARD).is_file():
        raise UnknownModelError(
            f"{path} holds a model with its repair, which `decompclip.load` and `decompclip evaluate` take; the model alone, "
            f"without the repair, is {path / GUARDED}"
        )
    if path.is_dir():
        return _of_folder(path, str(path), asked)
    state = asked.read(path)
    if is_of_transformers(state):
        raise UnknownModelError(
            f"{path} is a file of Hugging Face transformers'; load its folder, with its config.json: {str(path.parent)!r}"
        )
    names = models_like(state, of_any_size=asked.image_size is not None)
    if len(names) == 1:
        return _of_open_clip(names[0], replace(asked, checkpoint=path))
    more = ""
    if not names and (near := models_like(state, of_any_size=True)):
        more = f" but for their image size, which {', '.join(near[:3])} would fit; pass image_size= besides"
    raise UnknownModelError(
        f"the shapes of the weights in {path} fit {'several' if names else 'no native'} architectures of open_clip's"
        f"{more}{': ' if names else ''}{', '.join(names)}; pass the name of theirs with checkpoint={str(path)!r}"
    )


def _of_folder(folder: Path, name: str, asked: _Asked, expected: ModelSpec | None = None) -> HookedCLIP:
    """A folder's model; its image tower has to be of the shape `expected`."""
    reason = "argument" if asked.activation != "auto" else None
    with out_of(str(folder)):
        if is_of_open_clip(folder):
            spec, weights = open_clip_folder(folder), weights_of_open_clip(folder)
            check_saved(folder, weights)
            if asked.activation != "auto":
                spec = spec.with_activation(asked.activation)
            known = replace(_sized(spec, asked.image_size), name=name)
            if expected is not None:
                with torch.device("meta"):
                    wanted, own = (each.build_image_only("") for each in (expected, known))
                check_fit(wanted, own.state_dict(), source=str(folder), name=name)
            asked = replace(asked, pretrained=None, checkpoint=weights)
            return _filled(known, asked, reason or "open_clip_config.json", folder=folder)
        options = {"text": asked.text, "activation": asked.activation, "prefix": asked.prefix}
        found = read_folder(folder, image_size=asked.image_size, **options)
        if expected is not None:
            with torch.device("meta"):
                wanted = expected.build_image_only("")
            state = image_side(conform(wanted, found.model.state_dict()))
            check_fit(wanted, state, source=str(folder), name=name)
        chosen = found.activation, reason or "config.json"
        asked = replace(asked, pretrained=None, checkpoint=folder)
        provenance = asked.provenance(name, chosen, found.files, folder, found.resized)
        return found.hook(provenance)


def _bundled(name: str, asked: _Asked) -> HookedCLIP:
    if asked.pretrained is not None and asked.checkpoint is not None:
        raise UnknownModelError(f"expected pretrained= or checkpoint= for {name!r}, not both")
    if asked.pretrained not in (None, RANDOM):
        raise UnknownModelError(
            f"{name!r} is bundled with its weights; leave pretrained={asked.pretrained!r} out"
        )
    spec = spec_of(card(name))
    if asked.activation not in ("auto", spec.activation):
        raise ValueError(
            f"expected activation {spec.activation!r}, with which {name!r} was trained; received {asked.activation!r}"
        )
    if asked.pretrained is None and asked.checkpoint is None:
        if asked.image_size is not None:
            raise ValueError(f"{name!r} is bundled for images of its own size; leave image_size= out")
        return load_bundled(name)
    return _of_checkpoint(_sized(spec, asked.image_size), asked, "card")


def _of_open_clip(name: str, asked: _Asked) -> HookedCLIP:
    config: Any = open_clip.get_model_config(name)
    refuse(name, oddities(config["vision_cfg"]))
    pretrained, checkpoint = asked.pretrained, asked.checkpoint
    if (pretrained is None) == (checkpoint is None):
        raise UnknownModelError(
            f"expected either pretrained= or checkpoint= for {name!r}; received {'both' if pretrained else 'neither'}; "
            f"its pretrained tags: {listed(name)}"
        )
    if pretrained not in (None, RANDOM):
        check_tag(name, pretrained)
    spec = ModelSpec(
        name=name,
        architecture=config,
        tokenizer=tokenizer_of(name, config),
        preprocess=preprocess_of(name, None if pretrained == RANDOM else pretrained),
    )
    chosen, reason = _activation(name, config, asked)
    return _of_checkpoint(_sized(spec, asked.image_size).with_activation(chosen), asked, reason)


def _of_checkpoint(spec: ModelSpec, asked: _Asked, reason: str) -> HookedCLIP:
    """A model of `spec`; a folder says the rest itself."""
    path = None if asked.checkpoint is None else Path(asked.checkpoint)
    if path is not None and path.is_dir():
        return _of_folder(path, spec.name, asked, expected=spec)
    with nullcontext() if path is None else out_of(str(path)):
        return _filled(spec, asked, reason)


def _sized(spec: ModelSpec, size: tuple[int, int] | None) -> ModelSpec:
    """A spec for images of another size.

    Raises:
        ValueError: its tower is timm's, of one size.
    """
    vision = spec.architecture["vision_cfg"]
    if size is None:
        return spec
    if vision.get("timm_model_name"):
        raise ValueError(
            f"expected no image_size for {spec.name!r}, whose tower is timm's, of one size in open_clip; received {size[0]} x "
            f"{size[1]}; take the name of another resolution (open_clip.list_models())"
        )
    plain: Any = size[0] if size[0] == size[1] else list(size)
    return replace(spec, architecture={**spec.architecture, "vision_cfg": {**vision, "image_size": plain}})


def _activation(name: str, config: Mapping[str, Any], asked: _Asked) -> tuple[Activation, str]:
    """The activation to take, and what decided it."""
    of_name: Activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    if asked.activation == "quick_gelu" and config["vision_cfg"].get("timm_model_name"):
        raise ValueError(f"expected activation 'gelu' for {name!r}, whose tower is timm's; leave it out")
    if asked.activation != "auto":
        return asked.activation, "argument"
    if asked.pretrained not in (None, RANDOM):
        quick = open_clip.get_pretrained_cfg(name, asked.pretrained).get("quick_gelu", False)
        return ("quick_gelu" if quick else of_name), "pretrained tag"
    checkpoint = asked.checkpoint
    if checkpoint is not None and Path(checkpoint).is_file() and is_of_openai(Path(checkpoint)):
        return "quick_gelu", "OpenAI's archive"
    return of_name, "model name"


def _filled(spec: ModelSpec, asked: _Asked, reason: str, *, folder: Path | None = None) -> HookedCLIP:
    """A model of `spec` with a tag's weights, the checkpoint's (`folder`: where its configuration lies), or random ones."""
    tag = None if asked.pretrained in (None, RANDOM) else asked.pretrained
    checkpoint = asked.checkpoint
    weights = fetch(spec.name, tag) if tag else None if checkpoint is None else Path(checkpoint)
    state = None if tag or weights is None else asked.read(weights)
    resize = asked.image_size is not None
    if state is not None:
        text = asked.text is not False and "image_only" not in spec.architecture
        if folder is not None:
            check_sizes(towers_of(spec.architecture, text=text), state, source=str(folder / CONFIG))
        state = _check_unbuilt(spec, state, text=text, resize=resize, source=str(weights))
    model = _built(spec, tag, asked)
    if isinstance(model, ImageOnly):
        spec = replace(spec, tokenizer=NoTokenizer(model.why))
        state = asked.read(weights) if tag and weights else state
    if state is not None:
        found = _fitting(model, state, resize=resize, source=str(weights), name=spec.name)
        model.load_state_dict(found)
    if checkpoint is not None and reason == "model name":
        _warn_of_a_guess(spec.name, checkpoint, spec.activation)
    resized = None if asked.image_size is None else image_size_words(asked.image_size, state)
    asked = replace(asked, checkpoint=folder or checkpoint)
    files = [] if weights is None else [weights]
    return spec.hook(model, asked.provenance(spec.name, (spec.activation, reason), files, folder, resized))


def _check_unbuilt(
    spec: ModelSpec, state: Mapping[str, Tensor], *, text: bool, resize: bool, source: str
) -> dict[str, Tensor]:
    """The weights without those of heads beside the model, checked before memory is taken for a model, and before the
    hub is asked for a text tower."""
    alone = not text or "hf_model_name" in spec.architecture["text_cfg"]
    with torch.device("meta"):
        shell = spec.build_image_only("") if alone else spec.build()
    if not alone:
        state = without_others(conform(shell, state), shell.state_dict(), source=source)
    _fitting(shell, state, resize=resize, source=source, name=spec.name)
    return dict(state)


def _fitting(
    model: OpenCLIP, state: Mapping[str, Tensor], *, resize: bool, source: str, name: str
) -> dict[str, Tensor]:
    """The weights under the names of `model`, checked; `resize`: their positions brought to its grid."""
    found = conform(model, state)
    found = image_side(found) if isinstance(model, ImageOnly) else found
    found = with_positions_of(model, found, source=source) if resize else found
    check_fit(model, found, source=source, name=name)
    return found


def _built(spec: ModelSpec, tag: str | None, asked: _Asked) -> OpenCLIP:
    """A whole model, with the tag's weights if there is one; or an image tower with random weights."""
    if asked.text is False or "image_only" in spec.architecture:
        if asked.text is True:
            raise MissingTextError(f"the text tower cannot be had: {spec.architecture['image_only']}")
        return spec.build_image_only(spec.architecture.get("image_only", WITHOUT_TEXT))
    repository = spec.architecture["text_cfg"].get("hf_model_name")
    quick = spec.activation == "quick_gelu"
    try:
        with asked_once(repository):
            if tag:
                return create(spec.name, tag, quick_gelu=quick, image_size=asked.image_size)
            return spec.build()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if repository is None or isinstance(error, ModelError):
            raise
        why = (
            f"that of {spec.name!r} is transformers' {repository!r}, whose configuration lies on the hub and could not be "
            f"had ({first_line(error)}); install transformers and load it once where there is a network"
        )
        if asked.text is True:
            raise MissingTextError(f"the text tower cannot be had: {why}") from error
        warn_caller(f"the image tower is loaded alone, without the text tower: {why}")
        return spec.build_image_only(why)


def _warn_of_a_guess(name: str, checkpoint: str | Path, taken: str) -> None:
    base = name.removesuffix("-quickgelu")
    if {base, f"{base}-quickgelu"} <= set(open_clip.list_models()):
        warn_caller(
            f"{checkpoint} does not say which activation it was trained with; {taken!r} was taken, after the name "
            f"{name!r}. Weights that descend from OpenAI's need 'quick_gelu', most others 'gelu', and the wrong one "
            "costs accuracy: pass activation='quick_gelu' or activation='gelu' to choose."
        )
