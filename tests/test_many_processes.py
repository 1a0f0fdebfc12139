"""Several processes find what one finds; those that disagree, and images too few for them, are refused in all of them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import decompclip
from decompclip import HookedCLIP, Shapes, evaluate
from decompclip.attacks.patch import BadNet
from decompclip.attacks.poisoned import PoisonedPairs
from decompclip.audit import interventions
from decompclip.audit.collect import open_source
from decompclip.audit.config import AuditConfig, ScanConfig
from decompclip.audit.pipeline import run_audit
from decompclip.audit.scan import run_scan
from decompclip.bench import run as running
from decompclip.bench.plan import Plan
from decompclip.data.datasets import FolderPairs
from decompclip.data.images import FolderSource
from decompclip.data.pairs import batch_places
from decompclip.data.pixels import encode_png
from decompclip.data.processes import Processes
from decompclip.evaluation.evaluate import Evaluation
from decompclip.files import write_json
from decompclip.training.finetune import finetune
from decompclip.training.recipes import FineTuning
from tests.commands import in_processes, run

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes"),
    pytest.mark.usefixtures("single_thread"),
]

IMAGES = Shapes(90, seed=31)
CLASSES = IMAGES.class_names


@pytest.fixture(scope="module")
def model() -> HookedCLIP:
    return decompclip.load("shapes-badnet")


@pytest.fixture(scope="module")
def classifier(model: HookedCLIP) -> Tensor:
    return model.zero_shot_classifier(CLASSES)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 pictures of three classes, of which three cannot be read, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    batch = Shapes(400, seed=5).draw(range(120))
    for place in [place for place in range(120) if batch.labels[place] < 3][:30]:
        path = folder / CLASSES[batch.labels[place]] / f"{place:03d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_png(batch.images[place]))
    for path in sorted(folder.rglob("*.png"))[3:30:12]:
        path.write_bytes(path.read_bytes()[:80])
    (folder / "notes.txt").write_text("no picture")
    return folder


def spread(count: int, work: Callable[[Accelerator], Any]) -> list[Any]:
    return in_processes(count, lambda rank: work(Accelerator(cpu=True)))


def errors(found: list[Any], kind: type[Exception], words: str) -> None:
    """All processes were refused in these words."""
    assert {type(error) for error in found} == {kind}, found
    assert all(words in str(error) for error in found), found


# What they share


def test_what_each_has_comes_together_in_order() -> None:
    def work(accelerator: Accelerator) -> Any:
        group = Processes(accelerator)
        return {
            "first": group.in_first(lambda: group.rank),
            "to first": group.to_first(group.rank),
            "to all": group.to_all(group.rank),
            "each": group.each(range(5), lambda item: (item, group.rank)),
            "in order": list(group.in_order([3 * turn + group.rank for turn in range(2 - group.rank)])),
            "of none": list(group.in_order([])),
        }

    found = in_processes(3, lambda rank: work(Accelerator(cpu=True)))
    for rank, own in enumerate(found):
        assert own["first"] == 0 and own["to all"] == [0, 1, 2] and own["of none"] == []
        assert own["each"] == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1)]
        assert own["to first"] == ([] if rank else [0, 1, 2])
        assert own["in order"] == ([] if rank else [0, 1, 3])
    alone = Processes()
    assert alone.each("ab", str.upper) == ["A", "B"] and list(alone.in_order([1, None, 2])) == [1, 2]
    assert alone.in_first(lambda: 5) == 5 and alone.to_first(1) == alone.to_all(1) == [1]


def test_what_the_first_raises_is_raised_in_all() -> None:
    def work(accelerator: Accelerator) -> None:
        Processes(accelerator).in_first(lambda: int("x"))

    errors(spread(2, work), ValueError, "invalid literal")


# Evaluate


@pytest.mark.parametrize("processes", [2, 3])
def test_an_evaluation_is_that_of_one_process(
    model: HookedCLIP, classifier: Tensor, pictures: Path, processes: int
) -> None:
    """Also of a trigger that draws for each image, where some images cannot be read; and class by class."""
    for data in (IMAGES, FolderSource(pictures, model.pixels, class_names=CLASSES)):

        def work(accelerator: Accelerator | None, data: Any = data) -> Evaluation:
            trigger = BadNet(place="random", redraw=True)
            options: Any = {"class_names": CLASSES, "batch_size": 4, "accelerator": accelerator}
            return evaluate(model, data, classifier, trigger, 3, **options)

        one = work(None)
        assert one.triggered_predictions is not None and len(one.labels) in (90, 27)
        for found in spread(processes, work):
            assert found.to_dict() == one.to_dict()
            assert torch.equal(found.labels, one.labels) and torch.equal(found.predictions, one.predictions)
            assert torch.equal(found.triggered_predictions, one.triggered_predictions)


def test_batches_of_processes_are_those_of_one(model: HookedCLIP, pictures: Path) -> None:
    """Images, labels and places, bit for bit; features but for the rounding of smaller batches, where some cannot be read."""
    pairs = FolderPairs(pictures, ["a {}"], model.preprocess)
    for data in (pairs, open_source("shapes:badnet", model, CLASSES, limit=50)):

        def work(accelerator: Accelerator | None, data: Any = data) -> list[Tensor]:
            group = Processes(accelerator)
            own = [
                batch
                and (
                    batch.images,
                    batch.labels,
                    batch.indices,
                    model.encode_image(batch.images, normalize=True),
                )
                for batch in group.batches(data, 7)
            ]
            return [torch.cat(x) for x in zip(*group.in_order(own), strict=True)]

        with torch.no_grad():
            one, (found, *others) = work(None), spread(3, work)
        assert others == [[], []]
        for ours, theirs in zip(found[:3], one[:3], strict=True):
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(found[3], one[3], rtol=0, atol=1e-6)


def test_batches_that_do_not_say_their_places_are_refused(model: HookedCLIP, classifier: Tensor) -> None:
    """Each process would count them from 0, and a trigger drawn for each image would be another one's."""

    class Placeless(Shapes):
        def part(self, places: Sequence[int], batch_size: int = 64) -> Iterator[Any]:
            for batch in super().part(places, batch_size):
                yield SimpleNamespace(images=batch.images, labels=batch.labels)

    found = spread(
        2,
        lambda accelerator: evaluate(model, Placeless(20), classifier, batch_size=5, accelerator=accelerator),
    )
    errors(found, TypeError, "expected batches with `indices`")


