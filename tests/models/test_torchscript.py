"""TorchScript archives: their tensors, and nothing of their code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from decompclip.models.checkpoint import read_checkpoint
from decompclip.models.errors import CheckpointError
from decompclip.models.torchscript import is_of_openai, is_torchscript, read_torchscript

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


class Block(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.ln_1 = nn.LayerNorm(8)
        self.attn_mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        return x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask)[0]


class Miniature(nn.Module):
    """What an archive of OpenAI's is made of: modules in modules, a mask, and numbers among the weights."""

    def __init__(self, *, numbers: bool = True) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Conv1d(3, 3, 1, bias=False), Block(torch.zeros(3, 3)))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.names = ["a", "b"]
        self.sizes = {"a": 1.5, "b": 2.5}
        for name in ("input_resolution", "context_length", "vocab_size") if numbers else ():
            self.register_buffer(name, torch.tensor(224))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x) * self.logit_scale


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., Path]:
    def save(kind: str = "script", **options: Any) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module: Any = Miniature(**options).eval()
        made: Any = (
            torch.jit.script(module) if kind == "script" else torch.jit.trace(module, torch.zeros(3, 3, 8))
        )
        made.half().save(str(tmp_path / f"{kind}.pt"))
        return tmp_path / f"{kind}.pt"

    return save


@pytest.mark.parametrize("kind", ["script", "trace"])
def test_the_tensors_are_those_that_torch_reads(archive: Callable[..., Path], kind: str) -> None:
    path = archive(kind)
    expected = torch.jit.load(str(path), map_location="cpu").state_dict()
    found = read_torchscript(path)
    assert set(found) - set(expected) <= {"visual.1.attn_mask"}  # an attribute, no weight
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)
    assert found["logit_scale"].dtype == torch.float16
    assert is_torchscript(path)
    weights = read_checkpoint(path)
    assert "input_resolution" in found
    assert set(weights) == set(found) - {"input_resolution", "context_length", "vocab_size"}


def test_openai_s_archives_are_told_from_others(archive: Callable[..., Path], tmp_path: Path) -> None:
    assert is_of_openai(archive("script"))
    assert not is_of_openai(archive("trace", numbers=False))
    torch.save({"input_resolution": torch.tensor(1)}, tmp_path / "plain.pt")
    assert not is_torchscript(tmp_path / "plain.pt")
    assert not is_of_openai(tmp_path / "plain.pt")


def rewritten(path: Path, **changed: bytes) -> Path:
    """The archive with some of its entries, named by their last part, put in place of the old; b"" drops one."""
    target = path.with_name("rewritten.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = changed.get(name.split("/")[-1].replace(".", "_"), old.read(name))
            if content:
                new.writestr(name, content)
    return target


def test_the_code_in_an_archive_is_not_even_read(archive: Callable[..., Path]) -> None:
    path = archive("script")
    broken = path.with_name("broken.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(broken, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"def forward(self: this is no code" if "/code/" in name else old.read(name))
    with pytest.raises(RuntimeError):
        torch.jit.load(str(broken))
    found, expected = read_torchscript(broken), read_torchscript(path)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


class Trap:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(
    archive: Callable[..., Path], tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    path = rewritten(archive("script"), data_pkl=pickle.dumps(Trap(marker), protocol=2))
    with pytest.raises(
        CheckpointError, match=r"whose pickle would call '\S*getattr', .* Refused, nothing was run"
    ):
        read_checkpoint(path)
    assert not marker.exists()


def test_a_pickle_of_other_opcodes_is_refused(archive: Callable[..., Path]) -> None:
    path = rewritten(archive("script"), data_pkl=pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(CheckpointError, match="has the opcode FRAME, which torch's writer does not use"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"0": b"1234"}, "data/0 does not hold "),
        ({"data_pkl": b""}, "it has 0 files data.pkl"),
        ({"data_pkl": b"\x80\x02N."}, "it holds no module"),
        ({"data_pkl": b"\x80\x02N"}, "is truncated or damaged"),
        ({"byteorder": b"big"}, "big-endian"),
    ],
)
def test_a_damaged_archive_says_so(
    archive: Callable[..., Path], changed: dict[str, bytes], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=r"is truncated or damaged: .*download it again") as told:
        read_checkpoint(rewritten(archive("script"), **changed))
    assert reason in str(told.value)


@pytest.mark.parametrize(("compressed", "told"), [("/data/", "is compressed"), ("data.pkl", "is compressed")])
def test_compressed_entries_are_refused(archive: Callable[..., Path], compressed: str, told: str) -> None:
    path = archive("script")
    bomb = path.with_name("bomb.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w") as new:
        for name in old.namelist():
            kind = zipfile.ZIP_DEFLATED if compressed in name else zipfile.ZIP_STORED
            new.writestr(name, old.read(name), compress_type=kind)
    with pytest.raises(CheckpointError, match=told):
        read_torchscript(bomb)
    assert is_of_openai(bomb) is False or compressed == "/data/"
    with zipfile.ZipFile(bomb, "a") as more:
        more.writestr("other/data.pkl", b"")
    assert is_of_openai(bomb) is False  # no module has two, however many a file would have read


def test_modules_that_hang_in_many_places_are_read_once(tmp_path: Path) -> None:
    # (shell holding the one below twice) x 40: a walk over all ways would take 2 ** 40 steps
    levels = b"".join(
        b"c__torch__\nM\n)\x81}(X\x01\x00\x00\x00a"
        + bytes([0x68, n - 1])
        + b"X\x01\x00\x00\x00b"
        + bytes([0x68, n - 1])
        + b"ub"
        + bytes([0x71, n])
        for n in range(1, 41)
    )
    pickled = b"\x80\x02c__torch__\nM\n)\x81}bq\x00" + levels + b"h\x28."
    path = tmp_path / "dag.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/constants.pkl", b"")
    assert read_torchscript(path) == {}


@pytest.mark.parametrize("pickled", [b"\x80\x02)}b.", b"\x80\x02)K\x01a.", b"\x80\x02]K\x01K\x02s."])
def test_pickles_that_make_no_sense_are_damaged_archives(tmp_path: Path, pickled: bytes) -> None:
    path = tmp_path / "odd.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_torchscript(path)
