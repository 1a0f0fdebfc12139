"""The vocabulary of components: what it names, how it reads, and what it refuses."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from decompclip.decomposition.components import (
    ComponentMask,
    Components,
    embed,
    everything,
    features,
    heads,
    layers,
    mlps,
    neurons,
    pool,
    resolve as resolve_of,
)
from decompclip.tower.vit import HookedViT

# beartype looks at a random element of a list; what the strategies draw does not depend on it.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

L, H, N = 5, 3, 7
NAMES = {
    "heads": heads,
    "mlps": mlps,
    "layers": layers,
    "embed": embed,
    "pool": pool,
    "everything": everything,
}


def resolve(components: Components, *, has_pool: bool = False) -> ComponentMask:
    return components.resolve(L, H, pool=has_pool, d_mlp=N)


def names(components: Components, *, has_pool: bool = False) -> set[tuple[object, ...]]:
    mask = resolve(components, has_pool=has_pool)
    found: set[tuple[object, ...]] = {("head", *map(int, place)) for place in mask.heads.nonzero()}
    found |= {("mlp", int(layer)) for layer in mask.mlps.nonzero()}
    found |= {("pool",)} if mask.pool else set()
    return found | ({("embed",)} if mask.embed else set())


def of_neurons(components: Components) -> set[tuple[int, ...]]:
    return {tuple(place.tolist()) for place in resolve(components).neurons.nonzero()}


positions = st.one_of(
    st.integers(-L, L - 1),
    st.builds(
        slice, st.none() | st.integers(-L, L - 1), st.none() | st.integers(-L, L), st.none() | st.just(2)
    ),
    st.lists(st.integers(-L, L - 1), max_size=4),
)
atoms = st.one_of(
    st.sampled_from([heads, mlps, layers, embed, pool, everything]),
    positions.map(lambda index: heads[index]),
    positions.map(lambda index: mlps[index]),
    positions.map(lambda index: layers[index]),
    st.tuples(positions, st.integers(-H, H - 1) | st.just(slice(None))).map(lambda index: heads[index]),
)


def combined(inner: st.SearchStrategy[Components]) -> st.SearchStrategy[Components]:
    pairs = st.tuples(inner, st.sampled_from("|&-~"), inner)
    return pairs.map(
        lambda t: {"|": t[0] | t[2], "&": t[0] & t[2], "-": t[0] - t[2], "~": ~t[0] | t[2]}[t[1]]
    )


expressions = st.recursive(atoms, combined, max_leaves=5)


def test_a_single_part_knows_its_place() -> None:
    for part, place in (
        (heads[2, 1], (2, 1, None, None)),
        (neurons[2, 1], (2, None, 1, None)),
        (features[1], (None, None, None, 1)),
        (mlps[2], (2, None, None, None)),
        (heads[2], (2, None, None, None)),
        (heads[2:, [1]], (None,) * 4),
        (neurons[2, 1:], (2, None, None, None)),
        (features[[1, 2]], (None,) * 4),
        (embed, (None,) * 4),
    ):
        assert (part.layer, part.head, part.neuron, part.feature) == place


@settings(max_examples=60)
@given(expressions, expressions)
def test_the_operators_are_those_of_sets(a: Components, b: Components) -> None:
    def of(components: Components) -> set[tuple[object, ...]]:
        return names(components, has_pool=True)

    left, right = of(a), of(b)
    assert of(a | b) == left | right
    assert of(a & b) == left & right
    assert of(a - b) == left - right
    assert of(~a) == of(everything) - left


def test_a_wrong_operator_is_told_at_once() -> None:
    """Not after minutes of search for a smaller expression."""
    tried = 0

    @given(expressions, expressions)
    def swapped(a: Components, b: Components) -> None:
        nonlocal tried
        tried += names(a - b, has_pool=True) != names(b - a, has_pool=True)
        assert names(a - b, has_pool=True) == names(b - a, has_pool=True)

    with pytest.raises(AssertionError):
        swapped()
    assert 1 <= tried <= 3  # found, and run again to show it


@settings(max_examples=60)
@given(expressions)
def test_repr_is_the_expression(a: Components) -> None:
    again = eval(repr(a), NAMES)
    assert again == a
    assert hash(again) == hash(a)
    assert names(again, has_pool=True) == names(a, has_pool=True)


of_neurons_atoms = st.tuples(
    positions, st.integers(-N, N - 1) | st.lists(st.integers(-N, N - 1), max_size=3)
).map(lambda index: neurons[index])


@settings(max_examples=60)
@given(
    st.recursive(
        of_neurons_atoms,
        lambda x: st.tuples(x, st.sampled_from("|&-"), x).map(
            lambda t: {"|": t[0] | t[2], "&": t[0] & t[2], "-": t[0] - t[2]}[t[1]]
        ),
        max_leaves=3,
    ),
    of_neurons_atoms,
)
def test_neurons_are_sets_too(a: Components, b: Components) -> None:
    left, right = of_neurons(a), of_neurons(b)
    assert of_neurons(a | b) == left | right
    assert of_neurons(a & b) == left & right
    assert of_neurons(a - b) == left - right
    assert eval(repr(a - b), {"neurons": neurons}) == a - b
    with pytest.raises(ValueError, match="which names neurons; edit those with AblateNeurons"):
        a.resolve(L, H)


def test_an_mlp_and_its_neurons_mix_in_unions_alone() -> None:
    both = mlps[3] | neurons[3, 1] | heads[0]
    assert of_neurons(both) == {(3, 1)} and ("mlp", 3) in names(both)
    assert of_neurons(neurons[3] - mlps[2]) == {(3, index) for index in range(N)}
    for mixed in (mlps - neurons[3, 1], neurons[3] & layers[3], neurons[3] - everything, ~neurons[3, 1]):
        with pytest.raises(
            ValueError, match=r"neurons taken from neurons; received .* the MLP of layer 3 .*: neurons\[3\]"
        ):
            resolve(mixed)


def test_the_pool_is_there_where_the_tower_has_one() -> None:
    assert names(everything, has_pool=True) == names(everything) | {("pool",)}
    assert names(~pool, has_pool=True) == names(everything)
    assert names(layers[2]) == names(heads[2] | mlps[2])
    with pytest.raises(IndexError, match="whose attention pooling has an MLP of its own, .* leave pool out"):
        resolve(heads | pool)
    for part in (
        heads,
        mlps,
        layers,
        embed,
        everything,
        heads | embed,
        heads & layers[1],
        heads - layers[1],
    ):
        assert not part.resolve(L, H).has_pool  # unless it is said
    with pytest.raises(IndexError, match="whose attention pooling"):
        pool.resolve(L, H)


@settings(max_examples=60)
@given(expressions)
def test_flat_is_everything_in_one_row(a: Components) -> None:
    flat = resolve(a, has_pool=True).flat
    assert len(flat) == L * H + L + 2
    order = [("head", layer, head) for layer in range(L) for head in range(H)]
    order += [("mlp", layer) for layer in range(L)] + [("embed",), ("pool",)]
    assert {name for name, chosen in zip(order, flat.tolist(), strict=True) if chosen} == names(
        a, has_pool=True
    )
    assert len(resolve(heads).flat) == L * H + L + 1


@settings(max_examples=60)
@given(expressions)
def test_singles_are_the_whole_one_by_one(a: Components) -> None:
    mask = resolve(a, has_pool=True)
    each = [resolve(part, has_pool=True).flat for part in mask.singles]
    assert all(int(one.sum()) == 1 for one in each)
    assert torch.equal(sum(each, torch.zeros(len(mask.flat), dtype=torch.long)), mask.flat.long())
    order = [int(one.nonzero()) for one in each]
    assert order == sorted(order)


def test_indices_are_pythons() -> None:
    assert names(heads[-1, 2]) == {("head", 4, 2)}
    assert names(mlps[-2:]) == {("mlp", 3), ("mlp", 4)}
    assert names(heads[:, 0]) == {("head", layer, 0) for layer in range(L)}
    assert names(heads[[0, 2], 1:]) == {("head", layer, head) for layer in (0, 2) for head in (1, 2)}
    assert names(everything) == names(heads | mlps | embed)
    assert resolve(heads[[]]).empty
    assert not resolve(embed).empty
    assert resolve(heads).heads.dtype == torch.bool


def test_indices_are_numpys_too() -> None:
    """A table's cells are."""
    for mine, theirs in (
        (heads[2, 1], heads[np.int64(2), np.uint8(1)]),
        (mlps[[0, 3]], mlps[list(np.arange(0, 4, 3))]),
    ):
        assert mine == theirs and repr(mine) == repr(theirs)
    with pytest.raises(TypeError, match="expected a number, a slice or a list"):
        heads[np.float64(2)]