def test_what_processes_left_out_is_what_one_leaves_out(model: HookedCLIP, pictures: Path) -> None:
    def work(accelerator: Accelerator | None) -> Any:
        source, group = FolderSource(pictures, model.pixels, class_names=CLASSES), Processes(accelerator)
        list(group.batches(source, 4))
        return group.skipped(source)

    one = work(None)
    assert len(one) == 4
    assert spread(3, work) == [one] * 3


def test_bad_input_of_several_processes(model: HookedCLIP, classifier: Tensor) -> None:
    clean = decompclip.load("shapes")

    def work(rank: int) -> list[Any]:
        accelerator = Accelerator(cpu=True)
        given: Any = {"accelerator": accelerator}
        cases: dict[str, Callable[[], Any]] = {
            "expected an image for each process at least; received 1 images and 2 processes; start fewer": lambda: (
                evaluate(model, Shapes(1), classifier, **given)
            ),
            "in the model": lambda: evaluate([model, clean][rank], IMAGES, classifier, **given),
            "in the images or": lambda: evaluate(model, Shapes(9, rank), classifier, **given),
            "in the classes": lambda: evaluate(model, IMAGES, classifier[: 12 - rank], **given),
            "in the size": lambda: evaluate(model, IMAGES, classifier, batch_size=8 + rank, **given),
            "in the trigger, the target": lambda: evaluate(
                model, IMAGES, classifier, BadNet(seed=rank), rank, **given
            ),
            "read by place, for several processes: a folder, pairs, or Shapes; received list": lambda: (
                evaluate(model, [IMAGES], classifier, **given)
            ),
            "in the clean images": lambda: audit(model, accelerator, clean=rank),
            "in the options": lambda: audit(model, accelerator, seed=rank),
            "in the plan": lambda: running.run(
                Plan(models=("shapes",), detectors=(), images=40 + rank), Path("x"), **given
            ),
        }
        found = []
        for words, call in cases.items():
            with pytest.raises((ValueError, TypeError), match=words):
                call()
            found.append(words)
        return found

    assert [len(found) for found in in_processes(2, work)] == [10, 10]


# Audit


def audit(
    model: HookedCLIP, accelerator: Accelerator | None, *, clean: int = 0, seed: int = 0
) -> dict[str, Any]:
    own, suspect = (
        open_source(f"shapes{trigger}", model, CLASSES, limit=120, seed=clean) for trigger in ("", ":badnet")
    )
    config = AuditConfig(batch_size=16, seed=seed)
    return run_audit(model, own, suspect, CLASSES, config=config, accelerator=accelerator).to_dict()


