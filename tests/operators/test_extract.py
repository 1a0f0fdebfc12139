"""Stores: what is read is what the tower gave; any kill, damage or number of processes ends with the same bytes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets import ImageFolder

import decompclip
from analyses.benchmarks import capacity
from decompclip import (
    AgnosticDet,
    AgnosticRep,
    DecompDet,
    Decomposition,
    DecompRep,
    HookedCLIP,
    MeanAblate,
    Moments,
    RandomAblate,
    Shapes,
    Store,
    ZeroAblate,
    ablation_sweep,
    evaluate,
    extract,
    head_mmd,
    heads,
    mlps,
    probe,
    textspan,
)
from decompclip.cli.extract import StoredAs
from decompclip.cli.options import Convention as OfCommand
from decompclip.data.datasets import DatasetPairs, FolderPairs, PairStream
from decompclip.data.images import FolderSource
from decompclip.data.pairs import SubsetPairs
from decompclip.data.pixels import encode_png, to_pixels
from decompclip.data.processes import Processes
from decompclip.data.shapes import ShapesPairs
from decompclip.data.shards import ShardPairs, write_shards
from decompclip.data.tables import CsvPairs
from decompclip.decomposition import store as module
from decompclip.decomposition.decomposition import TERMS, write_tensors
from decompclip.decomposition.maps import Convention, term_maps
from decompclip.decomposition.store import (
    AGAIN,
    MANIFEST,
    MAPS,
    MOMENTS,
    TYPES,
    StoredType,
    bytes_per_image,
    facts_of,
    read_manifest,
    write_manifest,
    write_shard,
)
from decompclip.defenses.distances import ComponentDistances
from decompclip.evaluation.evaluate import DecomposedImages
from decompclip.files import FolderInUse, alone_in
from decompclip.operators.extract import NAME, _size
from decompclip.operators.sweeps import most_damaging
from tests.commands import in_processes, refused, succeeds

IMAGES = Shapes(150, seed=31)
SIZES: dict[str, Any] = {"shard_size": 40, "batch_size": 16}


def files(folder: Path) -> dict[str, bytes]:
    """What a store is made of."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def model() -> HookedCLIP:
    return decompclip.load("shapes")


@pytest.fixture(scope="module")
def classifier(model: HookedCLIP) -> Tensor:
    return model.zero_shot_classifier(IMAGES.class_names)


@pytest.fixture(scope="module")
def normal(model: HookedCLIP) -> Tensor:
    return model.normalize(torch.cat([batch.images for batch in IMAGES.batches()]))


