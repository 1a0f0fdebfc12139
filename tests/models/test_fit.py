"""Weights under the model's own names, or what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import pytest
import torch
from open_clip.model import CLIP

from decompclip.models.errors import CheckpointError
from decompclip.models.fit import check_fit, conform, models_like
from decompclip.models.spec import build_image_only, build_open_clip
from decompclip.models.text import image_side

State = dict[str, torch.Tensor]


@pytest.fixture
def state(source: CLIP) -> State:
    return {key: value.detach().clone() for key, value in source.state_dict().items()}


def misfit(model: CLIP, state: State) -> str:
    with pytest.raises(CheckpointError) as told:
        check_fit(model, state, source="a.pt", name="ViT-tiny-8")
    return str(told.value)


def test_weights_that_fit_pass(source: CLIP, state: State) -> None:
    check_fit(source, state, source="a.pt", name="ViT-tiny-8")


def test_a_misfit_counts_what_is_wrong(source: CLIP, state: State) -> None:
    total = len(state)
    del state["visual.ln_pre.bias"]
    state |= {f"extra{i}": torch.zeros(1) for i in range(4)}
    state["visual.proj"] = torch.zeros(32, 24)
    assert misfit(source, state).startswith(
        f"a.pt does not fit ViT-tiny-8: of {total} weights 1 missing (visual.ln_pre.bias); 4 left over (extra0, "
        "extra1, extra2 and 1 more); 1 of another shape (visual.proj expected [32, 20], got [32, 24]). Likely cause: "
    )


CAUSES: dict[str, Callable[[State], State]] = {
    "holds a ResNet, whose tower is not supported": lambda state: {
        "visual.layer1.0.conv1.weight": torch.zeros(1)
    },
    "has Hugging Face transformers' names; give the folder that it lies in, with its config.json": lambda state: {
        "vision_model.post_layernorm.bias": torch.zeros(1)
    },
    "holds a timm tower (SigLIP, EVA, ...), and that name has open_clip's native tower": lambda state: {
        "visual.trunk.pos_embed": torch.zeros(1)
    },
    "holds an image tower alone; a whole CLIP is needed": lambda state: {
        key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")
    },
    "holds another model; give the name that it was trained under": lambda state: {"weight": torch.zeros(1)},
    "holds another model (patches of 4 x 4 pixels, expected 8 x 8; 25 tokens, expected 7); give": lambda state: {
        **state,
        "visual.conv1.weight": torch.zeros(32, 3, 4, 4),
        "visual.positional_embedding": torch.zeros(25, 32),
    },
    "holds another model (width 48, expected 32; 1 layers, expected 2); give": lambda state: {
        "visual.conv1.weight": torch.zeros(48, 3, 8, 8),
        "visual.transformer.resblocks.0.ln_1.weight": torch.zeros(48),
    },
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_likely_cause_is_named(source: CLIP, state: State, cause: str) -> None:
    assert f"Likely cause: the file {cause}" in misfit(source, CAUSES[cause](state))


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-L-14-336"])
def test_the_model_that_a_file_holds_is_recognised(source: CLIP, name: str) -> None:
    architecture = open_clip.get_model_config(name)
    assert architecture is not None
    with torch.device("meta"):
        state = build_open_clip(architecture).state_dict()
    told = misfit(source, state)
    assert f"Likely cause: the file holds {name} (patches of " in told
    assert told.endswith("expected 2); give that name")


def test_a_text_tower_of_another_kind_is_named(source: CLIP, state: State) -> None:
    image = image_side(state)
    told = misfit(source, {**image, "text.transformer.embeddings.word_embeddings.weight": torch.zeros(9, 9)})
    assert told.endswith(
        "Likely cause: the image towers agree and the text towers do not (a text tower of Hugging Face transformers', "
        "where open_clip's own text tower was expected); give the name that it was trained under, or load the image "
        "tower alone with text=False"
    )
    state["ln_final.weight"] = torch.zeros(17)
    assert "the text towers do not; give the name" in misfit(source, state)


@pytest.mark.parametrize("apart", [False, True])
def test_a_text_tower_is_taken_from_either_place(
    config: dict, source: CLIP, state: State, apart: bool
) -> None:
    """open_clip's CustomTextCLIP keeps its text tower under `text.`, its CLIP at the top."""
    custom = build_open_clip({**config, "custom_text": True})
    file = conform(custom, state)
    assert set(file) == set(custom.state_dict())
    model = custom if apart else source
    found = conform(model, file if not apart else state)
    check_fit(model, found, source="a.pt", name="ViT-tiny-8")
    prefix = "text." if apart else ""
    assert torch.equal(found[f"{prefix}token_embedding.weight"], state["token_embedding.weight"])


def test_what_follows_from_the_shapes_is_dropped(source: CLIP, state: State) -> None:
    old = {
        **state,
        "attn_mask": torch.zeros(77, 77),
        "text_model.embeddings.position_ids": torch.zeros(1, 77),
    }
    assert set(conform(source, old)) == set(state)


def test_logit_scale_and_bias_take_the_model_s_shape(config: dict, state: State) -> None:
    model = build_open_clip({**config, "nonscalar_logit_scale": True, "init_logit_bias": -10.0})
    found = conform(model, state)
    check_fit(model, found, source="a.pt", name="ViT-tiny-8")
    assert found["logit_scale"].shape == found["logit_bias"].shape == (1,)
    assert found["logit_scale"] == state["logit_scale"]
    assert found["logit_bias"] == 0


def test_an_image_tower_takes_its_part_of_any_file(config: dict, source: CLIP, state: State) -> None:
    alone = build_image_only(config, why="")
    found = image_side(conform(alone, {**state, "text.transformer.x": torch.zeros(1)}))
    check_fit(alone, found, source="a.pt", name="ViT-tiny-8")
    alone.load_state_dict(found)
    assert torch.equal(alone.visual.state_dict()["proj"], state["visual.proj"])


def test_twins_share_their_shapes_and_are_told_once() -> None:
    architecture = open_clip.get_model_config("ViT-B-32-quickgelu")
    assert architecture is not None
    with torch.device("meta"):
        assert models_like(build_open_clip(architecture).state_dict()) == ["ViT-B-32"]
    assert models_like({}) == []


def test_weights_that_are_not_finite_are_named(source: CLIP, state: State) -> None:
    for key, value in (("visual.proj", float("nan")), ("logit_scale", float("inf"))):
        state[key] = torch.full_like(state[key], value)
    with pytest.raises(
        CheckpointError,
        match=r"received file\.pt, where 2 of \d+ hold infinite or undefined numbers \((visual\.proj|logit_scale), ",
    ):
        check_fit(source, state, source="file.pt", name="ViT-tiny-8")
