"""HookedCLIP: both encoders, the classifier, preprocessing, and hooks that come off again."""

from __future__ import annotations

import re
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from torch.nn import functional as F

from decompclip.models.clip import HookedCLIP, differentiable
from decompclip.models.text import ImageOnly, MissingTextError, WordTokenizer
from decompclip.models.zero_shot import key_of
from decompclip.tower.vit import HookedViT, tower

TEMPLATES = {"shape": ["a {}", "a photo of a {}"], "colour": ["a {} thing"]}


@pytest.fixture
def model(source: CLIP) -> HookedCLIP:
    return HookedCLIP.from_open_clip(
        source,
        tokenizer=open_clip.get_tokenizer("ViT-tiny-8"),
        preprocess={"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"},
        templates=TEMPLATES,
        class_names=("star", "ring"),
    )


class Scale:
    """An intervention that multiplies what stands at a hook point."""

    def __init__(self, name: str, factor: float) -> None:
        self.name, self.factor = name, factor

    def fwd_hooks(self, visual: HookedViT) -> list[tuple[str, Any]]:
        return [(self.name, lambda value, hook: value * self.factor)]


class Add(Scale):
    def fwd_hooks(self, visual: HookedViT) -> list[tuple[str, Any]]:
        return [(self.name, lambda value, hook: value + self.factor)]


def has_hooks(model: HookedCLIP) -> bool:
    return any(point.has_hooks() for point in model.visual.hook_dict.values())


