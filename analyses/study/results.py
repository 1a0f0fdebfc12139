"""Results as small JSON files with their provenance: figures redraw from these alone."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analyses.study.case import Member
from analyses.study.family import Family
from decompclip.bench.run import versions
from decompclip.files import write_json

RESULTS = Path(__file__).parent.parent / "results"

SCHEMA = 1
"""Of all results: raised when a field changes its meaning, so that old ones are refused and measured again."""


class MissingResult(FileNotFoundError):
    """A result that is not there, or was made by another version; says which command makes it."""


def place(analysis: str, family: str, folder: Path = RESULTS) -> Path:
    return folder / family / f"{analysis}.json"


def command(analysis: str, family: str) -> str:
    return f"python -m analyses.{analysis} --model-family {family}"


def save(
    analysis: str,
    family: Family,
    config: Any,
    members: tuple[Member, ...],
    found: Mapping[str, Any],
    *,
    seconds: float,
    folder: Path = RESULTS,
) -> dict[str, Any]:
    """Write what was found, with all that it depends on; a killed write leaves the old file."""
    record = {
        "analysis": analysis,
        "schema": SCHEMA,
        "command": command(analysis, family.name),
        "family": {"name": family.name, "title": family.title, "clean": family.clean_member()},
        "config": asdict(config),
        "models": {m.name: model_facts(m) for m in members},
        "versions": versions(),
        "seconds": round(seconds, 1),
        "made": time.strftime("%Y-%m-%d"),
        "found": found,
    }
    path = place(analysis, family.name, folder)
    write_json(path, record)
    return read(analysis, family.name, folder=folder)


def read(analysis: str, family: str, *, folder: Path = RESULTS) -> dict[str, Any]:
    """A record as `save` wrote it.

    Raises:
        MissingResult: there is none, or it is of another version; the message names the command that makes it.
    """
    path, remedy = place(analysis, family, folder), f"run: {command(analysis, family)}"
    if not path.exists():
        raise MissingResult(f"expected the result {path}; it is not there; {remedy}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MissingResult(f"expected JSON in {path}; it cannot be read ({error}); {remedy}") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise MissingResult(f"expected a result of version {SCHEMA} in {path}; it is of {schema}; {remedy}")
    return record


def is_current(record: Mapping[str, Any], config: Any, members: tuple[Member, ...]) -> bool:
    """Whether running again with these would measure the same thing."""
    same = json.loads(json.dumps(asdict(config))) == record["config"]
    return same and record["models"] == {m.name: model_facts(m) for m in members}


def model_facts(member: Member) -> dict[str, Any]:
    trigger = json.dumps(member.trigger.card(), sort_keys=True, default=str)
    return {
        "attack": member.attack,
        "kind": member.kind,
        "target": member.target,
        "seed": member.seed,
        "weights": member.weights,
        "trigger": hashlib.sha256(trigger.encode()).hexdigest()[:16],
    }


def read_measured(name: str, folder: Path) -> dict[str, Any]:
    """The result of an analysis that measures on demand, over no family.

    Raises:
        FileNotFoundError: nothing was measured yet; the message says what does.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"expected {path}; it is not there; run: python -m analyses.{name} --measure")
    return json.loads(path.read_text(encoding="utf-8"))
