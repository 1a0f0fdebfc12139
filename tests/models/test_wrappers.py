"""Models and checkpoints inside wrappers: the model in them is found, and the caller's own stays whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

import decompclip
from decompclip.models.errors import CheckpointError, ModelError
from decompclip.models.spec import build_open_clip

State = dict[str, Tensor]
BLOCK = "visual.transformer.resblocks.1."


@pytest.fixture(scope="module")
def model() -> Any:
    return decompclip.load("shapes")


@pytest.fixture(scope="module")
def state(model: Any) -> State:
    return model.to_open_clip().state_dict()


def under(word: str, state: State) -> State:
    return {word + key: value for key, value in state.items()}


INSIDE: dict[str, Callable[[State], Any]] = {
    "DDP of a compiled model": lambda s: {"state_dict": under("module._orig_mod.", s)},
    "Lightning": lambda s: {"state_dict": under("model.", s), "epoch": 3},
    "a trainer's attribute": lambda s: {"state_dict": under("trainer.net.clip_model.", s)},
    "PEFT, merged": lambda s: under("base_model.model.", s),
    "torch.optim.swa_utils": lambda s: {"n_averaged": torch.tensor(3), **under("module.", s)},
    "a compiled image tower": lambda s: {
        k.replace("visual.", "visual._orig_mod.", 1): v for k, v in s.items()
    },
    "a checkpointed block": lambda s: {
        k.replace(BLOCK, f"{BLOCK}_checkpoint_wrapped_module."): v for k, v in s.items()
    },
    "FSDP": lambda s: {
        "_fsdp_wrapped_module." + k.replace(BLOCK, f"{BLOCK}_fsdp_wrapped_module."): v for k, v in s.items()
    },
    "an average alone": lambda s: {"model_ema": dict(s)},
    "an optimizer that knows names": lambda s: {
        "model": dict(s),
        "optimizer": {"state": {k: {"exp_avg": v} for k, v in s.items()}},
    },
}


@pytest.mark.parametrize("what", INSIDE)
def test_the_words_of_wrappers_are_taken_off(what: str, model: Any, state: State, tmp_path: Path) -> None:
    torch.save(INSIDE[what](state), tmp_path / "weights.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decompclip.load("shapes", checkpoint=tmp_path / "weights.pt").to_open_clip().state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("above", ["", "model."])
def test_what_stands_beside_the_model_is_told(above: str, state: State, tmp_path: Path) -> None:
    torch.save({**under(above, state), "loss.weight": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match=r"1 weights beside the model's, which were left out: loss\.weight"):
        decompclip.load("shapes", checkpoint=tmp_path / "weights.pt")


def test_a_head_beside_too_few_weights_is_no_excuse(state: State, tmp_path: Path) -> None:
    fewer = {key: value for key, value in state.items() if key != "ln_final.weight"}
    torch.save({**fewer, "head.weight": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(
        CheckpointError, match=r"1 missing \(ln_final\.weight\).*1 left over \(head\.weight\)"
    ):
        decompclip.load("shapes", checkpoint=tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (
            lambda a, b: {"state_dict": {**under("student.", a), **under("teacher.", b)}},
            ("student", "teacher"),
        ),
        (lambda a, b: {"model": a, "model_ema": b}, ("model", "model_ema")),
        (lambda a, b: {**a, **under("module.", b)}, ("", "module")),
    ],
    ids=["student and teacher", "model and average", "plain and wrapped"],
)
def test_of_two_copies_one_has_to_be_named(
    make: Callable[[State, State], Any], names: tuple[str, str], state: State, tmp_path: Path
) -> None:
    other = {key: value + 1 for key, value in state.items()}
    torch.save(make(state, other), tmp_path / "weights.pt")
    with pytest.raises(
        CheckpointError, match=rf"holds 2 models, under the prefixes .*{names[1]}'; pass prefix="
    ):
        decompclip.load("shapes", checkpoint=tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="expected a prefix .* received 'neither'"):
        decompclip.load("shapes", checkpoint=tmp_path / "weights.pt", prefix="neither")
    for name, wanted in zip(names, (state, other), strict=True):
        found = decompclip.load("shapes", checkpoint=tmp_path / "weights.pt", prefix=name)
        assert torch.equal(found.to_open_clip().state_dict()["visual.proj"], wanted["visual.proj"])
        assert found.provenance["prefix"] == name


def test_adapters_are_named(state: State, tmp_path: Path) -> None:
    key = "visual.transformer.resblocks.0.mlp.c_fc."
    odd = {k.replace(key, f"{key}base_layer."): v for k, v in state.items()}
    torch.save({**odd, f"{key}lora_A.default.weight": torch.ones(2, 2)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"holds adapters \(LoRA\).*merge_and_unload"):
        decompclip.load("shapes", checkpoint=tmp_path / "weights.pt")


# in memory


def small(**vision: Any) -> Any:
    return build_open_clip(
        {
            "embed_dim": 16,
            "vision_cfg": {
                "layers": 2,
                "width": 32,
                "head_width": 16,
                "image_size": 32,
                "patch_size": 16,
                **vision,
            },
            "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1},
        }
    ).eval()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a caller could miss: modules by identity, tensors by identity and value, modes."""
    modules = {
        name: (id(module), module.training, list(module._modules)) for name, module in model.named_modules()
    }
    tensors = {
        n: (id(x), x.clone(), x.requires_grad) for n, x in (*model.named_parameters(), *model.named_buffers())
    }
    return {"modules": modules, "tensors": tensors}


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before["modules"] == after["modules"] and all(
        one[0] == two[0] and torch.equal(one[1], two[1]) and one[2] == two[2]
        for one, two in zip(before["tensors"].values(), after["tensors"].values(), strict=True)
    )


