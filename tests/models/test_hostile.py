"""Folders and files from strangers: their code never runs, nobody is asked, and what is odd is refused by name."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from decompclip import load
from decompclip.cli import app
from decompclip.models.checkpoint import read_checkpoint, sha256
from decompclip.models.errors import CheckpointError, ModelError
from decompclip.models.folders import save_model
from decompclip.models.json_files import check_architecture
from decompclip.models.torchscript import check_archive

State = dict[str, torch.Tensor]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 24, "max_position_embeddings": 8, "bos_token_id": 22, "eos_token_id": 23}


@pytest.fixture
def state(source: CLIP) -> State:
    return {key: value.detach().clone() for key, value in source.state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path, config: dict[str, Any], state: State) -> Path:
    """A model of open_clip's in a folder."""
    save_file(state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return tmp_path


@pytest.fixture
def theirs(tmp_path: Path) -> Callable[[str], Path]:
    """`theirs("clip")`: a model of transformers' in a folder."""

    def save(kind: str) -> Path:
        vision: dict[str, Any] = dict(VISION)
        text: dict[str, Any] = dict(TEXT)
        makers = {
            "clip": lambda: transformers.CLIPModel(
                transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
            ),
            "siglip": lambda: transformers.SiglipModel(
                transformers.SiglipConfig(vision_config=vision, text_config=text)
            ),
            "vision": lambda: transformers.CLIPVisionModelWithProjection(
                transformers.CLIPVisionConfig(**vision, projection_dim=16)
            ),
        }
        makers[kind]().save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


def changed(path: Path, *way: str, to: Any) -> None:
    """Set one field of a JSON."""
    found = holder = json.loads(path.read_text())
    for key in way[:-1]:
        holder = holder.setdefault(key, {})
    holder[way[-1]] = to
    path.write_text(json.dumps(found))


# code


def armed(folder: Path, marker: Path) -> Path:
    """The folder, now with code for a tokenizer, a model, a configuration and a processor that leaves a mark."""
    trap = f"open({str(marker)!r}, 'a').write('x')\nfrom transformers import *\n"
    classes = (
        "PreTrainedTokenizer",
        "PretrainedConfig",
        "PreTrainedModel",
        "BaseImageProcessor",
        "ProcessorMixin",
    )
    trap += "".join(f"class T{i}({base}):\n    model_type = 'trap'\n" for i, base in enumerate(classes))
    (folder / "trap.py").write_text(trap)
    for name in ("setup.py", "__init__.py", "modeling_trap.py"):
        (folder / name).write_text(trap)
    autos = {
        "AutoTokenizer": ["trap.T0", None],
        "AutoConfig": "trap.T1",
        "AutoModel": "trap.T2",
        "AutoImageProcessor": "trap.T3",
        "AutoProcessor": "trap.T4",
    }
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "config.json"):
        path = folder / name
        found = json.loads(path.read_text()) if path.is_file() else {}
        found |= {"auto_map": autos, "trust_remote_code": True}
        if name == "tokenizer_config.json":
            found["tokenizer_class"] = "T0"
        path.write_text(json.dumps(found))
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


