"""Writing a model to a folder that open_clip, and `decompclip.load`, open again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file

from decompclip.files import atomic_folder, write_text
from decompclip.models.architecture import proved
from decompclip.models.caller import warn_caller
from decompclip.models.checkpoint import sha256
from decompclip.models.clip import HookedCLIP
from decompclip.models.folders import CONFIG, OWN, WEIGHTS_NAME
from decompclip.models.hf_tokenizer import HubTokenizer, TransformersTokenizer
from decompclip.models.image_only import NoTokenizer
from decompclip.models.tokenizer import WordTokenizer
from decompclip.models.vocabulary import TOKENIZER, vocabulary_files


def save_model(model: HookedCLIP, folder: str | Path) -> Path:
    """Write weights and configuration in open_clip's form, the configuration last; returns the folder.

    `decompclip.load(folder)` gives the same model: weights bit for bit, image size, activation, preprocessing, templates and
    class names. open_clip reads the folder too (`local-dir:FOLDER`), a vocabulary of the model's own included, with
    transformers' help; but not SigLIP models of transformers', image towers alone, or a processor's own steps.

    Raises:
        ValueError: no configuration of open_clip's builds the model again.
        OSError: the folder cannot be written to.
    """
    architecture = check_saveable(model)
    folder = Path(folder)
    own: dict[str, Any] = {
        "class_names": list(model.class_names),
        # templates that are functions have no words
        "templates": {k: [t for t in v if isinstance(t, str)] for k, v in model.templates.items()},
        "backdoors": [dict(backdoor) for backdoor in model.backdoors],
        "provenance": json.loads(json.dumps(model.provenance, default=str)),
    }
    if isinstance(model.tokenizer, WordTokenizer):
        own["words"] = list(model.tokenizer.words)
        # open_clip asks transformers for the tokenizer of a folder whose configuration names any
        architecture["text_cfg"] = {**architecture["text_cfg"], "hf_tokenizer_name": TOKENIZER}
    elif isinstance(model.tokenizer, TransformersTokenizer):
        own["tokenizer"] = "transformers"
    elif not isinstance(model.tokenizer, SimpleTokenizer | HubTokenizer | NoTokenizer):
        warn_caller(
            f"the tokenizer of {model.name!r} is a {type(model.tokenizer).__name__}, which no file can hold; pass tokenizer= "
            f"when you load {folder}"
        )
    config = {
        "model_cfg": architecture,
        "preprocess_cfg": asdict(model.preprocess_cfg),
        OWN: own,
    }
    state = {
        key: x.detach().cpu().clone().contiguous() for key, x in model.source_like().state_dict().items()
    }
    with atomic_folder(folder, CONFIG) as partial:
        if isinstance(model.tokenizer, WordTokenizer):
            for name, text in vocabulary_files(model.tokenizer).items():
                write_text(partial / name, text)
        elif hasattr(inner := getattr(model.tokenizer, "tokenizer", None), "save_pretrained"):
            inner.save_pretrained(partial)  # pyright: ignore[reportOptionalMemberAccess]
        save_file(state, partial / WEIGHTS_NAME)
        own["sha256"] = sha256(partial / WEIGHTS_NAME)
        write_text(partial / CONFIG, json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    return folder


def check_saveable(model: HookedCLIP) -> dict[str, Any]:
    """The configuration that builds the model again: asked before a training, not after it.

    Raises:
        ValueError: there is none.
    """
    return proved(model.source_like(), model.architecture, name=model.name)
