"""A word-level tokenizer for CLIPs with a small vocabulary of their own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

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
