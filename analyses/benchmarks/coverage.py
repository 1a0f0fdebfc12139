"""Which image towers of open_clip's are decomposed, and how exactly: the page COVERAGE.md.

Command:   python -m analyses.coverage [--out analyses/COVERAGE.md] [--names ViT-B-32 ...] [--fresh]
Run time:  about two minutes, one thread. A killed run resumes: rows are kept beside the page until it is written.
Expected:  every transformer tower within 1e-10 in fp64 and 1e-4 in fp32.

Sizes are those of the whole tower, built without weights. Parity and sum error are measured on a reduced build
(`tests/models/reduced_towers.py`) with random weights, of which none is trivial: two blocks on six patches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import open_clip
import torch

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.maps import Convention
from decompclip.files import write_json, write_text
from decompclip.models.spec import build_image_only
from decompclip.tower.config import ViTConfig
from decompclip.tower.convert import Source
from decompclip.tower.families import WHY_NOT, config_of
from tests.models.reduced_towers import features, reduced_tower, relative_error
from tests.models.tower_families import FAMILY_OF, REFUSED, SUPPORTED

PAGE = Path(__file__).parent.with_name("COVERAGE.md")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
BOUND = {"fp64": 1e-10, "fp32": 1e-4}
ERRORS = ("parity", *(f"sum error `{kind}`" for kind in get_args(Convention)))
POOLS = {"cls": "class token", "mean": "mean", "attention": "attention"}


@dataclass(frozen=True)
class Row:
    """What is known of one tower.

    Attributes:
        terms: heads and MLPs over all layers, the pool's MLP, the embedding.
        sum_error: by convention and dtype; the largest miss of the terms' sum over the largest entry.
        parity: by dtype; the same for our tower against the source's.
        way_back: whether the source tower with our weights has every bit of its own.
    """

    name: str
    family: str
    parameters: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    n_prefix: int
    pool: str
    n_layers: int
    n_heads: int
    d_embed: int
    terms: int
    parity: dict[str, float]
    sum_error: dict[str, dict[str, float]]
    way_back: bool

    @property
    def exact(self) -> bool:
        """Whether all that was measured is within bounds."""
        errors = (self.parity, *self.sum_error.values())
        return self.way_back and all(error[dtype] <= BOUND[dtype] for error in errors for dtype in BOUND)


def measure(name: str) -> Row:
    """One tower's row."""
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"open_clip has no configuration {name!r}")
    with torch.device("meta"):
        full = build_image_only(config, why="weights are not wanted").visual
    cfg = config_of(full)
    parity, sum_error, way_back = {}, {kind: {} for kind in get_args(Convention)}, True
    for label, dtype in DTYPES.items():
        visual = reduced_tower(name, dtype=dtype)
        source = Source(visual)
        tower = source.adopt()
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(4, 3, *tower.cfg.image_size, generator=generator).to(dtype)
        with torch.no_grad():
            parity[label] = relative_error(tower(images), features(visual, images))
        for kind, errors in sum_error.items():
            errors[label] = decompose(tower, images, convention=kind).sum_error
        state, back = visual.state_dict(), source.filled(tower).state_dict()
        way_back &= all(torch.equal(back[key], value) for key, value in state.items())
    return Row(
        name=name,
        family=FAMILY_OF[name].name,
        parameters=sum(x.numel() for x in full.parameters()),
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        n_prefix=cfg.n_prefix,
        pool=POOLS[cfg.pool],
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        d_embed=cfg.d_embed,
        terms=number_of_terms(cfg),
        parity=parity,
        sum_error=sum_error,
        way_back=way_back,
    )


def number_of_terms(cfg: ViTConfig) -> int:
    """Heads, MLPs, the pool's MLP and the embedding; biases, which are constants, are not counted."""
    return cfg.n_layers * (cfg.n_heads + 1) + (cfg.pool_mlp > 0) + 1


def run(names: Sequence[str], store: Path) -> list[Row]:
    """The rows of these towers; those in `store` are taken over, and each new one is kept there at once."""
    rows = {row["name"]: Row(**row) for row in json.loads(store.read_text("utf-8"))} if store.exists() else {}
    for name in names:
        if name in rows:
            continue
        rows[name] = measure(name)
        print(f"{name}: parity {rows[name].parity}, sum error {rows[name].sum_error}", flush=True)
        write_json(store, [asdict(row) for row in rows.values()])
    return [rows[name] for name in names]


