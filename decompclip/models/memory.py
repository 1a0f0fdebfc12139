"""Models in memory, of open_clip's or of transformers'."""

from __future__ import annotations

from typing import Any

from torch import nn

from decompclip.models.clip import HookedCLIP
from decompclip.models.errors import UnknownModelError
from decompclip.models.hf_tokenizer import clip_tokenizer
from decompclip.models.hugging_face import from_transformers
from decompclip.models.image_only import WITHOUT_TEXT, ImageOnly, NoTokenizer
from decompclip.models.tokenizer import Tokenizer
from decompclip.models.wrappers import bare


def from_memory(model: nn.Module, *, text: bool = True, tokenizer: Tokenizer | None = None) -> HookedCLIP:
    """Hook a model that is in memory, wrapped or not; it is left as it is.

    Args:
        text: with its text tower.
        tokenizer: texts to token ids; by default open_clip's own where the vocabulary is CLIP's.

    Raises:
        UnknownModelError: a model of some other kind.
        UnsupportedTowerError: its image tower is none of those that `HookedViT` runs.
    """
    model = bare(model)
    source: Any = model
    if isinstance(getattr(getattr(source, "config", None), "model_type", None), str):
        return from_transformers(model, tokenizer=tokenizer, text=text)
    if isinstance(model, HookedCLIP) or not hasattr(source, "visual") or not hasattr(source, "encode_text"):
        raise UnknownModelError(
            f"expected a name, a path, or a model of open_clip's or transformers'; received a {type(model).__name__}"
        )
    if not text:
        bias = getattr(source, "logit_bias", None)
        alone = ImageOnly(
            source.visual,
            source.logit_scale.detach(),
            None if bias is None else bias.detach(),
            why=WITHOUT_TEXT,
        )
        return HookedCLIP.from_open_clip(alone, tokenizer=NoTokenizer(WITHOUT_TEXT))
    own = clip_tokenizer(
        context_length=getattr(source, "context_length", None) or 77,
        vocabulary=getattr(source, "vocab_size", None) or 0,
        where="the model in memory",
    )
    return HookedCLIP.from_open_clip(model, tokenizer=tokenizer or own)
