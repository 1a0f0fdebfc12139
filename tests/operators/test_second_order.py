"""Second-order effects equal plain loops and changes of a network held still; moments forget no image; nothing large is formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from decompclip.data.shapes import Shapes
from decompclip.decomposition import maps
from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import heads, neurons
from decompclip.models.bundled import load_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.operators import second_order as module
from decompclip.operators.neurons import AblateNeurons, neuron_terms
from decompclip.operators.second_order import SecondOrder, second_order
from decompclip.tower.layers import blocks
from decompclip.tower.vit import HookedViT
from tests.decomposition.test_families import FAMILIES

CHOSEN = [3, 17, 40]
LINEAR = [name for name in FAMILIES if not name.startswith("post-norm")]
FAMILY = {**{name: FAMILIES[name] for name in LINEAR}, "QuickGELU": {"activation": "quick_gelu"}}


@pytest.fixture(params=FAMILY)
def family(request: pytest.FixtureRequest, make_tower: Callable[..., HookedViT]) -> HookedViT:
    return make_tower(dtype=torch.float64, n_layers=4, **FAMILY[request.param])


@pytest.fixture
def batch(images: Tensor) -> Tensor:
    return images.double()


def still(visual: HookedViT, seen: dict[str, Tensor], *, mlps: bool = True) -> list[Any]:
    """Hooks that hold attention and scales, and what MLPs put out, at what was seen."""
    ends = ("hook_pattern", "hook_scale", "hook_mlp_out") if mlps else ("hook_pattern", "hook_scale")
    return [
        (name, lambda x, hook: seen[hook.name])
        for name in seen
        if name.endswith(ends) and "ln_pre" not in name
    ]


@torch.no_grad()
def run(visual: HookedViT, images: Tensor, hooks: list[Any]) -> Tensor:
    with visual.hooks(fwd_hooks=hooks):
        return visual(images, pooled_rows=False)


@torch.no_grad()
def through_one_layer(visual: HookedViT, images: Tensor, layer: int, neuron: int) -> Tensor:
    """What the feature loses where one later layer's attention alone does not read what the neuron wrote, layer by layer."""
    seen: dict[str, Tensor] = {}
    whole = run(visual, images, [(lambda name: True, lambda x, hook: seen.update({hook.name: x.clone()}))])
    block, total = blocks(visual)[layer], torch.zeros_like(whole)
    scale = 1 if block.ls2 is None else block.ls2
    wrote = seen[f"blocks.{layer}.mlp.hook_post"][..., neuron, None] * block.mlp.W_out[:, neuron] * scale
    moved = wrote - wrote.mean(-1, keepdim=True)
    for later in range(layer + 1, visual.cfg.n_layers):
        held = [
            (name, hook)
            for name, hook in still(visual, seen)
            if not name.startswith(f"blocks.{later}.attn.hook_z")
        ]
        # what later layers' attention makes of the change stays out: one head is passed
        for after in range(later + 1, visual.cfg.n_layers):
            name = f"blocks.{after}.hook_attn_out"
            held.append((name, lambda x, hook: seen[hook.name]))
        name = f"blocks.{later}.ln1.hook_normalized"
        less = moved / seen[f"blocks.{later}.ln1.hook_scale"]
        held.append((name, lambda x, hook, less=less: x - less))
        total += whole - run(visual, images, held)
    return total


@pytest.mark.parametrize("layer", [0, 2])
def test_an_effect_is_the_change_of_the_network_held_still(
    family: HookedViT, batch: Tensor, layer: int
) -> None:
    found = second_order(family, batch, neurons[layer, CHOSEN])
    effects = found.effects(family, batch)
    for place, neuron in enumerate(CHOSEN):
        expected = through_one_layer(family, batch, layer, neuron)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(effects[:, place], expected, rtol=0, atol=1e-11)


