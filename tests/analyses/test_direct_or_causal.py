"""Direct beside causal effects on the backdoored model: the table of the analysis, small."""

from __future__ import annotations

import pytest

from analyses.direct_causal import Config, rows, run, table
from decompclip.operators.effects import Effects


@pytest.fixture(scope="module")
def effects() -> Effects:
    return run(Config(images=16, validation=64, batch_size=32))


def test_early_mlps_work_through_later_layers(effects: Effects) -> None:
    first, last = (effects[f"mlps[{layer}]"] for layer in (0, 5))
    assert abs(first["causal"]) > 10 * abs(first["direct"])
    assert abs(last["direct"]) > 1
    assert effects.baseline > 5  # the trigger works


def test_rows_are_means_over_a_layer(effects: Effects) -> None:
    found = rows(effects)
    assert len(found) == 2 * 6
    of_heads = next(row for row in found if (row["kind"], row["layer"]) == ("heads", 4))
    assert of_heads["direct"] == pytest.approx(float(effects.heads("direct")[4].abs().mean()))
    assert of_heads["gap"] == pytest.approx(float(effects.heads("difference")[4].abs().mean()))
    lines = table(effects).split("\n\n")[0].splitlines()
    assert len(lines) == 2 + 6 and len({line.count("|") for line in lines}) == 1
    assert f"| {of_heads['direct']:.3f} |" in lines[2 + 4]