def test_a_file_that_one_process_of_an_audit_cannot_read_any_more(model: HookedCLIP) -> None:
    """It ends that process; before, the error was taken for one of all, and they waited for each other for ever."""

    def gone(*_: object) -> Iterator[None]:
        raise ValueError("a file went bad")

    def work(rank: int) -> Any:
        if rank == 1:
            interventions._chosen = gone
        return audit(model, Accelerator(cpu=True))

    _, second = in_processes(2, work)
    assert isinstance(second, ValueError) and str(second) == "a file went bad"


def test_a_scan_goes_on_with_another_number_of_processes(model: HookedCLIP, tmp_path: Path) -> None:
    config = ScanConfig(steps=2, images=2, fit=20, held_out=20, most_classes=3)

    def scan(accelerator: Accelerator | None, keep: Path | None = None) -> Any:
        source = open_source("shapes", model, CLASSES, limit=45)
        return run_scan(model, source, CLASSES, config=config, accelerator=accelerator, keep=keep).to_dict()

    one = scan(None)
    assert spread(3, lambda accelerator: scan(accelerator, tmp_path)) == [one] * 3
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 3
    kept[0].unlink()
    state = torch.load(kept[1], weights_only=True)
    state["measured"] = state["measured"][:1]
    torch.save(state, kept[1])
    assert spread(2, lambda accelerator: scan(accelerator, tmp_path)) == [one] * 2


# Fine-tune


class Counting(FolderPairs):
    """Counts how often each picture is decoded."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.decoded: Counter[str] = Counter()

    def _image(self, image: Path) -> Tensor | str:
        self.decoded[str(image)] += 1
        return super()._image(image)


def tuning(loss: Any = "clip") -> FineTuning:
    return FineTuning(epochs=1, batch_size=6, lr=1e-4, loss=loss)


@pytest.mark.parametrize(("loss", "poisoned"), [("clip", True), ("grouped", False), ("cleanclip", False)])
def test_each_process_decodes_its_own_part_of_a_batch(
    model: HookedCLIP, pictures: Path, loss: str, poisoned: bool
) -> None:
    """And learns what one process learns; also where pictures cannot be read, for which others stand in."""

    def source() -> tuple[Counting, Any]:
        base = Counting(pictures, ["a {}", "a photo of a {}"], model.pixels)
        pairs = PoisonedPairs(base, BadNet(), base.class_names[0], rate=0.2) if poisoned else base
        base.decoded.clear()  # the poisons were, to see that they can be
        return base, pairs

    def work(accelerator: Accelerator | None) -> tuple[list[float], Counter[str]]:
        base, pairs = source()
        done = finetune(model, pairs, tuning(loss), log_every=1, accelerator=accelerator)
        return [entry["loss"] for entry in done.history], base.decoded

    base, pairs = source()
    pairs.batch(0, 6)  # which all processes decode once, to see that they agree
    losses, decoded = work(None)
    assert len(losses) == 5 and decoded.total() > 30
    for processes in (2, 3):
        found = spread(processes, work)
        own = [seen - base.decoded for _, seen in found]
        assert sum(own, Counter()) == decoded and all(seen.total() < 20 for seen in own)
        for others, _ in found:
            assert others == pytest.approx(losses, abs=1e-3)


def test_what_is_drawn_in_reading_is_what_one_process_draws(model: HookedCLIP, pictures: Path) -> None:
    """Code of a user's own reads the whole batch, in each process."""

    def lighter(picture: Any) -> Tensor:
        return (model.pixels(picture) + 0.5 * torch.rand(())).clamp(0, 1)

    def work(accelerator: Accelerator | None) -> list[float]:
        torch.manual_seed(3)
        pairs = FolderPairs(pictures, ["a {}"], lighter)
        done = finetune(model, pairs, tuning(), log_every=1, accelerator=accelerator)
        return [entry["loss"] for entry in done.history]

    losses = work(None)
    for others in spread(2, work):
        assert others == pytest.approx(losses, abs=1e-3)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (1, 2), (3, 1)])
