"""Files of weights from strangers: read as tensors, or refused by name; no code in them runs."""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file

from decompclip.models.checkpoint import read_checkpoint, sha256
from decompclip.models.errors import CheckpointError

State = dict[str, torch.Tensor]


@pytest.fixture
def state(source: CLIP) -> State:
    return {key: value.detach().clone() for key, value in source.state_dict().items()}


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def with_prefix(state: State, prefix: str = "module.") -> State:
    return {prefix + key: value for key, value in state.items()}


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


FORMS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "open_clip_train": lambda state: {
        "epoch": 3,
        "name": "run",
        "state_dict": with_prefix(state),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "scaler": {"scale": 65536.0},
    },
    # the three share a training script; its learning rate is a number of numpy's, by a cosine of numpy's
    "CleanCLIP, BadCLIP and RoCLIP": lambda state: {
        "epoch": 10,
        "name": "badclip",
        "state_dict": with_prefix(state),
        "optimizer": {
            "state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 0.5 * (1 + np.cos(np.pi * 0.3)) * 1e-6, "betas": (0.9, 0.999)}],
        },
    },
    "the same on one GPU, loss beside": lambda state: {
        "epoch": np.int64(3),
        "name": "roclip",
        "state_dict": state,
        "loss": np.float32(0.5),
    },
    "arguments beside": lambda state: {"state_dict": state, "args": Namespace(lr=1e-6, model="ViT-B-32")},
    "DeepSpeed": lambda state: {"module": state, "ds_version": "0.15", "lr_scheduler": None},
    "OpenAI's numbers beside": lambda state: {
        **state,
        "input_resolution": torch.tensor(24),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    },
    "a trainer's nests": lambda state: {"model": with_prefix(state, "_orig_mod.module.")},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_are_read(tmp_path: Path, state: State, form: str, legacy: bool) -> None:
    path = tmp_path / "epoch_10.pt"
    torch.save(FORMS[form](state), path, _use_new_zipfile_serialization=not legacy)
    assert same(read_checkpoint(path), state)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_safetensors_are_read_whatever_their_name(tmp_path: Path, state: State, name: str) -> None:
    save_file(with_prefix(state), tmp_path / name)
    assert same(read_checkpoint(str(tmp_path / name)), state)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "bare pickle, protocol 4"])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, state: State, form: str) -> None:
    path, marker = tmp_path / "suspect.pt", tmp_path / "marker"
    content = {"state_dict": state, "args": Trap(marker)}
    if form.startswith("bare pickle"):
        path.write_bytes(pickle.dumps(content["args"], protocol=4 if "4" in form else 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError) as told:
        read_checkpoint(path)
    assert not marker.exists()
    message = str(told.value)
    assert str(path) in message
    # Path.touch is asked for by `getattr`; torch stops at the first opcode of protocol 4, before any name
    what = "takes more than torch.save writes" if "4" in form else "would call 'getattr'"
    assert f"holds more than tensors and plain data: unpickling it {what}" in message
    assert "Refused, nothing was run" in message
    assert "safetensors.torch.save_file" in message
    pickle.loads(pickle.dumps(content["args"]))  # the trap does snap
    assert marker.exists()


def test_objects_of_other_libraries_are_named(tmp_path: Path, state: State) -> None:
    torch.save({"state_dict": state, "best": Fraction(1, 2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"unpickling it would call 'fractions\.Fraction'\. Refused"):
        read_checkpoint(tmp_path / "a.pt")


def test_what_stands_in_for_harmless_objects_runs_none_of_them(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"state_dict": state, "args": Namespace(lr=1.0), "best": np.float64(0.5)}, tmp_path / "a.pt")

    def snap(*args: object, **kwargs: object) -> None:
        raise AssertionError("an object of the file was made")

    monkeypatch.setattr(Namespace, "__init__", snap)
    monkeypatch.setattr(Namespace, "__setattr__", snap)
    assert same(read_checkpoint(tmp_path / "a.pt"), state)
    with pytest.raises(CheckpointError, match="it holds best; expected a state dict"):
        torch.save({"best": np.float64(0.5)}, tmp_path / "b.pt")
        read_checkpoint(tmp_path / "b.pt")


def test_another_archive_is_no_damaged_checkpoint(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", weight=np.zeros(3))
    with pytest.raises(
        CheckpointError, match=r"a\.npz is a zip archive of weight\.npy, not weights of torch's"
    ):
        read_checkpoint(tmp_path / "a.npz")


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.999])
def test_a_truncated_file_says_so(tmp_path: Path, state: State, form: str, keep: float) -> None:
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"bytes\) is truncated or damaged: .*download it again"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: 0 bytes; copy or download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer.*`git lfs pull`",
        ),
        (b"<!DOCTYPE html><html>", "is no file of weights: it starts with b'<!DOCTYPE ht'"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "a.pt")


def test_a_missing_file_says_what_lies_beside(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "epoch_10.pt")
    with pytest.raises(CheckpointError, match=r"it is missing; beside it lie epoch_10.pt; give the path"):
        read_checkpoint(tmp_path / "epoch_1.pt")
    with pytest.raises(CheckpointError, match="it is a folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "held"), [({"epoch": 3, "lr": 0.1}, "it holds epoch, lr"), ([1, 2], "it holds list")]
)
def test_a_file_without_weights_says_what_it_holds(tmp_path: Path, content: Any, held: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=f"no weights in .*: {held}; expected a state dict"):
        read_checkpoint(tmp_path / "a.pt")


def test_sha256_is_the_file_s(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
