"""Tokenizers of Hugging Face transformers, for models that bring theirs along or need one from the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Int
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from decompclip.models.errors import CheckpointError, ModelError
from decompclip.models.json_files import TEXT, check_fields, may_be_null, read_json, shown
from decompclip.models.tags import asked_once
from decompclip.models.text import MissingTextError, NoTokenizer, Tokenizer

_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
CLIP_VOCABULARY = 49408


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
        if self.tokenizer is None:
            self.tokenizer = self._had()
        return self.tokenizer(texts)

    def _had(self) -> Any:
        try:
            with asked_once(self.repository), _panics_as_errors():
                return self._open()
        except Exception as error:
            where = f", {self.repository} on the hub," if self.repository else ""
            raise MissingTextError(
                f"the tokenizer of {self.name!r}{where} could not be had ({_first_line(error)}); install transformers, fetch "
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


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
            f"the tokenizer in {folder} cannot be read ({_first_line(error)}); pass tokenizer=, or text=False for the image tower alone"
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