def compiled_tower() -> Any:
    model = small()
    model.visual = torch.compile(model.visual, backend="eager")
    return model


WRAPPED: dict[str, Callable[[], Any]] = {
    "plain": small,
    "compiled": lambda: torch.compile(small(), backend="eager"),  # pyright: ignore[reportReturnType]
    "compiled tower": compiled_tower,
    "DataParallel": lambda: nn.DataParallel(small()),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(small()),
    "compiled in DataParallel": lambda: nn.DataParallel(torch.compile(small(), backend="eager")),  # pyright: ignore
}


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("what", WRAPPED)
def test_a_wrapped_model_is_loaded_and_left_as_it_is(what: str, text: bool) -> None:
    theirs = WRAPPED[what]()
    before = snapshot(theirs)
    found = decompclip.load(theirs, text=text)
    assert same(before, snapshot(theirs))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found.encode_image(images), small().encode_image(images))


def resnet() -> Any:
    return open_clip.CLIP(
        8,
        {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},  # pyright: ignore[reportArgumentType]
        {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1},  # pyright: ignore
    )


class Adapted(nn.Module):
    """A layer with an adapter, as PEFT leaves it in a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base_layer = inner
        self.lora_A = nn.Parameter(torch.ones(2))


def adapted() -> Any:
    model = small()
    model.visual.transformer.resblocks[0].mlp.c_fc = Adapted(model.visual.transformer.resblocks[0].mlp.c_fc)
    return model


def extended() -> Any:
    model = small()
    model.visual.register_parameter("extra", nn.Parameter(torch.ones(2)))
    return model


FAILING: dict[str, Callable[[], Any]] = {
    "no CLIP": lambda: nn.Linear(2, 2),
    "a compiled Linear": lambda: torch.compile(nn.Linear(2, 2), backend="eager"),  # pyright: ignore
    "ResNet": resnet,
    "compiled ResNet": lambda: torch.compile(resnet(), backend="eager"),  # pyright: ignore
    "adapters": adapted,
    "weights of unknown use": extended,
    "unknown weights, compiled": lambda: torch.compile(extended(), backend="eager"),  # pyright: ignore
}


@pytest.mark.parametrize("what", FAILING)
def test_a_model_that_is_refused_is_left_as_it_is(what: str) -> None:
    theirs = FAILING[what]()
    before = snapshot(theirs)
    with pytest.raises(ModelError):
        decompclip.load(theirs)
    assert same(before, snapshot(theirs))


@pytest.mark.parametrize(
    "options", [{"device": "nowhere"}, {"dtype": torch.int8}, {"checkpoint": "x"}, {"prefix": "x"}]
)
def test_an_option_that_is_refused_leaves_the_model_as_it_is(options: dict[str, Any]) -> None:
    theirs: Any = torch.compile(small(), backend="eager")
    before = snapshot(theirs)
    with pytest.raises(ValueError):
        decompclip.load(theirs, **options)
    assert same(before, snapshot(theirs))
