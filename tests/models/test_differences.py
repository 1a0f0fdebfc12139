"""Weights as a difference from others: what is restored is what was measured, and nothing strange is unpacked."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import load, save

from decompclip.models import bundled as models_zoo
from decompclip.models.bundled import (
    WHOLE,
    as_stored,
    bundled,
    card,
    digest,
    load_bundled,
    nothing,
    read_bundled,
    read_difference,
    spec_of,
    write_bundled,
    write_difference,
)
from decompclip.models.errors import CheckpointError

State = dict[str, torch.Tensor]


@pytest.fixture
def base() -> State:
    g = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(6, 40, generator=g),
        "conv": torch.randn(5, 3, 4, 4, generator=g),
        "b": torch.randn(40, generator=g),
        "scale": torch.tensor(2.5),
    }


@pytest.fixture
def state(base: State) -> State:
    g = torch.Generator().manual_seed(1)
    moved = {key: x + 0.01 * torch.randn(x.shape, generator=g) for key, x in base.items()}
    moved["w"][2] = base["w"][2]  # a row that did not move
    return moved


def test_what_is_read_is_what_was_measured(tmp_path: Path, base: State, state: State) -> None:
    stored = as_stored(state, base)
    told = write_difference(state, base, tmp_path / "x")
    read = read_difference(tmp_path / "x", base)
    assert told == digest(stored) == digest(read)
    assert all(torch.equal(read[key], stored[key]) for key in base)
    assert torch.equal(read["w"][2], base["w"][2])


def test_storing_again_changes_nothing(base: State, state: State) -> None:
    once = as_stored(state, base)
    again = as_stored(once, base)
    for key in base:
        assert torch.allclose(
            once[key], again[key], atol=1e-3 * 0.01 + 0.3 * (once[key] - state[key]).abs().max().item()
        )


def test_the_rounding_is_a_small_part_of_each_row_s_difference(base: State, state: State) -> None:
    stored = as_stored(state, base)
    for key in ("w", "conv"):
        change = (state[key] - base[key]).flatten(1)
        miss = (stored[key] - state[key]).flatten(1)
        step = torch.maximum(change.square().mean(1).sqrt() / 4, change.abs().amax(1) / 127)
        assert (miss.abs() <= step[:, None] / 2 + 1e-6).all()
    assert stored["scale"] == pytest.approx(state["scale"].item(), abs=1e-6)


def test_weights_stored_whole_keep_eight_bits(base: State) -> None:
    stored = as_stored(base, nothing(base), steps=WHOLE)
    for key, x in base.items():
        rows, found = (t.reshape(len(t), -1) if t.ndim > 1 else t.reshape(1, -1) for t in (x, stored[key]))
        assert ((rows - found).abs().amax(1) <= rows.abs().amax(1) / 254 * 1.001).all()


def test_coarser_steps_take_less_space(tmp_path: Path, base: State, state: State) -> None:
    sizes = []
    for steps in (4.0, 1.0):
        write_difference(state, base, tmp_path / "x", steps=steps)
        sizes.append((tmp_path / "x").stat().st_size)
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("shape", [(6, 40), (5, 3, 3)])
def test_coarse_numbers_lie_two_in_a_byte_and_far_ones_apart(tmp_path: Path, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(2)
    base = {"w": torch.randn(*shape, generator=g), "s": torch.tensor(2.5), "a": torch.zeros(3_001)}
    state = {
        "w": base["w"] + 0.01 * torch.randn(*shape, generator=g),
        "s": torch.tensor(2.6),
        "a": torch.randn(3_001, generator=g),
    }
    state["a"][-1] = 30.0
    path = tmp_path / "x"
    told = write_difference(state, base, path, steps=1.0)
    inside = load(zlib.decompress(path.read_bytes()))
    assert len(inside["pairs"]) == (3_002 + math.prod(shape) + 1) // 2
    assert inside["far/place"].tolist() == [3_000] and inside["far/number"].item() > 7
    read, stored = read_difference(path, base), as_stored(state, base, steps=1.0)
    assert all(torch.equal(read[key], stored[key]) for key in base) and told == digest(read)
    for damage in (
        {"pairs": inside["pairs"][:-1]},
        {"far/place": inside["far/place"] + 10_000},
        {"far/place": inside["far/place"] - 10_000},
        {"far/number": inside["far/number"].float()},
        {"far/number": inside["far/number"][:0]},
        {"pairs": inside["pairs"][None]},
        {"more": torch.zeros(2)},
    ):
        path.write_bytes(zlib.compress(save(inside | damage)))
        with pytest.raises(CheckpointError, match=r"no difference from these weights: "):
            read_difference(path, base)


def test_a_number_far_from_its_row_is_not_cut_off() -> None:
    wide = {"w": torch.zeros(1, 40_000)}
    far = {"w": torch.zeros(1, 40_000)}
    far["w"][0, 7] = 100.0  # 800 steps of a row's deviation
    assert as_stored(far, wide)["w"][0, 7] == pytest.approx(100.0, rel=1e-5)


def test_other_weights_are_refused(tmp_path: Path, base: State, state: State) -> None:
    with pytest.raises(ValueError, match=r"1 are in one alone, first more"):
        as_stored(state | {"more": torch.zeros(2)}, base)
    with pytest.raises(ValueError, match=r"weights of one shape; 1 differ, first b"):
        as_stored(state | {"b": torch.zeros(2)}, base)
    with pytest.raises(ValueError, match=r"expected finite weights; received others in b"):
        as_stored(state | {"b": state["b"] * torch.nan}, base)
    write_difference(state, base, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"no difference from these weights: .*1 are in one alone"):
        read_difference(tmp_path / "x", base | {"more": torch.zeros(2)})


@pytest.mark.parametrize("damage", ["cut", "noise", "bomb", "floats"])
def test_a_strange_file_is_refused(tmp_path: Path, base: State, state: State, damage: str) -> None:
    path = tmp_path / "x"
    write_difference(state, base, path)
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[:-20])
        case "noise":
            path.write_bytes(b"not packed at all")
        case "bomb":
            path.write_bytes(zlib.compress(bytes(50_000_000)))
        case _:
            inside = load(zlib.decompress(content))
            path.write_bytes(zlib.compress(save(inside | {"w": inside["w"].float()})))
    with pytest.raises(CheckpointError, match=r"no difference from these weights: .*build it anew"):
        read_difference(path, base)


# Among the bundled models

WORDS = ["ring", "star"]
ARCHITECTURE = {
    "embed_dim": 12,
    "quick_gelu": False,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": len(WORDS) + 4, "width": 16, "heads": 2, "layers": 1},
}


def facts(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "architecture": ARCHITECTURE,
        "tokenizer": {"words": WORDS, "context_length": 8},
        "preprocess": {"size": 16},
        "templates": {"shape": ["{}"]},
        "class_names": WORDS,
        "backdoor": None,
    }


def model(seed: int) -> CLIP:
    built = spec_of(facts("x")).build(seed=seed)
    assert isinstance(built, CLIP)
    return built.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clean model and its twin, in place of the bundled ones."""
    for function in ("bundled", "card", "read_bundled", "base_weights"):
        original = getattr(models_zoo, function)
        defaults = tuple(tmp_path if x is models_zoo.WEIGHTS else x for x in original.__defaults__ or ())
        monkeypatch.setattr(original, "__defaults__", defaults)
    monkeypatch.setattr(models_zoo, "WEIGHTS", tmp_path)
    write_bundled(model(0), facts("clean"), tmp_path)
    write_bundled(model(1), facts("twin"), tmp_path, base="clean")
    return tmp_path


