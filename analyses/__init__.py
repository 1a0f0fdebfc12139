"""Runnable studies: each module measures one thing and writes its result."""

from pathlib import Path

# `python -m analyses.figure1` runs `analyses/paper/figure1.py`; imports say `analyses.paper.figure1`.
__path__ += [str(Path(__file__).with_name(room)) for room in ("paper", "questions", "benchmarks", "training")]
