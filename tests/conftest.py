"""Shapes are checked in tests, at no cost in use; towers to test on; a disk that is full."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from importlib import import_module
from typing import TYPE_CHECKING

# Before torch is loaded: a process that a test forks would wait without end for OpenMP's other threads.
os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping
import pytest
import torch
from hypothesis import Phase, settings

if TYPE_CHECKING:
    from decompclip.tower.vit import HookedViT

MakeTower = Callable[..., "HookedViT"]

# A property that fails says so with the first example found, the same on every machine: a search for the smallest one
# went on for minutes where an example is an expression, and looked like an endless loop in what was tested.
settings.register_profile(
    "told at once", derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("told at once")

CHECKED = ["decompclip.decomposition", "decompclip.operators", "decompclip.defenses", "decompclip.evaluation"]


# What is made until the tests begin stays to the end: it is not looked at for what has gone.
gc.disable()

# Before a conftest further down imports anything of them. The process that only hands tests to others imports nothing.
if not {"-n", "--numprocesses"} & {word.partition("=")[0] for word in sys.argv}:
    # beneath the hook a library's bytecode would not be found, and all be compiled anew
    for library in ("open_clip", "scipy.stats", "sklearn.metrics", "transformer_lens"):
        import_module(library)
    jaxtyping.install_import_hook(CHECKED, "beartype.beartype")


# Files of ten processor seconds and more, the slowest first.
SLOW = (
    *(
        "notebooks",
        "docs",
        "process_faults",
        "many_processes",
        "diagnose",
        "bundled",
        "towers",
        "repair_command",
    ),
    *(
        "page_in_use",
        "policy",
        "token_rep",
        "verdict",
        "checkpoints",
        "cifar10_recipe",
        "defense_analyses",
        "browser",
    ),
    *(
        "readme",
        "threads",
        "ours",
        "scan",
        "measure",
        "roles",
        "detectors",
        "study_figures",
        "cli",
        "extract",
    ),
    *(
        "textspan",
        "study",
        "badclip",
        "explore",
        "loading",
        "kills",
        "hostile",
        "kernel",
        "saving",
        "photos_recipe",
    ),
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """From here on what has gone is looked for, among what tests make."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first: processes that share the tests end at about the same time."""
    rank = {f"test_{name}": place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def make_tower() -> MakeTower:
    """`make_tower(seed=0, **config)`: a small tower of random weights, none of them trivial."""

    from decompclip.tower.config import ViTConfig
    from decompclip.tower.vit import HookedViT

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> HookedViT:
        shape = {
            "n_layers": 3,
            "d_model": 32,
            "n_heads": 4,
            "d_head": 8,
            "d_mlp": 48,
            "d_embed": 20,
            "image_size": (24, 16),
            "patch_size": (8, 8),
        }
        generator = torch.Generator().manual_seed(seed)
        visual = HookedViT(ViTConfig(**{**shape, **changes}))  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            for name, parameter in visual.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                # Gains about one, all else about zero; xavier's draw from the global generator is overwritten.
                gain = name.endswith((".w", "ls1", "ls2"))
                parameter.copy_(
                    1 + 0.3 * noise if gain else noise * (0.3 if noise.ndim < 2 else noise.shape[-1] ** -0.5)
                )
        return visual.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def tower(make_tower: MakeTower) -> HookedViT:
    """3 layers of 4 heads, LayerScale, 7 tokens."""
    return make_tower(layer_scale=True)


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    return torch.randn(5, 3, 24, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave wrong shapes to the package's own checks, as in use: jaxtyping would speak first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def few_kept() -> Iterator[None]:
    """Each audit tries all corruptions on the pictures that it keeps: 60 serve where a user's has 96."""
    from decompclip.audit import collect

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "KEPT", 60)
        yield


@pytest.fixture(scope="module")
def single_thread() -> Iterator[None]:
    """As forked processes compute."""
    from decompclip.decomposition.maps import one_thread

    with one_thread():
        yield


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file grows beyond 100 kB: what a full disk does to a writer."""
    resource = pytest.importorskip("resource", reason="needs limits of the size of files, as Unix has them")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)