def test_truth_values_are_no_numbers() -> None:
    for index in (True, [True, False, True], [0, True]):
        with pytest.raises(TypeError, match="expected a number, a slice or a list"):
            heads[-1, index]


def test_a_single_layer_and_head_are_numbers() -> None:
    assert (heads[2, 3].layer, heads[2, 3].head, mlps[-1].layer) == (2, 3, -1)
    assert (heads[1:, [0, 2]].layer, heads[1:, [0, 2]].head, heads[1].head, mlps.layer) == (None,) * 4


def test_where_a_single_component_stands_on_its_field() -> None:
    found = {part: (part.field, part.place) for part in (heads[2, 3], mlps[-1], embed, pool)}
    assert list(found.values()) == [("coords", (2, 3)), ("mlps", (-1,)), ("embed", ()), ("pool", (0,))]


def test_neurons_are_named_of_a_tower_that_may_name_them(tower: HookedViT) -> None:
    assert resolve_of(neurons[1, [0, 47]], tower, neurons=True).neurons.nonzero().tolist() == [
        [1, 0],
        [1, 47],
    ]
    with pytest.raises(IndexError, match=r"0\.\.47"):
        resolve_of(neurons[1, 48], tower, neurons=True)
    with pytest.raises(ValueError, match="which names neurons"):
        resolve_of(neurons[1, 0], tower)
    assert resolve_of(~heads, tower).flat.tolist() == [False] * 12 + [True] * 4


