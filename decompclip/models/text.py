"""Tokenizers, and what stands for a text tower or tokenizer that is not there."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import open_clip
import torch
from jaxtyping import Int
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor, nn

from decompclip.models.errors import CheckpointError, ModelError, first_line
from decompclip.models.json_files import TEXT, check_fields, may_be_null, read_json, shown
from decompclip.models.tags import asked_once

_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
CLIP_VOCABULARY = 49408


def texts_of(texts: object) -> list[str]:
    """One text, or several, in a list.

    Raises:
        TypeError: what is no string.
    """
    if isinstance(texts, str):
        return [texts]
    found: list[str] = []
    for text in texts if isinstance(texts, Iterable) else [texts]:
        if not isinstance(text, str):
            raise TypeError(f"expected a text as a string, or several in a list; received {text!r}")
        found.append(text)
    return found


class TransformersTokenizer:
    """Texts to token ids of a fixed length, by a tokenizer of transformers."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> Int[Tensor, "text position"]:
        found = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        return torch.as_tensor(found["input_ids"])


class HubTokenizer:
    """open_clip's tokenizer of a model, where that is one of transformers': had when a text is first tokenized.

    Attributes:
        repository: where on the hub it lies; None where it lies in the model's own folder.
    """

    def __init__(self, name: str, repository: str | None, context_length: int) -> None:
        self.name = name
        self.repository = repository
        self.context_length = context_length
        self.tokenizer: Any = None

    def __call__(self, texts: list[str]) -> Int[Tensor, "text position"]:
        """Token ids.

        Raises:
            MissingTextError: the tokenizer is neither in the hub's cache nor to be had, or transformers is missing.
        """
        return self.opened()(texts)

    def opened(self) -> Any:
        """open_clip's.

        Raises:
            MissingTextError: as `__call__`.
        """
        try:
            if self.tokenizer is None:
                with asked_once(self.repository), _panics_as_errors():
                    self.tokenizer = self._open()
            return self.tokenizer
        except Exception as error:
            where = f", {self.repository} on the hub," if self.repository else ""
            raise MissingTextError(
                f"the tokenizer of {self.name!r}{where} could not be had ({first_line(error)}); install transformers, fetch "
                "it where there is a network, set `model.tokenizer` to a function from a list of texts to token ids, or "
                "pass token ids in place of texts"
            ) from error

    def _open(self) -> Any:
        # a tokenizer with code of its own is refused, not run, and nobody is asked about it
        return open_clip.get_tokenizer(self.name, trust_remote_code=False)


class FolderTokenizer(HubTokenizer):
    """The same of a model in a folder, whose files lie there.

    Args:
        options: of open_clip's `HFTokenizer`; nothing that it would hand on to transformers.
    """

    def __init__(self, folder: Path, context_length: int, options: Mapping[str, Any]) -> None:
        super().__init__(str(folder), None, context_length)
        self.options = dict(options)

    def _open(self) -> Any:
        refuse_code(Path(self.name))
        return HFTokenizer(
            self.name,
            context_length=self.context_length,
            **self.options,
            local_files_only=True,
            trust_remote_code=False,
        )


def refuse_code(folder: Path) -> None:
    """Check that the tokenizer in a folder is one of transformers' own classes.

    `trust_remote_code=False` keeps the code in a folder from being run; this says so before transformers is asked at all.

    Raises:
        CheckpointError: it asks for code of its own, or for files from elsewhere.
    """
    for name in ("tokenizer_config.json", "config.json"):
        path = folder / name
        if not os.path.lexists(path):
            continue
        found = read_json(path)
        wanted = found.get("auto_map") or ()
        whole = name == "tokenizer_config.json" or not isinstance(wanted, Mapping | list)
        if wanted and (whole or "AutoTokenizer" in wanted):
            raise CheckpointError(
                f"{path} asks for a tokenizer with code of its own ({shown(wanted)}); refused, nothing was run; "
                "pass tokenizer=, a function from a list of texts to token ids"
            )
        check_fields(found, {"tokenizer_class": may_be_null(TEXT)}, source=str(path))


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """A panic of the tokenizers package, which is no `Exception` of Python's, as a RuntimeError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the package tokenizers gave up: {error}") from error


def tokenizer_of(name: str, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of an architecture of open_clip's, by its model configuration; the network is not asked yet."""
    text = config["text_cfg"]
    if repository := text.get("hf_tokenizer_name"):
        return HubTokenizer(name, repository, text.get("context_length", 77))
    return open_clip.get_tokenizer(name)


def tokenizer_in(folder: Path, *, context_length: int, vocabulary: int) -> Tokenizer:
    """The tokenizer whose files lie in a folder, or else open_clip's own for CLIP, if the vocabulary is CLIP's.

    Raises:
        CheckpointError: there are such files, and transformers cannot read them.
    """
    if not any((folder / name).is_file() for name in _FILES):
        return clip_tokenizer(context_length=context_length, vocabulary=vocabulary, where=str(folder))
    try:
        transformers = import_transformers(f"to read the tokenizer in {folder}")
    except ModelError:
        if vocabulary == CLIP_VOCABULARY:  # the same tokenizer, by open_clip
            return SimpleTokenizer(context_length=context_length)
        raise
    refuse_code(folder)
    try:
        with _panics_as_errors():
            found = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read ({first_line(error)}); pass tokenizer=, or text=False for the image tower alone"
        ) from error
    return TransformersTokenizer(found, context_length)


def clip_tokenizer(*, context_length: int, vocabulary: int, where: str) -> Tokenizer:
    """open_clip's own tokenizer, where the vocabulary is CLIP's; else one that explains."""
    if vocabulary == CLIP_VOCABULARY:
        return SimpleTokenizer(context_length=context_length)
    return NoTokenizer(
        f"{where} brings none, and its vocabulary of {vocabulary} is not CLIP's of {CLIP_VOCABULARY}",
        tower=True,
    )


def import_transformers(why: str) -> Any:
    """The module, or what to do without it.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError(f"Hugging Face transformers is needed {why}: pip install transformers") from error
    return transformers


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

    @classmethod
    def of(cls, model: Any, *, why: str) -> ImageOnly:
        """The image side of an open_clip model; its weights are shared."""
        bias = getattr(model, "logit_bias", None)
        return cls(model.visual, model.logit_scale.detach(), None if bias is None else bias.detach(), why=why)

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
