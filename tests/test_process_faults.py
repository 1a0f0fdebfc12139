"""What befalls several processes: all of them are told, on CPUs none waits for ever, and the next run ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, InitProcessGroupKwargs

import decompclip
from decompclip import Shapes, extract
from decompclip.attacks.patch import BadNet
from decompclip.attacks.poisoned import PoisonedPairs, write_poisoned
from decompclip.bench import run as running
from decompclip.bench.plan import Plan
from decompclip.data.processes import Processes, ProcessGone
from decompclip.data.sources import open_pairs
from decompclip.decomposition.store import MOMENTS, shard_name
from decompclip.files import FolderInUse, alone_in, write_text
from decompclip.operators import extract as extracting
from decompclip.training import finetune as finetuning
from decompclip.training.finetune import finetune
from decompclip.training.recipes import FineTuning
from tests.commands import in_processes, run

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes"),
    pytest.mark.usefixtures("single_thread"),
]

IMAGES = Shapes(150, seed=31)
PLAN = Plan(
    models=("shapes", "shapes-badnet"), detectors=(), repairs=("none",), images=40, draws=2, seeds=(0, 1)
)


def store(folder: Path, accelerator: Accelerator | None = None, **options: Any) -> None:
    model = decompclip.load("shapes")
    extract(model, IMAGES, folder, shard_size=30, batch_size=15, accelerator=accelerator, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run of one process leaves: five shards."""
    folder = tmp_path_factory.mktemp("built") / "store"
    store(folder)
    return files(folder)


def after_a_shard(monkeypatch: pytest.MonkeyPatch, befall: Callable[[Path], object]) -> None:
    """Something happens after each shard that a process has written."""
    write = extracting.write_shard

    def then(path: Path, *given: Any) -> None:
        write(path, *given)
        befall(path)

    monkeypatch.setattr(extracting, "write_shard", then)


def ours(rank: int) -> Accelerator:
    del rank
    return Accelerator(cpu=True)


def errors(found: list[Any], kind: type[Exception], words: str) -> None:
    """All processes were refused in these words."""
    assert {type(error) for error in found} == {kind}, found
    assert all(words in str(error) for error in found), found


# A shard that vanishes


@pytest.mark.parametrize("processes", [2, 3])
def test_a_shard_that_vanishes(
    tmp_path: Path, built: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    def vanish(path: Path) -> None:
        if path.name == shard_name(3):
            path.unlink()

    with monkeypatch.context() as patch:
        after_a_shard(patch, vanish)
        found = in_processes(processes, lambda rank: store(tmp_path / "a", ours(rank)))
    errors(found, ValueError, "000003.safetensors of a store; it cannot be read")
    assert all("run the same `decompclip extract` again" in str(error) for error in found)
    assert in_processes(processes, lambda rank: store(tmp_path / "a", ours(rank))) == [None] * processes
    assert files(tmp_path / "a") == built


def test_moments_that_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path / "one", moments_only=True)
    finish = extracting.Job.finish

    def gone(job: Any, *given: Any) -> None:
        (tmp_path / "a" / MOMENTS).unlink()
        finish(job, *given)

    def work(rank: int) -> None:
        store(tmp_path / "a", ours(rank), moments_only=True)

    with monkeypatch.context() as patch:
        patch.setattr(extracting.Job, "finish", gone)
        errors(in_processes(2, work), ValueError, "moments.safetensors of a store; it cannot be read")
    assert in_processes(2, work) == [None, None]
    assert files(tmp_path / "a") == files(tmp_path / "one")


@pytest.mark.parametrize("processes", [2, 3])
def test_a_run_of_a_leaderboard_that_vanishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(running, "measure", lambda name, plan, **options: {"images": {}})
    lost = tmp_path / "runs" / "shapes-seed0.json"
    wait = Processes.wait

    def vanish(group: Processes) -> None:
        wait(group)
        if group.rank == 0:
            lost.unlink()

    def work(rank: int) -> Any:
        return running.run(PLAN, tmp_path, accelerator=ours(rank))

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "wait", vanish)
        errors(in_processes(processes, work), ValueError, "shapes-seed0.json is not there any more")
    assert len(list((tmp_path / "runs").iterdir())) == 3
    found = in_processes(processes, work)
    assert all(
        [one["model"] for one in runs] == ["shapes", "shapes", *["shapes-badnet"] * 2] for runs in found
    )


# Two runs into one folder


