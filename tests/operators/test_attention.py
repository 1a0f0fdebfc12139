"""Maps are what the decomposition says of tokens, laid out as the patches lie; rollout equals a slow reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from decompclip.data.shapes import Shapes
from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.models.bundled import load_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.operators.attention import attention_maps, contribution_maps, lay_out, rollout
from decompclip.operators.tokens import TokenMaps
from decompclip.tower.config import ViTConfig
from decompclip.tower.vit import HookedViT


@pytest.fixture(scope="module")
def model() -> HookedCLIP:
    return load_bundled("shapes")


@pytest.fixture(scope="module")
def world(model: HookedCLIP) -> Tensor:
    return model.normalize(Shapes(6, seed=5).draw(range(6)).images)


@pytest.fixture(scope="module")
def direction(tower: HookedViT) -> Tensor:
    return torch.randn(tower.cfg.d_embed, generator=torch.Generator().manual_seed(2))


def test_attention_lies_where_the_pattern_has_it(tower: HookedViT, images: Tensor) -> None:
    maps = attention_maps(tower, images, heads[1:, [0, 2]])
    assert maps.heads == ((1, 0), (1, 2), (2, 0), (2, 2))
    assert maps.patches.shape == (4, 5, 3, 2)  # 24 x 16 pixels: three rows of two
    _, cache = tower.run_with_cache(images)
    for layer, head in maps.heads:
        row = cache["pattern", layer][:, head, 0]
        for r in range(3):
            for c in range(2):
                torch.testing.assert_close(maps.of(layer, head)[:, r, c], row[:, 1 + 2 * r + c].detach())
    torch.testing.assert_close(maps.total, torch.ones(4, 5))


@pytest.mark.parametrize("normalize", [True, False])
def test_contributions_of_everything_sum_to_the_similarity(
    tower: HookedViT, images: Tensor, direction: Tensor, normalize: bool
) -> None:
    maps = contribution_maps(tower, images, direction, normalize=normalize)
    d = decompose(tower, images, normalize=normalize)
    others = (d.mlps.sum(1) + d.embed + d.bias) @ direction
    torch.testing.assert_close(maps.total.sum(0) + others, d.features @ direction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        maps.total.T.unflatten(1, (3, 4)), d.heads @ direction, rtol=1e-4, atol=1e-5
    )  # and head by head


def test_the_papers_convention_shares_constants_among_tokens(
    tower: HookedViT, images: Tensor, direction: Tensor
) -> None:
    maps = contribution_maps(tower, images, direction, heads[2, 1], convention="paper")
    d = decompose(tower, images, convention="paper", normalize=True)
    torch.testing.assert_close(maps.total[0], d.heads[:, 2, 1] @ direction, rtol=1e-4, atol=1e-5)


def test_a_difference_of_texts_is_the_difference_of_their_maps(model: HookedCLIP, world: Tensor) -> None:
    star, ring, both = (
        contribution_maps(model, world, text, heads[-1], against=other)
        for text, other in (("a star", None), ("a ring", None), ("a star", "a ring"))
    )
    torch.testing.assert_close(both.patches, star.patches - ring.patches, rtol=1e-4, atol=1e-6)
    back = contribution_maps(model, world, "a ring", heads[-1], against="a star")
    torch.testing.assert_close(back.patches, -both.patches)
    assert (star.toward, both.toward) == ("'a star'", "'a star' against 'a ring'")


def test_several_texts_are_one_direction(model: HookedCLIP, world: Tensor) -> None:
    classifier = model.zero_shot_classifier(["star"], ["a {}", "a photo of a {}"])
    expected = contribution_maps(model, world, classifier[0], heads[5, 1])
    found = contribution_maps(model, world, ["a star", "a photo of a star"], heads[5, 1])
    torch.testing.assert_close(found.patches, expected.patches, rtol=1e-4, atol=1e-6)
    assert (found.toward, expected.toward) == ("'a star' and 1 more", "a direction")
    assert contribution_maps(model, world, classifier[0], heads[5, 1], label="star").toward == "star"


@pytest.mark.parametrize("kind", ["attention", "contribution", "rollout"])
def test_batches_change_nothing(tower: HookedViT, images: Tensor, direction: Tensor, kind: str) -> None:
    def make(x: object, size: int) -> TokenMaps:
        match kind:
            case "attention":
                return attention_maps(tower, x, heads[2], batch_size=size)  # pyright: ignore[reportArgumentType]
            case "contribution":
                return contribution_maps(tower, x, direction, heads[2], batch_size=size)  # pyright: ignore
            case _:
                return rollout(tower, x, batch_size=size)  # pyright: ignore[reportArgumentType]

    whole = make(images, 64)
    assert len(whole) == 5
    for other in (make(images, 2), make(iter([images[:1], images[1:]]), 3)):
        torch.testing.assert_close(other.patches, whole.patches, rtol=1e-4, atol=1e-6)
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(
        make(images[order], 64).patches, whole.select(images=order).patches, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("n_prefix", [0, 1, 5])
def test_any_number_of_prefix_tokens(n_prefix: int) -> None:
    cfg = ViTConfig(
        n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=8, d_embed=4,
        image_size=(8, 14), patch_size=(4, 4), n_prefix=n_prefix, pool="cls" if n_prefix else "mean",
    )  # fmt: skip
    tokens = torch.arange(2.0 * 3 * (n_prefix + 6)).view(
        2, 3, -1
    )  # a grid of 2 x 3, two columns of pixels unseen
    maps = lay_out(cfg, [(tokens, None)], "attention", None, heads=((0, 0), (0, 1)))
    assert maps.prefix.shape == (2, 3, n_prefix) and maps.patches.shape == (2, 3, 2, 3)
    assert maps.patches[1, 2, 1, 0] == tokens[1, 2, n_prefix + 3]


# Rollout


def slow_rollout(tower: HookedViT, image: Tensor, fuse: str, residual: float) -> Tensor:
    _, cache = tower.run_with_cache(image[None])
    flow = torch.eye(tower.cfg.n_tokens, dtype=torch.float64)
    for layer in range(tower.cfg.n_layers):
        pattern = cache["pattern", layer][0].double()
        one = {"mean": pattern.mean(0), "max": pattern.amax(0), "min": pattern.amin(0)}[fuse]
        mixed = torch.zeros_like(one)
        for query in range(len(one)):
            for key in range(len(one)):
                stays = residual if query == key else 0.0
                mixed[query, key] = (1 - residual) * one[query, key] / one[query].sum() + stays
        flow = mixed @ flow
    return flow[0]


@pytest.mark.parametrize("fuse", ["mean", "max", "min"])
@pytest.mark.parametrize("residual", [0.5, 0.1])
def test_rollout_equals_the_slow_reference(
    tower: HookedViT, images: Tensor, fuse: str, residual: float
) -> None:
    maps = rollout(tower, images, fuse=fuse, residual=residual)  # pyright: ignore[reportArgumentType]
    for i in (0, 3):
        expected = slow_rollout(tower, images[i], fuse, residual).float().detach()
        found = torch.cat([maps.prefix[0, i], maps.patches[0, i].flatten()])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(maps.total, torch.ones(1, 5))
    assert (maps.labels, maps.heads) == (("rollout",), ())


def test_rollout_of_one_head_is_its_attention(make_tower: Callable[..., HookedViT], images: Tensor) -> None:
    visual = make_tower(n_layers=1, n_heads=1, d_head=32)
    attention, flow = attention_maps(visual, images), rollout(visual, images, residual=0.0)
    torch.testing.assert_close(flow.patches, attention.patches)
    stays = rollout(visual, images, residual=1.0)
    assert torch.equal(stays.patches, torch.zeros_like(stays.patches)) and torch.equal(
        stays.prefix, torch.ones(1, 5, 1)
    )
    assert not any(point.has_hooks() for point in visual.hook_dict.values())


# Results


def test_pictures_are_what_the_model_saw(model: HookedCLIP) -> None:
    pixels = Shapes(3, seed=5).draw(range(3)).images
    maps = attention_maps(model, model.normalize(pixels), heads[0, 0])
    expected = (255 * pixels).round().to(torch.uint8).permute(0, 2, 3, 1)
    for found in (maps.pictures, rollout(model, model.normalize(pixels)).pictures):
        assert found is not None and torch.equal(found, expected)
    some = maps.select(images=[2, 0])
    assert some.pictures is not None and torch.equal(some.pictures, expected[[2, 0]])
    for shown, signed in ((maps, False), (contribution_maps(model, model.normalize(pixels), "a star"), True)):
        overlay = shown.overlays()
        assert overlay.patches is shown.patches and overlay.pictures is shown.pictures
        assert (overlay.labels, overlay.names, overlay.toward) == (shown.labels, shown.names, shown.toward)
        assert overlay.signed is signed and torch.equal(overlay.top, shown.top)
    assert attention_maps(model, model.normalize(pixels), heads[0, 0], pictures=False).pictures is None
    assert rollout(model, model.normalize(pixels), pictures=False).pictures is None


def test_a_frame_has_a_row_for_each_token(tower: HookedViT, images: Tensor) -> None:
    maps = attention_maps(tower, images[:2], heads[1, 2:], names=["a", "b"])
    frame = maps.to_frame()
    assert list(frame.columns) == ["layer", "head", "image", "name", "token", "row", "column", "value"]
    assert len(frame) == 2 * 2 * 7 and frame["head"].tolist() == [2] * 14 + [3] * 14
    places = [(), *((row, column) for row in range(3) for column in range(2))] * 4
    assert list(map(tuple, frame[["row", "column"]].apply(lambda x: x.dropna().tolist(), axis=1))) == places
    cell = frame.query("layer == 1 and head == 3 and name == 'b' and row == 2 and column == 1")
    assert cell["value"].item() == pytest.approx(float(maps.of(1, 3)[1, 2, 1]))
    for name in ("row", "column"):
        assert (frame[name].isna() == (frame["token"] == 0)).all()
    sums = frame.groupby(["layer", "head", "image"])["value"].agg("sum").to_numpy()
    np.testing.assert_allclose(sums, np.ones(4), rtol=1e-5)
    whole = rollout(tower, images).to_frame()
    assert whole["layer"].isna().all() and whole["head"].isna().all()
    assert {str(frame[name].dtype) for name in ("layer", "head", "row", "column")} == {"Int64"}
    assert len(maps.select([], [0]).to_frame()) == 0


def test_selecting_and_asking(tower: HookedViT, images: Tensor) -> None:
    maps = attention_maps(tower, images, heads[2], names=list("abcde"))
    some = maps.select([3, -4], [4, 0])
    assert (some.heads, some.names, len(some)) == (((2, 3), (2, 0)), ("e", "a"), 2)
    assert torch.equal(some.of(2, 0), maps.of(2, 0)[[4, 0]])
    with pytest.raises(LookupError, match=r"among head 2\.0, head 2\.1, .*received 1\.0; .*heads\[1, 0\]"):
        maps.of(1, 0)
    assert torch.equal(maps.select(["head 2.3"], ["e", "a"]).patches, some.patches[:1])
    with pytest.raises(LookupError, match=r"expected a map of 4: 'head 2\.0', .*; received 4"):
        maps.select([4])
    with pytest.raises(LookupError, match=r"expected an image of 5: 'a', .*; received -6"):
        maps.select(images=[-6])


def test_it_reads_well(model: HookedCLIP, world: Tensor) -> None:
    maps = contribution_maps(model, world, "a star", heads[-1], label="<b>star</b>")
    assert repr(maps).startswith("TokenMaps(contribution: head 5.0, ") and "and 2 more" in repr(maps)
    page = maps._repr_html_()
    assert "6 x 6 patches" in page
    assert "&lt;b&gt;star" in page and "<b>star" not in page


@pytest.mark.usefixtures("ours_alone")
def test_errors_say_what_to_do(
    tower: HookedViT, model: HookedCLIP, images: Tensor, world: Tensor, direction: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"expected attention heads.*received mlps\[0\]; leave the other"):
        attention_maps(tower, images, mlps[0])
    with pytest.raises(ValueError, match=r"expected attention heads.*received heads\[0\] \| mlps"):
        attention_maps(tower, images, heads[0] | mlps)
    with pytest.raises(IndexError, match="expected a layer in 0..2"):
        attention_maps(tower, images, heads[3])
    for none in (images[:0], [], iter([])):
        with pytest.raises(ValueError, match="expected at least one image; received none"):
            attention_maps(tower, none, heads[0])
    with pytest.raises(ValueError, match="expected a name for each of 5 images; received 1; pass as many"):
        attention_maps(tower, images, heads[0], names=["a"])
    for make in (attention_maps, rollout):
        with pytest.raises(
            ValueError, match="expected batch_size to be a whole number of images, at least 1; received 0"
        ):
            make(tower, images, batch_size=0)
    with pytest.raises(
        ValueError, match=r"expected a direction \[20\], .*; received \[1, 20\]; take one row"
    ):
        contribution_maps(tower, images, direction[None])
    with pytest.raises(
        ValueError, match="an image tower, which reads no text; received .'a star'.; pass the whole"
    ):
        contribution_maps(tower, images, "a star")
    with pytest.raises(ValueError, match="expected at least one text; received none"):
        contribution_maps(model, world, [])
    with pytest.raises(ValueError, match=r"expected fuse of \('mean', 'max', 'min'\); received 'sum'"):
        rollout(tower, images, fuse="sum")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"expected a residual in \[0, 1\], a share; received 2"):
        rollout(tower, images, residual=2)


# Many texts


def test_maps_toward_many_texts_are_those_toward_each(
    tower: HookedViT, images: Tensor, direction: Tensor
) -> None:
    texts = torch.stack([direction, -2 * direction, direction.flip(0)])
    chosen = heads[1:, [0, 2]]
    d = decompose(tower, images, normalize=True, tokens=chosen)
    names = [f"image {i}" for i in range(5)]
    found = list(contribution_maps(d, texts, label=["a", "b", "c"], names=names))
    assert [maps.toward for maps in found] == ["a", "b", "c"]
    for maps, text in zip(found, texts, strict=True):
        expected = contribution_maps(tower, images, text, chosen, names=names)
        assert (maps.heads, maps.names) == (expected.heads, expected.names)
        torch.testing.assert_close(maps.patches, expected.patches, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(maps.prefix, expected.prefix, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2].of(2, 2), expected.of(2, 2), rtol=1e-4, atol=1e-5)


def test_texts_share_a_product_as_memory_allows(
    tower: HookedViT, images: Tensor, direction: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = torch.stack([direction, -direction, 2 * direction])
    d = decompose(tower, images, normalize=True, tokens=heads[2])
    expected = [maps.patches for maps in contribution_maps(d, texts)]
    together: list[int] = []
    product = Decomposition.token_logits

    def counted(self: Decomposition, along: Tensor, *place: int) -> Tensor:
        together.append(len(along))
        return product(self, along, *place)

    monkeypatch.setattr(Decomposition, "token_logits", counted)
    monkeypatch.setattr("decompclip.operators.attention.room", lambda device: 1)
    for maps, patches in zip(contribution_maps(d, texts), expected, strict=True):
        torch.testing.assert_close(maps.patches, patches)
    assert together == [1, 1, 1]


@pytest.mark.usefixtures("ours_alone")
def test_many_texts_need_tokens_and_features(tower: HookedViT, images: Tensor, direction: Tensor) -> None:
    with pytest.raises(
        LookupError, match=r"kept its tokens, and knows where they lie; .*decompose the images"
    ):
        contribution_maps(decompose(tower, images), direction[None])
    d = decompose(tower, images, tokens=heads[2])
    for texts in (direction[None, :4], direction, direction[None][:0]):
        with pytest.raises(ValueError, match=r"expected text features \[text, 20\]"):
            contribution_maps(d, texts)
    with pytest.raises(ValueError, match="expected a label for each of 1 texts; received 2"):
        contribution_maps(d, direction[None], label=["a", "b"])
    with pytest.raises(ValueError, match="beside a decomposition"):
        contribution_maps(d, "a star")  # pyright: ignore
    with pytest.raises(ValueError, match="a layer and a head, or neither"):
        d.attention(1)
