"""A reading is the answer of a tower that ends there; a patch's, of one that pools that patch alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decompclip.data.pixels import bytes_of
from decompclip.data.shapes import Shapes
from decompclip.intervals import mean_interval
from decompclip.models.bundled import load_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.operators.inputs import TextFeatures, encode_texts
from decompclip.operators.lens import LINES, LogitLens, logit_lens
from decompclip.tower.vit import HookedViT
from tests.conftest import MakeTower
from tests.decomposition.test_families import FAMILIES

TEXTS = ["a star", "a ring", "a red star"]


@pytest.fixture(scope="module")
def model() -> HookedCLIP:
    return load_bundled("shapes")


@pytest.fixture(scope="module")
def images_of(model: HookedCLIP) -> Tensor:
    return model.normalize(Shapes(5, seed=5).draw(range(5)).images)


@pytest.fixture(scope="module")
def lens(model: HookedCLIP, images_of: Tensor) -> LogitLens:
    return logit_lens(model, images_of, TEXTS, batch_size=2)


def cut(visual: HookedViT, depth: int) -> HookedViT:
    """The tower with its first blocks alone."""
    short = copy.deepcopy(visual)
    short.blocks = nn.ModuleList(list(short.blocks)[:depth])
    object.__setattr__(short.cfg, "n_layers", depth)
    return short


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_readings_are_answers_of_towers_that_end_there(
    make_tower: MakeTower, images: Tensor, name: str
) -> None:
    visual = make_tower(dtype=torch.float64, **FAMILIES[name])
    texts = torch.randn(4, visual.cfg.d_embed, generator=torch.Generator().manual_seed(6))
    plain = logit_lens(visual, images.double(), texts, normalize=False)
    unit = logit_lens(visual, images.double(), texts, batch_size=2, patches=False)
    assert unit.patches is None and plain.depths == ("input", "0", "1", "2") and plain.patches is not None
    for depth in (1, 2, 3):
        feature = cut(visual, depth)(images.double()).float()
        torch.testing.assert_close(plain.scores[:, depth], feature @ texts.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            unit.scores[:, depth], F.normalize(feature, dim=-1) @ texts.T, rtol=1e-4, atol=1e-4
        )
    start = visual.read(visual(images.double(), stop_at_layer=0)).float()
    torch.testing.assert_close(plain.scores[:, 0], start @ texts.T, rtol=1e-4, atol=1e-4)
    # A patch in the place of all rows that are pooled.
    stream = visual(images.double(), stop_at_layer=2)
    for patch in (0, 3, 5):
        row = stream[:, visual.cfg.n_prefix + patch]
        alone = visual.read(row[:, None].expand(-1, visual.cfg.n_tokens, -1)).float()
        found = plain.patches[:, 2, :, patch // 2, patch % 2]
        torch.testing.assert_close(found, alone @ texts.T, rtol=1e-4, atol=1e-4)
    if visual.cfg.pool == "mean" and visual.cfg.ln_final == "rows":
        torch.testing.assert_close(plain.patches.mean((3, 4)), plain.scores, rtol=1e-4, atol=1e-4)


def test_the_end_is_the_models_own_answer(model: HookedCLIP, images_of: Tensor, lens: LogitLens) -> None:
    with torch.no_grad():
        texts = F.normalize(model.encode_text(TEXTS), dim=-1)
        own = model.encode_image(images_of, normalize=True) @ texts.T
    torch.testing.assert_close(lens.scores[:, -1], own, rtol=0, atol=1e-5)
    again = logit_lens(model, iter([images_of[:1], images_of[1:]]), encode_texts(model, TEXTS))
    torch.testing.assert_close(again.scores, lens.scores, rtol=0, atol=1e-5)
    assert lens.texts == again.texts == tuple(TEXTS)
    one = logit_lens(model, images_of, "a ring")
    torch.testing.assert_close(one.scores[..., 0], lens.scores[..., 1], rtol=0, atol=1e-5)
    with model.hooks(fwd_hooks=[("blocks.3.hook_mlp_out", lambda x, hook: 0 * x)]):
        edited = logit_lens(model, images_of, TEXTS)  # the run under hooks is read
    torch.testing.assert_close(edited.scores[:, :4], lens.scores[:, :4], rtol=0, atol=1e-5)
    assert float((edited.scores[:, 4:] - lens.scores[:, 4:]).abs().max()) > 1e-2


def test_the_table_and_the_figures_show_the_numbers(
    lens: LogitLens, model: HookedCLIP, images_of: Tensor
) -> None:
    frame = lens.to_frame()
    assert len(frame) == 7 * 3
    row = frame[(frame["depth"] == "4") & (frame["text"] == "a ring")].iloc[0]
    assert row["mean"] == pytest.approx(mean_interval(lens.scores[:, 5, 1])[0], abs=1e-6)
    assert row["low"] < row["mean"] < row["high"]
    best = (lens.scores[:, 5].argmax(1) == 1).double().mean()
    assert row["first"] == pytest.approx(float(best))
    drawn: Any = lens.figure()
    assert drawn.layout.xaxis.title.text == "after block (5 images, mean and 95 % interval)"
    assert drawn.layout.xaxis.ticktext == lens.depths and len(drawn.layout.annotations) == 0
    assert lens._unit == "cosine" and drawn.layout.xaxis.domain == (0, 1)
    for text in TEXTS:
        (line,) = (line for line in drawn.data if line.name == text)
        rows = frame[frame["text"] == text]
        assert list(line.y) == pytest.approx(rows["mean"].tolist(), abs=1e-6)
        ends = torch.tensor([rows["low"].tolist(), rows["high"].tolist()]).T
        torch.testing.assert_close(torch.tensor(line.customdata), ends, rtol=0, atol=1e-6)
    maps: Any = lens.maps("a ring", images=[3, 1])
    assert lens.patches is not None and lens.pictures is not None
    assert torch.equal(lens.pictures, bytes_of(model.denormalize(images_of)))
    first = next(trace for trace in maps.data if trace.type == "heatmap")
    assert torch.equal(torch.tensor(first.z), lens.patches[3, -1, 1])  # the last depth first
    assert first.zmin == -first.zmax and len(maps.layout.images) == 2 * (
        1 + 7
    )  # over pictures, on both sides
    titles = [note.text for note in maps.layout.annotations]
    assert titles[:2] == ["<b>after block 5</b>", "<b>after block 4</b>"] and "<b>input</b>" in titles
    bare = replace(lens, patches=None)
    two: Any = replace(bare, scores=lens.scores[:2], names=("0", "1")).figure()
    one: Any = replace(bare, scores=lens.scores[:1], names=("0",)).figure()
    assert two.layout.xaxis.title.text == "after block (2 images, mean and 95 % interval)"
    assert one.layout.xaxis.title.text == "after block (0)"
    assert [line.name for line in one.data] == TEXTS  # of one image there is no interval
    for count, kind in ((LINES, "scatter"), (LINES + 1, "heatmap")):
        names = tuple(map(str, range(count)))
        shown: Any = replace(bare, scores=lens.scores.repeat(1, 1, 3)[..., :count], texts=names).figure()
        assert shown.data[0].type == kind
    many: Any = logit_lens(
        model, images_of[:1], [f"a {x} star" for x in ("red", "green", "blue")] * 3
    ).figure()
    assert torch.tensor(many.data[0].z).shape == (7, 9) and many.layout.yaxis.autorange is True
    assert many.layout.yaxis.title.text == "after block"
    assert many.layout.coloraxis.cmin == -many.layout.coloraxis.cmax
    assert many.layout.coloraxis.colorbar.title.text == drawn.layout.yaxis.title.text == lens._unit
    assert f"{lens._unit}<br>toward a ring" in str(maps.to_dict())
    assert "7 depths, 3 texts, 5 images, patch by patch" in repr(lens)


@pytest.mark.usefixtures("ours_alone")
def test_mistakes_are_told(model: HookedCLIP, images_of: Tensor, lens: LogitLens) -> None:
    other = load_bundled("shapes-badnet")
    mistakes: list[tuple[Any, Any, Any, dict[str, Any], str]] = [
        (model, images_of, [], {}, "at least one text"),
        (model, images_of, 7, {}, "expected texts, or features"),
        (model, images_of, torch.ones(128), {}, r"text features \[text, 128\], .* received \[128\]"),
        (model, images_of, torch.ones(2, 20), {}, r"received \[2, 20\]"),
        (model, images_of, encode_texts(other, TEXTS), {}, "other weights"),
        (model.visual, images_of, encode_texts(other, TEXTS), {}, "other weights"),
        (model, images_of, TextFeatures(("a star",), torch.eye(1, 20)), {}, r"received \[1, 20\]"),
        (model.visual, images_of, TEXTS, {}, "pass the whole model"),
        (model, images_of[:0], TEXTS, {}, "at least one image"),
        (model, images_of, TEXTS, {"names": ["a"]}, "a name for each of 5 images"),
        (model, images_of, TEXTS, {"names": []}, "a name for each of 5 images; received 0"),
        (model, images_of, TEXTS, {"batch_size": 0}, "batch_size to be a whole number"),
        (model, images_of[..., :40], TEXTS, {}, "through the model's `preprocess`"),
    ]
    for visual, images, texts, options, words in mistakes:
        with pytest.raises(ValueError, match=words):
            logit_lens(visual, images, texts, **options)
    with pytest.raises(TypeError, match="a text as a string, or several in a list; received 3"):
        logit_lens(model, images_of, cast(Any, ["a star", 3]))
    with pytest.raises(LookupError, match="a text of 3: 'a star', 'a ring', 'a red star'; received 'a dog'"):
        lens.maps("a dog")
    with pytest.raises(ValueError, match=r"patches=True"):
        logit_lens(model, images_of, TEXTS, patches=False).maps()