@pytest.fixture(scope="module")
def built(model: HookedCLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four shards, of unit features."""
    folder = tmp_path_factory.mktemp("stores") / "built"
    extract(model, IMAGES, folder, normalize=True, class_names=IMAGES.class_names, **SIZES)
    return folder


@pytest.fixture
def again(model: HookedCLIP, built: Path, tmp_path: Path) -> Callable[..., Store | Moments]:
    """The same run in a copy of the store, `tmp_path / "copy"`."""
    shutil.copytree(built, tmp_path / "copy")

    def run(**changes: Any) -> Store | Moments:
        given = {"normalize": True, "class_names": IMAGES.class_names, **SIZES, **changes}
        return extract(given.pop("model", model), given.pop("data", IMAGES), tmp_path / "copy", **given)

    return run


# What is read


def test_a_store_holds_what_the_tower_gives(model: HookedCLIP, built: Path, normal: Tensor) -> None:
    store, d = Store(built), model.decompose(normal, normalize=True)
    assert len(store) == 150 and len(store.manifest["shards"]) == 4
    assert d.target is not None and store.sum_error < 1e-5
    torch.testing.assert_close(store.features, d.target, rtol=0, atol=1e-4 * float(d.target.abs().max()))
    for name in TERMS:
        torch.testing.assert_close(getattr(store, name), getattr(d, name), rtol=1e-4, atol=1e-5)
    labels = torch.cat([batch.labels for batch in IMAGES.batches()])
    assert store.labels is not None and torch.equal(store.labels, labels)
    assert store.class_names == IMAGES.class_names
    assert store.ids == tuple(f"shapes/31/{place}" for place in range(150))
    assert store.maps.matches(d.maps) and store.normalized and store.convention == "centred"
    none = Decomposition.load(built / MAPS)
    assert len(none) == 0 and none.normalized and none.maps.matches(d.maps)


@pytest.mark.parametrize(
    "index",
    [
        slice(0, 0),
        slice(3, 9),
        slice(30, 90),
        slice(1, 9, 2),
        slice(None, None, 7),
        slice(-5, None),
        4,
        -1,
        [149, 3, 3, 80, 0],
        torch.arange(150) % 4 == 1,
        torch.arange(149, -1, -1),
    ],
    ids=repr,
)
def test_some_of_the_images_are_those_of_all(built: Path, index: Any) -> None:
    store = Store(built)
    some, all_ = store[index], store[:]
    assert type(some) is type(all_) is Decomposition
    for name in (*TERMS, "target"):
        assert torch.equal(getattr(some, name), getattr(all_[index], name))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of what is mapped")
def test_a_slice_of_a_shard_is_mapped_not_read(built: Path) -> None:
    coords = Store(built)[42:47].coords
    regions = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    at = {}
    for ends, _, _, _, _, *name in regions:
        start, end = (int(x, 16) for x in ends.split("-"))
        if start <= coords.data_ptr() < end:
            at = {"file": name[-1], "whole": end - start}
    assert at["file"] == str(built / "000001.safetensors") and len(coords) == 5
    assert at["whole"] >= Path(at["file"]).stat().st_size


def test_there_is_no_such_image(built: Path) -> None:
    store = Store(built)
    for holder in (store, store[:]):
        with pytest.raises(IndexError, match=r"expected an image in 0\.\.149; received 150"):
            holder[150]
        with pytest.raises(IndexError, match=r"expected indices of one axis; received \[1, 2\]"):
            holder[torch.tensor([[0, 1]])]
        assert torch.equal(holder[True].embed, store[1:2].embed)  # a number, not a mask


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_what_a_narrow_type_costs_is_measured(model: HookedCLIP, tmp_path: Path, dtype: Any) -> None:
    whole = extract(model, IMAGES, tmp_path / "whole", **SIZES)
    store = extract(model, IMAGES, tmp_path / dtype, dtype=dtype, **SIZES)
    assert isinstance(store, Store) and isinstance(whole, Store)
    errors = store.manifest["errors"]
    for name in ("coords", "mlps", "embed", "bias_coords"):
        x, y = getattr(whole, name), getattr(whole, name).to(TYPES[dtype]).float()
        assert torch.equal(getattr(store, name), y)
        parts = zip((x - y).split(40), x.split(40), strict=True)
        assert errors[name] == pytest.approx(max(float(e.abs().max() / p.abs().max()) for e, p in parts))
    d = store[:]
    assert d.sum_error == pytest.approx(errors["features"]) and 1e-5 < d.sum_error < 1e-2
    assert errors["features before"] < 1e-5 and errors["pool"] == 0
    assert whole.manifest["errors"]["coords"] == 0
    ablation_sweep(store, Moments.of(store), torch.randn(3, store.d_embed))


def test_a_type_that_cannot_hold_the_terms_is_refused(
    model: HookedCLIP, normal: Tensor, tmp_path: Path
) -> None:
    d = model.decompose(normal[:2])
    large = d.with_fields(coords=d.coords * 1e7)
    with pytest.raises(ValueError, match="that fp16 can hold; received coords of up to .*; store in bf16"):
        write_shard(tmp_path / "a.safetensors", large, None, ["a", "b"], "fp16", {})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_size_is_told_as_it_will_be(model: HookedCLIP, tmp_path: Path, dtype: Any) -> None:
    said: list[str] = []
    store = extract(model, IMAGES, tmp_path / "a", dtype=dtype, log=said.append, **SIZES)
    assert isinstance(store, Store)
    each = bytes_per_image(store.maps, 0, dtype)
    with module.safe_open(tmp_path / "a" / "000000.safetensors", framework="pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == 40 * each  # noqa: SIM118
    assert (
        said[0].startswith("150 images take ") and f"({each + NAME:,} bytes an image) in 4 shards" in said[0]
    )
    there = sum(len(x) for x in files(tmp_path / "a").values())
    assert there == pytest.approx(150 * (each + NAME) + len(files(tmp_path / "a")[MAPS]), rel=0.05)


def test_sizes_are_told_in_the_larger_unit_from_one_of_it_on() -> None:
    assert [_size(n) for n in (0, 123_456, 999_900_000, 10**9, 2_345_000_000)] == [
        "0.0 MB", "0.1 MB", "999.9 MB", "1.00 GB", "2.35 GB"
    ]  # fmt: skip


def test_the_page_on_capacity_holds_what_the_formula_gives() -> None:
    page = (Path(__file__).parents[2] / "docs" / "capacity.md").read_text(encoding="utf-8")
    found = capacity.run(capacity.Config())
    for part in capacity.table(found).split("\n\n"):
        assert part in page
    visual = decompclip.load("ViT-B-32", pretrained="random", text=False).visual
    maps = term_maps(visual, "centred")
    assert (*maps.heads.shape, len(maps.bias), 0) == capacity.SHAPES["ViT-B-32"]


# Who reads it

USES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "moments": lambda d, c, m: Moments.of(d).mlps,
    "sweep": lambda d, c, m: [x.predictions for x in ablation_sweep(d, Moments.of(d), c).sweeps.values()],
    "greedy": lambda d, c, m: most_damaging(d, None, c, torch.zeros(150, dtype=torch.long), size=2).hits,
    "mmd": lambda d, c, m: head_mmd(d, [d], permutations=0).values,
    "probe": lambda d, c, m: probe(d, {"place": torch.arange(150) % 2}, components=heads[-1, :2]).accuracy,
    "textspan": lambda d, c, m: textspan(m, -1, 0, images=d, texts=["a", "b", "c"], n_texts=2).texts,
    "mean ablation": lambda d, c, m: MeanAblate(mlps[-2:], Moments.of(d))(d).features,
    "noise": lambda d, c, m: RandomAblate(heads[-1], moments=Moments.of(d))(d).features,
    "detector of terms": lambda d, c, m: AgnosticDet(c, folds=2).fit(d).score(d),
    "repair of terms": lambda d, c, m: AgnosticRep(c, budget=0.1).fit(d)(d).features,
    "distances": lambda d, c, m: ComponentDistances(c, folds=2).fit(d).score(d),
    "prototypes": lambda d, c, m: DecompRep(convention="centred").fit(d)(d).features,
    "prototype detector": lambda d, c, m: DecompDet(convention="centred").fit(d).score(d),
    "evaluate": lambda d, c, m: (
        evaluate(
            None,
            DecomposedImages(d, torch.zeros(150, dtype=torch.long)),
            c,
            DecomposedImages(d, torch.ones(150).long()),
            0,
        ).predictions
    ),
    "another type": lambda d, c, m: d.to(torch.float64).features,
    "a file": lambda d, c, m: Decomposition.load(d.save(Path(os.environ["PYTEST_FILE"]))).coords,
}


@pytest.mark.parametrize("use", USES)
def test_what_takes_a_decomposition_takes_a_store(
    model: HookedCLIP,
    built: Path,
    classifier: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    use: str,
) -> None:
    monkeypatch.setenv("PYTEST_FILE", str(tmp_path / "d.safetensors"))
    store = Store(built)
    with torch.no_grad():
        ours, theirs = (USES[use](d, classifier, model) for d in (store, store[:]))
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4) if not isinstance(ours, tuple) else None
    if isinstance(ours, tuple):
        assert ours == theirs


@pytest.mark.parametrize(
    "use", ["moments", "sweep", "greedy", "mmd", "probe", "textspan", "evaluate", "fit", "scores"]
)
def test_what_goes_batch_by_batch_reads_a_shard_at_a_time(
    model: HookedCLIP, built: Path, classifier: Tensor, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    def refuse(self: Store, name: str) -> Tensor:
        raise AssertionError(f"all {name} were read")

    monkeypatch.setattr(Store, "_whole", refuse)
    longest = 0
    of_terms = Store._terms

    def seen(self: Store, tensors: Any, at: Any) -> Decomposition:
        nonlocal longest
        d = of_terms(self, tensors, at)
        longest = max(longest, len(d))
        return d

    monkeypatch.setattr(Store, "_terms", seen)
    store = Store(built)
    if use == "fit":
        for defense in (AgnosticDet(classifier, folds=2), AgnosticRep(classifier, budget=0.1)):
            defense.fit(store)
        DecompRep(convention="centred").fit(store)
        ComponentDistances(classifier, folds=2).fit(store)
    elif use == "scores":
        AgnosticDet(classifier, folds=2).fit(store).score(store)
        DecompDet(convention="centred").fit(store).score(store)
        ComponentDistances(classifier, folds=2).fit(store).score(store)
        assert len(store.features) == 150
    else:
        USES[use](store, classifier, model)
    assert 0 < longest <= 40


def test_terms_that_do_not_fit_the_memory_are_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 1000

    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: Little)
    with pytest.raises(MemoryError, match="all coords of .* take .* GB.*read a slice at a time"):
        Store(built).coords
    Little.available = 4 * 150 * Store(built).maps.heads[..., 0].numel()
    assert Store(built).coords.nbytes == Little.available  # it just fits
    Little.available -= 1
    with pytest.raises(MemoryError, match="all coords of"):
        Store(built).coords
    Little.available = 1000
    with pytest.raises(MemoryError, match="all features of .* take .* GB.*read a slice at a time"):
        Store(built).features


class Allocated(TorchDispatchMode):
    """Counts the bytes of new tensors of floats."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::cat", "aten::_to_copy", "aten::empty", "aten::new_empty"):
            self.total += found.nbytes
        return found


