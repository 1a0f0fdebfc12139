"""Single neurons and single source tokens: their terms, and their ablation in both modes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import heads, layers, mlps, neurons
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.operators.ablation import MeanAblate, ZeroAblate
from decompclip.operators.intervention import Intervention
from decompclip.operators.neurons import AblateNeurons, mean_neurons, neuron_terms
from decompclip.operators.tokens import AblateTokens, TokenValues, mean_values
from decompclip.tower.vit import HookedViT

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
N_COMPONENTS = 3 * 4 + 3 + 1


def drawn(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 24, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def moments(tower: HookedViT) -> Moments:
    return Moments.fit(tower, [drawn(16, 5)])


@pytest.fixture(scope="module")
def d(tower: HookedViT, images: Tensor) -> Decomposition:
    return decompose(tower, images)


@pytest.fixture(scope="module")
def others() -> Tensor:
    return drawn(5, 9)


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
    feature, cache = tower.run_with_cache(images)
    length = feature.norm(dim=-1)[:, None, None] if normalize else torch.ones(5, 1, 1)
    if convention == "centred":
        scaled = silent * cache["ln_final.hook_scale"][:, 0, None] * length
        torch.testing.assert_close(scaled, scaled[:1].expand(5, -1, -1), **CLOSE)
    plain = neuron_terms(tower, images, neurons, convention=convention)
    torch.testing.assert_close(terms.terms * length, plain.terms)


def test_autocast_rounds_the_tower_and_not_the_terms(tower: HookedViT, images: Tensor) -> None:
    chosen, exact = neurons[-1, 20:], neuron_terms(tower, images, neurons[-1, 20:])
    with torch.autocast("cpu", torch.bfloat16):
        rough = neuron_terms(tower, images, chosen)
        scale: list[Tensor] = []
        hooks: list[Any] = [("blocks.2.mlp.hook_post", lambda x, hook: x)]
        hooks += [("ln_final.hook_scale", lambda x, hook: scale.append(x.float()))]
        with tower.hooks(fwd_hooks=hooks):
            tower(images)
    assert rough.coords.dtype == torch.float32 and torch.equal(rough.maps, exact.maps)
    torch.testing.assert_close(rough.coords[:, 0], rough.post[:, 0] / scale[0][:, 0])


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
    asked = mean_neurons(tower, [others], chosen, convention="paper", normalize=True)
    assert (asked.convention, asked.normalized) == ("paper", True)
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


def test_neuron_terms_are_a_table_and_bars(make_tower: Callable[..., HookedViT], images: Tensor) -> None:
    for changes in ({}, {"pool": "attention", "pool_heads": 4, "n_prefix": 0}):
        terms = neuron_terms(make_tower(**changes), images, neurons[1:, [3, 17]])
        frame: Any = terms.to_frame()
        assert list(zip(frame["layer"], frame["neuron"], strict=True)) == [(1, 3), (1, 17), (2, 3), (2, 17)]
        lengths = terms.terms.norm(dim=-1)
        torch.testing.assert_close(torch.tensor(frame["length"].to_numpy()), lengths.mean(0), **CLOSE)
        torch.testing.assert_close(torch.tensor(frame["largest"].to_numpy()), lengths.amax(0), **CLOSE)
        assert float(frame["activation"][2]) == pytest.approx(float(terms.post[..., 2].mean()), rel=1e-5)
        longest = frame.sort_values("length", ascending=False)
        bars, largest = cast(Any, terms.figure().data)
        assert list(bars.x) == pytest.approx(list(longest["length"]))
        assert list(largest.x) == pytest.approx(list(longest["largest"]))
        layout: Any = terms.figure().layout
        assert layout.yaxis.ticktext == tuple(
            f"neurons[{layer}, {neuron}]"
            for layer, neuron in zip(longest["layer"], longest["neuron"], strict=True)
        )
        assert layout.xaxis.title.text == "length of the term"
        assert "4 neurons, 5 images" in terms._repr_html_()


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


@torch.no_grad()
@pytest.mark.parametrize("convention", ["centred", "paper"])
@pytest.mark.parametrize(
    "pool", [{}, {"pool": "mean"}, {"pool": "attention", "pool_heads": 2, "pool_mlp": 8}]
)
def test_tokens_are_filled_with_their_means(
    make_tower: Callable[..., HookedViT], images: Tensor, pool: dict[str, Any], convention: Any
) -> None:
    visual = make_tower(dtype=torch.float64, **pool)
    images = images.double()
    fill = mean_values(visual, [images[:2], images[2:]])
    _, cache = visual.run_with_cache(images)
    for layer in range(3):
        torch.testing.assert_close(fill.values[layer], cache["v", layer].mean(0).transpose(0, 1))
    tokens = torch.zeros(5, 7, dtype=torch.bool)
    tokens[1, [2, 5]], tokens[3, :] = True, True
    edit = AblateTokens(heads[-1, 1:3], tokens, fill=fill)
    d = decompose(visual, images, tokens=True, convention=convention)
    found = edit(d)
    with visual.hooks(fwd_hooks=edit.fwd_hooks(visual)):
        z = visual.run_with_cache(images, names_filter="blocks.2.attn.hook_z")[1]["z", 2]
    pattern, v = cache["pattern", 2], cache["v", 2].clone()
    for image in range(5):
        for token in tokens[image].nonzero()[:, 0].tolist():
            v[image, token, 1:3] = cache["v", 2][:, token, 1:3].mean(0)
    torch.testing.assert_close(z, torch.einsum("bhqk,bkhe->bqhe", pattern, v))
    assert torch.equal(found.coords[~tokens.any(1)], d.coords[~tokens.any(1)])
    assert torch.equal(found.coords[:, :2], d.coords[:, :2]) and not torch.equal(found.coords, d.coords)
    # The feature, were the last scale as it was, and no last MLP there to read the edit.
    if "pool_mlp" not in pool and convention == "centred":
        both = edit | ZeroAblate(mlps[-1])
        torch.testing.assert_close(at_frozen_scale(visual, images, both), both(d).features)
    if "pool_mlp" not in pool:  # constants apart, a head's coordinates are z in both conventions
        plain = decompose(visual, images, tokens=True)
        torch.testing.assert_close((found.coords - d.coords)[..., :8], edit(plain).coords - plain.coords)
    terms = d.token_terms
    assert terms is not None
    mean = fill.values[-1] - (fill.bias[-1][:, None] if convention == "centred" else 0)
    other = terms.values.clone()
    other[:, -4:] = mean  # the last layer's heads
    swapped = replace(d, token_terms=replace(terms, values=other))
    for head in (1, 2) if convention == "centred" else ():
        change = (swapped.tokens(2, head) - d.tokens(2, head)) * tokens[..., None]
        torch.testing.assert_close(found.heads[:, 2, head], d.heads[:, 2, head] + change.sum(1))
    same = TokenValues(torch.stack([cache["v", i][0].transpose(0, 1) for i in range(3)]), fill.bias)
    kept = AblateTokens(heads, tuple(range(7)), fill=same)(d[:1])  # its own values: nothing changes
    torch.testing.assert_close(kept.coords, d[:1].coords)
    assert "fill=TokenValues(3 layers x 4 heads, 7 tokens)" in repr(edit)
    fewer = make_tower(n_layers=2, dtype=torch.float64)
    for use in (lambda: edit.fwd_hooks(fewer), lambda: edit(decompose(fewer, images, tokens=True))):
        with pytest.raises(ValueError, match="mean_values of the same tower"):
            use()
    with pytest.raises(ValueError, match="expected batches of images"):
        mean_values(visual, [])


@pytest.mark.usefixtures("ours_alone")
def test_errors_say_what_to_do(
    make_tower: Callable[..., HookedViT],
    tower: HookedViT,
    images: Tensor,
    d: Decomposition,
    moments: Moments,
) -> None:
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
    other = decompose(make_tower(seed=8), images)
    with pytest.raises(ValueError, match="terms of the model that was decomposed; .* of other weights; make"):
        AblateNeurons(neurons[0, 4], terms=terms)(other)
    for unlike in (
        neuron_terms(tower, images, neurons[0, 5]),
        neuron_terms(tower, images, neurons[0, 4], normalize=True),
    ):
        with pytest.raises(ValueError, match="expected a fill of the neurons of the terms"):
            AblateNeurons(neurons[0, 4], terms=terms, fill=unlike)
    fill = neuron_terms(make_tower(seed=8), images, neurons[0, 4])
    for use in (
        lambda: AblateNeurons(neurons[0, 4], terms=terms, fill=fill),
        lambda: AblateNeurons(neurons[0, 4], fill=fill).fwd_hooks(tower),
    ):
        with pytest.raises(ValueError, match="a fill of the model that is edited; .* of other weights"):
            use()
    for named, words in (
        (neurons[0, [4, 5]], r"expected terms of neurons\[0, \[4, 5\]\]; received .* of others; make them"),
        (heads | neurons[0, 4], r"expected neurons alone; received heads \| neurons\[0, 4\]"),
    ):
        with pytest.raises(ValueError, match=words):
            AblateNeurons(named, terms=terms)(d)
    with pytest.raises(ValueError, match=r"a fill of the neurons neurons\[0, 5\]; received .* of others"):
        AblateNeurons(neurons[0, 5], fill=terms).fwd_hooks(tower)
    with pytest.raises(ValueError, match="expected batches of images; received none"):
        mean_neurons(tower, [], neurons[0])
    with pytest.raises(IndexError, match=r"tokens in 0\.\.6; received 9"):
        causal(tower, images, AblateTokens(heads, (0, 9)))
    with pytest.raises(ValueError, match=r"mask over 7 tokens; received \[6\]; a mask of patches lacks"):
        causal(tower, images, AblateTokens(heads, torch.ones(6, dtype=torch.bool)))
    for use in (lambda edit: edit.fwd_hooks(tower), lambda edit: edit(decompose(tower, images, tokens=True))):
        with pytest.raises(ValueError, match=r"heads, for they alone read tokens; received layers\[0\]"):
            use(AblateTokens(layers[0], (1,)))
    masks = torch.ones(3, 7, dtype=torch.bool)
    for use in (
        lambda edit: causal(tower, images, edit),
        lambda edit: edit(decompose(tower, images, tokens=True)),
    ):
        with pytest.raises(
            ValueError, match=r"a mask for each of 5 images, or one for all; received \[3, 7\]"
        ):
            use(AblateTokens(heads, masks))
    nonsense: list[Any] = [(), [1, 2], "cls", torch.ones(7), masks[None]]
    for tokens in nonsense:
        with pytest.raises(
            ValueError, match=r"tokens as a tuple of token numbers, at least one, or a boolean mask"
        ):
            AblateTokens(heads, tokens)
    with pytest.raises(
        ValueError, match=r"compose the two with \| \(their means: AblateNeurons\(\.\.\., fill="
    ):
        MeanAblate(neurons[0], moments)(d)
