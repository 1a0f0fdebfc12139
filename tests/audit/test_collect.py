from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from decompclip.audit.collect import KEPT, THUMBNAIL, ImageSet, are_paired, collect, open_source, split
from decompclip.audit.config import AuditConfig
from decompclip.data.shapes import PROPERTIES
from decompclip.models.clip import HookedCLIP

CONFIG = AuditConfig(batch_size=16)


@pytest.fixture
def sets(model: HookedCLIP) -> tuple[ImageSet, ImageSet]:
    clean, suspect = (
        collect(model, open_source(spec, model, PROPERTIES["shape"], limit=50), CONFIG)
        for spec in ("shapes", "shapes:badnet")
    )
    return clean, suspect


def test_batches_make_no_difference(model: HookedCLIP, sets: tuple[ImageSet, ImageSet]) -> None:
    source = open_source("shapes", model, PROPERTIES["shape"], limit=50)
    (batch,) = source.batches(50)
    d = model.decompose(batch.images, normalize=True)
    for name in ("coords", "mlps", "embed", "bias_coords"):
        torch.testing.assert_close(getattr(sets[0].decomposition, name), getattr(d, name))
    assert sets[0].paths == batch.paths
    features = model.encode_image(batch.images, normalize=True)
    torch.testing.assert_close(sets[0].decomposition.features, features.detach())
    assert sets[0].sum_error < 1e-5


def test_the_pictures_kept_are_the_same_of_twins(sets: tuple[ImageSet, ImageSet]) -> None:
    clean, suspect = sets
    assert len(clean.kept) == min(KEPT, len(clean))
    assert clean.kept.keys() == suspect.kept.keys()


def test_a_picture_kept_does_not_keep_its_batch(sets: tuple[ImageSet, ImageSet]) -> None:
    assert all(image.untyped_storage().nbytes() == image.nbytes for image in sets[0].kept.values())


def test_nothing_is_both_fitted_on_and_reported(sets: tuple[ImageSet, ImageSet]) -> None:
    parts = split(*sets, CONFIG, infer_target=True)
    fitted = set(parts.validation.paths)
    assert len(fitted) == 10
    assert not fitted & {*parts.clean.paths, *parts.suspect.paths}
    assert parts.held_out is not None and set(parts.held_out.paths) == fitted
    assert parts.paired and parts.clean.paths == parts.suspect.paths
    assert len(parts.clean) + len(parts.validation) == 50


def test_equal_names_alone_make_no_twins(sets: tuple[ImageSet, ImageSet]) -> None:
    """Folders whose files are counted from zero: the names agree, the pictures do not."""
    clean, suspect = sets
    bare = (replace(images, labels=None) for images in (clean, suspect))
    a, b = bare
    assert are_paired(a, b)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    unrelated = replace(b, thumbnails=b.thumbnails[order], decomposition=b.decomposition[order])
    assert not are_paired(a, unrelated)
    assert not split(a, unrelated, CONFIG, infer_target=False).paired
    assert not are_paired(clean, replace(suspect, labels=(torch.arange(50) % 12)))


def test_rows_of_one_file_are_not_called_alike(sets: tuple[ImageSet, ImageSet]) -> None:
    """All rows of a parquet file were partners of each other, so that nothing was left to report on."""
    named = [replace(images, paths=tuple(f"a.parquet#{i}" for i in range(50))) for images in sets]
    parts = split(named[0], named[1], CONFIG, infer_target=True)
    assert parts.paired and len(parts.suspect) == len(parts.clean) == 40


@pytest.mark.parametrize("world", ["shapes", "photographs"])
def test_a_copy_in_other_light_is_a_twin(
    model: HookedCLIP, sets: tuple[ImageSet, ImageSet], world: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    if world == "shapes":
        (batch,) = open_source("shapes", model, PROPERTIES["shape"], limit=50).batches(50)
        images = model.denormalize(batch.images)
    else:  # cloudy, of a light and a contrast of their own
        coarse = torch.rand(50, 3, 6, 6, generator=generator)
        images = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
        light, contrast = (torch.rand(50, 1, 1, 1, generator=generator) for _ in range(2))
        images = 0.4 * light + (0.2 + 0.4 * contrast) * images
    noise = 0.2 * torch.randn(images.shape, generator=generator)
    bare = replace(sets[0], labels=None)

    def of(pixels: torch.Tensor) -> ImageSet:
        pixels = model.normalize((255 * pixels.clamp(0, 1)).round() / 255)
        seen = torch.nn.functional.adaptive_avg_pool2d(pixels, THUMBNAIL).flatten(1)
        return replace(bare, thumbnails=seen)

    made = {"dark": 0.15 * images, "dim": 0.45 * images, "pale": 0.8 + 0.2 * images, "noisy": images + noise}
    for name, changed in made.items():
        assert are_paired(of(images), of(changed)), name
        assert not are_paired(of(images), of(changed.roll(7, 0))), name
    flat = torch.rand(50, 1, 1, 1, generator=generator).expand(-1, 3, 32, 32)
    assert not are_paired(of(flat), of(flat.roll(7, 0)))  # greys: nothing but their light to know them by
    assert are_paired(of(flat), of(flat))


def test_twins_may_be_stored_in_another_format(sets: tuple[ImageSet, ImageSet]) -> None:
    clean, suspect = (
        replace(images, paths=tuple(f"{i:04}.{ending}" for i in range(50)), kept={})
        for images, ending in zip(sets, ("png", "jpg"), strict=True)
    )
    parts = split(clean, suspect, CONFIG, infer_target=False)
    assert parts.paired
    assert len(parts.suspect) == len(parts.clean) == 40


def test_a_named_target_needs_no_suspect_images(sets: tuple[ImageSet, ImageSet]) -> None:
    clean, suspect = sets
    assert split(clean, suspect, CONFIG, infer_target=False).held_out is None
    strangers = replace(suspect, paths=tuple(f"other/{path}" for path in suspect.paths))
    parts = split(clean, strangers, CONFIG, infer_target=False)
    assert len(parts.suspect) == 50 and not parts.paired
    parts = split(clean, strangers, CONFIG, infer_target=True)
    assert parts.held_out is not None and len(parts.held_out) == 10 and len(parts.suspect) == 40
    assert not set(parts.held_out.paths) & set(parts.suspect.paths)


def test_the_seed_chooses_the_validation_part(sets: tuple[ImageSet, ImageSet]) -> None:
    first, again, other = (
        split(*sets, replace(CONFIG, seed=seed), infer_target=False).validation.paths for seed in (0, 0, 1)
    )
    assert first == again != other


def test_suspect_images_that_are_all_twins_of_fitted_ones_are_refused(
    sets: tuple[ImageSet, ImageSet],
) -> None:
    clean, suspect = sets
    fitted = set(split(clean, suspect, CONFIG, infer_target=False).validation.paths)
    alone = suspect.at(torch.tensor([path in fitted for path in suspect.paths]))
    with pytest.raises(
        ValueError, match=r"beside the partners of the 10 clean images.*all 10 are such partners"
    ):
        split(clean, alone, CONFIG, infer_target=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation": 1.0}, "expected validation between 0 and 1, a share; received 1.0"),
        ({"quantile": 0.0}, "expected quantile between 0 and 1"),
        ({"batch_size": 0}, "expected batch_size of at least 1; received 0"),
        ({"convention": "other"}, "expected convention of .*; received 'other'"),
    ],
)
def test_options_are_checked(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AuditConfig(**options)