def test_all_terms_take_their_own_memory_and_no_more(model: HookedCLIP, tmp_path: Path) -> None:
    extract(model, IMAGES, tmp_path / "a", dtype="bf16", **SIZES)
    store = Store(tmp_path / "a", check=False)
    with Allocated() as seen:
        coords = store.coords
    assert len(coords) == 150 and seen.total == coords.nbytes


# Moments alone


def test_moments_alone_are_those_of_the_terms(
    model: HookedCLIP, built: Path, tmp_path: Path, normal: Tensor
) -> None:
    said: list[str] = []
    moments = extract(
        model, IMAGES, tmp_path / "m", normalize=True, moments_only=True, log=said.append, **SIZES
    )
    assert isinstance(moments, Moments)
    told = re.match(r"150 images take ([\d.]+) MB \(whatever the number of images\) in 4 shards", said[0])
    size = (tmp_path / "m" / MOMENTS).stat().st_size
    assert told and float(told[1]) == pytest.approx(2 * size / 1e6, rel=0.03)  # the old one, and the new
    store = Moments.of(Store(built))
    assert moments.count == store.count == 150
    for name in TERMS:
        torch.testing.assert_close(getattr(moments, name), getattr(store, name), rtol=1e-5, atol=1e-7)
    whole = Moments.fit(model, [*normal[:40].split(16), *normal[40:].split(16)], normalize=True)
    assert moments.scatter is not None and whole.scatter is not None and store.scatter is not None
    for name, x in whole.scatter.items():
        torch.testing.assert_close(moments.scatter[name], x, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(moments.scatter[name], store.scatter[name], rtol=1e-5, atol=1e-7)
    assert moments.streams is not None and whole.streams is not None
    for name, x in vars(whole.streams).items():
        assert x is None or torch.allclose(vars(moments.streams)[name], x, atol=1e-5)
    again = Moments.load(tmp_path / "m" / MOMENTS)
    assert torch.equal(again.scatter["mlps"], moments.scatter["mlps"]) if again.scatter else False
    with pytest.raises(ValueError, match=r"holds moments alone; read them with Moments\.load"):
        Store(tmp_path / "m")


def test_moments_alone_take_as_much_whatever_the_number_of_images(model: HookedCLIP, tmp_path: Path) -> None:
    sizes = []
    for count in (10, 200, 220):
        data = Shapes(count, seed=2)
        extract(model, data, tmp_path / str(count), moments_only=True, shard_size=20, batch_size=20)
        sizes.append({name: len(x) for name, x in files(tmp_path / str(count)).items()})
    assert len({found[MOMENTS] for found in sizes}) == 1 and sizes[0].keys() == {MANIFEST, MOMENTS}
    assert sizes[1][MANIFEST] - sizes[0][MANIFEST] < 10  # digits


def test_moments_travel_without_maps_and_are_written_now_and_then(
    model: HookedCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    travelled: list[Any] = []
    saved: list[Path] = []
    to_first, save = Processes.to_first, Moments.save

    def sent(self: Processes, own: Any) -> Any:
        travelled.append(own[0])
        return to_first(self, own)

    def kept(self: Moments, path: Any, **facts: Any) -> Any:
        saved.append(path)
        return save(self, path, **facts)

    monkeypatch.setattr(Processes, "to_first", sent)
    monkeypatch.setattr(Moments, "save", kept)
    extract(model, Shapes(20, seed=2), tmp_path, moments_only=True, shard_size=10, batch_size=10)
    assert [moments.maps.heads.numel() for moments in travelled] == [0, 0]
    assert saved == [tmp_path / MOMENTS]


def test_moments_go_on_where_they_were(
    model: HookedCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decompclip.operators.extract.EVERY", 0.0)
    options: dict[str, Any] = {"moments_only": True, **SIZES}
    extract(model, IMAGES, tmp_path / "a", **options)
    fit, calls = Moments.fit, []

    def stops(*given: Any, **more: Any) -> Moments:
        calls.append(1)
        if len(calls) == 8:  # in the third shard
            raise KeyboardInterrupt
        return fit(*given, **more)

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(Moments, "fit", stops)
        extract(model, IMAGES, tmp_path / "b", **options)
    assert int(facts_of(tmp_path / "b" / MOMENTS)["shards"]) == 2 and not (tmp_path / "b" / MANIFEST).exists()
    extract(model, IMAGES, tmp_path / "b", **options)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    (tmp_path / "b" / MOMENTS).write_bytes(b"no such thing")
    with pytest.warns(UserWarning, match=r"moments\.safetensors is damaged and is built anew"):
        extract(model, IMAGES, tmp_path / "b", **options)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_all_that_made_moments_is_written_down(
    model: HookedCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on with other batches says so; one that had nothing to do made nothing."""
    monkeypatch.setattr("decompclip.operators.extract.EVERY", 0.0)
    fit, calls = Moments.fit, []

    def stops(*given: Any, **more: Any) -> Moments:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return fit(*given, **more)

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(Moments, "fit", stops)
        extract(model, IMAGES, tmp_path / "a", moments_only=True, shard_size=40, batch_size=16)
    for batch_size in (20, 10):
        extract(model, IMAGES, tmp_path / "a", moments_only=True, shard_size=40, batch_size=batch_size)
    assert [made["batch_size"] for made in read_manifest(tmp_path / "a")["made"]] == [16, 20]


# What befalls a store


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def edit(path: Path) -> None:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**manifest, "images": 151}), encoding="utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "flipped": ("000001.safetensors", flip, "000001.*other numbers than its digest", "000001.* is damaged"),
    "cut": ("000002.safetensors", cut, "000002.* was cut or changed", "000002.* is damaged"),
    "gone": (
        "000003.safetensors",
        Path.unlink,
        "expected the shard .*000003.* not there",
        "000003.* is gone",
    ),
    "manifest edited": (MANIFEST, edit, "changed by hand or damaged", "written anew"),
    "manifest broken": (MANIFEST, cut, "expected a store's manifest; .* is none", "written anew"),
    "manifest gone": (MANIFEST, Path.unlink, "was begun and not finished", ""),
    "maps gone": (MAPS, Path.unlink, "expected a saved decomposition", ""),
    "maps flipped": (MAPS, flip, "was changed or damaged", ""),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_built_anew(
    built: Path, tmp_path: Path, again: Callable[..., Any], what: str, recwarn: pytest.WarningsRecorder
) -> None:
    name, damage, refusal, warning = DAMAGE[what]
    damage(tmp_path / "copy" / name)
    with pytest.raises((ValueError, FileNotFoundError), match=refusal) as refused:
        Store(tmp_path / "copy").coords
    assert AGAIN in str(refused.value)
    again()
    told = [str(one.message) for one in recwarn if issubclass(one.category, UserWarning)]
    assert len(told) == bool(warning)
    if warning:
        assert re.search(warning, told[0])
    assert files(tmp_path / "copy") == files(built)


def test_a_shard_of_another_run_is_not_read(model: HookedCLIP, built: Path, tmp_path: Path) -> None:
    other = extract(model, Shapes(150, seed=32), tmp_path / "other", normalize=True, **SIZES)
    assert isinstance(other, Store)
    shutil.copytree(built, tmp_path / "copy")
    shutil.copy(tmp_path / "other" / "000001.safetensors", tmp_path / "copy")
    with pytest.raises(
        ValueError, match="expected the shard that .* lists; received .*000001.* of another run"
    ):
        Store(tmp_path / "copy")[50:60]


def test_maps_of_another_model_are_not_read(built: Path, tmp_path: Path) -> None:
    """A twin has the same architecture, and a file of maps that is whole in itself."""
    twin = decompclip.load("shapes-badnet")
    extract(twin, Shapes(1), tmp_path / "twin", normalize=True, **SIZES)
    shutil.copytree(built, tmp_path / "copy")
    shutil.copy(tmp_path / "twin" / MAPS, tmp_path / "copy")
    with pytest.raises(
        ValueError, match=r"expected the maps that .* lists; received .*maps.* of another run"
    ):
        Store(tmp_path / "copy")


def shard_of(manifest: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The manifest with another first shard."""
    first, *others = manifest["shards"]
    return {**manifest, "shards": [{**first, **changes}, *others]}


def run_of(manifest: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**manifest, "run": {**manifest["run"], **changes}}


FORGED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a path": (
        lambda m: shard_of(m, file="../secret.safetensors"),
        "the shard 000000.*; received '../secret",
    ),
    "another shard": (
        lambda m: shard_of(m, file="000001.safetensors"),
        "the shard 000000.*; received '000001",
    ),
    "a negative number": (lambda m: shard_of(m, images=-40), r"how many images.*received \[-40, "),
    "a huge number": (lambda m: shard_of(m, images=10**30), r"how many images.*received \[10+, "),
    "no number": (lambda m: shard_of(m, images="40"), r"how many images.*received \['40', "),
    "no shards": (lambda m: {**m, "shards": 3}, "a list of shards; received 3"),
    "a list": (lambda m: {**m, "shards": [[]]}, "the shard 000000.*; received None"),
    "no run": (lambda m: {**m, "run": None}, "a dtype of fp32, fp16, bf16; received None"),
    "a script": (lambda m: run_of(m, dtype="<script>"), "a dtype of fp32, fp16, bf16; received '<script>'"),
    "no error": (lambda m: {**m, "errors": {"features": "<b>"}}, "a number as the error.*received '<b>'"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_manifest_is_not_taken_at_its_word(built: Path, tmp_path: Path, what: str) -> None:
    """Who can write a manifest can write its digest too."""
    change, words = FORGED[what]
    shutil.copytree(built, tmp_path / "copy")
    shutil.copy(built / "000000.safetensors", tmp_path / "secret.safetensors")
    write_manifest(tmp_path / "copy", change(read_manifest(tmp_path / "copy")))
    with pytest.raises(ValueError, match=f"expected in .*store.json {words}.*extract` again"):
        Store(tmp_path / "copy")


@pytest.mark.parametrize("check", [True, False])
def test_as_many_images_as_the_manifest_says(built: Path, tmp_path: Path, check: bool) -> None:
    shutil.copytree(built, tmp_path / "copy")
    write_manifest(tmp_path / "copy", shard_of(read_manifest(tmp_path / "copy"), images=39))
    with pytest.raises(ValueError, match=r"expected 39 images in .*000000.*; it holds 40"):
        Store(tmp_path / "copy", check=check)[0:5]


def test_what_a_notebook_shows_is_escaped(model: HookedCLIP, normal: Tensor, built: Path) -> None:
    assert "<td>150</td>" in Store(built)._repr_html_()
    d = model.decompose(normal[:1])
    facts = {"<b>": "<script>alert(1)</script>"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decomposition, "_facts", lambda self: facts)
        shown = d._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;alert(1)" in shown and "<b>" not in shown


def test_a_store_of_a_newer_version_is_left_alone(
    built: Path, tmp_path: Path, again: Callable[..., Any]
) -> None:
    path = tmp_path / "copy" / MANIFEST
    path.write_text(path.read_text(encoding="utf-8").replace("decompclip.store/1", "decompclip.store/2"))
    before = files(tmp_path / "copy")
    for use in (lambda: Store(tmp_path / "copy"), again):
        with pytest.raises(ValueError, match="is of version 2; read it with a newer decompclip"):
            use()
    assert files(tmp_path / "copy") == before


def test_there_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a store of `decompclip extract`; there is none in"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": Shapes(150, seed=32)}, "the images, their classes or their preprocessing"),
        ({"data": Shapes(151, seed=31)}, "the images, their classes or their preprocessing"),
        ({"dtype": "fp16"}, "the dtype"),
        ({"normalize": False}, "the length of features"),
        ({"convention": "paper"}, "the convention"),
        ({"shard_size": 41}, "the size of shards"),
        ({"moments_only": True}, "terms or moments, the dtype"),
        ({"model": "shapes-badnet"}, "the model's weights"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_run_is_refused(
    built: Path,
    tmp_path: Path,
    again: Callable[..., Any],
    changes: dict[str, Any],
    words: str,
    finished: bool,
) -> None:
    if not finished:
        (tmp_path / "copy" / MANIFEST).unlink()
    before = files(tmp_path / "copy")
    if "model" in changes:
        changes = {"model": decompclip.load(changes["model"])}
    with pytest.raises(FileExistsError, match=f"holds one that differs in .*{words}; name another folder"):
        again(**changes)
    assert files(tmp_path / "copy") == before


def pictures(folder: Path) -> Path:
    """A square picture, which every way of cutting leaves alike, and wide ones."""
    (folder / "cat").mkdir(parents=True)
    for place, width in enumerate((48, 96, 96)):
        picture = Image.linear_gradient("L").resize((width, 48)).convert("RGB")
        picture.save(folder / "cat" / f"{place}.png")
    return folder


def as_folder(folder: Path, resize_mode: Any = "shortest") -> Any:
    return FolderSource(folder, to_pixels(48, resize_mode=resize_mode))


def as_pairs(folder: Path, resize_mode: Any = "shortest") -> Any:
    return FolderPairs(folder, ["a {}"], to_pixels(48, resize_mode=resize_mode))


def as_table(folder: Path, resize_mode: Any = "shortest") -> Any:
    rows = [f"cat/{place}.png,a cat" for place in range(3)]
    (folder / "table.csv").write_text("\n".join(["image,caption", *rows]))
    pairs = CsvPairs(folder / "table.csv", to_pixels(48, resize_mode=resize_mode))
    return SubsetPairs(pairs, range(3))


def as_shards(folder: Path, resize_mode: Any = "shortest") -> Any:
    with tarfile.open(folder / "00000.tar", "w") as shard:
        for place in range(3):
            (folder / "caption.txt").write_text("a cat")
            shard.add(folder / "caption.txt", f"{place}.txt")
            shard.add(folder / "cat" / f"{place}.png", f"{place}.png")
    return ShardPairs(folder, to_pixels(48, resize_mode=resize_mode))


@pytest.mark.parametrize("source", [as_folder, as_pairs, as_table, as_shards])
def test_pictures_that_changed_are_another_run(
    model: HookedCLIP, tmp_path: Path, source: Callable[..., Any]
) -> None:
    folder = pictures(tmp_path / "pictures")
    store = extract(model, source(folder), tmp_path / "a")
    assert isinstance(store, Store)
    if source is not as_shards:  # whose file is written again
        again = extract(model, source(folder), tmp_path / "a")
        assert isinstance(again, Store) and torch.equal(again.coords, store.coords)
    with pytest.raises(FileExistsError, match="the images, their classes or their preprocessing"):
        extract(model, source(folder, "squash"), tmp_path / "a")
    Image.new("RGB", (96, 48), "red").save(folder / "cat" / "1.png")
    with pytest.raises(FileExistsError, match="the images, their classes or their preprocessing"):
        extract(model, source(folder), tmp_path / "a")


@pytest.mark.parametrize("name", ["thesis.tex", "weights.safetensors", "2024"])
def test_somebodys_folder_is_left_alone(model: HookedCLIP, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("...")
    with pytest.raises(FileExistsError, match=f"holds {re.escape(name)}; name another"):
        extract(model, IMAGES, tmp_path)


def test_a_stopped_run_reads_no_further(model: HookedCLIP, tmp_path: Path) -> None:
    def track(items: Any, description: str, total: int) -> Any:
        yield next(iter(items))
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="^mine$") as caught:
        extract(model, IMAGES, tmp_path / "stopped", track=track, **SIZES)
    assert caught.tb
    for thread in threading.enumerate():
        if thread.name == "decompclip-feed":
            thread.join(5)
            assert not thread.is_alive()


def test_two_runs_do_not_share_a_folder(tmp_path: Path, again: Callable[..., Any]) -> None:
    with alone_in(tmp_path / "copy"), pytest.raises(FolderInUse, match="expected to be alone in writing"):
        again()


def test_a_small_disk_is_refused_before_the_work(
    model: HookedCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(OSError, match=r"expected 1\.5 MB of free disk; 0\.1 MB are free .* store in fp16"):
        extract(model, IMAGES, tmp_path / "a", **SIZES)
    assert not (tmp_path / "a").exists()


def test_a_disk_need_not_be_larger_than_the_store(
    model: HookedCLIP, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, maps = shutil.disk_usage(tmp_path), Store(built).maps
    fixed = sum(x.nbytes for x in vars(maps).values() if isinstance(x, Tensor))
    needed = fixed + 3 * (bytes_per_image(maps, 0, "fp32") + NAME)
    for free, fits in (
        (needed - 1, False),
        (needed, True),
        (needed // 2, True),
    ):  # the last with the store there
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            extract(model, Shapes(3), tmp_path / "a")
            continue
        with pytest.raises(OSError, match="of free disk"):
            extract(model, Shapes(3), tmp_path / "a")


def test_progress_is_that_of_the_work(
    model: HookedCLIP, tmp_path: Path, again: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int, int]] = []
    threads: set[str] = set()
    draw = Shapes.draw

    def track(items: Any, description: str, total: int) -> Any:
        items = list(items)
        told.append((description, total, len(items), sum(len(getattr(x, "images", ())) for x in items)))
        return iter(items)

    def drawn(self: Shapes, indices: Any) -> Any:
        threads.add(threading.current_thread().name)
        return draw(self, indices)

    monkeypatch.setattr(Shapes, "draw", drawn)
    extract(model, IMAGES, tmp_path / "new", track=track, **SIZES)
    again(track=track)
    work = "shapes: batches of 16"  # of four shards, whose ends count
    assert told == [(work, 15, 15, 150), ("shards that are there", 4, 4, 0), (work, 0, 0, 0)]
    assert "decompclip-feed" in threads  # read ahead of the model


@pytest.mark.parametrize("moments_only", [False, True])
def test_what_is_not_whole_has_no_manifest(
    model: HookedCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments_only: bool
) -> None:
    def run() -> None:
        extract(model, Shapes(20, seed=2), tmp_path, moments_only=moments_only, shard_size=10, batch_size=10)

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    run()
    monkeypatch.setattr("decompclip.operators.extract.write_manifest", killed)
    for damaged in (False, True):
        if damaged:
            cut(tmp_path / (MOMENTS if moments_only else "000001.safetensors"))
        with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
            warnings.simplefilter("ignore")
            run()
        assert (tmp_path / MANIFEST).exists() != damaged


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_what_is_whole(model: HookedCLIP, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"000000\.safetensors"):
        extract(model, IMAGES, tmp_path / "a", **SIZES)
    assert not files(tmp_path / "a") if (tmp_path / "a").exists() else True


def test_images_that_cannot_be_read_are_listed(model: HookedCLIP, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for place in range(6):
        Image.new("RGB", (60, 60), (40 * place, 10, 90)).save(folder / f"{place}.png")
    for place in (0, 2, 3):
        cut(folder / f"{place}.png")
        (folder / f"{place}.png").write_bytes((folder / f"{place}.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no picture")

    def run(out: str, **options: Any) -> Any:
        return extract(model, FolderSource(folder, model.pixels), tmp_path / out, shard_size=2, **options)

    store = run("a")
    assert store.ids == ("1.png", "4.png", "5.png") and store.labels is None and len(store) == 3
    assert set(store.manifest["skipped"]) == {"notes.txt", "0.png", "2.png", "3.png"}
    assert [shard["images"] for shard in store.manifest["shards"]] == [1, 0, 2]
    assert len(store[0:3]) == 3 and len(store.features) == 3
    assert run("m", moments_only=True).count == 3
    for path in folder.glob("[145].png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    for options in ({}, {"moments_only": True}):
        with pytest.raises(ValueError, match="expected images; none of 6 could be read; the last: "):
            run(f"none{len(options)}", **options)


@pytest.mark.parametrize("moments_only", [True, False])
def test_images_are_not_normalised_twice(model: HookedCLIP, tmp_path: Path, moments_only: bool) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for place in range(3):
        Image.new("RGB", (60, 60), (90 * place, 10, 90)).save(folder / f"{place}.png")
    source = FolderSource(folder, model.preprocess)
    with pytest.raises(
        ValueError, match=r"pixels in \[0, 1\]; received -.* in the batch of 0\.png; leave the normalisation"
    ):
        extract(model, source, tmp_path / "a", moments_only=moments_only)
    assert not (tmp_path / "a" / MANIFEST).exists()


@pytest.mark.usefixtures("ours_alone")
def test_bad_options(model: HookedCLIP, tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"dtype": "int8"}, r"expected dtype of \('fp32', 'fp16', 'bf16'\); received 'int8'"),
        ({"shard_size": 0}, "expected shard_size to be a whole number of images, at least 1; received 0"),
        ({"batch_size": 0}, "expected batch_size to be a whole number of images, at least 1; received 0"),
    )
    for changes, words in cases:
        with pytest.raises(ValueError, match=words):
            extract(model, IMAGES, tmp_path / "a", **changes)
    with pytest.raises(TypeError, match="expected images that are read by place: .* received list"):
        extract(model, [torch.zeros(3, 48, 48)], tmp_path / "a")  # pyright: ignore[reportArgumentType]


def test_an_edited_run_is_not_taken_for_the_models_own(model: HookedCLIP, tmp_path: Path) -> None:
    with (
        model.hooks(ZeroAblate(heads[0])),
        pytest.raises(ValueError, match="expected a model without hooks, whose terms are the model's own"),
    ):
        extract(model, IMAGES, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    """safetensors alone writes metadata in another order each time."""
    for place in range(12):
        write_tensors(tmp_path / f"{place}", {"a": torch.arange(3)}, "form", {"ü": '\ud800 "quoted" \n'})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


# Many processes


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_write_what_one_would(
    model: HookedCLIP, built: Path, tmp_path: Path, processes: int
) -> None:
    extract(model, IMAGES, tmp_path / "one", normalize=True, moments_only=True, **SIZES)
    if processes == 3:  # go on from what another number of processes left
        shutil.copytree(built, tmp_path / "terms")
        for name in (MANIFEST, "000000.safetensors", "000003.safetensors"):
            (tmp_path / "terms" / name).unlink()

    def work(rank: int) -> list[str]:
        given: dict[str, Any] = {"accelerator": Accelerator(cpu=True), "normalize": True, **SIZES}
        extract(model, IMAGES, tmp_path / "terms", class_names=IMAGES.class_names, **given)
        extract(model, IMAGES, tmp_path / "moments", moments_only=True, **given)
        said = []
        for data, out in (
            (Shapes(processes - 1, seed=1), "few"),
            (Shapes(150, seed=rank), "other"),
            (Shapes(150, seed=32), "terms"),
            (IMAGES, f"own{rank}"),
        ):
            with pytest.raises((ValueError, FileExistsError)) as error:
                extract(model, data, tmp_path / out, **given)
            said.append(str(error.value))
        return said

    for few, other, taken, own in in_processes(processes, work):
        assert few.startswith(f"expected an image for each process at least; received {processes - 1} images")
        assert "expected processes that agree; process 1 differs from process 0 in the images" in other
        assert "differs in the images" in taken
        assert own.startswith("expected a folder that all processes share; process 1 does not see")
    assert files(tmp_path / "terms") == files(built)
    assert files(tmp_path / "moments") == files(tmp_path / "one")
    assert not (tmp_path / "few").exists() and not (tmp_path / "other").exists()


# Streams

ROWS = 50


class Rows:
    """As a data set of Hugging Face's yields them when it is streamed: pictures, in turn open, as bytes, or broken."""

    def __init__(self) -> None:
        self.passes = 0
        self.threads: set[threading.Thread] = set()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.passes += 1
        self.threads.add(threading.current_thread())
        batch = Shapes(ROWS, seed=7).draw(range(ROWS))
        for place in range(ROWS):
            file = encode_png(batch.images[place])
            image: Any = {"bytes": file[:60] if place == 34 else file, "path": None}
            yield {"image": Image.open(io.BytesIO(file)) if place % 2 else image, "label": place % 6}


class Samples:
    """As webdataset's readers yield them, whose shards may come through pipes and from URLs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                content = {member.name: tar.extractfile(member) for member in tar}
                for key in sorted({name.split(".")[0] for name in content}):
                    image, label = (content[f"{key}.{kind}"] for kind in ("png", "cls"))
                    assert image is not None and label is not None
                    yield {
                        "__key__": key,
                        "__url__": f"pipe:cat {path}",
                        "png": image.read(),
                        "cls": label.read(),
                    }


def test_a_stream_is_extracted_as_what_it_holds(model: HookedCLIP, tmp_path: Path) -> None:
    batch = Shapes(ROWS, seed=7).draw(range(ROWS))
    kept = [place for place in range(ROWS) if place != 34]
    rows = Rows()
    store = extract(model, PairStream(rows, model.pixels), tmp_path / "rows", shard_size=20, batch_size=8)
    assert isinstance(store, Store) and len(store) == ROWS - 1
    assert rows.passes == 3  # to list it, to see the first picture, to read
    assert rows.threads == {threading.current_thread()}  # a user's code runs where it was called
    pixels = torch.stack([(255 * image).round() / 255 for image in batch.images[kept]])
    with torch.no_grad():
        features = model.encode_image(model.normalize(pixels))
    torch.testing.assert_close(store.features, features, rtol=0, atol=1e-4 * float(features.abs().max()))
    assert store.labels is not None and store.labels.tolist() == [place % 6 for place in kept]
    assert store.ids == tuple(f"{place:09d}" for place in kept)
    assert list(store.manifest["skipped"]) == ["000000034"]


def test_samples_of_webdataset_are_extracted_as_the_shards_are(model: HookedCLIP, tmp_path: Path) -> None:
    write_shards(ShapesPairs(40, seed=3), tmp_path / "tars", per_shard=15)
    stores = [
        extract(model, data, tmp_path / name, shard_size=16, batch_size=8)
        for name, data in (
            ("placed", ShardPairs(tmp_path / "tars", model.pixels)),
            ("streamed", PairStream(Samples(tmp_path / "tars"), model.pixels)),
        )
    ]
    placed, streamed = (store for store in stores if isinstance(store, Store))
    assert torch.equal(placed.coords, streamed.coords) and placed.ids == streamed.ids
    assert placed.labels is not None and streamed.labels is not None
    assert torch.equal(placed.labels, streamed.labels)


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_processes_share_a_stream(model: HookedCLIP, tmp_path: Path) -> None:
    """Each passes over the others' shards, and all write what one would."""

    def work(accelerator: Accelerator | None, out: Path) -> None:
        stream = PairStream(Rows(), model.pixels)
        extract(model, stream, out, shard_size=10, batch_size=8, accelerator=accelerator)

    work(None, tmp_path / "one")
    assert in_processes(2, lambda rank: work(Accelerator(cpu=True), tmp_path / "two")) == [None, None]
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_stream_that_is_another_one_each_time_is_refused(model: HookedCLIP, tmp_path: Path) -> None:
    items = [
        (image, label, f"{place}") for place, (image, label) in enumerate(zip(*tensors(12), strict=True))
    ]

    class Changing:
        def __iter__(self) -> Iterator[Any]:
            items.append(items.pop(0))
            return iter(items)

    with pytest.raises(ValueError, match=r"expected the same 12 items each time .* do not shuffle it"):
        extract(model, PairStream(Changing(), model.pixels), tmp_path / "a")
    with pytest.raises(ValueError, match=r"expected a stream of \(image, caption\)"):
        extract(model, PairStream([1, 2], model.pixels), tmp_path / "b")


def tensors(count: int) -> tuple[Tensor, list[int]]:
    batch = Shapes(count, seed=7).draw(range(count))
    return batch.images, batch.labels.tolist()


def test_torchvisions_data_sets_are_extracted(model: HookedCLIP, tmp_path: Path) -> None:
    images, labels = tensors(12)
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "photos" / f"{label}" / f"{place:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(image))
    data = ImageFolder(tmp_path / "photos")
    store = extract(model, DatasetPairs(data, model.pixels), tmp_path / "store")
    assert isinstance(store, Store) and store.labels is not None and store.labels.tolist() == data.targets
    folder = extract(model, FolderSource(tmp_path / "photos", model.pixels), tmp_path / "other")
    assert isinstance(folder, Store) and torch.equal(folder.coords, store.coords)


# The command


def test_the_command_takes_what_the_function_takes() -> None:
    assert tuple(StoredAs) == get_args(StoredType) and tuple(OfCommand) == get_args(Convention)


def test_the_command(tmp_path: Path) -> None:
    out, err = succeeds(
        "extract", "shapes", "shapes:90", "--out", tmp_path / "s", "--dtype", "fp16", "--shard-size", 50
    )
    assert "Store('" in out and "stored in: fp16" in out
    assert "90 images take" in err and "free" in err
    store = Store(tmp_path / "s")
    assert (
        len(store) == 90
        and store.class_names == IMAGES.class_names
        and store.manifest["source"] == "shapes:90"
    )
    out, _ = succeeds("extract", "shapes", "shapes:90", "--out", tmp_path / "m", "--moments-only")
    assert out.startswith("Moments(90 images")
    error = refused(
        "extract", "shapes", "shapes:91", "--out", tmp_path / "s", "--dtype", "fp16", "--shard-size", 50
    )
    assert "differs in the images" in error
    assert "there is no folder" in refused("extract", "shapes", tmp_path / "nowhere", "--out", tmp_path / "x")
