"""HookedCLIP: a hooked image tower beside open_clip's text tower, tokenizer and preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from decompclip.models.config import ViTConfig
from decompclip.models.vit import HookedViT

if TYPE_CHECKING:
    from PIL.Image import Image

    from decompclip.cache.activations import ViTCache
    from decompclip.cache.components import Components
    from decompclip.cache.decomposition import Decomposition
    from decompclip.cache.maps import Convention

Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]


class CausalIntervention(Protocol):
    """What `HookedCLIP.hooks` takes: anything that says which hooks carry it out in a forward pass."""

    def fwd_hooks(self, visual: HookedViT) -> Sequence[Hook]: ...


class HookedCLIP(nn.Module):
    """A CLIP whose image tower is hooked; made by `decompclip.load`.

    Attributes:
        visual: the image tower.
        text: open_clip's model without its image tower, which encodes texts.
        tokenizer: texts to token ids.
        preprocess: a picture (PIL) to the model's input `[3, h, w]`.
        mean, std: of `normalize`.
        templates: zero-shot prompt templates used by default.
        provenance: name, weights with their SHA-256, activation and how it was chosen, versions.
    """

    def __init__(
        self,
        visual: HookedViT,
        text: nn.Module,
        *,
        name: str,
        tokenizer: Callable[..., Int[Tensor, "text position"]],
        preprocess: Callable[[Image], Float[Tensor, "3 h w"]],
        mean: Sequence[float],
        std: Sequence[float],
        templates: Sequence[str | Callable[[str], str]],
        provenance: dict[str, Any],
    ) -> None:
        super().__init__()
        self.visual, self.text = visual, text
        self.name, self.tokenizer, self.preprocess = name, tokenizer, preprocess
        self.mean, self.std, self.templates = tuple(mean), tuple(std), tuple(templates)
        self.provenance = provenance

    @property
    def cfg(self) -> ViTConfig:
        return self.visual.cfg

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input, pixels."""
        return self.cfg.image_size

    @property
    def device(self) -> torch.device:
        return self.visual.proj.device

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.proj.dtype

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """Logarithm of the factor between cosines and logits, as open_clip keeps it."""
        return self.text.logit_scale  # type: ignore[return-value]

    # Towers

    def encode_image(
        self, images: Float[Tensor, "batch 3 h w"], normalize: bool = False
    ) -> Float[Tensor, "batch d_embed"]:
        """Image features; unit vectors with `normalize`.

        Raises:
            ValueError: images of another size.
        """
        features = self.visual(self._moved(images))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(
        self, texts: str | Sequence[str] | Int[Tensor, "text position"], normalize: bool = False
    ) -> Float[Tensor, "text d_embed"]:
        """Text features of texts or of their token ids; unit vectors with `normalize`.

        Raises:
            ValueError: token ids of another length than the text tower's context.
        """
        tokens = texts if isinstance(texts, Tensor) else self.tokenize(texts)
        length = getattr(self.text, "context_length", None)
        if tokens.ndim != 2 or (length is not None and tokens.shape[1] != length):
            raise ValueError(
                f"expected token ids [text, {length}]; received {list(tokens.shape)}; make them with this model's "
                "`tokenize`"
            )
        return self.text.encode_text(tokens.to(self.device), normalize=normalize)  # type: ignore[operator]

    def tokenize(self, texts: str | Sequence[str]) -> Int[Tensor, "text position"]:
        """Token ids, one row a text."""
        return self.tokenizer([texts] if isinstance(texts, str) else list(texts))

    def normalize(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """Pixels in [0, 1] to the model's input."""
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    def denormalize(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """The model's input to pixels in [0, 1], for looking at."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

    def zero_shot_classifier(
        self, class_names: Sequence[str], templates: Sequence[str | Callable[[str], str]] | None = None
    ) -> Float[Tensor, "class d_embed"]:
        """One unit vector a class: the mean over templates of unit text features, normalised (METHOD 1).

        Args:
            templates: prompts with a slot `{}`; by default the model's own: OpenAI's 80 for ImageNet, or those
                that a bundled model was trained for.

        Raises:
            ValueError: no class, no template, or a class that stands twice.
        """
        from decompclip.evaluation.zero_shot import zero_shot_classifier

        chosen = self.templates if templates is None else templates
        return zero_shot_classifier(self.encode_text, self.tokenize, class_names, chosen)

    # Taking apart

    def decompose(
        self,
        images: Float[Tensor, "batch 3 h w"],
        *,
        convention: Convention = "centred",
        normalize: bool = False,
        tokens: Components | bool | None = None,
    ) -> Decomposition:
        """Exact terms of the image features (see `decompclip.cache.capture.decompose`)."""
        from decompclip.cache.capture import decompose

        return decompose(
            self.visual, self._moved(images), convention=convention, normalize=normalize, tokens=tokens
        )

    def run_with_cache(
        self, images: Float[Tensor, "batch 3 h w"], **options: Any
    ) -> tuple[Float[Tensor, "batch d_embed"], ViTCache]:
        """Image features and a typed cache of activations; options as in TransformerLens."""
        return self.visual.run_with_cache(self._moved(images), **options)

    @contextmanager
    def hooks(
        self,
        *interventions: CausalIntervention,
        fwd_hooks: Sequence[Hook] = (),
        bwd_hooks: Sequence[Hook] = (),
    ) -> Iterator[HookedCLIP]:
        """Carry interventions out in every forward pass inside the `with` block, the first one first.

        Args:
            fwd_hooks, bwd_hooks: pairs of hook name and function, as in TransformerLens.
        """
        forward = [hook for intervention in interventions for hook in intervention.fwd_hooks(self.visual)]
        with self.visual.hooks(fwd_hooks=[*forward, *fwd_hooks], bwd_hooks=list(bwd_hooks)):
            yield self

    def _moved(self, images: Tensor) -> Tensor:
        return images.to(self.device, self.dtype) if isinstance(images, Tensor) else images
