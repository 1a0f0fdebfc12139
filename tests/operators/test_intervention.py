"""The protocol: restriction image by image, other images' components, repair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import Components, embed, everything, heads, layers, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.operators.ablation import MeanAblate, ZeroAblate
from decompclip.operators.intervention import Intervention
from decompclip.operators.noise import RandomAblate
from decompclip.operators.transplant import Patch, Repair, ResampleAblate, decomp_reverse
from decompclip.tower.vit import HookedViT

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


# Restriction


def edits(moments: Moments, tower: HookedViT) -> list[Intervention]:
    chosen = heads[1:] | mlps[0] | embed
    return [
        ZeroAblate(chosen),
        MeanAblate(chosen, moments),
        RandomAblate(chosen, moments, model=tower),
        ZeroAblate(heads[0]) | MeanAblate(mlps[1:], moments),
    ]


def test_a_component_mask_restricts_every_kind_of_component(
    tower: HookedViT, images: Tensor, d: Decomposition, moments: Moments
) -> None:
    where = torch.rand(5, N_COMPONENTS, generator=torch.Generator().manual_seed(0)) < 0.5
    for edit in edits(moments, tower):
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
        nowhere = torch.zeros_like(where)
        assert edit(d, where=nowhere) is d
        torch.testing.assert_close(causal(tower, images, edit, where=nowhere), tower(images), **CLOSE)


def test_the_mask_has_the_order_of_flat(d: Decomposition) -> None:
    chosen = heads[2, 1] | mlps[1]
    where = chosen.resolve(3, 4).flat.expand(5, -1)
    torch.testing.assert_close(
        ZeroAblate(everything)(d, where=where).features, ZeroAblate(chosen)(d).features
    )
    assert ZeroAblate(everything)(d, where=embed.resolve(3, 4).flat.expand(5, -1)).embed.abs().sum() == 0


@pytest.mark.usefixtures("ours_alone")
def test_a_restricted_edit_is_one_with_where(tower: HookedViT, images: Tensor, d: Decomposition) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(5, 3, 4, generator=generator) < 0.6 for _ in range(2))
    edit = ZeroAblate(layers[1:])
    torch.testing.assert_close(edit.on(a)(d).features, edit(d, where=a).features)
    torch.testing.assert_close(edit.on(a)(d, where=b).features, edit(d, where=a & b).features)
    torch.testing.assert_close(causal(tower, images, edit.on(a)), causal(tower, images, edit, where=a))
    torch.testing.assert_close((edit.on(a) | edit)(d).features, edit(d).features)
    assert repr(edit.on(a)) == f"(ZeroAblate(layers[1:])).on(mask {list(a.shape)})"
    every = torch.rand(5, N_COMPONENTS, generator=generator) < 0.6
    torch.testing.assert_close(edit.on(every)(d).features, edit(d, where=every).features)
    with pytest.raises(ValueError, match=r"of the shape \[5, 3, 4\] that .* received \[5, 16\]; give both"):
        edit.on(a)(d, where=torch.ones(5, 16, dtype=torch.bool))
    for no_mask in ([True] * 5, torch.ones(5, dtype=torch.bool), torch.ones(5, 16)):
        with pytest.raises(TypeError, match=r"expected a boolean mask .* for whole images repeat it"):
            edit.on(no_mask)  # pyright: ignore[reportArgumentType]


def test_whole_layers(d: Decomposition) -> None:
    torch.testing.assert_close(
        ZeroAblate(layers[-1])(d).features, ZeroAblate(heads[-1] | mlps[-1])(d).features
    )


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


def test_one_image_serves_for_all(
    tower: HookedViT, images: Tensor, others: Tensor, d: Decomposition, source: Decomposition
) -> None:
    one = Patch(everything, source[:1], images=others[:1])
    torch.testing.assert_close(causal(tower, images, one), tower(others[:1]).expand(5, -1), **CLOSE)
    torch.testing.assert_close(one(d).mlps, source.mlps[:1].expand(5, -1, -1), rtol=0, atol=0)


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
    assert repr(ResampleAblate(heads, d, seed=3)) == "ResampleAblate(heads, 5 images, seed=3)"
    for components in (heads[1, 2], mlps[:2] | embed):  # one image serves for all, in patching and as a draw
        torch.testing.assert_close(
            ResampleAblate(components, d[:1])(d[1:]).features, Patch(components, d[:1])(d[1:]).features
        )


@pytest.mark.parametrize("convention", ["centred", "paper"])
def test_the_sources_images_are_known_by_their_features(
    tower: HookedViT, images: Tensor, others: Tensor, convention: Any
) -> None:
    source = decompose(tower, others, convention=convention, normalize=True)
    run = causal(tower, images, Patch(everything, source, images=others))
    torch.testing.assert_close(run, tower(others), **CLOSE)
    swapped = others[[1, 0, 2, 3, 4]]
    with pytest.raises(ValueError, match="expected the images that the source was decomposed from"):
        Patch(everything, source, images=swapped).fwd_hooks(tower)


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
    with pytest.raises(
        ValueError, match=r"flags \[5, 3, 4\] speak; received heads \| mlps, whose others would"
    ):
        decomp_reverse(source, Fixed(flags), components=heads | mlps)
    every = torch.zeros(5, 3 * 4 + 3 + 1, dtype=torch.bool)
    every[2, 13] = True  # mlps[1]
    both = decomp_reverse(source, Fixed(every), components=heads | mlps)(d)
    torch.testing.assert_close(both.mlps[2, 1], source.mlps[2, 1])
    assert torch.equal((both.features - d.features).abs().amax(1) > 1e-4, every.any(1))


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
    for edit in (Patch(heads, source), ResampleAblate(heads, source)):
        with pytest.raises(ValueError, match=r"expected the source's images, .*\(..., images=images\)"):
            edit.fwd_hooks(tower)
        with pytest.raises(
            ValueError,
            match="convention='paper', as those before; received convention='centred'; decompose all",
        ):
            edit(decompose(tower, images, convention="paper"))
    other = decompose(make_tower(seed=3, layer_scale=True), images)
    with pytest.raises(
        ValueError, match="expected terms of one model; received those of another .* other weights"
    ):
        Patch(heads, other)(d)
    with pytest.raises(
        ValueError, match=r"a source of 5 images, one for each .* received 3; pair the images"
    ):
        Patch(heads, source[:3])(d)
    with pytest.raises(ValueError, match=r"a batch of 3 images, as many as the source .* received 5"):
        causal(tower, images, Patch(heads, source[:3], images=others[:3]))
    with pytest.raises(ValueError, match="other images to draw from; received one of 1 images"):
        ResampleAblate(heads, d[:1])(d[:1])
    for edit_of in (Patch, ResampleAblate):
        with pytest.raises(
            ValueError, match="the 5 images that the source was decomposed from; received 3 images"
        ):
            edit_of(heads, source, images=others[:3])
        with pytest.raises(
            ValueError, match=r"received images whose features differ, by \d+% in image \d; pass"
        ):
            edit_of(heads, source, images=images).fwd_hooks(tower)
        assert source.target is not None
        for share, alike in ((0.0008, True), (0.0015, False)):  # of one image's own length
            target = source.target.clone()
            target[3] *= 1 + share
            edit = edit_of(heads, source.with_fields(target=target), images=others)
            if alike:
                assert edit.fwd_hooks(tower)
                continue
            with pytest.raises(ValueError, match=r"whose features differ, by 0% in image 3; pass"):
                edit.fwd_hooks(tower)
        with pytest.raises(ValueError, match=r"whose features are \[5, 9\], not \[5, 20\]"):
            edit_of(heads, source, images=others).fwd_hooks(make_tower(d_embed=9))
        with pytest.raises(ValueError, match="and a source that was not edited"):
            edit_of(heads, ZeroAblate(mlps)(source), images=others).fwd_hooks(tower)
