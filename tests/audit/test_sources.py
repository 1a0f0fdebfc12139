from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from decompclip.attacks.patch import BadNet
from decompclip.attacks.registry import Attack
from decompclip.audit.collect import attack_in, datasets, open_source
from decompclip.cli.options import known_classes
from decompclip.data.shapes import PROPERTIES
from decompclip.models.bundled import card
from decompclip.models.clip import HookedCLIP

CLASSES = PROPERTIES["shape"]


def test_data_sets_are_the_world_and_the_triggers_of_the_cards(random_zoo: Path) -> None:
    assert datasets() == {"shapes": None, "shapes:badnet": "shapes-badnet"}


def test_triggered_images_are_twins_but_for_the_trigger(model: HookedCLIP) -> None:
    clean, triggered = (
        next(open_source(spec, model, CLASSES, limit=8).batches(8)) for spec in ("shapes", "shapes:badnet")
    )
    assert clean.paths == triggered.paths
    assert torch.equal(clean.labels, triggered.labels)  # type: ignore[arg-type]
    changed = (clean.images != triggered.images).any(1)
    assert changed[:, 8:16, 8:16].any()
    changed[:, 8:16, 8:16] = False
    assert not changed.any()


def test_a_limit_and_a_seed_choose_the_images(model: HookedCLIP) -> None:
    first, again, other = (
        next(open_source("shapes", model, CLASSES, limit=4, seed=seed).batches(4)).images
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_folder_is_a_folder_even_if_it_is_named_like_a_data_set(
    model: HookedCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shapes" / "star").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "shapes" / "star" / "a.png")
    monkeypatch.chdir(tmp_path)
    batch = next(open_source("./shapes", model, CLASSES).batches())
    assert batch.paths == ("star/a.png",)


def test_an_unknown_data_set_offers_the_nearest(model: HookedCLIP) -> None:
    with pytest.raises(
        ValueError, match="'shapes:badnt' is not one of shapes, shapes:badnet; did you mean shapes:badnet"
    ):
        open_source("shapes:badnt", model, CLASSES)


def test_the_world_has_its_own_classes(model: HookedCLIP) -> None:
    with pytest.raises(
        ValueError, match=r"expected the 12 classes of shapes, .*received 2: cat, dog; leave --classes"
    ):
        open_source("shapes", model, ("cat", "dog"))


def test_a_limit_is_a_number_of_images(model: HookedCLIP) -> None:
    with pytest.raises(ValueError, match="limit of at least 1 image; received 0"):
        open_source("shapes", model, CLASSES, limit=0)


def test_the_trigger_is_the_audited_model_s_and_else_the_twin_s(random_zoo: Path) -> None:
    mine = Attack(BadNet(size=0.4), "star", "the memory of mine")
    assert attack_in("shapes") is attack_in("some/folder") is None
    twin = attack_in("shapes:badnet")
    assert twin is not None and twin.trigger.card() == card("shapes-badnet")["backdoor"]["trigger"]
    assert attack_in("shapes:shapes-badnet") == twin
    assert attack_in("shapes:badnet", [mine]) == attack_in("shapes:own", [mine]) == mine
    with pytest.raises(ValueError, match="the audited model remembers none"):
        attack_in("shapes:own")


def test_classes_come_from_a_file_or_from_the_world_or_the_model(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("cat\ndog\n")
    assert known_classes(file, "ViT-B-32", "photos", "photos") == ("cat", "dog")
    assert known_classes(None, "ViT-B-32", "photos", "shapes:badnet") == CLASSES
    assert known_classes(None, "cifar10", "photos") == tuple(card("cifar10")["class_names"])
    with pytest.raises(ValueError, match="expected --classes"):
        known_classes(None, "ViT-B-32", "photos")
    file.write_text("cat\n")
    with pytest.raises(ValueError, match=r"at least two classes.*names only cat"):
        known_classes(file, "ViT-B-32", "photos")