TEXT_SIDES: dict[str, dict[str, Any]] = {
    "tokenizer": {"hf_tokenizer_name": "x"},
    "tokenizer with the flag": {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}},
    "tokenizer of a path": {"hf_tokenizer_name": "HERE", "tokenizer_kwargs": {"cache_dir": "HERE"}},
    "text tower of a path": {"hf_model_name": "HERE", "hf_tokenizer_name": "HERE"},
    "text tower of the hub": {"hf_model_name": "someone/else", "hf_tokenizer_name": "someone/else"},
}
TOWERS = (
    "hf-hub:someone/else",
    "local-dir:HERE",
    "HERE",
    "hf_hub:someone/else",
    "local-dir:HERE/vit_base_patch16_224",
)


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the standard input is told "yes"."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def used(path: Path, **options: Any) -> str:
    """Load and put to use; what went wrong, if it did."""
    try:
        model = load(path, **options) if not options.get("name") else load(options["name"], checkpoint=path)
        model.zero_shot_classifier(["a", "b"])
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("side", TEXT_SIDES)
@pytest.mark.parametrize("text", ["auto", True])
def test_an_open_clip_folder_runs_no_code(folder: Path, tmp_path: Path, side: str, text: Any) -> None:
    extra = json.loads(json.dumps(TEXT_SIDES[side]).replace("HERE", str(folder)))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= extra
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    armed(folder, marker := tmp_path / "the code ran")
    assert str(folder) in used(folder, text=text)
    used(folder, name="ViT-mini-8")
    assert not marker.exists()


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_of_timm_s_is_one_by_its_name(folder: Path, tmp_path: Path, name: str) -> None:
    armed(folder, marker := tmp_path / "the code ran")
    changed(
        folder / "open_clip_config.json",
        "model_cfg",
        "vision_cfg",
        "timm_model_name",
        to=name.replace("HERE", str(folder)),
    )
    with pytest.raises(
        CheckpointError, match=r"open_clip_config.json, vision_cfg: expected a model of timm's"
    ):
        load(folder)
    assert not marker.exists()


@pytest.mark.usefixtures("unasked")
@pytest.mark.filterwarnings("ignore:.*loaded without a tokenizer")
@pytest.mark.parametrize("kind", ["clip", "siglip", "vision"])
@pytest.mark.parametrize("text", ["auto", True])
def test_a_folder_of_transformers_runs_no_code(
    theirs: Callable[[str], Path], tmp_path: Path, kind: str, text: Any
) -> None:
    path = armed(theirs(kind), marker := tmp_path / "the code ran")
    used(path, text=text)
    used(path, name="ViT-mini-8")
    assert not marker.exists()


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("name", ["a.pt", "pytorch_model.bin", "a.safetensors", "script.pt"])
def test_a_file_beside_code_runs_none(folder: Path, tmp_path: Path, state: State, name: str) -> None:
    armed(folder, marker := tmp_path / "the code ran")
    if name == "a.safetensors":
        save_file(state, folder / name)
    elif name == "script.pt":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(folder / name))
    else:
        torch.save(state, folder / name, _use_new_zipfile_serialization=name == "a.pt")
    used(folder / name)
    used(folder / name, name="ViT-mini-8")
    assert not marker.exists()


