"""Every figure and table of a family, and one page to browse them: `python -m analyses --all --model-family shapes`.

A killed run goes on where it was; what is measured with the same models and options is not measured again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from analyses.study.command import FAMILY
from analyses.study.family import open_family
from analyses.study.index import write_index
from analyses.study.registry import ANALYSES, READERS, load
from analyses.study.results import RESULTS


def produce_all(
    names: Sequence[str], family: str, out: Path, *, jobs: int, rest: Sequence[str] = ()
) -> dict[str, str]:
    """Run analyses, each in a process of its own; what failed, with the last thing that it said."""

    def one(name: str) -> tuple[str, str]:
        begin = time.perf_counter()
        words = [sys.executable, "-m", f"analyses.{name}", "--model-family", family, "--out", str(out), *rest]
        words += ["--results", str(out)] if name in READERS and out != RESULTS else []
        environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        error = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{name}: {error or 'done'} ({time.perf_counter() - begin:.0f} s)", flush=True)
        return name, error

    with ThreadPoolExecutor(jobs) as pool:
        done = [*pool.map(one, [n for n in names if n not in READERS])]
        done += pool.map(one, [n for n in names if n in READERS])
    return {name: error for name, error in done if error}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analyses", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ANALYSES)}")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--model-family", default=FAMILY, help="photos, shapes, cifar10, or a JSON file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results and of the index")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="analyses at a time")
    parser.add_argument("--formats", default="png", help="of figures, as the analyses take them")
    parser.add_argument("--images", type=int, help="fewer images than the analyses' own, for a quick look")
    options = parser.parse_args(argv)
    try:
        names = tuple(ANALYSES) if options.all else tuple(options.names)
        for name in names:
            load(name)
        open_family(options.model_family)
        rest = ["--formats", options.formats]
        rest += [] if options.images is None else ["--images", str(options.images)]
        failed = produce_all(names, options.model_family, options.out, jobs=options.jobs, rest=rest)
        print(write_index(options.out))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