def test_another_run_in_the_folder_is_told_to_all(tmp_path: Path) -> None:
    """Of every function that writes to a folder for long, called from Python."""
    model, pairs = decompclip.load("shapes"), open_pairs("shapes:32")
    recipe = FineTuning(epochs=1, batch_size=8)

    def work(rank: int) -> list[str]:
        accelerator = ours(rank)
        calls: list[Callable[[], object]] = [
            lambda: store(tmp_path, accelerator),
            lambda: running.run(PLAN, tmp_path, accelerator=accelerator),
            lambda: finetune(model, pairs, recipe, checkpoint=tmp_path / "a.pt", accelerator=accelerator),
            lambda: write_poisoned(PoisonedPairs(pairs, BadNet(), "star", count=2), tmp_path),
        ]
        said = []
        for call in calls:
            with pytest.raises(FolderInUse) as error:
                call()
            said.append(str(error.value))
        return said

    with alone_in(tmp_path), alone_in(tmp_path, name="a.pt"):
        for said in in_processes(2, work):
            assert all(f"process {os.getpid()} on " in text for text in said)
            assert [text.split(";")[0].rpartition("/")[2] for text in said] == [
                tmp_path.name,
                tmp_path.name,
                "a.pt",
                tmp_path.name,
            ]
    assert [path.name for path in tmp_path.iterdir()] == [".decompclip.lock"]
    with alone_in(tmp_path), alone_in(tmp_path, name="a.pt"):  # let go
        pass


@pytest.mark.parametrize("command", ["audit", "evaluate", "finetune"])
def test_all_processes_of_a_command_say_that_another_run_is_there(tmp_path: Path, command: str) -> None:
    """Before, the first one said so, and the others waited for it."""
    args = {
        "audit": ("--clean", "shapes:50", "--out", tmp_path),
        "evaluate": ("shapes:50", "--out", tmp_path / "a.json"),
        "finetune": ("shapes:8", "--batch-size", 8, "--out", tmp_path),
    }[command]
    name = "a.json" if command == "evaluate" else ""
    with alone_in(tmp_path, name=name):
        found = in_processes(2, lambda rank: run(command, "shapes", *args, "--device", "cpu"), grace=60)
    for rank, (code, _, said) in enumerate(found):
        assert code == 2 and f"process {rank} of 2: error: expected to be alone in writing to " in said


def test_two_runs_of_two_processes_at_a_time(tmp_path: Path, built: dict[str, bytes]) -> None:
    """The second is refused in both of its processes, and the first ends as if alone."""
    out, begun, ends = tmp_path / "a", tmp_path / "begun", tmp_path / "ends"

    def hold(text: str) -> None:
        """Told once the folder is the run's own, before the work."""
        write_text(begun, text)
        for _ in range(6000):
            if ends.exists():
                return
            time.sleep(0.01)

    first = os.fork()
    if not first:
        code = 1
        try:
            done = in_processes(2, lambda rank: store(out, ours(rank), log=hold))
            code = int(done != [None, None])
        finally:
            os._exit(code)
    try:
        while not begun.exists():
            assert os.waitpid(first, os.WNOHANG) == (0, 0)
            time.sleep(0.01)
        second = in_processes(2, lambda rank: store(out, ours(rank)))
    finally:
        write_text(ends, "")
    errors(second, FolderInUse, "expected to be alone in writing")
    assert os.waitpid(first, 0)[1] == 0
    assert files(out) == built


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here; the tests with a limit of the size of files run")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_disk_that_fills_up(
    small_disk: Path, built: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    ballast = small_disk / "of somebody else"

    def fill(_: Path) -> None:
        with pytest.raises(OSError), ballast.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def work(rank: int) -> None:
        store(small_disk / "a", ours(rank))

    with monkeypatch.context() as patch:
        after_a_shard(patch, fill)
        found = in_processes(processes, work, grace=60)
    full = [error for error in found if isinstance(error, OSError) and "make room on the disk" in str(error)]
    assert full, found
    assert all(error is None or isinstance(error, ProcessGone) for error in found if error not in full), found
    there = files(small_disk / "a")
    assert there and there.items() <= built.items()  # whole, what there is
    assert not list((small_disk / "a").glob(".*.partial"))
    ballast.unlink()
    assert in_processes(processes, work) == [None] * processes
    assert files(small_disk / "a") == built


