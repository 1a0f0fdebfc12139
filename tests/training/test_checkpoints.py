"""Checkpoints are whole or not there, whatever interrupts their writing."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from decompclip.training.loop import Recipe, load_checkpoint, save_checkpoint, train

STATE = {"recipe": "r", "modules": {}, "optimizers": [], "step": 3, "history": [{"loss": 0.5}]}


def training(path: Path | None) -> Tensor:
    """Twenty steps with a checkpoint each five; the weights at the end."""
    model = nn.Linear(64, 64, bias=False)
    nn.init.eye_(model.weight)

    def loss(step: int) -> Tensor:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.roll(1, 1)).square().mean()

    recipe = Recipe(samples=160, batch_size=8, lr=0.01)
    train({"m": model}, loss, recipe, checkpoint=path, checkpoint_every=5, log=lambda _: None)
    return model.weight.detach()


def die_while_writing(path: Path) -> None:
    """Run `training` in this process, a forked one, which is killed when half of the second checkpoint is on the disk."""
    whole, count = torch.save, 0

    def save(state: object, file: io.BufferedWriter) -> None:
        nonlocal count
        count += 1
        if count == 1:
            whole(state, file)
            return
        buffer = io.BytesIO()
        whole(state, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save
    training(path)


def test_a_kill_while_writing_leaves_the_last_checkpoint_and_the_run_resumes_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    path, child = tmp_path / "run.pt", os.fork()
    if not child:
        try:
            die_while_writing(path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (half,) = tmp_path.glob(".*.partial")
    assert half.stat().st_size > 0  # half a file, under the other name
    assert load_checkpoint(path)["step"] == 5
    assert torch.equal(training(path), training(None))
    assert load_checkpoint(path)["step"] == 20
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, STATE)
    before = path.read_bytes()
    with pytest.raises(OSError, match=f"expected to write {path}; .*what was there is as it was; make room"):
        save_checkpoint(path, {**STATE, "step": 4, "ballast": torch.zeros(100_000)})
    assert path.read_bytes() == before
    assert load_checkpoint(path)["step"] == 3
    assert list(tmp_path.iterdir()) == [path]
    save_checkpoint(path, {**STATE, "step": 4})  # with room again
    assert load_checkpoint(path)["step"] == 4


def test_a_full_disk_before_the_first_checkpoint(tmp_path: Path, small_files: None) -> None:
    with pytest.raises(OSError, match="nothing is there yet; make room"):
        save_checkpoint(tmp_path / "run.pt", {**STATE, "ballast": torch.zeros(100_000)})
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a" / "b" / "run.pt", STATE)
    assert load_checkpoint(tmp_path / "a" / "b" / "run.pt") == STATE


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, {**STATE, "ballast": torch.zeros(1_000)})
    path.write_bytes(path.read_bytes()[:2_000])
    with pytest.raises(
        ValueError, match=r"received a file that cannot be read \(.*\); delete it to start anew"
    ):
        load_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(path)
    save_checkpoint(path, {**STATE, "ballast": torch.zeros(1_000)})
    content = bytearray(path.read_bytes())
    content[content.index(bytes(4_000)) + 1_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not as it was written"):
        load_checkpoint(path)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="received another file of torch's; give another name"):
        load_checkpoint(path)