@pytest.mark.usefixtures("unasked")
def test_a_text_tower_of_the_hub_asks_nobody(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip builds it without a word about code; what the hub has under a known name may change."""
    armed(folder, marker := tmp_path / "the code ran")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "trap", "auto_map": {"AutoConfig": "trap.T1"}})
    )
    monkeypatch.chdir(folder.parent)
    entry = open_clip.get_model_config("roberta-ViT-B-32")
    assert entry is not None
    entry["text_cfg"]["hf_model_name"] = str(folder)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "roberta-ViT-B-32", entry)
    with pytest.warns(UserWarning, match="the image tower is loaded alone"):
        load("roberta-ViT-B-32", pretrained="random")
    assert not marker.exists()


@pytest.mark.parametrize(("answer", "flag"), [(None, True), ("y\n" * 5, False)])
def test_the_command_line_runs_no_code(folder: Path, tmp_path: Path, answer: str | None, flag: bool) -> None:
    armed(folder, marker := tmp_path / "the code ran")
    side = TEXT_SIDES["tokenizer with the flag" if flag else "tokenizer"]
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= side
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    pictures = tmp_path / "pictures" / "a"
    pictures.mkdir(parents=True)
    from PIL import Image

    Image.new("RGB", (24, 16)).save(pictures / "1.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    words = ["evaluate", str(folder), str(pictures.parent), "--classes", str(tmp_path / "classes.txt")]
    found = CliRunner().invoke(app, words, input=answer, env={"COLUMNS": "200"})
    assert found.exit_code == 2
    assert "Do you wish to run" not in found.output
    assert str(folder) in found.stderr.replace("\n", "")
    assert not marker.exists()


def test_open_clip_s_own_configurations_are_known() -> None:
    for name in open_clip.list_models():
        config: Any = open_clip.get_model_config(name)
        check_architecture(config, source=name)


# what is read


def test_the_files_read_are_those_that_transformers_reads(theirs: Callable[[str], Path]) -> None:
    path = theirs("clip")
    whole = load_file(path / "model.safetensors")
    other = {key: torch.zeros_like(value) for key, value in whole.items()}
    save_file(other, path / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(whole, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(other, path / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="there lie other weights too, which are not looked at"):
        model = load(path)
    deployed: Any = transformers.CLIPModel.from_pretrained(path)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = deployed.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(model.encode_image(pixels), expected, rtol=1e-4, atol=1e-5)
    assert model.provenance["files"]["model.safetensors"] == sha256(path / "model.safetensors")
    assert model.provenance["files"]["config.json"] == sha256(path / "config.json")
    assert model.provenance["files_not_read"] == ["model-00001-of-00001.safetensors", "pytorch_model.bin"]


def test_what_finetune_goes_on_from_is_no_other_model(folder: Path, state: State) -> None:
    torch.save({"model": state}, folder / "checkpoint.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(folder)
    assert model.provenance["files_not_read"] == ["checkpoint.pt"]


def test_the_file_read_is_the_one_that_open_clip_reads(folder: Path, state: State) -> None:
    torch.save({key: torch.zeros_like(x) for key, x in state.items()}, folder / "open_clip_pytorch_model.bin")
    with pytest.warns(UserWarning, match="not looked at: open_clip_pytorch_model.bin"):
        model = load(folder)
    assert model.provenance["files_not_read"] == ["open_clip_pytorch_model.bin"]
    assert set(model.provenance["files"]) == {"open_clip_model.safetensors", "open_clip_config.json"}
    assert model.visual.get_parameter("W_E").abs().sum() > 0


@pytest.mark.parametrize("key", ["transformers_weights", "quantization_config"])
def test_what_makes_transformers_run_other_weights_is_refused(
    theirs: Callable[[str], Path], key: str
) -> None:
    path = theirs("clip")
    changed(path / "config.json", key, to="other.safetensors")
    with pytest.raises(CheckpointError, match=f"has {key} .*transformers would run other weights"):
        load(path)


def test_an_adapter_over_the_weights_is_refused(theirs: Callable[[str], Path]) -> None:
    path = theirs("clip")
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="lays an adapter over the weights"):
        load(path)


def test_a_weight_in_two_shards_is_refused(theirs: Callable[[str], Path]) -> None:
    path = theirs("clip")
    whole = load_file(path / "model.safetensors")
    for name in ("a.safetensors", "b.safetensors"):
        save_file(whole, path / name)
    (path / "model.safetensors").unlink()
    index = {"weight_map": {key: f"{'ab'[i % 2]}.safetensors" for i, key in enumerate(whole)}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=rf"b.safetensors holds {len(whole)} weights that are in another shard"
    ):
        load(path)


# damage


def test_one_flipped_bit_in_an_archive_is_seen(tmp_path: Path, state: State) -> None:
    path = tmp_path / "a.pt"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    at = content.index(state["visual.proj"].numpy().tobytes())
    for offset in (0, 1, 1001):
        broken = bytearray(content)
        broken[at + offset] ^= 1
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match="is not as it was written"):
            read_checkpoint(path)


def test_an_archive_of_several_disks_is_told(tmp_path: Path, state: State) -> None:
    """zipfile raises for it where it is only asked whether a file is an archive."""
    path = tmp_path / "a.pt"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    locator = b"PK\x06\x07" + (7).to_bytes(4, "little") + bytes(8) + (9).to_bytes(4, "little")
    at = content.rfind(b"PK\x06\x07")
    content[at : at + 20] = locator if at >= 0 else b""
    if at < 0:
        content[end:end] = locator
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a.pt"):
        read_checkpoint(path)


def test_an_archive_without_checksums_is_read(tmp_path: Path, state: State) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_checkpoint(tmp_path / "a.pt").keys() == state.keys()


def rewritten(path: Path, how: str) -> None:
    """The same archive: compressed, with a member twice, or with a directory that says more than there is."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    kind = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(
                name, bytes(10**8) if how == "compressed" and name.endswith("data/0") else content
            )
        if how == "twice":
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr(*next(iter(members.items())))


