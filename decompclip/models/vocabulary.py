"""A model's own words as the files of a tokenizer that transformers, and so plain open_clip, reads."""

from __future__ import annotations

import json
from typing import Any

from decompclip.models.tokenizer import WordTokenizer

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
