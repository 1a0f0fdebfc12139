"""An attack is found by whatever names it, and a model remembers its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import decompclip
from decompclip.attacks.patch import BadNet
from decompclip.attacks.poisoned import PoisonedPairs, write_poisoned
from decompclip.attacks.registry import Attack, attacks_of, distinct, open_attack, poisoned_by, remembered
from decompclip.attacks.whole_image import Blended
from decompclip.data.datasets import PairStream
from decompclip.data.shapes import ShapesPairs
from decompclip.data.shards import write_shards
from decompclip.data.sources import open_pairs
from decompclip.models.bundled import bundled, card
from decompclip.models.folders import save_model
from decompclip.training.finetune import finetune
from decompclip.training.recipes import FineTuning

TWINS = tuple(name for name in bundled() if card(name)["backdoor"])
SHORT = FineTuning(epochs=1, batch_size=16, lr=1e-5)
CLEANCLIP = FineTuning(epochs=1, batch_size=16, lr=1e-5, loss="cleanclip")


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_s_kind_is_the_card_s_not_the_default(name: str) -> None:
    facts, known = card(name)["backdoor"], remembered(name)
    for spec in ("own", facts["trigger"]["name"], name):
        found = open_attack(spec, known)
        assert (found.trigger.card(), found.target) == (facts["trigger"], facts["target"])
        assert found.origin == f"the card of {name}"


def test_another_kind_and_a_clean_model_get_defaults() -> None:
    assert open_attack("badnet").trigger == BadNet()
    assert open_attack("blended", remembered("shapes-badnet")) == Attack(
        Blended(), None, "the defaults of blended"
    )
    assert remembered("shapes") == remembered("ViT-B-32") == ()


@pytest.fixture(scope="module")
def poisons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("poisons")
    pairs = PoisonedPairs(ShapesPairs(32, seed=0), BadNet(size=0.3, seed=5), "ring", count=6)
    write_poisoned(pairs, folder)
    return folder


def test_files_folders_and_json_name_it(poisons: Path, tmp_path: Path) -> None:
    mine = BadNet(size=0.3, seed=5)
    for spec in (poisons, poisons / "poisons.json"):
        found = open_attack(str(spec))
        assert (found.trigger, found.target, found.origin) == (mine, "ring", str(poisons / "poisons.json"))
    file = tmp_path / "a.json"
    for content, target in (
        (mine.card(), None),
        ({"name": "badnet", "size": 0.3, "seed": 5}, None),
        ({"trigger": mine.card(), "target": "ring"}, "ring"),
        ({"trigger": mine.card(), "target": 4, "target_class": "ring", "cacc": None}, "ring"),
        ({"name": "shapes-mine", "backdoor": {"trigger": mine.card(), "target": "ring"}}, "ring"),
    ):
        file.write_text(json.dumps(content))
        for spec in (str(file), json.dumps(content)):
            assert (open_attack(spec).trigger, open_attack(spec).target) == (mine, target)
    assert attacks_of([open_attack(str(poisons)).to_dict()], "x")[0].trigger == mine


def test_it_says_every_parameter() -> None:
    assert str(open_attack("own", remembered("shapes-badnet"))) == (
        "badnet (seed=0, size=0.145833, place=random, redraw=False) -> star, by the card of shapes-badnet"
    )
    said = str(open_attack("shapes-badclip"))
    assert "SHA-256" in said and len(said) < 250


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("own", ValueError, "remembers none"),
        ("badclip", ValueError, "BadCLIP's patch"),
        ("badnett", ValueError, "expected a trigger among.*nearest: badnet"),
        ("shapes", ValueError, "one of .*shapes-badnet.*'shapes' has none"),
        ("nowhere.json", FileNotFoundError, "there is no nowhere.json"),
        ("{", ValueError, "is no JSON"),
        ("[" * 5, ValueError, "expected a trigger among"),
        ('{"a": 1}', ValueError, "expected a trigger among"),
        ('{"name": ["badnet"]}', ValueError, "expected a trigger among"),
        ('{"name": "badnet", "colour": 3}', ValueError, "unknown parameters"),
        ('{"name": "badnet", "size": "big"}', ValueError, "the JSON given"),
        ('{"name": "badnet", "size": 2}', ValueError, "the JSON given: expected a size"),
        ('{"trigger": 3}', ValueError, "names no trigger"),
        ('{"name": "shapes", "backdoor": null}', ValueError, "that of one without"),
    ],
)
def test_what_names_none_is_refused(spec: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        open_attack(spec)


def test_files_that_hold_none_are_refused(poisons: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content, words in ((b"\xff\xfe\x00", "no text"), (b"[1]", "holds a list"), (b"[" * 10**5, "no JSON")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            open_attack(str(file))
    file.write_text((poisons / "poisons.json").read_text().replace('"size": 0.3', '"size": 0.1'))
    with pytest.raises(ValueError, match="changed by hand"):
        open_attack(str(file))
    with pytest.raises(ValueError, match="remembers 0"):
        open_attack(str(tmp_path))


def test_a_twin_s_memory_goes_through_fine_tuning_and_saving(tmp_path: Path) -> None:
    model, expected = decompclip.load("shapes-badnet"), remembered("shapes-badnet")[0]
    for generation, recipe in enumerate((CLEANCLIP, SHORT, CLEANCLIP)):
        tuned = finetune(model, ShapesPairs(16, seed=generation), recipe).model
        folder = save_model(tuned, tmp_path / str(generation))
        (found,) = remembered(folder)
        assert (found.trigger, found.target) == (expected.trigger, "star")
        for again in (("ViT-B-32", folder), (folder / "open_clip_model.safetensors",)):
            assert [a.trigger for a in remembered(*again)] == [expected.trigger]
        model = decompclip.load(folder)
    assert decompclip.backdoor(tmp_path / "2").target_index == 3
    assert open_attack(str(tmp_path / "2")).trigger == expected.trigger


def test_the_poisons_of_one_s_own_are_remembered(poisons: Path, tmp_path: Path) -> None:
    shards = open_pairs(poisons)
    clean = finetune(decompclip.load("shapes"), shards, SHORT).model
    assert [found.target for found in attacks_of(clean.backdoors, "")] == ["ring"]
    twice = finetune(decompclip.load("shapes-badnet"), shards, SHORT).model
    folder = save_model(twice, tmp_path / "twice")
    assert [attack.target for attack in remembered(folder)] == ["star", "ring"]
    for spec in ("own", "badnet"):
        with pytest.raises(ValueError, match=f"{spec} can mean; twice remembers 2"):
            open_attack(spec, remembered(folder), model="twice")


@pytest.mark.parametrize("wrap", [lambda pairs: pairs, lambda pairs: PairStream(pairs)])
def test_pairs_poisoned_in_memory_tell_it(wrap: Callable[[PoisonedPairs], object]) -> None:
    pairs = PoisonedPairs(ShapesPairs(32, seed=0), Blended(), "ring", count=6)
    assert [(a.trigger, a.target) for a in poisoned_by(wrap(pairs))] == [(Blended(), "ring")]
    assert poisoned_by(ShapesPairs(32, seed=0)) == ()


def test_a_list_beside_clean_shards_is_no_poison(poisons: Path, tmp_path: Path) -> None:
    write_shards([ShapesPairs(32, seed=0)[i] for i in range(1)], tmp_path)
    (tmp_path / "poisons.json").write_bytes((poisons / "poisons.json").read_bytes())
    assert poisoned_by(open_pairs(tmp_path)) == ()
    assert len(poisoned_by(open_pairs(poisons))) == 1


def test_the_same_attack_counts_once() -> None:
    one, other = Attack(BadNet(), "star", "a"), Attack(BadNet(), "star", "b")
    assert distinct([one, other, Attack(BadNet(), "ring", "c")]) == (one, Attack(BadNet(), "ring", "c"))


def test_a_trigger_of_the_user_s_own_is_told_and_not_remembered() -> None:
    class Corner(Blended):
        name = "corner"

    pairs = PoisonedPairs(ShapesPairs(40, seed=3), Corner(), "star", count=4)
    with pytest.warns(UserWarning, match="will not remember the trigger 'corner'"):
        assert poisoned_by(pairs) == ()
