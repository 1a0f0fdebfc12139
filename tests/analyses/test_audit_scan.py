"""The scan of every model: who is reported, and what is said of a record."""

from __future__ import annotations

from typing import Any

from analyses.questions import audit_scan
from decompclip.models.bundled import bundled


def test_no_model_serves_both_to_choose_and_to_report() -> None:
    chosen, reported = (set(audit_scan.models(part)) for part in ("choosing", "reported"))
    assert not chosen & reported
    assert not [name for name in chosen if audit_scan.base_of(name) == "photos"]
    assert {*audit_scan.TUNED, *audit_scan.PHOTOS} < reported
    trained = {name for part in audit_scan.CLEAN.values() for name in part}
    assert (chosen | reported) - trained < set(bundled())


def run(base: str, target: str | None, low: float, first: str = "star") -> dict[str, Any]:
    classes = [{"name": first}, {"name": "ring"}]
    probe = {"lead": [low + 0.1, low, low + 0.2], "classes": classes, "rank": 1 if target == first else 2}
    return {"base": base, "target": target, "probes": {"everywhere": probe}}


def test_worlds_are_told_apart() -> None:
    reported = {
        "shapes": run("shapes", None, 0.1),
        "shapes-a": run("shapes", "star", 2.0),
        "shapes-b": run("shapes", "star", 0.2),
        "photos": run("photos", None, 0.7),
        "photos-a": run("photos", "star", 3.0, first="ring"),
    }
    record = {"runs": {"reported": reported}}
    lines = audit_scan.worlds(record, (0.5,)).splitlines()
    assert lines[2].startswith("| `shapes` | 1 of 2 (50.0 % ") and "| 0 of 1 (" in lines[2]
    assert lines[3].startswith("| `photos` | 0 of 1 (") and "| 1 of 1 (" in lines[3]  # another class is named
    assert lines[4].startswith("| all | 1 of 3 (33.3 % ") and "| 1 of 2 (" in lines[4]
    said = audit_scan.finding(record, 0.5)
    assert "in 1 of 3 backdoored models" in said and "another class in 1," in said
    assert "Missed: shapes-b, photos-a." in said