def page(rows: Sequence[Row]) -> str:
    """The page, in Markdown."""
    refused = sum(len(family.configurations) for family in REFUSED)
    total = sum(len(family.configurations) for family in SUPPORTED)
    conventions = " and ".join(f"`{kind}`" for kind in get_args(Convention))
    bounds = " and ".join(f"{bound:.0e} in {dtype}" for dtype, bound in BOUND.items())
    worst = zip(ERRORS, *(_worst(rows, dtype) for dtype in DTYPES), strict=True)
    return f"""\
# Which image towers are covered

Made by `python -m analyses.coverage`; do not edit by hand.

open_clip {version("open_clip_torch")} lists {len(FAMILY_OF)} configurations. {total} have a transformer for an image tower, and
**{sum(row.exact for row in rows)} of {total}** are decomposed exactly (within {bounds}), in both conventions, {conventions}.
The other {refused} are refused with the reason. The largest errors over all towers, relative to the largest entry of the feature:

{_table(["", *DTYPES], worst)}

Errors are measured on reduced builds: open_clip's own code builds the tower with two blocks of three heads on three by two
patches, all else as in the configuration, and every weight is random, gains, biases and LayerScales included. The way
back, from our tower to open_clip's, keeps every bit of {sum(row.way_back for row in rows)} of them. Parameters, sizes and terms are those of
the whole tower. Terms are heads, MLPs, the attention pool's MLP and the embedding; biases are kept apart, as constants.

## Families

{_of_families(rows)}

## Configurations

{_of_configurations(rows)}

## Refused

{_of_refused()}
"""


def _worst(rows: Sequence[Row], dtype: str) -> list[str]:
    """The largest of each of `ERRORS`."""
    errors = [[error[dtype] for error in (row.parity, *row.sum_error.values())] for row in rows]
    return [f"{max(column):.0e}" for column in zip(*errors, strict=True)]


def _of_families(rows: Sequence[Row]) -> str:
    lines = []
    for family in SUPPORTED:
        if mine := [row for row in rows if row.family == family.name]:
            errors = [error for dtype in DTYPES for error in _worst(mine, dtype)]
            lines.append([family.name, family.kind, len(mine), *errors])
    titles = [f"{kind}, {dtype}" for dtype in DTYPES for kind in ERRORS]
    return _table(["family", "tower", "configurations", *titles], lines)


def _of_configurations(rows: Sequence[Row]) -> str:
    def line(row: Row) -> list[Any]:
        what = [f"`{row.name}`", row.family, f"{row.parameters / 1e6:,.0f}"]
        sides = [" x ".join(map(str, dict.fromkeys(size))) for size in (row.image_size, row.patch_size)]
        shape = [row.n_prefix, row.pool, f"{row.n_layers} x {row.n_heads}", row.terms, row.d_embed]
        return [*what, *sides, *shape, *_worst([row], "fp32")]

    what = ["configuration", "family", "parameters, M", "image", "patch"]
    shape = ["prefix tokens", "pool", "layers x heads", "terms", "width"]
    return _table([*what, *shape, *(f"{kind}, fp32" for kind in ERRORS)], map(line, rows))


def _of_refused() -> str:
    lines = [
        [family.name, ", ".join(f"`{name}`" for name in family.configurations), WHY_NOT[family.why_not or ""]]
        for family in REFUSED
    ]
    return _table(["family", "configurations", "why"], lines)


def _table(titles: Sequence[str], lines: Iterable[Iterable[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [titles, ["---"] * len(titles), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [name for family in SUPPORTED for name in family.configurations]
    parser.add_argument("--out", type=Path, default=PAGE, help="where the page goes")
    parser.add_argument(
        "--names", nargs="+", default=every, choices=every, metavar="NAME", help="only these towers"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what a killed run has measured")
    given = parser.parse_args()
    store = given.out.with_suffix(".partial")
    if given.fresh:
        store.unlink(missing_ok=True)
    text = page(run(given.names, store))
    write_text(given.out, text)
    store.unlink()


if __name__ == "__main__":
    main()