# A process that is stopped


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_is_killed(
    tmp_path: Path, built: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, dies: int, processes: int
) -> None:
    """SIGKILL, after its first shard: the others are told so where they next come together."""
    told = tmp_path / "told"

    def work(rank: int) -> None:
        if rank == dies:
            after_a_shard(monkeypatch, lambda _: os.kill(os.getpid(), signal.SIGKILL))
        try:
            store(tmp_path / "a", ours(rank))
        except ProcessGone as error:
            write_text(told.with_suffix(f".{rank}"), str(error))

    in_processes(processes, work, grace=60)
    said = [path.read_text() for path in tmp_path.glob("told.*")]
    assert len(said) == processes - 1
    assert all(
        "go on together; one of them has ended" in text and "run the same again" in text for text in said
    )
    there = files(tmp_path / "a")
    assert there and there.items() <= built.items()
    assert in_processes(2, lambda rank: store(tmp_path / "a", ours(rank))) == [None, None]
    assert files(tmp_path / "a") == built


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_of_a_command_that_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    """SIGTERM while it works: it says what is kept; the other says that it does not go on alone."""
    command = ("extract", "shapes", "shapes:150", "--shard-size", 30, "--device", "cpu", "--out")
    assert run(*command, tmp_path / "one")[0] == 0

    def work(rank: int) -> Any:
        if rank == stopped:
            after_a_shard(monkeypatch, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        return run(*command, tmp_path / "two")

    found = in_processes(2, work, grace=60)
    (code, _, said), (other, _, heard) = found[stopped], found[1 - stopped]
    assert code == 143 and f"process {stopped} of 2: stopped by SIGTERM: what is whole stays in " in said
    assert other == 2 and f"process {1 - stopped} of 2: error: expected 2 processes" in heard
    assert [code for code, *_ in in_processes(2, lambda rank: run(*command, tmp_path / "two"))] == [0, 0]
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_process_of_a_fine_tuning_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other waits for its gradients, inside torch."""
    command = (
        "finetune",
        "shapes",
        "shapes:64",
        "--epochs",
        1,
        "--batch-size",
        8,
        "--device",
        "cpu",
        "--out",
    )

    def work(rank: int) -> Any:
        if rank == 1:
            monkeypatch.setattr(
                finetuning,
                "check_pixels",
                lambda images, where: where.endswith("step 3") and os.kill(os.getpid(), 9),
            )
        return run(*command, tmp_path / "a")

    (code, _, said), killed = in_processes(2, work, grace=60)
    assert killed is None and code == 2
    assert "process 0 of 2: error: expected 2 processes that go on together; one of them has ended" in said
    assert [code for code, *_ in in_processes(2, lambda rank: run(*command, tmp_path / "a"))] == [0, 0]
    assert decompclip.load(str(tmp_path / "a")).name


def test_a_process_that_waits_hears_a_signal(tmp_path: Path) -> None:
    """A wait inside torch would end with the process that is waited for, hours later."""

    class Stop(Exception): ...

    def stop(*_: object) -> None:
        raise Stop

    def work(rank: int) -> float:
        group = Processes(ours(rank))
        group.wait()
        if rank == 0:
            time.sleep(0.3)
            os.kill(int(group_of(tmp_path / "1")), signal.SIGTERM)
            time.sleep(2)
            return 0
        signal.signal(signal.SIGTERM, stop)
        write_text(tmp_path / "1", str(os.getpid()))
        began = time.monotonic()
        with pytest.raises(Stop):
            group.wait()
        return time.monotonic() - began

    _, waited = in_processes(2, work)
    assert 0 < waited < 2


def test_one_that_is_late_is_told_apart_from_one_that_has_ended() -> None:
    """And what else torch says stays as it is."""

    def work(rank: int) -> None:
        waits = InitProcessGroupKwargs(timeout=timedelta(seconds=2))
        group = Processes(Accelerator(cpu=True, kwargs_handlers=[waits]))
        with pytest.raises(RuntimeError, match=r"^gloo: a shape$"), group.going_on():
            raise RuntimeError("gloo: a shape")
        with pytest.raises(RuntimeError, match="^the user's reader timed out$"), group.going_on():
            raise RuntimeError("the user's reader timed out")
        group.wait()
        time.sleep(5 * rank)
        group.wait()

    late, gone = in_processes(2, work, grace=60)
    assert type(late) is TimeoutError and "one of them is still at work, or hangs; torch says: " in str(late)
    assert "InitProcessGroupKwargs(timeout=" in str(late)
    assert isinstance(gone, ProcessGone)


def group_of(path: Path) -> str:
    while not path.exists():
        time.sleep(0.01)
    return path.read_text()


def test_a_launcher_that_is_stopped(tmp_path: Path) -> None:
    """`torchrun`, which hands SIGTERM on: it ends, what is kept is said, and the next run ends with the same bytes."""
    args = ("extract", "shapes", "shapes:600", "--shard-size", "20", "--device", "cpu", "--out")
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    with subprocess.Popen(
        [*launch, "-m", "decompclip", *args, str(tmp_path / "a")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as launcher:
        while not list((tmp_path / "a").glob("0*.safetensors")):
            assert launcher.poll() is None
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        said = launcher.communicate(timeout=100)[1]
    assert launcher.returncode
    assert f"stopped by SIGTERM: what is whole stays in {tmp_path / 'a'}" in said
    there = files(tmp_path / "a")
    assert 0 < len(there) < 30
    for out in ("a", "one"):
        assert run(*args, tmp_path / out)[0] == 0
    assert files(tmp_path / "a") == files(tmp_path / "one")
    assert there.items() <= files(tmp_path / "one").items()