@pytest.mark.parametrize(("how", "message"), [("compressed", "is compressed"), ("twice", "is there twice")])
def test_archives_that_torch_does_not_write_are_refused(
    tmp_path: Path, state: State, how: str, message: str
) -> None:
    path = tmp_path / "a.pt"
    torch.save(state, path)
    rewritten(path, how)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)
    with pytest.raises(ValueError, match=message):
        check_archive(path)


def test_small_files_of_large_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="they repeat the same numbers"):
        read_checkpoint(tmp_path / "a.pt")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="no plain tensors"):
        read_checkpoint(tmp_path / "b.pt")


def test_what_overflows_in_fp32_is_refused(tmp_path: Path, state: State) -> None:
    state["visual.proj"] = state["visual.proj"].double()
    state["visual.proj"][0, 0] = 1e200
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"expected finite weights .*visual.proj"):
        load("ViT-mini-8", checkpoint=tmp_path / "a.safetensors")


def test_a_saved_model_is_held_to_its_digest(folder: Path, tmp_path: Path) -> None:
    saved = save_model(load(folder), tmp_path / "saved")
    assert load(saved).provenance["files"]["open_clip_model.safetensors"] == sha256(
        saved / "open_clip_model.safetensors"
    )
    content = bytearray((saved / "open_clip_model.safetensors").read_bytes())
    content[-3] ^= 1
    (saved / "open_clip_model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="as it was saved, with SHA-256"):
        load(saved)


# configurations


NAN = float("nan")
FIELDS: list[tuple[tuple[str, ...], Any]] = [
    *(
        (("model_cfg", "vision_cfg", "layers"), x)
        for x in (10**7, 10**9, 0, -1, "12", 2.0, None, True, [], {})
    ),
    *((("model_cfg", "vision_cfg", "width"), x) for x in (10**7, 2**31 - 1, 2**70, 0, "a")),
    *((("model_cfg", "vision_cfg", "image_size"), x) for x in (10**9, 16384, [1, 2, 3], 0, "24", [16, NAN])),
    *((("model_cfg", "text_cfg", "layers"), x) for x in (10**7, "a")),
    *((("model_cfg", "text_cfg", "vocab_size"), x) for x in (2**31 - 1, -5)),
    *((("model_cfg", "text_cfg", "context_length"), x) for x in (10**8, 10**6, [])),
    *((("model_cfg", "vision_cfg", "mlp_ratio"), x) for x in (0, NAN, 1e9, "4")),
    *((("model_cfg", "vision_cfg", "norm_kwargs"), {"eps": x}) for x in (0, -1, NAN, "1e-5", None, [1e-5])),
    (("model_cfg", "vision_cfg", "norm_kwargs"), {"device": "meta"}),
    (("model_cfg", "vision_cfg", "act_kwargs"), {"approximate": "x"}),
    (("model_cfg", "vision_cfg", "unknown"), 1),
    (("model_cfg", "vision_cfg"), []),
    (("model_cfg", "text_cfg"), None),
    (("model_cfg", "embed_dim"), "20"),
    (("model_cfg", "cast_dtype"), "float16"),
    (("model_cfg",), [1]),
    *((("preprocess_cfg", "mean"), x) for x in ([0.5], [0.5] * 4, [NAN] * 3, ["a"] * 3, "abc", 0.5, {})),
    *((("preprocess_cfg", "std"), x) for x in ([0.0] * 3, [0.5], [-1.0] * 3, [1e-300] * 3, [NAN] * 3, "x")),
    (("preprocess_cfg", "interpolation"), 3),
    (("preprocess_cfg", "resize_mode"), ["squash"]),
    (("preprocess_cfg",), "none"),
    (("decompclip", "words"), "a b"),
    (("decompclip", "class_names"), [1, 2]),
    (("decompclip", "templates"), {"a": "b"}),
    (("decompclip",), 7),
]


@pytest.mark.parametrize(("way", "value"), FIELDS)
def test_odd_fields_of_open_clip_s_configuration_are_told(
    folder: Path, way: tuple[str, ...], value: Any
) -> None:
    changed(folder / "open_clip_config.json", *way, to=value)
    with pytest.raises(CheckpointError, match=r"open_clip_config.json"):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [
        '{"model_cfg":' * 100_000,
        '{"model_cfg": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a": "\\ud800"}',
        '{"a": ' + "9" * 5000 + "}",
        "[]",
        "null",
        "\ufeff{}",
        "",
    ],
    ids=["cut", "deep", "surrogate", "digits", "list", "null", "mark", "empty"],
)
@pytest.mark.parametrize("name", ["open_clip_config.json", "config.json"])
def test_what_is_no_json_of_a_model_is_told(
    folder: Path, theirs: Callable[[str], Path], name: str, content: str
) -> None:
    path = folder / name if name == "open_clip_config.json" else theirs("clip") / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=name):
        load(path.parent)


