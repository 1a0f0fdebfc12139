"""The vocabulary of components: what it names, how it reads, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decompclip.cache.components import ComponentMask, Components, embed, everything, heads, mlps

# beartype looks at a random element of a list; what the strategies draw does not depend on it.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

L, H = 5, 3


def resolve(components: Components) -> ComponentMask:
    return components.resolve(L, H)


def names(components: Components) -> set[tuple[object, ...]]:
    mask = resolve(components)
    found: set[tuple[object, ...]] = {("head", *map(int, place)) for place in mask.heads.nonzero()}
    found |= {("mlp", int(layer)) for layer in mask.mlps.nonzero()}
    return found | ({("embed",)} if mask.embed else set())


layers = st.one_of(
    st.integers(-L, L - 1),
    st.builds(
        slice, st.none() | st.integers(-L, L - 1), st.none() | st.integers(-L, L), st.none() | st.just(2)
    ),
    st.lists(st.integers(-L, L - 1), max_size=4),
)
atoms = st.one_of(
    st.sampled_from([heads, mlps, embed, everything]),
    layers.map(lambda index: heads[index]),
    layers.map(lambda index: mlps[index]),
    st.tuples(layers, st.integers(-H, H - 1) | st.just(slice(None))).map(lambda index: heads[index]),
)
expressions = st.recursive(
    atoms,
    lambda inner: st.tuples(inner, st.booleans(), inner).map(lambda t: t[0] | t[2] if t[1] else t[0] - t[2]),
    max_leaves=5,
)


@given(expressions, expressions)
def test_union_and_difference_are_those_of_sets(a: Components, b: Components) -> None:
    assert names(a | b) == names(a) | names(b)
    assert names(a - b) == names(a) - names(b)


@given(expressions)
def test_repr_is_the_expression(a: Components) -> None:
    again = eval(repr(a), {"heads": heads, "mlps": mlps, "embed": embed, "everything": everything})
    assert again == a
    assert hash(again) == hash(a)
    assert names(again) == names(a)


def test_indices_are_pythons() -> None:
    assert names(heads[-1, 2]) == {("head", 4, 2)}
    assert names(mlps[-2:]) == {("mlp", 3), ("mlp", 4)}
    assert names(heads[:, 0]) == {("head", layer, 0) for layer in range(L)}
    assert names(heads[[0, 2], 1:]) == {("head", layer, head) for layer in (0, 2) for head in (1, 2)}
    assert names(everything) == names(heads | mlps | embed)
    assert resolve(heads[[]]).empty
    assert not resolve(embed).empty
    assert resolve(heads).heads.dtype == torch.bool


def test_it_reads_as_it_is_written() -> None:
    assert repr(heads[4, 2] | mlps[-5:]) == "heads[4, 2] | mlps[-5:]"
    assert repr(everything - (heads[:, 0] | embed)) == "everything - (heads[:, 0] | embed)"
    assert repr((heads | mlps) - embed) == "(heads | mlps) - embed"
    assert heads[:] == heads


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
    with pytest.raises(IndexError, match=r"a layer has one MLP; received mlps\[0, 3\]; .* mlps\[\[0, 3\]\]"):
        mlps[0, 3]
    with pytest.raises(TypeError, match="a number, a slice or a list of numbers as index; received 'all'"):
        heads["all"]
    with pytest.raises(TypeError, match="unsupported operand"):
        heads | 3  # pyright: ignore[reportOperatorIssue]
