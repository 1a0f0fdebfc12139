"""BDetCLIP (Niu et al., 2024): a triggered image does not care what is said of its class (docs/method.md, section 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.defenses.detectors.detector import LabelDetector
from decompclip.evaluation.evaluate import Encoder

# The source asks a language model for descriptions of each class. Ours are sentences that suit any class.
DESCRIPTIVE = (
    "a photo of a {}, seen whole and in focus",
    "the typical look of a {}",
    "a {} with all of its parts",
    "a close picture of a {}",
    "a {} as everyone knows it",
)
UNRELATED = (
    "the weather was fine on that day",
    "a blank page",
    "numbers in a table",
    "music from the next room",
    "an idea that nobody wrote down",
)


class BDetCLIP(LabelDetector):
    """Minus the difference of an image's similarity to descriptions of its class and to unrelated texts.

    Args:
        model, classifier, batch_size: as `LabelDetector`.
        descriptive: features of each class's descriptions, their mean of unit length; `prompts` makes both.
        unrelated: of the texts that describe no class.
    """

    name: ClassVar[str] = "BDetCLIP"

    def __init__(
        self,
        model: Encoder,
        classifier: Float[Tensor, "class d_embed"],
        descriptive: Float[Tensor, "_ _"],
        unrelated: Float[Tensor, " d_embed"],
        *,
        batch_size: int = 64,
    ) -> None:
        super().__init__(model, classifier, batch_size=batch_size)
        if descriptive.shape != classifier.shape:
            raise ValueError(
                f"expected descriptions {list(classifier.shape)}, one of each class; received {list(descriptive.shape)}"
            )
        self.descriptive = descriptive
        self.unrelated = unrelated

    def _score(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        features = self._features(images)
        label = (features @ self.classifier.to(features).T).argmax(1)
        own = (features * self.descriptive.to(features)[label]).sum(1)
        return features @ self.unrelated.to(features) - own


def prompts(
    encode: Callable[..., Tensor],
    class_names: Sequence[str],
    *,
    descriptive: Sequence[str] = DESCRIPTIVE,
    unrelated: Sequence[str] = UNRELATED,
) -> tuple[Float[Tensor, "class d_embed"], Float[Tensor, " d_embed"]]:
    """What `BDetCLIP` compares with.

    Args:
        encode: from texts to features, as `model.encode_text`.
        class_names: of the classifier, in its order.

    Raises:
        ValueError: no class names.
    """

    def mean(texts: Sequence[str]) -> Tensor:
        features = torch.nn.functional.normalize(encode(list(texts)).float(), dim=1)
        return torch.nn.functional.normalize(features.mean(0), dim=0)

    if not class_names:
        raise ValueError(
            "expected class names to describe; received none; give those that the classifier was built from"
        )
    with torch.no_grad():
        described = [mean([text.replace("{}", name) for text in descriptive]) for name in class_names]
        return torch.stack(described), mean(unrelated)
