"""The paper's data sets with classes, as they lie on a disk: ImageNet-1K's validation photographs, Caltech-101, Oxford-IIIT Pet.

A table of facts, and one reader of classes in folders or in a list. (CC3M comes as shards or as a table, and is read as such.) `decompclip data check` says what is missing, and how to get it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from typing_extensions import Unpack

from decompclip.data.feed import in_threads
from decompclip.data.files import PARTS, SkippedFile, SourceSpec, data_folder, open_rgb, reason
from decompclip.data.images import class_places, find_class, image_files, split_indices
from decompclip.data.pairs import FilePairs, PairEntry, PairOptions, Pairs
from decompclip.data.pixels import Preprocess
from decompclip.display import Track, silently, some

VALIDATION, SEED = 0.2, 0
"""The paper's validation part, and the seed that draws it here."""

Split = Literal["train", "test"]

Row = tuple[Path, int]
"""A picture, from the data set's folder on, and the place of its class."""


def imagenet_folders() -> tuple[str, ...]:
    """WordNet ids in the order of the labels."""
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def imagenet_classes() -> tuple[str, ...]:
    """open_clip's names, of which two stand for two classes each: the second missile and the first sunglasses have WordNet's."""
    from open_clip import IMAGENET_CLASSNAMES

    names = list(IMAGENET_CLASSNAMES)
    names[744], names[836] = "projectile", "sunglass"
    return tuple(names)


_CALTECH = """
Faces Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular bonsai brain
brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier cougar_body
cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly electric_guitar
elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill
headphone hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus
mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid
revolver rhino rooster saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish
stegosaurus stop_sign strawberry sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat
windsor_chair wrench yin_yang
"""
CALTECH = tuple(_CALTECH.split())
"""Folders of the categories, in torchvision's order; the background is no category."""

_CALTECH_NAMES = {
    "Faces": "off-center face",
    "Faces_easy": "centered face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "car_side": "side of a car",
    "cougar_body": "body of a cougar cat",
    "cougar_face": "face of a cougar cat",
    "crocodile_head": "head of a crocodile",
    "flamingo_head": "head of a flamingo",
    "garfield": "garfield the cat",
    "snoopy": "snoopy the dog",
    "water_lilly": "water lily",
    "yin_yang": "yin and yang symbol",
}

_PETS = """
Abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle Bengal Birman Bombay boxer
British_Shorthair chihuahua Egyptian_Mau english_cocker_spaniel english_setter german_shorthaired
great_pyrenees havanese japanese_chin keeshond leonberger Maine_Coon miniature_pinscher newfoundland Persian
pomeranian pug Ragdoll Russian_Blue saint_bernard samoyed scottish_terrier shiba_inu Siamese Sphynx
staffordshire_bull_terrier wheaten_terrier yorkshire_terrier
"""
PETS = tuple(_PETS.split())
"""Breeds as the files are called, in the order of the labels."""


@dataclass(frozen=True)
class KnownDataset:
    """Facts of a data set.

    Attributes:
        title: its name.
        folder: under DECOMPCLIP_DATA, where no path is given.
        inside: where pictures may lie in its folder, the first there is.
        images: how many there are in all.
        keys: what the classes are called on the disk, in the order of the labels.
        class_names: for prompts.
        get: how to get it.
    """

    title: str
    folder: str
    inside: tuple[str, ...]
    images: int
    keys: Callable[[], tuple[str, ...]]
    class_names: Callable[[], tuple[str, ...]]
    get: str


DATASETS = {
    "imagenet": KnownDataset(
        "ImageNet-1K's validation photographs",
        "imagenet",
        ("val", "validation", "ILSVRC/Data/CLS-LOC/val", "."),
        50_000,
        imagenet_folders,
        imagenet_classes,
        "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz from https://image-net.org (an account is needed) into one folder, then "
        'torchvision.datasets.ImageNet(folder, split="val") sorts them into folders named after WordNet ids (n01440764, ...)',
    ),
    "caltech101": KnownDataset(
        "Caltech-101",
        "caltech-101",
        ("101_ObjectCategories", "caltech101/101_ObjectCategories", "caltech-101/101_ObjectCategories"),
        8_677,
        lambda: CALTECH,
        lambda: tuple(_CALTECH_NAMES.get(name, name.replace("_", " ")) for name in CALTECH),
        "torchvision.datasets.Caltech101(folder, download=True), or caltech-101.zip from https://data.caltech.edu/records/mzrjq-6wc02",
    ),
    "pets": KnownDataset(
        "Oxford-IIIT Pet",
        "oxford-iiit-pet",
        ("images", "oxford-iiit-pet/images"),
        7_349,
        lambda: PETS,
        lambda: tuple(name.replace("_", " ").lower() for name in PETS),
        "torchvision.datasets.OxfordIIITPet(folder, download=True), or images.tar.gz and annotations.tar.gz from "
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
    ),
}
"""By the word in front of the path: `imagenet:PATH`."""

