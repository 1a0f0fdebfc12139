"""Thousands of broken checkpoints, through every loader: each is loaded, or refused by an error that names it.

    python tests/fuzz_checkpoints.py --count 3000 --seed 0

No crash, no hang, no other exception, no memory beyond a bound. Every case follows from its number alone
(`--only 1234` repeats one); a small part of the same runs as a test, in `tests/models/test_hostile.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from open_clip import factory
from PIL import Image
from safetensors.torch import save_file

import decompclip
from decompclip.models.spec import build_open_clip

NAME = "ViT-fuzz-8"
CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 24, "width": 16, "heads": 2, "layers": 1},
}
SECONDS = 60
"""A case that takes longer hangs; the slowest honest one takes about one."""
MEBIBYTES = 600
"""That a case may take on top of what the process had."""


class Shell(torch.nn.Module):
    """A model's weights under their names, with a line of code that torch can script."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        for name, value in model.named_parameters(recurse=False):
            self.register_parameter(name, torch.nn.Parameter(value.detach(), requires_grad=False))
        for name, child in model.named_children():
            self.add_module(name, Shell(child))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def seeds(folder: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """Whole checkpoints of each kind, and how each is loaded."""
    factory._MODEL_CONFIGS[NAME] = CONFIG
    model = build_open_clip(CONFIG)
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    found: dict[str, tuple[Path, Callable[[Path], Any]]] = {}

    def by_name(path: Path) -> Any:
        return decompclip.load(NAME, checkpoint=path)

    words = {"words": [f"word{i}" for i in range(20)], "class_names": ["word1"], "templates": {"a": ["a {}"]}}
    configuration = {
        "model_cfg": CONFIG,
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"},
        "decompclip": words,
    }
    for name, weights in (
        ("open_clip", "open_clip_model.safetensors"),
        ("open_clip bin", "open_clip_pytorch_model.bin"),
    ):
        (folder / name).mkdir()
        (folder / name / "open_clip_config.json").write_text(json.dumps(configuration))
        if weights.endswith("bin"):
            torch.save(state, folder / name / weights)
        else:
            save_file(state, folder / name / weights)
        found[name] = (folder / name, decompclip.load)
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "a.pt")
    torch.save(state, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    save_file(state, folder / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script: Any = torch.jit.script(Shell(model))
        script.save(str(folder / "script.pt"))
    found |= {name: (folder / name, by_name) for name in ("a.pt", "legacy.bin", "a.safetensors", "script.pt")}
    vision: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": 16, "patch_size": 8}
    text = {**vision, "vocab_size": 24, "max_position_embeddings": 8, "num_hidden_layers": 1}
    text = {key: value for key, value in text.items() if key not in ("image_size", "patch_size")}
    makers = {
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
        ),
        "siglip": lambda: transformers.SiglipModel(
            transformers.SiglipConfig(vision_config=vision, text_config=text)
        ),
        "clip vision": lambda: transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**vision, projection_dim=16)
        ),
        "clip shards": None,
    }
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "resample": 3}
    processor |= {"size": {"height": 16, "width": 16}, "do_center_crop": False, "rescale_factor": 1 / 255}
    for name, maker in makers.items():
        theirs: Any = (maker or makers["clip"])()
        theirs.save_pretrained(folder / name, **({} if maker else {"max_shard_size": "4KB"}))
        (folder / name / "preprocessor_config.json").write_text(json.dumps(processor))
        (folder / name / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
        vocabulary = {f"{c}</w>": i for i, c in enumerate("abcdefghijklmnopqrst")}
        vocabulary |= {"<|startoftext|>": 22, "<|endoftext|>": 23}
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / name / "merges.txt").write_text("#version: 0.2\n")
        found[name] = (folder / name, decompclip.load)
    return found