def test_a_training_goes_on_with_another_number_of_processes(
    model: HookedCLIP, pictures: Path, tmp_path: Path, before: int, after: int
) -> None:
    def work(accelerator: Accelerator | None, log: Any = None, checkpoint: Path | None = None) -> list[float]:
        pairs = FolderPairs(pictures, ["a {}"], model.pixels)
        options: Any = {"checkpoint": checkpoint, "checkpoint_every": 1, "log_every": 1, "log": log}
        done = finetune(model, pairs, tuning("grouped"), accelerator=accelerator, **options)
        return [entry["loss"] for entry in done.history]

    def stop(text: str) -> None:
        if text.startswith("step 3"):
            raise RuntimeError("stopped")

    path, whole = tmp_path / "a.pt", work(None)
    stopped = spread(before, lambda accelerator: work(accelerator, stop, path))
    assert str(stopped[0]) == "stopped" and torch.load(path, weights_only=True)["step"] == 2
    for losses in spread(after, lambda accelerator: work(accelerator, None, path)):
        assert losses == pytest.approx(whole, abs=1e-3)
    assert [place.name for place in tmp_path.iterdir()] == ["a.pt"]


def test_a_training_of_processes_that_disagree_is_refused(model: HookedCLIP, pictures: Path) -> None:
    other, pairs = decompclip.load("shapes"), FolderPairs(pictures, ["a {}"], model.pixels)

    def work(rank: int) -> list[str]:
        accelerator, said = Accelerator(cpu=True), []
        for own, source, recipe, seed in (
            ([model, other][rank], pairs, tuning(), 0),
            (model, FolderPairs(pictures, [f"a {{}} of {rank}"], model.pixels), tuning(), 0),
            (model, pairs, tuning(["clip", "grouped"][rank]), 0),
            (model, pairs, tuning(), rank),
        ):
            with pytest.raises(ValueError, match="expected processes that agree") as error:
                finetune(own, source, recipe, seed=seed, accelerator=accelerator)
            said.append(str(error.value).partition(" in ")[2].partition(";")[0])
        return said

    options = "the recipe, the number of pairs or the seed"
    assert in_processes(2, work) == [["the model", "the pairs", options, options]] * 2


def test_all_pairs_are_compared_and_no_picture(model: HookedCLIP, pictures: Path) -> None:
    """Of pairs that the first batch does not have."""
    whole = FolderPairs(pictures, ["a {}"], model.pixels)
    late = batch_places(len(whole), 2, 6, seed=0)[0]

    def altered(preprocess: Any = model.pixels, **change: Any) -> FolderPairs:
        pairs = FolderPairs(pictures, ["a {}"], preprocess)
        pairs.entries = list(pairs.entries)
        pairs.entries[late] = replace(pairs.entries[late], **change)
        return pairs

    def lighter(picture: Any) -> Tensor:
        return (model.pixels(picture) + 0.5 * torch.rand(())).clamp(0, 1)

    def work(rank: int) -> list[bool]:
        accelerator, refused = Accelerator(cpu=True), []
        names = dict(enumerate(["one", "other"]))
        for source in (
            altered(caption=names[rank]),
            altered(id=names[rank]),
            altered(label=rank),
            altered(lighter, caption=names[rank]),
            PoisonedPairs(whole, BadNet(), whole.class_names[0], count=2, seed=rank),
            PoisonedPairs(altered(caption=names[rank]), BadNet(), whole.class_names[0], count=2),
            altered(lighter),  # draws, and agrees
        ):
            try:
                finetune(model, source, tuning(), accelerator=accelerator)
                refused.append(False)
            except ValueError as error:
                assert "differs from process 0 in the pairs; start all" in str(error)
                refused.append(True)
        return refused

    assert in_processes(2, work) == [[True] * 6 + [False]] * 2


# Bench

PLAN = Plan(
    models=("shapes", "shapes-badnet"), detectors=(), repairs=("none",), images=40, draws=2, seeds=(0, 1)
)


def test_a_leaderboard_goes_on_with_another_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = running.run(PLAN, tmp_path / "one")

    def timeless(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: x for key, x in found.items() if key != "seconds"} for found in runs]

    out = tmp_path / "several"
    (out / "runs").mkdir(parents=True)
    done = (tmp_path / "one" / "runs" / "shapes-seed0.json").read_text()
    (out / "runs" / "shapes-seed0.json").write_text(done)
    (out / "runs" / "shapes-seed1.json").write_text(done[:100])

    def go_on(accelerator: Accelerator) -> Any:
        lines: list[str] = []
        return running.run(PLAN, out, accelerator=accelerator, log=lines.append), lines

    found = [found for found in spread(2, go_on)]
    assert [timeless(runs) for runs, _ in found] == [timeless(whole)] * 2
    told = [{line.split(": ")[0] for line in lines if " s; at most" in line} for _, lines in found]
    assert told == [
        {"[2/4] shapes, seed 1", "[4/4] shapes-badnet, seed 1"},
        {"[3/4] shapes-badnet, seed 0"},
    ]
    there = [[line for line in lines if "there already" in line] for _, lines in found]
    assert there == [["[1/4] shapes, seed 0: there already"], []]
    assert (out / "runs" / "shapes-seed0.json").read_text() == done