CC3M = KnownDataset(
    "CC3M",
    "cc3m",
    (),
    3_318_333,
    tuple,
    tuple,
    "the table of addresses from https://ai.google.com/research/ConceptualCaptions/download, then img2dataset with "
    "--output_format webdataset, which writes shards; many addresses are gone by now",
)
"""`cc3m:PATH` is read as shards or a table."""


def known_folder(source: SourceSpec) -> Path:
    """Where a data set lies: behind the colon, or in the folder that DECOMPCLIP_DATA names.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    about = DATASETS[source.kind]
    folder = data_folder(about.folder, f"{about.title}, as {source.kind}:PATH", source.detail or None)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected {about.title} in {folder}, which is no folder; get {about.get}")
    return folder


def known_pairs(
    source: SourceSpec,
    preprocess: Preprocess | None = None,
    *,
    split: Split = "test",
    root: str | Path | None = None,
    **options: Unpack[PairOptions],
) -> Pairs:
    """The photographs of a data set with classes, all of them or one part.

    Args:
        source: as `parse_source` reads `pets:PATH` or `pets:PATH@validation`: the part of `VALIDATION`, or the rest.
        preprocess: as `Pairs`.
        split: of Oxford-IIIT Pet, whose lists tell them apart; others have one.
        root: a folder that all images must lie in, links resolved; None allows any.
        options: as `Pairs`; `class_names` by default the data set's own, `templates` open_clip's for ImageNet.

    Raises:
        FileNotFoundError: it is not there, or a class is missing.
        ValueError: its lists are broken, or none of its classes is among `class_names`.
    """
    return KnownPairs(
        source.kind, known_folder(source), preprocess, split=split, part=source.part, root=root, **options
    )


class KnownPairs(FilePairs):
    """Photographs of a data set of `DATASETS` that has classes; see `known_pairs`."""

    def __init__(
        self,
        word: str,
        folder: Path,
        preprocess: Preprocess | None = None,
        *,
        split: Split = "test",
        part: str = "",
        root: str | Path | None = None,
        **options: Unpack[PairOptions],
    ) -> None:
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        about = DATASETS[word]
        own = about.class_names()
        names = tuple(options.get("class_names", ())) or own
        templates = options.get("templates") or [fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES]
        super().__init__(preprocess, **{**options, "class_names": names, "templates": templates})
        self.folder, self.root = _pictures(about, folder), root
        rows, left_out = _rows(word, self.folder, split)
        if missing := _missing(about, rows):
            raise FileNotFoundError(
                f"expected photographs of {len(own)} classes in {self.folder}; there are none of {some(missing, 5)}; see "
                f"decompclip data check {word}:{folder}"
            )
        if part:  # of all classes, whichever are asked for: no picture is in both
            chosen = split_indices(len(rows), VALIDATION, SEED)[part == "evaluation"]
            rows = [rows[place] for place in chosen.tolist()]
        self._left_out = {skip.path: skip for skip in left_out}
        places = class_places(names)
        given = [find_class(name, places) for name in own]
        if not any(place is not None for place in given):
            raise ValueError(
                f"expected classes of {about.title}, such as {', '.join(own[:3])}; received {some(names, 5)}; leave --classes out"
            )
        self._list(self._entries(rows, given), f"photographs of {about.title} in {folder}")

    def _entries(self, rows: Sequence[Row], given: Sequence[int | None]) -> Iterator[PairEntry]:
        for path, label in rows:
            name, place = path.as_posix(), given[label]
            if place is None:
                self._left_out[name] = SkippedFile(name, "is of a class that is not among those asked for")
            else:
                yield PairEntry(name, self._caption("", place, name), place, self.folder / path)


def _pictures(about: KnownDataset, folder: Path) -> Path:
    """The folder of the pictures; raises FileNotFoundError where nothing there is laid out so."""
    keys = about.keys()
    for place in (folder / inside for inside in about.inside):
        if place.is_dir() and (
            (names := set(_names(place))) & set(keys) or (about is DATASETS["pets"] and names)
        ):
            return place
    flat = any(name.startswith("ILSVRC2012_val") for name in _names(folder))
    found = (
        "photographs that are not sorted into classes yet" if flat else some(_names(folder) or ["nothing"], 5)
    )
    inside = " or ".join(place for place in about.inside if place != ".")
    raise FileNotFoundError(
        f"expected {about.title} in {folder}: {inside}{f' with {keys[0]}, {keys[1]}, ...' if keys else ''}; found {found}; "
        f"get {about.get}"
    )


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _missing(about: KnownDataset, rows: Sequence[Row]) -> list[str]:
    there = {label for _, label in rows}
    return [key for place, key in enumerate(about.keys()) if place not in there]


def _rows(word: str, folder: Path, split: Split | None) -> tuple[list[Row], list[SkippedFile]]:
    """Every picture with its class, and what is left out."""
    places = {key: place for place, key in enumerate(DATASETS[word].keys())}
    if word == "pets":
        return _listed(folder, places, ("trainval", "test") if split is None else (_LISTS[split],))
    files, left_out = image_files(folder)
    rows = [(file, places[file.parts[0]]) for file in files if file.parts[0] in places]
    others = Counter(file.parts[0] for file in files if file.parts[0] not in places)
    why = "is no class of this data set: {} pictures"
    return rows, [*left_out, *(SkippedFile(name, why.format(count)) for name, count in others.items())]


_LISTS = {"train": "trainval", "test": "test"}


def _listed(
    folder: Path, places: dict[str, int], lists: Sequence[str]
) -> tuple[list[Row], list[SkippedFile]]:
    """Oxford-IIIT Pet: lines of name, class from 1, species, breed within it."""
    annotations = folder.parent / "annotations"
    there = {path.name for path in folder.iterdir()}
    rows: list[Row] = []
    left_out: list[SkippedFile] = []
    for name in lists:
        path = annotations / f"{name}.txt"
        if not path.is_file():
            raise FileNotFoundError(
                f"expected the list {path} beside {folder}; it is not there; get {DATASETS['pets'].get}"
            )
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            picture, *numbers = line.split()
            label = places.get(picture.rpartition("_")[0])
            if len(numbers) != 3 or label is None or numbers[0] != str(label + 1):
                raise ValueError(
                    f"expected a picture's name and three numbers, as Abyssinian_100 1 1 1, the first of the breed; {path} "
                    f"has in line {number}: {line[:80]}; get annotations.tar.gz again"
                )
            file = Path(f"{picture}.jpg")
            if file.name in there:
                rows.append((file, label))
            else:
                left_out.append(SkippedFile(file.name, f"is in {path.name}, and not there"))
    return rows, left_out


def recognise(folder: Path) -> str | None:
    """Which data set of classes lies in a folder, by its layout; None for none of them."""
    for word, about in DATASETS.items():
        try:
            place = _pictures(about, folder)
        except FileNotFoundError:
            continue
        if word != "pets" or (place.parent / "annotations" / "trainval.txt").is_file():
            return word
    return None


@dataclass(frozen=True)
class DatasetCheck:
    """What there is of a data set.

    Attributes:
        title: its name.
        images, expected: pictures that can be read, and how many there are in all; None where that is not known.
        missing: classes without a picture.
        skipped: files that are missing, broken or no pictures, and why.
        get: how to get it.
    """

    title: str
    images: int
    expected: int | None
    missing: tuple[str, ...]
    skipped: tuple[SkippedFile, ...]
    get: str

    @property
    def whole(self) -> bool:
        """Whether every picture of every class is there and can be read."""
        return not self.missing and not self.skipped and self.images == (self.expected or self.images)


def check_known(source: SourceSpec, *, decode: bool = True, track: Track = silently) -> DatasetCheck:
    """Look for every class and picture of a data set.

    Args:
        source: as `known_pairs`.
        decode: open every picture; False asks only whether it is there.
        track: shows progress.

    Raises:
        FileNotFoundError: nothing is laid out as this data set is.
        ValueError: its lists are broken.
    """
    about = DATASETS[source.kind]
    folder = _pictures(about, known_folder(source))
    rows, left_out = _rows(source.kind, folder, None)
    broken: list[SkippedFile] = []
    parts = [rows[start : start + CHECKED] for start in range(0, len(rows), CHECKED)] if decode else []
    for part in track(parts, about.title, len(parts)):
        for (path, _), why in zip(part, in_threads(lambda row: _broken(folder / row[0]), part), strict=True):
            broken += [] if why is None else [SkippedFile(path.as_posix(), why)]
    extra = "BACKGROUND_Google"  # no category, and no fault
    others = [skip for skip in left_out if not skip.path.startswith(extra)]
    missing = tuple(_missing(about, rows))
    return DatasetCheck(
        about.title, len(rows) - len(broken), about.images, missing, (*others, *broken), about.get
    )


CHECKED = 256
"""Pictures that are opened between two looks at the clock."""


def _broken(path: Path) -> str | None:
    try:
        open_rgb(path)
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        return reason(error)
    return None


def parts_of(source: SourceSpec) -> dict[str, list[str]]:
    """Names of the pictures of the validation part and of the evaluation part, as `known_pairs` splits them."""
    parts = {part: known_pairs(replace(source, part=part)) for part in PARTS}
    return {part: list(pairs.ids) for part, pairs in parts.items()}