# Values that configurations are not expected to hold.
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 7, 10**7, 10**9, 2**31, 2**63, 10**30, 10**400, -(10**9)),
    *(0.0, -0.5, 1e-320, 1e30, 1e308, float("nan"), float("inf"), 12.5),
    *(
        "",
        "text",
        "12",
        "\ud800",
        "\x00",
        "../../../etc/passwd",
        "hf-hub:a/b",
        "local-dir:/tmp",
        "a" * 100_000,
        "\u202e\u0301",
    ),
    *("tanh", "quick_gelu", "roberta-base", "vit_base_patch16_224", "resnet50", "map", "token"),
    *(
        [],
        [1],
        [0, 0],
        [16, 16],
        [1, 2, 3],
        [[]],
        [None] * 3,
        [float("nan")] * 3,
        ["a"] * 3,
        [0, 0, 0],
        list(range(1000)),
    ),
    *({}, {"a": 1}, {"eps": 0}, {"eps": "x"}, {"trust_remote_code": True}, {"height": 10**9, "width": 10**9}),
]
ADDED = (
    *("auto_map", "tokenizer_kwargs", "norm_kwargs", "act_kwargs", "hf_model_name", "hf_tokenizer_name"),
    *(
        "timm_model_name",
        "timm_pool",
        "pos_embed_type",
        "pool_type",
        "attentional_pool",
        "attn_pooler_queries",
    ),
    *(
        "multimodal_cfg",
        "custom_text",
        "quick_gelu",
        "mlp_ratio",
        "ls_init_value",
        "patch_dropout",
        "init_logit_bias",
    ),
    *(
        "crop_size",
        "do_pad",
        "vision_config_dict",
        "text_config_dict",
        "layer_norm_eps",
        "hidden_act",
        "weight_map",
    ),
    *("cast_dtype", "trust_remote_code", "transformers_weights", "quantization_config", "steps", "backdoors"),
)


def _places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [here] if here else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        found += _places(each, (*here, key))
    return found