def test_features_are_those_of_an_autoencoder(tower: HookedViT) -> None:
    some = (features[:3] | features[4]) - features[1]
    found = resolve_of(some, tower, features=5)
    assert found.features.tolist() == [True, False, True, False, True]
    assert (
        found.beside_heads
        and not found.heads.any()
        and repr(some) == "(features[:3] | features[4]) - features[1]"
    )
    assert resolve_of(features, tower, features=5).features.all()
    with pytest.raises(ValueError, match="which names features of a sparse autoencoder"):
        resolve_of(features[1], tower)
    with pytest.raises(IndexError, match=r"a feature in 0\.\.4 .*the sparse autoencoder has 5 features"):
        resolve_of(features[5], tower, features=5)


def test_what_is_resolved_is_of_the_towers_shape(tower: HookedViT) -> None:
    shape: Any = SimpleNamespace(n_layers=2, n_heads=3, has_pool=True)
    assert resolve_of(pool | heads[1], shape).flat.tolist() == [False] * 3 + [True] * 3 + [False] * 3 + [True]
    with pytest.raises(TypeError, match=r"components such as heads\[-1\] \| mlps; received 'heads'"):
        resolve_of("heads", shape)


def test_a_slice_up_to_an_end_names_nothing() -> None:
    for part in (mlps[:-3], mlps[:0], heads[:-3], heads[1, :-4]):
        assert part.resolve(3, 4).empty
    for part in (mlps[3:], mlps[:-4], heads[0, 4:]):
        with pytest.raises(IndexError):
            part.resolve(3, 4)