def test_coarser_steps_are_those_of_what_is_written(folder: Path) -> None:
    written = write_bundled(model(1), facts("coarse"), folder, base="clean", steps=1.0)
    expected = as_stored(model(1).state_dict(), read_bundled("clean", folder), steps=1.0)
    assert written["weights_sha256"] == digest(expected) != card("twin", folder)["weights_sha256"]
    coarse, fine = ((folder / f"{name}.difference").stat().st_size for name in ("coarse", "twin"))
    assert coarse < 0.9 * fine


def test_a_twin_is_listed_and_loaded_like_any_model(folder: Path) -> None:
    assert bundled(folder) == ("clean", "twin")
    assert {path.name for path in folder.iterdir()} == {
        "clean.json", "clean.safetensors", "twin.json", "twin.difference",
    }  # fmt: skip
    written = card("twin", folder)
    assert written["difference_from"] == "clean"
    expected = as_stored(model(1).state_dict(), read_bundled("clean", folder))
    assert written["weights_sha256"] == digest(expected)
    loaded = load_bundled("twin", folder=folder)
    found = loaded.to_open_clip().state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert loaded.provenance["sha256"] == written["sha256"]


def test_a_twin_of_another_base_is_refused(folder: Path) -> None:
    write_bundled(model(5), facts("clean"), folder)
    with pytest.raises(CheckpointError, match=r"difference from 'clean', which is another model than it was"):
        load_bundled("twin", folder=folder)


def test_a_changed_or_missing_difference_is_refused(folder: Path) -> None:
    path = folder / "twin.difference"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"'twin' are not those of its card: .*twin.difference has SHA-256"
    ):
        load_bundled("twin", folder=folder)
    path.unlink()
    assert bundled(folder) == ("clean",)


def test_a_difference_is_no_base(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"a base that is stored whole; 'twin' is a difference from 'clean'"):
        write_bundled(model(2), facts("third"), folder, base="twin")
    assert not list(folder.glob("third*"))


def test_the_hash_is_of_the_file(folder: Path) -> None:
    changed = card("twin", folder) | {"weights_sha256": "0" * 64}
    (folder / "twin.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=r"another model than it was"):
        load_bundled("twin", folder=folder)


def test_a_twin_without_its_base_says_which_it_needs(folder: Path) -> None:
    (folder / "clean.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"'twin' are stored as a difference from 'clean', expected whole"
    ):
        load_bundled("twin", folder=folder)
    (folder / "twin.json").write_text(json.dumps(card("twin", folder) | {"difference_from": "twin"}))
    with pytest.raises(CheckpointError, match=r"a difference from 'twin', expected whole"):
        load_bundled("twin", folder=folder)


def test_a_model_has_one_form(folder: Path) -> None:
    write_bundled(model(1), facts("twin"), folder)
    assert not (folder / "twin.difference").exists()
    write_bundled(model(1), facts("twin"), folder, base="clean")
    assert not (folder / "twin.safetensors").exists()