def test_with_one_later_layer_own_term_and_second_order_are_all_of_it(
    family: HookedViT, batch: Tensor
) -> None:
    """Silence a neuron with attention, scales and later MLPs held: the feature loses the two, and nothing else."""
    layer, seen = family.cfg.n_layers - 2, {}
    whole = run(family, batch, [(lambda name: True, lambda x, hook: seen.update({hook.name: x.clone()}))])
    held = [(name, hook) for name, hook in still(family, seen) if name != f"blocks.{layer}.hook_mlp_out"]
    for neuron in CHOSEN:
        chosen = neurons[layer, neuron]
        lost = whole - run(family, batch, [*AblateNeurons(chosen).fwd_hooks(family), *held])
        own = neuron_terms(family, batch, chosen).terms[:, 0]
        effect = second_order(family, batch, chosen).effects(family, batch)[:, 0]
        torch.testing.assert_close(own + effect, lost, rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("normalize", [False, True])
def test_effects_equal_plain_loops(
    make_tower: Callable[..., HookedViT], batch: Tensor, normalize: bool
) -> None:
    """The formula as the paper has it, image by image, head by head, token by token, with LayerNorm's gain and scale."""
    visual = make_tower(dtype=torch.float64, layer_scale=True)
    features, cache = visual.run_with_cache(batch)
    block, found = blocks(visual), second_order(visual, batch, neurons[0, CHOSEN], normalize=normalize)
    proj: Any = visual.proj
    scales: list[Any] = [(each.ls1, each.ls2) for each in block]
    effects = found.effects(visual, batch)
    centre = torch.eye(32, dtype=torch.float64) - 1 / 32
    for i in range(len(batch)):
        end = centre @ torch.diag(visual.ln_final.w) @ proj / cache["ln_final.hook_scale"][i, 0]
        end = end / features[i].norm() if normalize else end
        for place, neuron in enumerate(CHOSEN):
            total = torch.zeros(20, dtype=torch.float64)
            for later in (1, 2):
                attn, ln = block[later].attn, block[later].ln1
                for head in range(4):
                    for token in range(7):
                        wrote = (
                            cache["blocks.0.mlp.hook_post"][i, token, neuron] * block[0].mlp.W_out[:, neuron]
                        )
                        read = (
                            (wrote * scales[0][1])
                            @ centre
                            / cache[f"blocks.{later}.ln1.hook_scale"][i, token]
                        )
                        value = (read * ln.w) @ attn.W_V[head]
                        looked = cache[f"blocks.{later}.attn.hook_pattern"][i, head, 0, token]
                        total += looked * (value @ attn.W_O[head] * scales[later][0]) @ end
            torch.testing.assert_close(effects[i, place], total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_moments_of_a_stream_are_those_of_all_effects(
    family: HookedViT, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worked on neuron by neuron."""
    monkeypatch.setattr(maps, "CACHED", 1)
    data = torch.randn(40, 3, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = second_order(family, data, neurons[1, CHOSEN], normalize=normalize, batch_size=7)
    effects = found.effects(family, data)
    mean = effects.mean(0)
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-12)
    past = effects - mean
    torch.testing.assert_close(found.spread, past.square().sum(2).mean(0).sqrt(), rtol=0, atol=1e-10)
    along = found.project(family, data.split(9))
    torch.testing.assert_close(along, torch.einsum("bnd,nd->bn", past, found.direction), rtol=0, atol=1e-10)
    for place in range(len(CHOSEN)):
        _, values, vectors = torch.linalg.svd(past[:, place], full_matrices=False)
        assert float((vectors[0] @ found.direction[place]).abs()) == pytest.approx(1, abs=1e-8)
        lean = (past[:, place].square().sum(1) * along[:, place]).mean()
        assert float(lean / found.spread[place] ** 3) > 1e-6
        assert float(found.share[place]) == pytest.approx(
            float(values[0].square() / values.square().sum()), abs=1e-9
        )
    mixed = second_order(family, data.flip(0), neurons[1, CHOSEN], normalize=normalize, batch_size=40)
    torch.testing.assert_close(mixed.direction, found.direction, rtol=0, atol=1e-8)


def test_moments_of_uneven_batches_are_those_of_all(make_tower: Callable[..., HookedViT]) -> None:
    """Beside plain means and sums; fewer neurons than paths, and none of the batches as long as another."""
    visual = make_tower(dtype=torch.float64)
    paths = module.Paths.named(visual, neurons[0, CHOSEN])
    draws = torch.Generator().manual_seed(4)
    coords = 3 + torch.randn(12, paths.number, len(CHOSEN), dtype=torch.float64, generator=draws)
    lengths = 1 + torch.rand(12, dtype=torch.float64, generator=draws)
    moments = module.PathMoments(paths)
    for x, length in zip(coords.split([1, 7, 4]), lengths.split([1, 7, 4]), strict=True):
        moments.add(x, length)
    past = (coords - coords.mean(0)).permute(2, 0, 1)  # [neuron image path]
    assert moments.count == 12 and moments.length == pytest.approx(float(lengths.mean()), rel=1e-12)
    torch.testing.assert_close(moments.mean, coords.mean(0).T)
    torch.testing.assert_close(moments.squares, past.mT @ past)
    square = (torch.einsum("nip,pnd->nid", past, paths.maps(slice(None)))).square().sum(2, keepdim=True)
    torch.testing.assert_close(moments.lean, (square * past).sum(1), rtol=1e-9, atol=1e-9)


def test_a_side_counts_as_stronger_past_rounding(family: HookedViT, batch: Tensor) -> None:
    """The mean lean, beside the cube of the spread: against the mean effect past the root of the precision, with it below."""
    paths, eps = module.Paths.named(family, neurons[1, CHOSEN]), torch.finfo(torch.float64).eps
    moments = module.PathMoments(paths)
    moments.add(*paths.coords(batch, False))
    mean, direction, spread, _ = module._principal(paths, moments, slice(None))
    lean = torch.einsum("np,pnd->nd", moments.lean / moments.count, paths.maps(slice(None)))
    side, with_mean = (lean * direction).sum(1), (mean * direction).sum(1)
    for times, expected in ((0.5, 1.0), (2.0, -1.0)):
        factor = -times * eps**0.5 * spread**3 / side * with_mean.sign()  # on the other side than the mean's
        held, moments.lean = moments.lean, moments.lean * factor[:, None]
        _, found, _, _ = module._principal(paths, moments, slice(None))
        moments.lean = held
        torch.testing.assert_close((found * mean).sum(1).sign(), torch.full_like(side, expected))
        torch.testing.assert_close(found.norm(dim=1), torch.ones_like(side))


@torch.no_grad()
def test_what_counts_as_rounding_goes_by_the_features_length_and_the_own_mean(
    family: HookedViT, batch: Tensor
) -> None:
    paths, eps = module.Paths.named(family, neurons[1, CHOSEN]), torch.finfo(torch.float64).eps
    moments = module.PathMoments(paths)
    moments.add(*paths.coords(batch, False))
    mean, _, spread, _ = module._principal(paths, moments, slice(None))
    largest = spread / (module.ROUNDING * eps)  # what a spread may stand beside
    own = moments.mean
    for place in range(len(CHOSEN)):
        for times, told in ((0.99, True), (1.01, False)):
            moments.mean, moments.length = 0 * own, float(times * largest[place])
            assert bool(module._principal(paths, moments, slice(None))[1][place].any()) == told
            moments.mean, moments.length = own.clone(), 0.0
            moments.mean[place] *= times * largest[place] / mean[place].norm()
            expected = [told if i == place else True for i in range(len(CHOSEN))]
            assert module._principal(paths, moments, slice(None))[1].any(1).tolist() == expected


def test_without_a_stronger_side_the_sign_is_that_of_the_mean(family: HookedViT, batch: Tensor) -> None:
    """Two images lie as far from their mean on the one side as on the other."""
    found = second_order(family, batch[:2], neurons[1, CHOSEN])
    assert bool(((found.direction * found.mean).sum(1) > 0).all())


def test_what_varies_by_rounding_alone_has_no_direction(make_tower: Callable[..., HookedViT]) -> None:
    visual = make_tower(n_layers=4)
    images = torch.randn(16, 3, 24, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        blocks(visual)[1].mlp.W_out[:, 17] *= 1e-9
    found = second_order(visual, images, neurons[1, CHOSEN])
    torch.testing.assert_close(
        found.direction.norm(dim=1), torch.tensor([1, 0, 1.0]).double(), rtol=0, atol=1e-6
    )
    assert float(found.share[1]) == 0 and 0 < float(found.spread[1]) < 1e-8 and float(found.share[0]) > 0
    alone = second_order(visual, images, neurons[1, 17])
    assert not alone.direction.any() and not alone.project(visual, images).any()


def test_autocast_rounds_the_tower_and_not_the_effects(family: HookedViT, images: Tensor) -> None:
    """Effects, what ablation takes out and projections come from the same rounded activations, and agree in full."""
    visual = family.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = second_order(visual, images, neurons[1, CHOSEN])
        effects = found.effects(visual, images)
        # the same hooks, with which the tower takes the same kernels, and rounds alike
        whole, _, _ = module.Paths.named(visual, neurons[1, CHOSEN]).seen(images, False)
        edited = found.mean_ablate(visual, images)
        along = found.project(visual, images)
    past = effects.double() - found.mean
    close: Any = {"rtol": 1e-5, "atol": 1e-5 * float(effects.abs().max())}
    assert effects.dtype == along.dtype == torch.float32 and close["atol"] > 1e-8
    torch.testing.assert_close(effects.double().mean(0), found.mean, **close)
    torch.testing.assert_close(along.double(), (past * found.direction).sum(2), **close)
    lost = (whole.features - edited.features).double()
    torch.testing.assert_close(lost, past.sum(1), rtol=1e-4, atol=1e-6 * float(whole.features.abs().max()))


@pytest.mark.parametrize("normalize", [False, True])
def test_mean_ablation_takes_out_what_differs_from_the_mean(
    family: HookedViT, batch: Tensor, normalize: bool
) -> None:
    found = second_order(family, batch, neurons[1, CHOSEN], normalize=normalize)
    other = torch.randn(4, 3, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    d = decompose(family, other, normalize=normalize)
    edited = found.mean_ablate(family, other)
    lost = (found.effects(family, other) - found.mean).sum(1)
    torch.testing.assert_close(edited.features, d.features - lost, rtol=0, atol=1e-11)
    torch.testing.assert_close(edited.heads[:, :2], d.heads[:, :2], rtol=0, atol=1e-13)
    torch.testing.assert_close(edited.mlps, d.mlps, rtol=0, atol=1e-13)
    one = found.select([2]).mean_ablate(family, other)
    torch.testing.assert_close(
        one.features, d.features - (found.effects(family, other) - found.mean)[:, 2], rtol=0, atol=1e-11
    )
    # over the images of the mean nothing is lost on average
    same = found.mean_ablate(family, batch).features - decompose(family, batch, normalize=normalize).features
    torch.testing.assert_close(same.mean(0), torch.zeros_like(same[0]), rtol=0, atol=1e-11)


class Largest(TorchDispatchMode):
    """The most numbers that any operation put out."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_nothing_of_the_size_of_tokens_times_neurons_times_width_is_formed(
    make_tower: Callable[..., HookedViT], monkeypatch: pytest.MonkeyPatch
) -> None:
    visual = make_tower(n_layers=3, d_mlp=512, image_size=(40, 40), patch_size=(4, 4), n_heads=2, d_head=16)
    data = torch.randn(12, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(maps, "CACHED", 2**16)  # the joint space is worked on a few neurons at a time
    most = {}
    for n in (6, 12):
        with Largest() as largest:
            found = second_order(visual, data[:n], neurons[1], batch_size=2)
        most[n] = largest.most
        with Largest() as largest:
            found.mean_ablate(visual, data[:2])
        assert len(found) == 512 and largest.most <= 2 * 101 * 512
    assert module._slices(module.Paths.named(visual, neurons[1]))[-1].stop == 512
    tokens, width = visual.cfg.n_tokens, visual.cfg.d_model
    # The MLP's own activations of a batch are the largest: twice the images take no more.
    assert most[6] == most[12] == 2 * tokens * 512 < tokens * 512 * width


@pytest.fixture(scope="module")
def model() -> HookedCLIP:
    return load_bundled("shapes")


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return Shapes(96, seed=31).draw(range(96)).images


@pytest.fixture(scope="module")
def found(model: HookedCLIP, pixels: Tensor) -> SecondOrder:
    return second_order(model, model.normalize(pixels), neurons[3])


def test_directions_of_a_clip_have_words_that_say_what_moves_them(
    model: HookedCLIP, pixels: Tensor, found: SecondOrder
) -> None:
    assert len(found) == model.cfg.d_mlp and all(found.words) and bool((found.fidelity > 0).all())
    pool = module.text_pool(model, None, 5, class_names=model.class_names)
    features = dict(zip(pool.texts, pool.features, strict=True))
    combined = [sum((w * features[t] for t, w in words), start=torch.zeros(128)) for words in found.words]
    with torch.no_grad():
        seen = F.normalize(model.encode_image(model.normalize(pixels)), dim=1).double()
    similar = seen @ F.normalize(torch.stack(combined), dim=1).T.double()
    past = found.effects(model, model.normalize(pixels)) - found.mean
    order = past.norm(dim=2).argsort(dim=0)
    sides = (past * found.direction).sum(2).gather(0, order[-10:]) > 0
    most, least = (similar.gather(0, at).mean(0) for at in (order[-10:], order[:10]))
    # by the sign of the mean effect 0.59 and 0.57 of the neurons
    assert float((most > least).double().mean()) > 0.7
    assert float((sides.double().mean(0) >= 0.5).double().mean()) > 0.97
    top = found.top(5)
    for words in found.words:
        weights = [w for _, w in words]
        assert weights == sorted(weights, reverse=True) and weights[-1] > 0
    assert f"({module.show_words(top.words[0][:2])})" in repr(found)
    whole = found.effects(model, model.normalize(pixels[:4]))
    few = top.effects(model, model.normalize(pixels[:4]))
    places = found.spread.argsort(descending=True, stable=True)[:5]
    torch.testing.assert_close(few, whole[:, places], rtol=1e-4, atol=1e-6)


def test_tables_and_figures_say_the_same(found: SecondOrder) -> None:
    frame, top = found.to_frame(), found.top(3)
    assert list(frame.columns) == ["layer", "neuron", "spread", "share", "mean", "fidelity", "texts"]
    assert frame["spread"].tolist() == pytest.approx(found.spread.tolist())
    assert frame["mean"].tolist() == pytest.approx(found.mean.norm(dim=1).tolist())
    plot: Any = top.figure()
    assert list(plot.data[0].x) == pytest.approx(top.spread.tolist())
    assert list(plot.data[1].x) == pytest.approx((top.spread * top.share.sqrt()).tolist())
    notes = [module.show_words(words) for words in top.words]
    named = [f"{label}: {words[0][0]}" for label, words in zip(top.labels, top.words, strict=True)]
    assert [list(row) for row in plot.data[0].customdata] == list(map(list, zip(named, notes, strict=True)))
    assert top.labels[0] in repr(found) and top.labels[0] in found._repr_html_()


@pytest.mark.usefixtures("ours_alone")
def test_mistakes_are_told(
    make_tower: Callable[..., HookedViT], model: HookedCLIP, pixels: Tensor, found: SecondOrder
) -> None:
    images, last = model.normalize(pixels[:3]), model.cfg.n_layers - 1
    mistakes: list[tuple[Any, dict[str, Any], str]] = [
        (neurons[last], {}, "heads behind it"),
        (neurons[1:3], {}, "layers 1, 2"),
        (heads[1], {}, "expected neurons alone"),
        (neurons[1, 0], {"texts": ["a star"]}, "texts that the text tower tells apart"),
        (neurons[1, 0], {"batch_size": 0}, "batch_size to be a whole number of images, at least 1"),
        (neurons[1, 0], {"batch_size": 2.5}, "at least 1; received 2.5"),
    ]
    for chosen, options, words in mistakes:
        with pytest.raises(ValueError, match=words):
            second_order(model, images, chosen, **options)
    for few in (images[:1], images[:0], []):
        with pytest.raises(ValueError, match="at least two images"):
            second_order(model, few, neurons[1, 0])
    with pytest.raises(TypeError, match="a model or image tower, .* received str: 'shapes'; load it"):
        second_order("shapes", images, neurons[1, 0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(IndexError, match="neuron"):
        second_order(model, images, neurons[1, 10_000])
    with pytest.raises(ValueError, match="an image tower"):
        second_order(model.visual, images, neurons[1, 0], texts=["a star"])
    with pytest.raises(ValueError, match="expected a tower of two layers or more, .* received one of 1"):
        second_order(make_tower(n_layers=1), images, neurons[0, 0])
    with pytest.raises(ValueError, match="without a LayerNorm behind its MLPs"):
        second_order(make_tower(norm="post"), images, neurons[1, 0])
    other = load_bundled("shapes-badnet")
    for use in (found.effects, found.project, found.mean_ablate):
        with pytest.raises(ValueError, match="other weights"):
            use(other, images)
    with pytest.raises(ValueError, match="received none"):
        found.project(model, [])
    for k in (0, "3"):
        with pytest.raises(ValueError, match=f"a whole number of neurons, at least 1; received {k!r}"):
            found.top(k)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="expected places of neurons"):
        found.select([])


def test_too_many_moments_are_refused_before_they_are_made(
    make_tower: Callable[..., HookedViT], batch: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    visual = make_tower(dtype=torch.float64)
    whole = 2 * 48 * 8**2 * 8  # bytes: squares and products of 8 paths, of 48 neurons
    for free, fewer in ((2_000, 1), (whole - 1, 47)):
        monkeypatch.setattr(module, "room", lambda device, free=free: free)
        with pytest.raises(ValueError, match=rf"name fewer, such as neurons\[layer, :{fewer}\]"):
            second_order(visual, batch, neurons[0])
    monkeypatch.setattr(module, "room", lambda device: whole)
    assert len(second_order(visual, batch, neurons[0])) == 48
