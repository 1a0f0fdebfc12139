"""A model's own words as the files of a tokenizer that transformers, and so plain open_clip, reads.

A CLIP of which the image tower alone could be had, or was wanted.

A word-level tokenizer for CLIPs with a small vocabulary of their own.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Int
from open_clip.model import CLIP
from torch import Tensor, nn

from decompclip.models.errors import ModelError
from decompclip.models.siglip_tower import LEAST, siglip_tower

TOKENIZER = "tokenizer.json"
PAD, START, UNKNOWN, END = "<|pad|>", "<|start|>", "<|unknown|>", "<|end|>"


def vocabulary_files(tokenizer: WordTokenizer) -> dict[str, str]:
    """Content by name of file. With them open_clip's `get_tokenizer("local-dir:FOLDER")` gives the same ids, for texts in
    which it has no mojibake or HTML to mend: it does so before any tokenizer is asked."""
    ends = {START: 1, END: tokenizer.end_id}
    special = {PAD: 0, START: 1, UNKNOWN: tokenizer.unknown_id, END: tokenizer.end_id}
    row: list[dict[str, Any]] = [
        {"SpecialToken": {"id": START, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": END, "type_id": 0}},
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in special.items()],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "[a-z0-9]+"},
            "behavior": "Removed",
            "invert": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": row,
            "pair": row,
            "special_tokens": {
                token: {"id": token, "ids": [i], "tokens": [token]} for token, i in ends.items()
            },
        },
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": special | {word: i + 2 for i, word in enumerate(tokenizer.words)},
            "unk_token": UNKNOWN,
        },
    }
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.context_length,
        "padding_side": "right",
        "pad_token": PAD,
        "bos_token": START,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    return {
        TOKENIZER: json.dumps(content, indent=1) + "\n",
        "tokenizer_config.json": json.dumps(about, indent=1) + "\n",
    }


# The smallest text tower that open_clip builds; it is thrown away.
_LEAST_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
_IMAGE_SIDE = (
    "embed_dim",
    "vision_cfg",
    "quick_gelu",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
)


WITHOUT_TEXT = "it was loaded with text=False; load it without that option"


class MissingTextError(ModelError):
    """Text was asked of a model whose text tower or tokenizer is not there; the message says why."""


class ImageOnly(nn.Module):
    """Stands for an open_clip model without its text side; a `HookedCLIP` keeps it, less `visual`, as its `text`.

    Attributes:
        why: why there is no text tower, and what to do.
    """

    context_length = 0
    vocab_size = 0

    def __init__(
        self, visual: nn.Module, logit_scale: Tensor, logit_bias: Tensor | None = None, *, why: str
    ) -> None:
        super().__init__()
        self.visual = visual
        self.logit_scale = nn.Parameter(logit_scale)
        self.logit_bias = None if logit_bias is None else nn.Parameter(logit_bias)
        self.why = why

    def encode_text(self, text: Any = None, normalize: bool = False) -> NoReturn:
        """Explain.

        Raises:
            MissingTextError: always.
        """
        raise MissingTextError(f"this model has no text tower: {self.why}")


class NoTokenizer:
    """Stands for a tokenizer that is not there; `tower`: whether the text tower is, so that token ids would do."""

    def __init__(self, why: str, *, tower: bool = False) -> None:
        self.why = why
        self.tower = tower

    def __call__(self, texts: list[str]) -> NoReturn:
        """Explain.

        Raises:
            MissingTextError: always.
        """
        if not self.tower:
            raise MissingTextError(f"this model has no text tower: {self.why}")
        raise MissingTextError(
            f"this model has no tokenizer: {self.why}; set `model.tokenizer` to a function from a list of texts to "
            "token ids, or pass token ids in place of texts"
        )


def build_image_only(architecture: Mapping[str, Any], *, why: str, seed: int = 0) -> ImageOnly:
    """The image tower of an open_clip architecture with random weights; of the text side nothing is built."""
    options = deepcopy({key: architecture[key] for key in _IMAGE_SIDE if key in architecture})
    vision = options["vision_cfg"]
    vision["timm_model_pretrained"] = False
    siglip = vision.pop("siglip_tower", None)
    if siglip is not None:
        options["vision_cfg"] = dict(LEAST)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = CLIP(**options, text_cfg=_LEAST_TEXT)  # pyright: ignore[reportArgumentType]
        if siglip is not None:
            model.visual = siglip_tower(vision["image_size"], siglip)
    bias = model.logit_bias
    return ImageOnly(
        model.visual, model.logit_scale.detach(), None if bias is None else bias.detach(), why=why
    )


def image_side(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict that an `ImageOnly` takes."""
    return {
        key: value
        for key, value in state.items()
        if key.split(".")[0] in {"visual", "logit_scale", "logit_bias"}
    }


Tokenizer = Callable[[list[str]], Int[Tensor, "text position"]]
"""Texts to token ids."""

_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class WordTokenizer:
    """Maps texts to token ids: padding 0, start 1, the words, unknown word, end.

    The end token is the last of the vocabulary because open_clip's text tower pools at the largest id.

    Args:
        words: the vocabulary, lower case, in the order of its ids.
        context_length: number of tokens of every row, start and end included.
    """

    words: tuple[str, ...]
    context_length: int

    @property
    def vocab_size(self) -> int:
        return len(self.words) + 4

    @property
    def unknown_id(self) -> int:
        return len(self.words) + 2

    @property
    def end_id(self) -> int:
        return len(self.words) + 3

    def __call__(
        self, texts: str | Sequence[str], context_length: int | None = None
    ) -> Int[Tensor, "text position"]:
        """Token ids, one row a text.

        Words outside the vocabulary and words past the context are named in a warning: they change or
        lose meaning.
        """
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        ids = {word: i + 2 for i, word in enumerate(self.words)}
        tokens = torch.zeros(len(texts), length, dtype=torch.long)
        unknown: set[str] = set()
        cut: list[str] = []
        for row, text in enumerate(texts):
            words = _WORD.findall(text.lower())
            unknown.update(w for w in words if w not in ids)
            if len(words) > length - 2:
                cut.append(text)
            body = [ids.get(w, self.unknown_id) for w in words[: length - 2]]
            tokens[row, : len(body) + 2] = torch.tensor([1, *body, self.end_id])
        if unknown:
            warnings.warn(
                f"words unknown to this model's vocabulary of {len(self.words)}: {', '.join(sorted(unknown)[:10])}; "
                "they are all read as one unknown word. `model.tokenizer.words` lists the known ones.",
                stacklevel=2,
            )
        if cut:
            warnings.warn(
                f"{len(cut)} texts are longer than {length - 2} words and were cut, first: {cut[0]!r}",
                stacklevel=2,
            )
        return tokens


def check_tokens(tokens: Tensor, context_length: int, vocabulary: int | None) -> None:
    """Hold token ids to be such as a text tower takes.

    Raises:
        ValueError: they are not integers `[text, context_length]`, or not in the vocabulary.
    """
    if tokens.ndim != 2 or tokens.shape[1] != context_length or tokens.is_floating_point():
        raise ValueError(
            f"expected token ids [text, {context_length}] of an integer type, got {list(tokens.shape)} "
            f"of {tokens.dtype}; make them with this model's `tokenize`"
        )
    # asking a tensor on an accelerator for its largest value would wait for it
    if vocabulary and tokens.numel() and tokens.device.type == "cpu" and tokens.max() >= vocabulary:
        raise ValueError(
            f"expected token ids below {vocabulary}, the size of this model's vocabulary, got "
            f"{int(tokens.max())}; make them with this model's `tokenize`"
        )