@pytest.mark.parametrize(
    ("way", "value"),
    [
        *((("vision_config", "num_hidden_layers"), x) for x in (10**7, "2", None, 0)),
        *((("vision_config", "hidden_size"), x) for x in (2**31 - 1, 10**6, [16], 2**80)),
        *((("vision_config", "layer_norm_eps"), x) for x in (0, NAN, "x", None)),
        (("vision_config", "image_size"), 10**9),
        (("vision_config", "hidden_act"), ["gelu"]),
        (("vision_config",), "a"),
        (("text_config", "vocab_size"), 2**31 - 1),
        (("text_config", "max_position_embeddings"), 10**8),
        (("projection_dim",), "16"),
        (("model_type",), 5),
    ],
)
def test_odd_fields_of_config_json_are_told(
    theirs: Callable[[str], Path], way: tuple[str, ...], value: Any
) -> None:
    path = theirs("clip")
    changed(path / "config.json", *way, to=value)
    with pytest.raises(CheckpointError, match=r"config.json"):
        load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("image_mean", x) for x in ([0.5], [NAN] * 3, ["a"] * 3, "abc")),
        *(("image_std", x) for x in ([0.0] * 3, 0, [0.5] * 4, [-1.0] * 3)),
        *(("size", x) for x in ("16", {"height": "a", "width": 16}, {"shortest_edge": 10**9}, [16, 16])),
        ("resample", "bicubic"),
        ("rescale_factor", 1e-300),
        ("do_resize", "yes"),
    ],
)
def test_odd_fields_of_a_processor_are_told(theirs: Callable[[str], Path], key: str, value: Any) -> None:
    path = theirs("clip")
    (path / "preprocessor_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match="preprocessor_config.json"):
        load(path)


def test_a_model_s_memory_is_not_taken_before_its_weights_are_known_to_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration of twice the width, well below any bound: nothing of it is built but its shapes."""
    changed(folder / "open_clip_config.json", "model_cfg", "vision_cfg", "width", to=64)
    monkeypatch.setattr("decompclip.models.loading._built", lambda *_: pytest.fail("it was built"))
    with pytest.raises(CheckpointError, match="of another shape"):
        load(folder)


@pytest.mark.filterwarnings("ignore")
def test_some_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small part of `tests/fuzz_checkpoints.py`, in this process."""
    where = importlib.util.spec_from_file_location("fuzz", Path(__file__).parents[1] / "fuzz_checkpoints.py")
    assert where is not None
    assert where.loader is not None
    fuzz = importlib.util.module_from_spec(where)
    where.loader.exec_module(fuzz)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, fuzz.NAME, fuzz.CONFIG)
    kinds = fuzz.seeds(tmp_path)
    (tmp_path / "work").mkdir()
    found = [fuzz.outcome(case, kinds, tmp_path / "work") for case in range(60)]
    assert [each for each in found if each[1] not in ("loaded", "refused")] == []
    assert {each[1] for each in found} == {"loaded", "refused"}
