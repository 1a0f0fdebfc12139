"""The protocol: restriction image by image, noise, other images' components, repair, neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from decompclip.cache.capture import decompose
from decompclip.cache.components import Components, embed, everything, heads, layers, mlps, neurons
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.moments import Moments
from decompclip.models.vit import HookedViT
from decompclip.operators.ablation import MeanAblate, ZeroAblate
from decompclip.operators.intervention import Intervention
from decompclip.operators.neurons import AblateNeurons, mean_neurons, neuron_terms
from decompclip.operators.noise import RandomAblate
from decompclip.operators.tokens import AblateTokens
from decompclip.operators.transplant import Patch, Repair, ResampleAblate, decomp_reverse

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
N_COMPONENTS = 3 * 4 + 3 + 1


def drawn(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 24, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def others() -> Tensor:
    return drawn(5, 9)


@pytest.fixture(scope="module")
def moments(tower: HookedViT) -> Moments:
    return Moments.fit(tower, [drawn(16, 5)])


@pytest.fixture(scope="module")
def d(tower: HookedViT, images: Tensor) -> Decomposition:
    return decompose(tower, images)


@pytest.fixture(scope="module")
def source(tower: HookedViT, others: Tensor) -> Decomposition:
    return decompose(tower, others)


def causal(tower: HookedViT, images: Tensor, edit: Intervention, **options: Any) -> Tensor:
    with tower.hooks(fwd_hooks=edit.fwd_hooks(tower, **options)):
        return tower(images)


def at_frozen_scale(tower: HookedViT, images: Tensor, edit: Intervention) -> Tensor:
    """Causal, but for the last LayerNorm, which divides as it did."""
    scales: list[Tensor] = []
    with tower.hooks(fwd_hooks=[("ln_final.hook_scale", lambda s, hook: scales.append(s.clone()))]):
        tower(images)
    hooks: list[Any] = [*edit.fwd_hooks(tower), ("ln_final.hook_scale", lambda s, hook: scales[0])]
    with tower.hooks(fwd_hooks=hooks):
        return tower(images)


# Restriction


def edits(d: Decomposition, moments: Moments, images: Tensor, others: Tensor) -> list[Intervention]:
    chosen = heads[1:] | mlps[0] | embed
    return [
        ZeroAblate(chosen),
        MeanAblate(chosen, moments),
        RandomAblate(chosen, moments),
        ZeroAblate(heads[0]) | MeanAblate(mlps[1:], moments),
    ]


def test_a_component_mask_restricts_every_kind_of_component(
    tower: HookedViT, images: Tensor, others: Tensor, d: Decomposition, moments: Moments
) -> None:
    where = torch.rand(5, N_COMPONENTS, generator=torch.Generator().manual_seed(0)) < 0.5
    for edit in edits(d, moments, images, others):
        whole, part = edit(d), edit(d, where=where)
        of_heads, of_mlps, of_embed = where[:, :12].view(5, 3, 4), where[:, 12:15], where[:, 15]
        torch.testing.assert_close(
            part.coords, torch.where(of_heads[..., None], whole.coords, d.coords), rtol=0, atol=0
        )
        torch.testing.assert_close(
            part.mlps, torch.where(of_mlps[..., None], whole.mlps, d.mlps), rtol=0, atol=0
        )
        torch.testing.assert_close(
            part.embed, torch.where(of_embed[:, None], whole.embed, d.embed), rtol=0, atol=0
        )
        together = causal(tower, images, edit, where=where)
        for i in range(5):
            alone = causal(tower, images[i : i + 1], edit, where=where[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, **CLOSE)
        assert edit(d, where=torch.zeros_like(where)) is d


def test_the_mask_has_the_order_of_flat(d: Decomposition) -> None:
    chosen = heads[2, 1] | mlps[1]
    where = chosen.resolve(3, 4).flat.expand(5, -1)
    torch.testing.assert_close(
        ZeroAblate(everything)(d, where=where).features, ZeroAblate(chosen)(d).features
    )
    assert ZeroAblate(everything)(d, where=embed.resolve(3, 4).flat.expand(5, -1)).embed.abs().sum() == 0


def test_a_restricted_edit_is_one_with_where(tower: HookedViT, images: Tensor, d: Decomposition) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(5, 3, 4, generator=generator) < 0.6 for _ in range(2))
    edit = ZeroAblate(layers[1:])
    torch.testing.assert_close(edit.on(a)(d).features, edit(d, where=a).features)
    torch.testing.assert_close(edit.on(a)(d, where=b).features, edit(d, where=a & b).features)
    torch.testing.assert_close(causal(tower, images, edit.on(a)), causal(tower, images, edit, where=a))
    torch.testing.assert_close((edit.on(a) | edit)(d).features, edit(d).features)
    assert repr(edit.on(a)) == f"(ZeroAblate(layers[1:])).on({int(a.sum())} of 60 components)"
    with pytest.raises(ValueError, match=r"of the shape \[5, 3, 4\] that .* received \[5, 16\]; give both"):
        edit.on(a)(d, where=torch.ones(5, 16, dtype=torch.bool))


def test_whole_layers(d: Decomposition) -> None:
    torch.testing.assert_close(
        ZeroAblate(layers[-1])(d).features, ZeroAblate(heads[-1] | mlps[-1])(d).features
    )


# Noise


@pytest.mark.parametrize("convention", ["centred", "paper"])
def test_noise_has_its_length_and_a_direction_of_its_seed(
    tower: HookedViT, images: Tensor, convention: Any
) -> None:
    d = decompose(tower, images, convention=convention)
    moments = Moments.fit(tower, [drawn(16, 5)], convention=convention)
    matched = RandomAblate(everything, moments)(d)
    lengths = moments.heads.norm(dim=-1).float().expand(5, -1, -1)
    torch.testing.assert_close(matched.heads.norm(dim=-1), lengths, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(matched.mlps.norm(dim=-1), moments.mlps.norm(dim=-1).float().expand(5, -1))
    unit = RandomAblate(everything, scale="unit")(d)
    for terms in (unit.heads, unit.mlps, unit.embed):
        torch.testing.assert_close(
            terms.norm(dim=-1), torch.full(terms.shape[:-1], 20**0.5), rtol=1e-3, atol=0
        )
    assert torch.equal(unit.mlps[0], unit.mlps[4])
    again = RandomAblate(mlps[1], scale="unit")(d)
    torch.testing.assert_close(again.mlps[:, 1], unit.mlps[:, 1])
    other = RandomAblate(everything, scale="unit", seed=1)(d)
    assert torch.cosine_similarity(other.heads[0], unit.heads[0], dim=-1).abs().max() < 0.99


@pytest.mark.parametrize(("scale", "length"), [("unit", 32**0.5), ("matched", None)])
def test_causal_noise(
    tower: HookedViT, images: Tensor, moments: Moments, scale: Any, length: float | None
) -> None:
    edit = RandomAblate(heads[1, 2] | mlps[0], moments, scale=scale)
    with tower.hooks(fwd_hooks=edit.fwd_hooks(tower)):
        _, cache = tower.run_with_cache(images)
    assert moments.streams is not None
    expected = moments.streams.mlp_out[0].norm(dim=-1).float() if length is None else torch.full((7,), length)
    torch.testing.assert_close(cache["mlp_out", 0].norm(dim=-1), expected.expand(5, -1), **CLOSE)
    z = cache["z", 1][:, :, 2]
    expected = moments.streams.z[1, :, 2].norm(dim=-1).float() if length is None else torch.full((7,), 8**0.5)
    torch.testing.assert_close(z.norm(dim=-1), expected.expand(5, -1), **CLOSE)


# Other images' components


@pytest.mark.parametrize("components", [heads[1, 2], mlps[:2] | embed, layers[-1], everything], ids=repr)
def test_a_patch_is_what_the_source_has(
    d: Decomposition, source: Decomposition, components: Components
) -> None:
    patched = Patch(components, source)(d)
    rest = everything - components
    torch.testing.assert_close(
        patched.features - patched.bias,
        ZeroAblate(rest)(source).features - source.bias + ZeroAblate(components)(d).features - d.bias,
        **CLOSE,
    )


def test_patching_all_that_is_upstream_gives_the_sources_run(
    tower: HookedViT, images: Tensor, others: Tensor, source: Decomposition
) -> None:
    for components in (embed, everything, embed | heads[0]):
        edit = Patch(components, source, images=others)
        torch.testing.assert_close(causal(tower, images, edit), tower(others), **CLOSE)
    with tower.hooks(fwd_hooks=Patch(heads[0, 1] | mlps[1], source, images=others).fwd_hooks(tower)):
        _, patched = tower.run_with_cache(images)
    _, cache = tower.run_with_cache(others)
    torch.testing.assert_close(patched["z", 0][:, :, 1], cache["z", 0][:, :, 1])
    torch.testing.assert_close(patched["mlp_out", 1], cache["mlp_out", 1])


def test_resampling_takes_each_component_from_another_image(d: Decomposition) -> None:
    resampled = ResampleAblate(everything, d, seed=3)(d)
    sources = (resampled.coords[:, None] == d.coords[None]).all(-1)  # [batch, source, layer, head]
    assert (sources.sum(1) == 1).all()
    assert not sources.diagonal(dim1=0, dim2=1).any()
    assert len({tuple(row.tolist()) for row in sources[0].flatten(1).T}) > 1  # not one image for all
    from_mlps = (resampled.mlps[:, None] == d.mlps[None]).all(-1)
    assert (from_mlps.sum(1) == 1).all() and not from_mlps.diagonal(dim1=0, dim2=1).any()
    again = ResampleAblate(everything, d, seed=3)(d)
    assert torch.equal(again.coords, resampled.coords)
    assert not torch.equal(ResampleAblate(everything, d, seed=4)(d).coords, resampled.coords)


def test_resampling_draws_alike_in_both_modes(
    tower: HookedViT, images: Tensor, others: Tensor, d: Decomposition, source: Decomposition
) -> None:
    """What a component receives comes from one image of the source, whichever the mode."""
    edit = ResampleAblate(heads[0] | mlps[0], source, images=others)
    with tower.hooks(fwd_hooks=edit.fwd_hooks(tower)):
        _, cache = tower.run_with_cache(images)
    _, before = tower.run_with_cache(others)
    direct = edit(d)
    for i in range(5):
        for head in range(4):
            origin = int((direct.coords[i, 0, head] == source.coords[:, 0, head]).all(-1).nonzero())
            torch.testing.assert_close(cache["z", 0][i, :, head], before["z", 0][origin, :, head])
        origin = int((direct.mlps[i, 0] == source.mlps[:, 0]).all(-1).nonzero())
        torch.testing.assert_close(cache["mlp_out", 0][i], before["mlp_out", 0][origin])


class Fixed:
    """A selector that flags what it was told to."""

    def __init__(self, flags: Tensor) -> None:
        self.told = flags

    def flags(self, d: Decomposition) -> Tensor:
        return self.told

    def __repr__(self) -> str:
        return "Fixed()"


def test_repair_edits_what_is_flagged(
    tower: HookedViT, images: Tensor, d: Decomposition, moments: Moments
) -> None:
    flags = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(2)) < 0.4
    fill = MeanAblate(heads, moments)
    repair = Repair(Fixed(flags), fill)
    torch.testing.assert_close(repair(d).coords, fill(d, where=flags).coords)
    torch.testing.assert_close(causal(tower, images, repair.at(d)), causal(tower, images, fill, where=flags))
    torch.testing.assert_close(
        causal(tower, images, repair, where=flags), causal(tower, images, fill, where=flags)
    )
    with pytest.raises(ValueError, match=r"expected where, .* use repair.at\(model.decompose\(images\)\)"):
        repair.fwd_hooks(tower)
    assert repr(repair).startswith("Repair(Fixed(), MeanAblate(heads, ")


def test_decomp_reverse_copies_flagged_heads_into_the_twin(
    tower: HookedViT, images: Tensor, others: Tensor, d: Decomposition, source: Decomposition
) -> None:
    flags = torch.zeros(5, 3, 4, dtype=torch.bool)
    flags[1, 2, 3] = flags[4, 0] = True
    reverse = decomp_reverse(source, Fixed(flags), images=others)
    torch.testing.assert_close(
        reverse(d).heads, torch.where(flags[..., None], source.heads, d.heads), **CLOSE
    )
    torch.testing.assert_close(reverse(d).mlps, d.mlps, rtol=0, atol=0)
    changed = causal(tower, images, reverse)
    assert torch.equal((changed - tower(images)).abs().amax(1) > 1e-4, flags.flatten(1).any(1))


# Neurons


@pytest.mark.parametrize("convention", ["centred", "paper"])
@pytest.mark.parametrize("normalize", [False, True])
def test_all_neurons_and_the_bias_sum_to_the_mlps_term(
    tower: HookedViT, images: Tensor, convention: Any, normalize: bool
) -> None:
    d = decompose(tower, images, convention=convention, normalize=normalize)
    terms = neuron_terms(tower, images, neurons, convention=convention, normalize=normalize)
    by_layer = terms.terms.unflatten(1, (3, 48)).sum(2)
    silent = d.mlps - by_layer
    # What is left is the output bias: the same for all layers' images up to their scale, plus shared constants.
    gone = AblateNeurons(neurons, terms=terms)(d)
    torch.testing.assert_close(gone.mlps, silent, **CLOSE)
    if convention == "centred" and not normalize:
        _, cache = tower.run_with_cache(images)
        scaled = silent * cache["ln_final.hook_scale"][:, 0, None]
        torch.testing.assert_close(scaled, scaled[:1].expand(5, -1, -1), **CLOSE)


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "mean", "n_prefix": 0},
        {"pool": "mean", "ln_final": "pooled", "n_prefix": 1},
        {"pool": "attention", "pool_heads": 4, "pool_mlp": 24, "n_prefix": 0},
        {"gated": True, "mlp_norm": True},
    ],
    ids=["mean", "mean_then_norm", "attention", "gated"],
)
def test_neurons_of_other_towers(make_tower: Callable[..., HookedViT], images: Tensor, changes: Any) -> None:
    """All neurons and the output bias, whose term is that of an MLP whose neurons are silent, make up the MLP."""
    tower = make_tower(**changes)
    d, terms = decompose(tower, images), neuron_terms(tower, images, neurons[-1])
    left = AblateNeurons(neurons[-1], terms=terms)(d).mlps[:, -1]
    torch.testing.assert_close(left, d.mlps[:, -1] - terms.terms.sum(1), **CLOSE)
    # What reads the last stream reads as it did: only then is the feature linear in the stream.
    reading = ["ln_final.hook_scale", *(["pool.hook_pattern"] if changes.get("pool") == "attention" else [])]
    seen: dict[str, Tensor] = {}
    with tower.hooks(fwd_hooks=[(name, lambda x, hook: seen.update({hook.name: x})) for name in reading]):
        tower(images)
    hooks: list[Any] = [(name, lambda x, hook: seen[hook.name]) for name in reading]
    with tower.hooks(fwd_hooks=[*AblateNeurons(neurons[-1]).fwd_hooks(tower), *hooks]):
        silent = decompose(tower, images)
    torch.testing.assert_close(left, silent.mlps[:, -1], **CLOSE)


def test_a_neuron_of_the_last_mlp_is_the_same_in_both_modes(
    tower: HookedViT, images: Tensor, others: Tensor, d: Decomposition
) -> None:
    chosen = neurons[-1, [3, 17]] | neurons[-1, 40:]
    terms = neuron_terms(tower, images, chosen)
    edit = AblateNeurons(chosen, terms=terms)
    torch.testing.assert_close(at_frozen_scale(tower, images, edit), edit(d).features, **CLOSE)
    mean = mean_neurons(tower, others.split(2), chosen)
    whole = neuron_terms(tower, others, chosen)
    torch.testing.assert_close(mean.post, whole.post.mean(0, keepdim=True))
    torch.testing.assert_close(mean.coords, whole.coords.mean(0, keepdim=True))


def test_neurons_are_set_at_the_tokens_asked_for(tower: HookedViT, images: Tensor, others: Tensor) -> None:
    chosen = neurons[1, [3, 17]]
    mean = mean_neurons(tower, [others], chosen)
    where = torch.zeros(5, N_COMPONENTS, dtype=torch.bool)
    where[1:3, 13] = True
    for edit, rows in ((AblateNeurons(chosen, fill=mean, rows=(0, 2)), [0, 2]),):
        _, before = tower.run_with_cache(images)
        with tower.hooks(fwd_hooks=edit.fwd_hooks(tower, where=where)):
            _, after = tower.run_with_cache(images)
        expected = before["post", 1].clone()
        for i in (1, 2):
            for row in rows:
                expected[i, row, [3, 17]] = mean.post[0, row]
        torch.testing.assert_close(after["post", 1], expected, rtol=0, atol=0)


def test_a_patched_neuron_is_the_sources(
    tower: HookedViT, images: Tensor, others: Tensor, d: Decomposition
) -> None:
    chosen = neurons[2, 5]
    terms, fill = neuron_terms(tower, images, chosen), neuron_terms(tower, others, chosen)
    edit = AblateNeurons(chosen, terms=terms, fill=fill)
    torch.testing.assert_close(edit(d).mlps[:, 2] - d.mlps[:, 2], (fill.terms - terms.terms)[:, 0], **CLOSE)
    none = torch.zeros(5, N_COMPONENTS, dtype=torch.bool)
    torch.testing.assert_close(edit(d, where=none).mlps, d.mlps)


# Tokens


@pytest.mark.parametrize("kind", ["numbers", "mask", "masks"])
def test_deaf_heads_of_the_last_block_are_the_same_in_both_modes(
    tower: HookedViT, images: Tensor, kind: str
) -> None:
    drawn_tokens = torch.rand(5, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    tokens: Any = {"numbers": (0, -2), "mask": drawn_tokens[0], "masks": drawn_tokens}[kind]
    d = decompose(tower, images, tokens=True)
    # The last MLP reads the heads; without it, nothing but the last LayerNorm does.
    edit = AblateTokens(heads[-1, 1:], tokens) | ZeroAblate(mlps[-1])
    where = torch.ones(5, 3, 4, dtype=torch.bool)
    where[2, 2, 1] = False
    for at in (edit, edit.on(where)):
        torch.testing.assert_close(at_frozen_scale(tower, images, at), at(d).features, **CLOSE)
    assert torch.equal(edit(d).coords[:, :2], d.coords[:, :2])
    assert not torch.equal(edit(d).coords[:, 2, 1:], d.coords[:, 2, 1:])


@pytest.mark.parametrize("convention", ["centred", "paper"])
def test_deaf_heads_behind_an_attention_pool(
    make_tower: Callable[..., HookedViT], images: Tensor, convention: Any
) -> None:
    tower = make_tower(pool="attention", pool_heads=4, n_prefix=0)
    d = decompose(tower, images, tokens=True, convention=convention)
    deaf = AblateTokens(heads[1:, 2], (1, 4))(d)
    for layer in (1, 2):
        shares = AblateTokens(heads, tuple(range(6)))(d).heads[:, layer, 2]  # what no token brings
        brought = d.tokens(layer, 2) - (shares / 6)[:, None]
        expected = d.heads[:, layer, 2] - brought[:, [1, 4]].sum(1)
        torch.testing.assert_close(deaf.heads[:, layer, 2], expected, **CLOSE)
    torch.testing.assert_close(deaf.heads[:, :, 1], d.heads[:, :, 1])


@pytest.mark.parametrize("convention", ["centred", "paper"])
def test_a_head_deaf_to_all_tokens_is_ablated(tower: HookedViT, images: Tensor, convention: Any) -> None:
    d = decompose(tower, images, tokens=heads[1], convention=convention)
    deaf = AblateTokens(heads[1], tuple(range(7)))
    torch.testing.assert_close(
        deaf(d).coords[..., :8], ZeroAblate(heads[1])(d).coords[..., :8], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        causal(tower, images, deaf), causal(tower, images, ZeroAblate(heads[1])), **CLOSE
    )
    with pytest.raises(LookupError, match="expected the tokens of heads"):
        AblateTokens(heads[2], (1,))(d)


@pytest.mark.usefixtures("ours_alone")
def test_errors_say_what_to_do(
    tower: HookedViT,
    images: Tensor,
    others: Tensor,
    d: Decomposition,
    source: Decomposition,
    moments: Moments,
    make_tower: Callable[..., HookedViT],
) -> None:
    with pytest.raises(ValueError, match=r"a scale of \('matched', 'unit'\); received 'big'"):
        RandomAblate(heads, moments, scale="big")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="expected moments, whose means the noise is to be as long as"):
        RandomAblate(heads)
    for edit in (Patch(heads, source), ResampleAblate(heads, source)):
        with pytest.raises(ValueError, match=r"expected the source's images, .*\(..., images=images\)"):
            edit.fwd_hooks(tower)
        with pytest.raises(
            ValueError, match="received convention='centred', normalize=False; decompose both"
        ):
            edit(decompose(tower, images, convention="paper"))
    other = decompose(make_tower(seed=3, layer_scale=True), images)
    with pytest.raises(ValueError, match="normalize=False of other weights; decompose both with one model"):
        Patch(heads, other)(d)
    with pytest.raises(
        ValueError, match=r"a source of 5 images, one for each .* received 3; pair the images"
    ):
        Patch(heads, source[:3])(d)
    with pytest.raises(ValueError, match=r"a batch of 3 images, as many as the source .* received 5"):
        causal(tower, images, Patch(heads, source[:3], images=others[:3]))
    with pytest.raises(ValueError, match="other images to draw from; received one of 1 images"):
        ResampleAblate(heads, d[:1])(d[:1])
    with pytest.raises(
        ValueError, match=r"pass terms=neuron_terms\(visual, images, neurons\[0\]\) of the same"
    ):
        AblateNeurons(neurons[0])(d)
    with pytest.raises(ValueError, match=r"expected neurons alone; received heads \| neurons\[0\]"):
        AblateNeurons(heads | neurons[0]).fwd_hooks(tower)
    with pytest.raises(IndexError, match=r"a neuron in 0\.\.47 .*received neuron 48"):
        neuron_terms(tower, images, neurons[0, 48])
    terms = neuron_terms(tower, images, neurons[0, 4])
    with pytest.raises(
        ValueError, match="neuron terms of 3 images, convention='centred', normalize=False; received"
    ):
        AblateNeurons(neurons[0, 4], terms=terms)(d[:3])
    with pytest.raises(ValueError, match="expected a fill of the neurons of the terms"):
        AblateNeurons(neurons[0, 4], terms=terms, fill=neuron_terms(tower, images, neurons[0, 5]))
    with pytest.raises(ValueError, match=r"a fill of the neurons neurons\[0, 5\]; received .* of others"):
        AblateNeurons(neurons[0, 5], fill=terms).fwd_hooks(tower)
    with pytest.raises(ValueError, match="expected batches of images; received none"):
        mean_neurons(tower, [], neurons[0])
    with pytest.raises(IndexError, match=r"tokens in 0\.\.6; received 9"):
        causal(tower, images, AblateTokens(heads, (0, 9)))
    with pytest.raises(
        ValueError, match=r"mask over 7 tokens; received torch.bool \[6\]; a mask of patches lacks"
    ):
        causal(tower, images, AblateTokens(heads, torch.ones(6, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"heads, for they alone read tokens; received layers\[0\]"):
        AblateTokens(layers[0], (1,)).fwd_hooks(tower)