def mutate_value(found: Any, draw: random.Random) -> Any:
    """One field replaced, scaled, removed, added or nested."""
    found = copy.deepcopy(found)
    if not (places := _places(found)):  # emptied before
        return found
    *way, last = draw.choice(places)
    holder = found
    for key in way:
        holder = holder[key]
    match draw.randrange(6):
        case 0 if isinstance(holder, dict):
            del holder[last]
        case 1 if isinstance(holder, dict):
            holder[draw.choice(ADDED)] = draw.choice(NASTY)
        case 2 if isinstance(holder[last], int | float):
            factor = draw.choice([-1, 2, 10, 1000, 10**7, 10**12, 0.5])
            # half of an integer that no float holds is one again
            holder[last] = (
                holder[last] // 2 if factor == 0.5 and abs(holder[last]) > 1e300 else holder[last] * factor
            )
        case 3:
            holder[last] = [holder[last]] * draw.choice([1, 2, 3, 50])
        case _:
            holder[last] = draw.choice(NASTY)
    return found


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    match draw.randrange(12):
        case 0:
            depth = draw.choice([100, 5_000, 300_000])
            return b'{"model_cfg":' * depth + b"1" + b"}" * depth
        case 1:
            return b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
        case 2:
            return mutate_bytes(content, draw)
        case 3:
            return json.dumps(draw.choice(NASTY)).encode()
    found = json.loads(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        found = mutate_value(found, draw)
    return json.dumps(found).encode()


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bits flipped, ranges cut, doubled, zeroed; more often where the structure lies, at the ends."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        size = len(changed)
        if not size:
            break
        near = draw.choice([size, min(size, 200), min(size, 2000)])
        at = draw.randrange(near) if draw.random() < 0.6 else size - 1 - draw.randrange(near)
        span = draw.choice([1, 2, 8, 64, size // 3 + 1])
        match draw.randrange(7):
            case 0:
                del changed[at:]
            case 1:
                del changed[at : at + span]
            case 2:
                changed[at:at] = changed[at : at + span]
            case 3:
                changed[at : at + span] = bytes(len(changed[at : at + span]))
            case 4:
                changed[at : at + span] = b"\xff" * len(changed[at : at + span])
            case 5:
                changed[at : at + 4] = struct.pack(
                    "<I", draw.choice([0, 1, 2**31 - 1, 2**32 - 1, draw.getrandbits(32)])
                )
            case _:
                changed[at] ^= 1 << draw.randrange(8)
    return bytes(changed)


def mutate_safetensors(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.4:
        return mutate_bytes(content, draw)
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    if draw.random() < 0.5:
        tensor = header[draw.choice([key for key in header if key != "__metadata__"])]
        key, values = draw.choice(
            [
                ("shape", [[], [0], [0, 10**12], [2**63], [-1], [1, 1, 1], [10**6, 10**6]]),
                ("dtype", ["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "X", "U8"]),
                ("data_offsets", [[0, 0], [0, len(rest)], [len(rest), 0], [0, 2**63], [-1, 4]]),
            ]
        )
        tensor[key] = draw.choice(values)
    else:
        header = mutate_value(header, draw)
    told = json.dumps(header).encode()
    return struct.pack("<Q", draw.choice([len(told)] * 5 + [0, 2**63, len(told) + 1])) + told + rest


def mutate_zip(path: Path, draw: random.Random) -> None:
    if draw.random() < 0.5:
        path.write_bytes(mutate_bytes(path.read_bytes(), draw))
        return
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = draw.randrange(len(members))
    name, content = members[at]
    pickled = [i for i, (each, _) in enumerate(members) if each.endswith("data.pkl")]
    how = draw.randrange(6)
    if how == 0:
        members.pop(at)
    elif how == 1:
        members.append((name, content))
    elif how == 2:
        members[at] = (name, b"\0" * (64 << 20))  # stored small where it is compressed
    elif how == 3:
        members[at] = (draw.choice(["", "../../evil", "/etc/passwd", f"{name}/", "a/code/b"]), content)
    else:
        at = pickled[0] if pickled else at
        members[at] = (members[at][0], mutate_bytes(members[at][1], draw))
    kind = zipfile.ZIP_DEFLATED if how == 2 or draw.random() < 0.1 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", kind) as archive:
        warnings.simplefilter("ignore")
        for each, stored in members:
            archive.writestr(each or "a", stored)


def mutate(path: Path, draw: random.Random) -> str:
    """Change one file of a checkpoint; returns its name."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    texts = [file for file in files if file.suffix == ".json"]
    file = draw.choice(texts) if texts and draw.random() < 0.65 else draw.choice(files)
    if file.suffix == ".json":
        file.write_bytes(mutate_json(file.read_bytes(), draw))
    elif file.suffix == ".safetensors":
        file.write_bytes(mutate_safetensors(file.read_bytes(), draw))
    elif zipfile.is_zipfile(file):
        mutate_zip(file, draw)
    else:
        file.write_bytes(mutate_bytes(file.read_bytes(), draw))
    return file.name


def outcome(
    case: int, kinds: dict[str, tuple[Path, Callable[[Path], Any]]], work: Path
) -> tuple[str, str, str]:
    """What becomes of a case: its kind, the outcome, and more about what is not to be."""
    draw = random.Random(case)
    kind = draw.choice(sorted(kinds))
    origin, load = kinds[kind]
    path = work / f"case {case}{origin.suffix}"
    if origin.is_dir():
        shutil.copytree(origin, path)
    else:
        shutil.copyfile(origin, path)
    name = mutate(path, draw)
    before = _memory()
    try:
        model = load(path)
        with torch.no_grad():
            height, width = model.image_size
            model.preprocess(Image.new("RGB", (40, 30)))
            model.encode_image(torch.zeros(1, 3, height, width))
        told = "loaded", ""
    except ValueError as error:  # CheckpointError among them
        told = ("refused", "") if path.name in str(error) else ("no path", f"{type(error).__name__}: {error}")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        told = "other error", f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if (taken := _memory() - before) > MEBIBYTES:
        told = "memory", f"{taken:.0f} MiB"
    what, more = told
    return f"{kind}, {name if origin.is_dir() else 'file'}", what, more


def _memory() -> float:
    """The most that this process held at once, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _work(cases: Any, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kinds = seeds(Path(folder))
    for path, load in kinds.values():
        load(path)  # what is whole loads; and imports are done
    work = Path(folder) / "work"
    work.mkdir()
    limit = 16 << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    cases.send("ready")
    while (case := cases.recv()) is not None:
        cases.send(outcome(case, kinds, work))


def run(numbers: list[int], *, told: Callable[[str], None] = lambda line: None) -> Counter[str]:
    """How many cases had each outcome; a worker that dies or hangs is counted, and replaced."""
    counts: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")
    waiting = list(numbers)[::-1]
    while waiting:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, folder), daemon=True)
            worker.start()
            theirs.close()
            ours.recv()
            while waiting:
                case = waiting.pop()
                ours.send(case)
                found = ("", "hang", "")
                try:
                    if ours.poll(SECONDS):
                        found = ours.recv()
                except EOFError:
                    found = ("", "crash", "")
                kind, what, more = found
                counts[what] += 1
                counts[f"{kind}: {what}"] += 1
                if what not in ("loaded", "refused"):
                    told(f"case {case}: {kind}: {what}: {more}")
                if what in ("hang", "crash"):
                    break
            else:
                ours.send(None)
            worker.kill()
            worker.join()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="the first case's number")
    parser.add_argument("--only", type=int, help="one case")
    options = parser.parse_args()
    numbers = (
        [options.only]
        if options.only is not None
        else list(range(options.seed, options.seed + options.count))
    )
    start = time.monotonic()
    counts = run(numbers, told=lambda line: print(line, flush=True))
    for what, count in sorted(counts.items()):
        print(f"{count:6} {what}")
    print(f"{len(numbers)} cases in {time.monotonic() - start:.0f} s")
    return int(any(counts[what] for what in ("hang", "crash", "other error", "no path", "memory")))


if __name__ == "__main__":
    sys.exit(main())
