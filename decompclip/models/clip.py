"""HookedCLIP: a hooked image tower beside open_clip's own text tower, tokenizer and preprocessing."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor, nn
from torch.nn import functional as F

from decompclip.decomposition.capture import decompose, decompose_pool
from decompclip.decomposition.components import Components
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention
from decompclip.display import Track
from decompclip.models.checkpoint import shell
from decompclip.models.preprocessing import PictureTransform, Preprocessing, RawPixels
from decompclip.models.text import ImageOnly, MissingTextError, Tokenizer, check_tokens, texts_of
from decompclip.models.zero_shot import (
    Template,
    causal,
    encode_prompts,
    keep,
    kept,
    key_of,
    zero_shot_classifier,
)
from decompclip.tower.cache import ViTCache
from decompclip.tower.config import ViTConfig, tower_facts
from decompclip.tower.convert import Source
from decompclip.tower.vit import Causal, Hook, HookedViT

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def plain(x: T) -> T:
    """A tensor that autograd takes: a copy of one that was made under `torch.inference_mode()`, else the thing itself."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x  # pyright: ignore[reportReturnType]


def differentiable(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function that needs gradients with them, whatever mode its caller is in and made its tensors under."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.enable_grad():
            given = [plain(x) for x in args]
            named = {key: plain(x) for key, x in kwargs.items()}
            return function(*given, **named)  # pyright: ignore[reportCallIssue]

    return run


class HookedCLIP(nn.Module):
    """A CLIP whose image tower can be read, edited and decomposed.

    Build it by `decompclip.load`, or by `HookedCLIP.from_open_clip` from a model in memory.

    Attributes:
        visual: the image tower; its hook points are in `visual.hook_dict`.
        text: the source model without its image tower.
        tokenizer: texts to token ids.
        preprocess: from an RGB picture to the tower's input, as the model was trained.
        pixels: the same without the normalisation: pixels in [0, 1], for triggers and for training.
        templates: the model's own prompt templates, by property; empty for models of the wide world.
        class_names: the model's own classes, or none.
        provenance: name, weights, SHA-256, activation and where it came from, versions.
        architecture: open_clip's configuration, where it is known; `save_model` writes it.
        backdoors: what it is known to have been poisoned with, each a `trigger`'s card and its `target`; fine-tuning
            and `save_model` keep them.
    """

    visual: HookedViT
    text: nn.Module

    def __init__(
        self,
        visual: HookedViT,
        text: nn.Module,
        *,
        tokenizer: Tokenizer,
        preprocess: Mapping[str, Any],
        templates: Mapping[str, Sequence[Template]] | None = None,
        class_names: Sequence[str] = (),
        provenance: Mapping[str, Any],
        source: Source | None = None,
    ) -> None:
        super().__init__()
        self.visual = visual
        self._source = source
        self.architecture: Mapping[str, Any] | None = None
        self.backdoors: tuple[Mapping[str, Any], ...] = ()
        self.text = text
        self.tokenizer = tokenizer
        self.preprocess_cfg = Preprocessing(**{**preprocess, "size": visual.cfg.image_size})
        self.preprocess: PictureTransform = self.preprocess_cfg.transform()
        self.pixels: PictureTransform = self.preprocess_cfg.pixels()
        self.templates = {name: tuple(values) for name, values in (templates or {}).items()}
        self.class_names = tuple(class_names)
        self.provenance = dict(provenance)
        self.raw_pixels = RawPixels()
        self.eval()

    def __repr__(self) -> str:
        tag, file = (self.provenance.get(key) for key in ("pretrained", "checkpoint"))
        weights = "in memory" if tag is None else "random weights" if tag == "random" else tag
        weights = weights if file is None else f"checkpoint {Path(file).name!r}"
        alone = ["image tower alone"] * isinstance(self.text, ImageOnly)
        facts = [repr(self.name), weights, *tower_facts(self.cfg), *alone]
        return f"{type(self).__name__}({', '.join(facts)})"

    @classmethod
    def from_open_clip(
        cls,
        model: nn.Module,
        *,
        tokenizer: Tokenizer,
        preprocess: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        copy: bool = True,
        **options: Any,
    ) -> HookedCLIP:
        """Hook a model of open_clip's that is in memory.

        Args:
            model: an `open_clip.model.CLIP` (or `CustomTextCLIP`); left as it is.
            tokenizer: texts to token ids.
            preprocess: open_clip's `PreprocessCfg` fields; by default those that the model carries.
            provenance: what the model is made of; see the class.
            copy: own the weights; `False` shares them with `model`, for callers who drop it.
            options: `templates` and `class_names` of the class.

        Returns:
            The hooked model, in evaluation mode.

        Raises:
            UnsupportedTowerError: its image tower is none of those that `HookedViT` runs.
        """
        source: Any = model
        origin = Source(source.visual, copy=copy)
        text = shell(model, {name: module for name, module in model._modules.items() if name != "visual"})
        return cls(
            origin.adopt(),
            copying.deepcopy(text) if copy else text,
            tokenizer=tokenizer,
            preprocess=getattr(source.visual, "preprocess_cfg", {}) if preprocess is None else preprocess,
            provenance={"name": "open_clip model in memory"} if provenance is None else provenance,
            source=origin,
            **options,
        )

    def to_open_clip(self) -> nn.Module:
        """An open_clip model of its own with the present weights and the same outputs.

        So an edited or repaired model leaves this package. Hooks are no weights and do not go along.

        Raises:
            MissingTextError: the model was loaded without its text tower.
            ValueError: the source's architecture cannot hold the edit, or there was no source.
        """
        if isinstance(self.text, ImageOnly):
            raise MissingTextError(f"open_clip models have a text tower; this one has none: {self.text.why}")
        return self.source_like()

    def source_like(self) -> nn.Module:
        """As `to_open_clip`; of an image tower alone the stand-in around open_clip's tower.

        Raises:
            ValueError: as `to_open_clip`.
        """
        if self._source is None:
            raise ValueError(
                "expected a model converted from open_clip's; received one around a HookedViT of its own"
            )
        model: Any = copying.deepcopy(self.text)
        model.visual = self._source.filled(self.visual)
        return model.eval()

    @property
    def cfg(self) -> ViTConfig:
        return self.visual.cfg

    @property
    def name(self) -> str:
        return self.provenance["name"]

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """Logarithm of the factor from similarity to logit."""
        scale = self.text.get_parameter("logit_scale")
        return scale.reshape(())

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(self.preprocess_cfg.mean)

    @property
    def std(self) -> tuple[float, ...]:
        return tuple(self.preprocess_cfg.std)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.cfg.image_size

    @property
    def context_length(self) -> int:
        return getattr(self.text, "context_length", None) or getattr(self.tokenizer, "context_length", 77)

    @property
    def device(self) -> torch.device:
        return self.visual.device

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.dtype

    def normalize(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """Pixels in [0, 1] to the tower's input.

        Args:
            pixels: in [0, 1].

        Returns:
            Images, past mean and deviation of the model's preprocessing.
        """
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def denormalize(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """The tower's input to pixels in [0, 1], in float32.

        Args:
            images: as the tower takes them.
        """
        images = images.float()
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

    def encode_image(
        self, images: Float[Tensor, "batch 3 h w"], normalize: bool = False
    ) -> Float[Tensor, "batch d_embed"]:
        """Image features.

        Args:
            images: as the tower takes them (see `normalize`); moved to the model's device and dtype.
            normalize: to length one.

        Raises:
            ValueError: the images are not `[batch, 3, h, w]` of the tower's size.
        """
        features = self.visual(self._input(images))
        return F.normalize(features, dim=-1) if normalize else features

    def tokenize(self, texts: str | Sequence[str]) -> Int[Tensor, "text position"]:
        """Token ids, as the text tower takes them.

        Args:
            texts: one, or several.

        Raises:
            TypeError: what is no string.
        """
        return self.tokenizer(texts_of(texts))

    def encode_text(
        self, texts: str | Sequence[str] | Int[Tensor, "text position"], normalize: bool = False
    ) -> Float[Tensor, "text d_embed"]:
        """Text features.

        Args:
            texts: one text, several, or token ids.
            normalize: to length one.

        Raises:
            TypeError: a text that is no string.
            ValueError: token ids that are not integers `[text, context_length]`, or not in the vocabulary.
        """
        tokens = texts if isinstance(texts, Tensor) else self.tokenize(texts)
        check_tokens(tokens, self.context_length, getattr(self.text, "vocab_size", None))
        text: Any = self.text
        return text.encode_text(tokens.to(self.device), normalize=normalize)

    def zero_shot_classifier(
        self,
        class_names: Iterable[str] | None = None,
        templates: str | Sequence[Template] | None = None,
        *,
        allow_duplicates: bool = False,
        track: Track | None = None,
    ) -> Float[Tensor, "class d_embed"]:
        """One unit vector a class: the mean over the templates of its unit text features, normalised again.

        Args:
            class_names: by default the model's own.
            templates: prompts with one slot `{}`, or functions of the name; or, for a bundled model, the
                name of a property (`"colour"`). By default the model's own, for the first property, or
                else open_clip's `OPENAI_IMAGENET_TEMPLATES`.
            allow_duplicates: let two classes share a name, as two pairs of open_clip's `IMAGENET_CLASSNAMES` do; the later one
                is then never predicted.
            track: shows progress, where there are many. The last few classifiers are kept while the text tower is as it was.

        Raises:
            ValueError: no class names, a name that stands twice, a single string for a list, a template without a slot.
        """
        names = self.class_names if class_names is None else class_names
        names = names if isinstance(names, str) else tuple(names)  # whatever gives them once
        chosen = self._templates(templates)
        key = key_of(names, chosen, self.tokenizer)
        if not (isinstance(names, str) or allow_duplicates) and (found := kept(self.text, key)) is not None:
            return found
        classifier = zero_shot_classifier(
            self._encode_prompts, self.tokenize, names, chosen, allow_duplicates=allow_duplicates, track=track
        )
        if not allow_duplicates:  # what is kept has passed the check of names
            keep(self.text, key, classifier)
        return classifier

    def _encode_prompts(self, tokens: Int[Tensor, "text position"]) -> Float[Tensor, "text d_embed"]:
        if not causal(self.text):
            return self.encode_text(tokens)
        check_tokens(tokens, self.context_length, getattr(self.text, "vocab_size", None))
        return encode_prompts(self.text, tokens.to(self.device))

    def _templates(self, templates: str | Sequence[Template] | None) -> Sequence[Template]:
        if templates is None:
            return next(iter(self.templates.values()), tuple(OPENAI_IMAGENET_TEMPLATES))
        if isinstance(templates, str):
            if templates not in self.templates:
                known = ", ".join(map(repr, self.templates)) or "none"
                raise ValueError(
                    f"expected a list of templates, or a property whose templates {self.name!r} brings "
                    f"along ({known}), got {templates!r}"
                )
            return self.templates[templates]
        return templates

    def decompose(
        self,
        images: Float[Tensor, "batch 3 h w"],
        *,
        convention: Convention = "centred",
        normalize: bool = False,
        tokens: Components | Literal[True] | None = None,
    ) -> Decomposition:
        """Image features as a sum over heads, MLPs, embedding and biases (docs/method.md, section 1).

        Args:
            images: as the tower takes them.
            convention: "centred", or "paper" (the constants and the stream's mean shared out among the terms).
            normalize: divide all terms by the length of the feature.
            tokens: heads whose tokens to keep, for `Decomposition.tokens`; True for all.

        Returns:
            The terms, which sum to the features.

        Raises:
            DecompositionError: the terms miss the feature, because a hook writes past the components.
        """
        images = self._input(images)
        return decompose(self.visual, images, convention=convention, normalize=normalize, tokens=tokens)

    def decompose_pool(
        self, images: Float[Tensor, "batch 3 h w"], *, normalize: bool = False, tokens: bool = False
    ) -> Decomposition:
        """Image features as a sum over the heads of the attention pool, `heads[0, q]`, and its MLP, `mlps[0]` (SigLIP, PE, CoCa).

        Args:
            images: as the tower takes them.
            normalize: divide all terms by the length of the feature.
            tokens: keep what each token brings.

        Returns:
            The terms, which sum to the features; all that takes a decomposition takes them.

        Raises:
            ValueError: the tower pools otherwise.
        """
        return decompose_pool(self.visual, self._input(images), normalize=normalize, tokens=tokens)

    def run_with_cache(
        self, images: Float[Tensor, "batch 3 h w"], **options: Any
    ) -> tuple[Float[Tensor, "batch d_embed"], ViTCache]:
        """Features and activations of the image tower.

        Args:
            images: as the tower takes them; with `start_at_layer`, the stream.
            options: `names_filter`, `device`, `stop_at_layer` and the like, as in TransformerLens.

        Returns:
            The features, and the activations by hook name.
        """
        return self.visual.run_with_cache(self._input(images, options), **options)

    def run_with_hooks(
        self, images: Float[Tensor, "batch 3 h w"], **options: Any
    ) -> Float[Tensor, "batch d_embed"]:
        """Features under hooks for this one run.

        Args:
            images: as the tower takes them; with `start_at_layer`, the stream.
            options: `fwd_hooks`, `bwd_hooks`, `stop_at_layer` and the like, as in TransformerLens.

        Raises:
            KeyError: a hook point that the tower does not have; the nearest names are offered.
        """
        return self.visual.run_with_hooks(self._input(images, options), **options)

    @property
    def hook_dict(self) -> dict[str, Any]:
        """The image tower's hook points by name."""
        return self.visual.hook_dict

    def add_hook(
        self, name: str | Callable[[str], bool], hook: Callable[..., Any], *args: Any, **options: Any
    ) -> None:
        """Add a hook to the image tower that stays until `reset_hooks`.

        Args:
            name: the hook point's name, or a choice among the names.
            hook: what to do there; takes the activation and the hook point.
            args: `dir` ("fwd" or "bwd") and what follows it in TransformerLens.
            options: the same by name: `dir`, `is_permanent`, `level`, `prepend`.

        Raises:
            KeyError: a hook point that the tower does not have; the nearest names are offered.
        """
        self.visual.add_hook(name, hook, *args, **options)

    def reset_hooks(self, **options: Any) -> None:
        """Remove the image tower's hooks (options as in TransformerLens).

        Args:
            **options: of transformer_lens's `reset_hooks`.
        """
        self.visual.reset_hooks(**options)

    def _input(self, images: Tensor, options: Mapping[str, Any] = MappingProxyType({})) -> Tensor:
        if options.get("start_at_layer") is not None:  # a stream, no images
            return images.to(self.device, self.dtype)
        if not images.is_floating_point():
            raise ValueError(
                f"expected floating-point images as `preprocess` or `normalize` gives them, got {images.dtype}; divide "
                "pixels by 255 and pass them through `normalize`"
            )
        self.raw_pixels.look(images, self.mean, self.std)
        return images.to(self.device, self.dtype)

    @contextmanager
    def hooks(
        self, *interventions: Causal, fwd_hooks: Sequence[Hook] = (), bwd_hooks: Sequence[Hook] = ()
    ) -> Iterator[HookedCLIP]:
        """Run the image tower under interventions, from the first to the last, then under plain hooks.

        The hooks come off at the end, whatever happens inside.

        Args:
            interventions: edits of components (causal mode).
            fwd_hooks: names of hook points and what to do there with the activation.
            bwd_hooks: the same with the gradient.

        Raises:
            KeyError: a hook point that the tower does not have; the nearest names are offered.
        """
        wanted = [hook for intervention in interventions for hook in intervention.fwd_hooks(self.visual)]
        wanted += fwd_hooks
        with self.visual.hooks(fwd_hooks=wanted, bwd_hooks=list(bwd_hooks)):
            yield self