def test_it_reads_as_it_is_written() -> None:
    assert repr(heads[4, 2] | mlps[-5:]) == "heads[4, 2] | mlps[-5:]"
    assert repr(everything - (heads[:, 0] | embed)) == "everything - (heads[:, 0] | embed)"
    assert repr((heads | mlps) - embed) == "(heads | mlps) - embed"
    assert repr(heads[1] | mlps & layers[2:]) == "heads[1] | mlps & layers[2:]"
    assert repr((heads[1] | mlps) & ~layers[2]) == "(heads[1] | mlps) & everything - layers[2]"
    assert repr(neurons[3, [5, 7]]) == "neurons[3, [5, 7]]"
    assert heads[:] == heads != mlps


def test_errors_name_the_range() -> None:
    for beyond in (heads[7:9], heads[12:], heads[:, 3:], mlps[L:]):
        with pytest.raises(
            IndexError, match=r"or -\d\.\.-1 from the end\); received .*, which names none of the"
        ):
            resolve(beyond)
    assert len(names(mlps[-7:])) == L  # "the last seven", of five
    assert names(mlps[2:2]) == set()
    with pytest.raises(
        IndexError,
        match=r"a layer in 0\.\.4 \(or -5\.\.-1 from the end\); received layer 5 in heads\[5\]; the tower has 5",
    ):
        resolve(heads[5])
    with pytest.raises(
        IndexError,
        match=r"a head in 0\.\.2 .*received head -4 in heads\[1, -4\]; the tower has 3 heads a layer",
    ):
        resolve(heads[1, -4])
    with pytest.raises(IndexError, match=r"received layer 9 in mlps\[\[0, 9\]\]"):
        resolve(embed | mlps[[0, 9]])
    with pytest.raises(
        IndexError, match=r"received heads\[1\]\[2\]; write all indices into one pair of brackets"
    ):
        heads[1][2]
    with pytest.raises(IndexError, match=r"received heads\[1\]\[2:, \[3\]\]; write"):
        heads[1][2:, [3]]
    with pytest.raises(IndexError, match=r"received heads\[0, 1, 2\]; write"):
        heads[0, 1, 2]
    with pytest.raises(IndexError, match=r"a layer has one MLP; received mlps\[0, 3\]; .* mlps\[\[0, 3\]\]"):
        mlps[0, 3]
    with pytest.raises(IndexError, match=r"received layers\[0, 3\]; .* layers\[\[0, 3\]\]"):
        layers[0, 3]
    with pytest.raises(
        IndexError, match=r"neurons\[layer\] or neurons\[layer, neuron\]; received neurons\[1\]\[2\]"
    ):
        neurons[1][2]
    with pytest.raises(IndexError, match=r"a neuron in 0\.\.6 .*; the tower has 7 neurons a layer"):
        resolve(neurons[0, 7])
    with pytest.raises(TypeError, match="embed is one component, .* leave the brackets out"):
        embed[0]
    with pytest.raises(TypeError, match="a number, a slice or a list of numbers as index; received 'all'"):
        heads["all"]


@pytest.mark.parametrize("sign", ["|", "&", "-"])
def test_what_is_no_component_is_told_beside_an_operator(sign: str) -> None:
    combine = {"|": operator.or_, "&": operator.and_, "-": operator.sub}[sign]
    with pytest.raises(
        TypeError,
        match=rf"components on both sides of '\{sign}'; received heads\[-1\] \{sign} 3; write heads",
    ):
        combine(heads[-1], 3)


def test_an_expression_has_no_members() -> None:
    with pytest.raises(TypeError, match=r"heads\[-1\] names no tower, so that \(5, 1\) .*resolve\(n_layers"):
        assert (5, 1) in heads[-1]
    with pytest.raises(TypeError, match="not iterable"):
        iter(heads)  # pyright: ignore[reportArgumentType, reportCallIssue]