def test_the_source_is_left_as_it_was(source: CLIP, model: HookedCLIP, images: torch.Tensor) -> None:
    before = source.encode_text(model.tokenize("a star"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(source.encode_text(model.tokenize("a star")), before)
    assert source.encode_image(images).abs().max() > 0
    assert not hasattr(model.text, "visual")


# text


@torch.no_grad()
def test_texts_and_tokens_encode_alike(model: HookedCLIP) -> None:
    texts = ["a star", "a ring"]
    features = model.encode_text(texts)
    assert torch.equal(features, model.encode_text(model.tokenize(texts)))
    torch.testing.assert_close(features[:1], model.encode_text("a star"))
    torch.testing.assert_close(model.encode_text(texts, normalize=True), F.normalize(features, dim=-1))


@pytest.mark.parametrize(
    ("tokens", "received"),
    [
        (torch.zeros(2, 20, dtype=torch.long), r"got \[2, 20\] of torch.int64"),
        (torch.zeros(77, dtype=torch.long), r"got \[77\] of torch.int64"),
        (torch.zeros(2, 77), r"got \[2, 77\] of torch.float32"),
    ],
)
def test_tokens_of_another_shape_are_refused(model: HookedCLIP, tokens: torch.Tensor, received: str) -> None:
    with pytest.raises(
        ValueError, match=rf"expected token ids \[text, 77\] of an integer type, {received}; .*`tokenize`"
    ):
        model.encode_text(tokens)


def test_tokens_of_another_vocabulary_are_refused(model: HookedCLIP) -> None:
    with pytest.raises(ValueError, match="expected token ids below 49408, .* got 50000"):
        model.encode_text(torch.full((1, 77), 50000))


# classifier


def plain_classifier(model: HookedCLIP, names: list[str], templates: list[str]) -> torch.Tensor:
    rows = []
    for name in names:
        features = model.encode_text([template.format(name) for template in templates], normalize=True)
        rows.append(F.normalize(features.mean(dim=0), dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize("templates", [["a {}", "the {}"], "colour", None])
@torch.no_grad()
def test_the_classifier_is_the_plain_mean(model: HookedCLIP, templates: Any) -> None:
    used = TEMPLATES[templates or "shape"] if isinstance(templates, str | None) else templates
    found = model.zero_shot_classifier((name for name in ("red", "blue")), templates)
    torch.testing.assert_close(found, plain_classifier(model, ["red", "blue"], used))


def test_a_kept_classifier_keeps_its_tokenizer() -> None:
    """Else another one may come to lie where it lay, and be given its classifier."""

    class Tokens:
        def __call__(self, texts: list[str]) -> torch.Tensor:
            return torch.zeros(len(texts), 4, dtype=torch.long)

    one, other = Tokens(), Tokens()
    key = key_of(["a"], ["{}"], one)
    assert key == key_of(["a"], ["{}"], one) != key_of(["a"], ["{}"], other)
    left = weakref.ref(one)
    del one
    assert left() is not None


@torch.no_grad()
def test_the_classifier_defaults_to_the_model_s_own_classes(model: HookedCLIP) -> None:
    assert torch.equal(model.zero_shot_classifier(), model.zero_shot_classifier(["star", "ring"]))


@torch.no_grad()
def test_a_model_without_templates_uses_openai_s(source: CLIP) -> None:
    model = HookedCLIP.from_open_clip(source, tokenizer=open_clip.get_tokenizer("ViT-tiny-8"))
    templates = list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert torch.equal(model.zero_shot_classifier(["cat"]), model.zero_shot_classifier(["cat"], templates))


def test_an_unknown_property_lists_the_known(model: HookedCLIP) -> None:
    with pytest.raises(ValueError, match=r"brings along \('shape', 'colour'\), got 'a \{\}'"):
        model.zero_shot_classifier(["star"], "a {}")


# images


def test_preprocessing_is_open_clip_s(model: HookedCLIP) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(24, 16, 3), dtype=np.uint8)
    found = model.preprocess(Image.fromarray(pixels))
    unit = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(found[None], model.normalize(unit))
    assert model.preprocess(Image.new("L", (90, 70))).shape == (3, 24, 16)


def test_facts_are_plain(model: HookedCLIP) -> None:
    assert (model.mean, model.std, model.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (24, 16))
    assert model.logit_scale.shape == ()
    assert model.context_length == 77
    assert not model.training


def test_a_tower_is_its_own_and_that_of_a_model(model: HookedCLIP) -> None:
    assert tower(model) is tower(model.visual) is model.visual
    for other in ("ViT-B-32", model.text):
        told = f"as decompclip.load gives it; received {type(other).__name__}: {str(other)[:60]!r}; load it first"
        with pytest.raises(TypeError, match=re.escape(told)):
            tower(other)  # pyright: ignore[reportArgumentType]


def test_a_small_vocabulary_sets_the_context(make_source: Any) -> None:
    tokenizer = WordTokenizer(("a", "star"), 77)
    model = HookedCLIP.from_open_clip(make_source(), tokenizer=tokenizer)
    assert model.encode_text("a star").shape == (1, 20)


def test_pixels_come_back_in_full_precision_and_within_bounds(model: HookedCLIP) -> None:
    pixels = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.denormalize(model.normalize(pixels)), pixels)
    half = model.denormalize(model.normalize(pixels).bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, pixels, atol=0.01, rtol=0)
    ends = torch.stack([torch.full((3, 24, 16), value) for value in (-0.5, 1.5)])
    assert torch.equal(model.denormalize(model.normalize(ends)), ends.clamp(0, 1))


def test_the_context_is_the_text_tower_s_or_else_the_tokenizer_s(model: HookedCLIP) -> None:
    def context(of_text: int | None, of_tokenizer: int | None) -> int:
        owners: tuple[Any, Any] = torch.nn.Module(), SimpleNamespace()
        for owner, length in zip(owners, (of_text, of_tokenizer), strict=True):
            if length is not None:
                owner.context_length = length
        text, tokenizer = owners
        facts: Any = {"tokenizer": tokenizer, "preprocess": {}, "provenance": {"name": "t"}}
        return HookedCLIP(model.visual, text, **facts).context_length

    assert [context(*given) for given in ((8, 9), (8, None), (None, 9), (None, None))] == [8, 8, 9, 77]


@torch.no_grad()
def test_it_goes_back_to_open_clip_from_where_it_came(
    source: CLIP, model: HookedCLIP, images: torch.Tensor
) -> None:
    tokens = model.tokenize("a star")
    model.visual.get_parameter("proj").mul_(2)
    back: Any = model.to_open_clip()
    torch.testing.assert_close(back.encode_image(images), 2 * source.encode_image(images))
    assert torch.equal(back.encode_text(tokens), source.encode_text(tokens))
    facts: Any = {"tokenizer": model.tokenizer, "preprocess": {}, "provenance": {"name": "t"}}
    with pytest.raises(ValueError, match="converted from open_clip's; received one around a HookedViT"):
        HookedCLIP(model.visual, model.text, **facts).to_open_clip()
    model.text = ImageOnly(torch.nn.Identity(), torch.tensor(1.0), why="loaded with text=False")
    with pytest.raises(MissingTextError, match="this one has none: loaded with text=False"):
        model.to_open_clip()


def test_a_model_that_is_no_copy_shares_its_source_s_weights(source: CLIP) -> None:
    for copy in (True, False):
        model = HookedCLIP.from_open_clip(source, tokenizer=open_clip.get_tokenizer("ViT-tiny-8"), copy=copy)
        for ours, theirs in (
            (model.visual.proj, source.visual.get_parameter("proj")),
            (model.text.get_parameter("text_projection"), source.text_projection),
        ):
            assert (ours is theirs) != copy


@torch.no_grad()
def test_the_pool_s_heads_are_decomposed_as_asked(make_source: Any, images: torch.Tensor) -> None:
    source = make_source(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=3)
    model = HookedCLIP.from_open_clip(source, tokenizer=open_clip.get_tokenizer("ViT-tiny-8"))
    plain, asked = (model.decompose_pool(images, **o) for o in ({}, {"normalize": True, "tokens": True}))
    assert (plain.normalized, plain.token_terms) == (False, None)
    assert asked.normalized and asked.token_terms is not None
    torch.testing.assert_close(asked.features, model.encode_image(images, normalize=True))


def test_what_needs_gradients_has_them_in_any_mode() -> None:
    @differentiable
    def slope(x: torch.Tensor, *, factor: torch.Tensor, name: str) -> tuple[torch.Tensor, str]:
        (factor * x.requires_grad_().square()).sum().backward()
        assert x.grad is not None
        return x.grad, name

    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with mode:
            found, name = slope(torch.tensor([1.0, 2.0]), factor=torch.tensor(3.0), name="x")
        assert found.tolist() == [6, 12] and name == "x"
    x = torch.ones(2)
    assert differentiable(lambda given: given)(x) is x


# hooks


@torch.no_grad()
def test_no_intervention_changes_nothing(model: HookedCLIP, images: torch.Tensor) -> None:
    plain = model.encode_image(images)
    with model.hooks():
        assert torch.equal(model.encode_image(images), plain)


@torch.no_grad()
def test_interventions_act_in_order_and_before_plain_hooks(model: HookedCLIP, images: torch.Tensor) -> None:
    name, seen = "blocks.0.hook_mlp_out", []
    watch = (name, lambda value, hook: seen.append(value.clone()))
    with model.hooks(fwd_hooks=[watch]):
        model.encode_image(images)
    with model.hooks(Scale(name, 2.0), Add(name, 1.0), fwd_hooks=[watch]) as inside:
        assert inside is model
        model.encode_image(images)
    with model.hooks(Add(name, 1.0), Scale(name, 2.0), fwd_hooks=[watch]):
        model.encode_image(images)
    plain, scaled_first, added_first = seen
    torch.testing.assert_close(scaled_first, 2 * plain + 1)
    torch.testing.assert_close(added_first, 2 * (plain + 1))


@torch.no_grad()
def test_nested_hooks_come_off_one_by_one(model: HookedCLIP, images: torch.Tensor) -> None:
    plain = model.encode_image(images)
    with model.hooks(Scale("blocks.0.hook_attn_out", 0.0)):
        outer = model.encode_image(images)
        with model.hooks(Scale("blocks.1.hook_mlp_out", 0.0)):
            assert not torch.allclose(model.encode_image(images), outer)
        assert torch.equal(model.encode_image(images), outer)
    assert torch.equal(model.encode_image(images), plain)
    assert not torch.allclose(outer, plain)


def test_transformer_lens_ways_of_hooking_stand_on_the_model(model: HookedCLIP, images: torch.Tensor) -> None:
    plain, name = model.encode_image(images), "blocks.0.hook_attn_out"
    silent = (name, lambda value, hook: value * 0)
    with model.hooks(fwd_hooks=[silent]):
        expected = model.encode_image(images)
    assert model.hook_dict is model.visual.hook_dict
    assert torch.equal(model.run_with_hooks(images.double(), fwd_hooks=[silent]), expected)
    assert torch.equal(model.encode_image(images), plain)
    model.add_hook(*silent)
    assert torch.equal(model.encode_image(images), expected)
    model.reset_hooks()
    assert torch.equal(model.encode_image(images), plain)
    gradients = []
    model.add_hook(name, lambda gradient, hook: gradients.append(gradient), "bwd")
    model.encode_image(images).sum().backward()
    model.reset_hooks()
    assert len(gradients) == 1 and not has_hooks(model)
    with pytest.raises(KeyError, match=r"no hook point 'blocks.9.hook_attn_out' .*nearest: blocks"):
        model.run_with_hooks(images, fwd_hooks=[("blocks.9.hook_attn_out", silent[1])])
    with pytest.raises(KeyError, match="no hook point 'hook_embedding'"):
        model.add_hook("hook_embedding", silent[1])


def test_hooks_come_off_after_an_exception(model: HookedCLIP, images: torch.Tensor) -> None:
    with pytest.raises(ZeroDivisionError), model.hooks(Scale("hook_embed", 2.0)):
        assert has_hooks(model)
        raise ZeroDivisionError
    assert not has_hooks(model)
    with pytest.raises(ValueError, match="expected images"), model.hooks(Scale("hook_embed", 2.0)):
        model.encode_image(images[:, :, 1:])
    assert not has_hooks(model)


def test_an_unknown_hook_point_offers_the_nearest_and_adds_none(model: HookedCLIP) -> None:
    hooks = [("hook_embed", lambda value, hook: None), ("blocks.9.attn.hook_z", lambda value, hook: None)]
    with (
        pytest.raises(
            KeyError, match=r"no hook point 'blocks.9.attn.hook_z' in this tower of 2 layers; nearest: blocks"
        ),
        model.hooks(fwd_hooks=hooks),
    ):
        pass
    assert not has_hooks(model)


def test_backward_hooks_see_gradients(model: HookedCLIP, images: torch.Tensor) -> None:
    seen = []
    with model.hooks(bwd_hooks=[("blocks.0.hook_resid_post", lambda grad, hook: seen.append(grad.shape))]):
        model.encode_image(images).sum().backward()
    assert seen == [(len(images), model.cfg.n_tokens, model.cfg.d_model)]


# the rooms above


@torch.no_grad()
def test_the_cache_is_transformer_lens_s_and_typed(model: HookedCLIP, images: torch.Tensor) -> None:
    features, cache = model.run_with_cache(images)
    torch.testing.assert_close(features, model.encode_image(images), rtol=1e-5, atol=1e-5)
    assert cache["resid_post", 1].shape == (len(images), model.cfg.n_tokens, model.cfg.d_model)
    assert not has_hooks(model)


@torch.no_grad()
def test_a_decomposition_sums_to_the_feature(model: HookedCLIP, images: torch.Tensor) -> None:
    d = model.decompose(images)
    asked = model.decompose(images, convention="paper", normalize=True, tokens=True)
    assert (asked.convention, asked.normalized) == ("paper", True) and asked.token_terms is not None
    torch.testing.assert_close(d.features, model.encode_image(images), rtol=1e-5, atol=1e-5)
    with model.hooks(Scale("blocks.0.hook_mlp_out", 0.0)):  # the edited run is what is decomposed
        edited = model.encode_image(images)
        torch.testing.assert_close(model.decompose(images).features, edited, rtol=1e-5, atol=1e-5)


def test_whole_numbers_are_no_images(model: HookedCLIP) -> None:
    pixels = torch.zeros(1, 3, *model.image_size, dtype=torch.uint8)
    for use in (model.encode_image, model.decompose, model.run_with_cache):
        with pytest.raises(
            ValueError, match=r"expected floating-point images .* got torch.uint8; divide pixels by 255"
        ):
            use(pixels)