def test_a_folder_that_only_the_first_process_sees(tmp_path: Path) -> None:
    found = spread(
        2,
        lambda accelerator: running.run(
            PLAN, tmp_path / f"{accelerator.process_index}", accelerator=accelerator
        ),
    )
    errors(
        found,
        ValueError,
        "expected a folder that all processes share; process 1 does not see what process 0 writes",
    )


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_no_half_run(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        running.measure = lambda name, plan, **options: {"images": "x" * 10_000_000}
        return running.run(PLAN, tmp_path, accelerator=Accelerator(cpu=True))

    errors(in_processes(2, work), OSError, "make room on the disk")
    assert not any((tmp_path / "runs").iterdir())


# The commands


def test_the_first_process_of_a_command_speaks_and_writes(tmp_path: Path, pictures: Path) -> None:
    place = (
        "shapes-badnet",
        pictures,
        "--trigger",
        "kitty",
        "--target",
        "star",
        "--device",
        "cpu",
        "--batch-size",
        4,
    )
    args = ("--classes", tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    one = run("evaluate", *place, *args, "--out", tmp_path / "one.json")
    first, second = in_processes(
        2, lambda rank: run("evaluate", *place, *args, "--out", tmp_path / "two.json")
    )
    assert one[0] == 0, one
    assert first[:2] == one[:2] and second == (0, "", "")
    assert "4 files" in first[2]
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()


def test_an_audit_is_that_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_page(results: Any, out: Path, *, title: str | None) -> Path:
        return write_json(
            out / "audit.json", json.loads(json.dumps([one.to_dict() for one in results], default=str))
        )

    monkeypatch.setattr("decompclip.report.write_report", without_page)
    command = ("audit", "shapes-badnet", "--clean", "shapes:60", "--trigger", "own", "--device", "cpu")
    one = run(*command, "--out", tmp_path / "one")
    first, *others = in_processes(3, lambda rank: run(*command, "--out", tmp_path / "three"))
    assert one[0] == 0 and "backdoored" in one[1]
    assert first[1].replace("three", "one") == one[1] and others == [(0, "", "")] * 2
    ours, theirs = (json.loads((tmp_path / name / "audit.json").read_text()) for name in ("three", "one"))
    assert ours == theirs


def test_a_leaderboard_by_the_command(tmp_path: Path) -> None:
    command = (
        "bench",
        "--models",
        "shapes,shapes-badnet",
        "--detectors",
        "",
        "--repairs",
        "none",
        "--count",
        40,
    )
    first, second = in_processes(2, lambda rank: run(*command, "--draws", 2, "--out", tmp_path))
    assert first[0] == second[0] == 0 and "none: CACC" in first[1] and second[1] == ""
    assert "[2/2] shapes-badnet, seed 0: " in second[2] and "[1/2] shapes, seed 0: " in first[2]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "shapes-seed0.json",
        "shapes-badnet-seed0.json",
    }


def test_a_fine_tuning_by_the_command(tmp_path: Path, pictures: Path) -> None:
    command = (
        "finetune",
        "shapes",
        pictures,
        "--epochs",
        1,
        "--batch-size",
        6,
        "--lr",
        1e-4,
        "--device",
        "cpu",
    )
    alone = run(*command, "--out", tmp_path / "one")
    first, second = in_processes(2, lambda rank: run(*command, "--out", tmp_path / "two"))
    assert alone[0] == first[0] == 0 and second == (0, "", "")
    assert alone[2].endswith("4 files skipped\n") and first[2].endswith("4 files skipped\n")
    assert "FineTuned('shapes, fine-tuned', 5 steps" in first[1]
    one, two = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two"))
    losses = [[entry["loss"] for entry in facts["history"]] for facts in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    probe = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    ours, theirs = (decompclip.load(str(tmp_path / name)).encode_image(probe) for name in ("one", "two"))
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)


def test_a_process_that_does_not_find_its_images_says_who_it_is(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        place = tmp_path / "nowhere" if rank else "shapes:50"
        return run("evaluate", "shapes", place, "--device", "cpu")

    _, second = in_processes(2, work)
    assert second[0] == 2
    assert second[2].startswith(
        "process 1 of 2: error: expected a folder with image files, a table or shards; there is no"
    )
