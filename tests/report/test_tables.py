"""What downloads as CSV is what the JSON holds, at full precision."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from urllib.parse import unquote

import pytest

from decompclip.audit.result import AuditResult
from decompclip.report import render
from decompclip.report.view import as_csv, as_link, tables_of

Make = Callable[..., AuditResult]


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_numbers_are_those_of_the_json(make: Make) -> None:
    result = make()
    tables, numbers = tables_of(result), result.to_dict()
    first = rows_of(as_csv(tables["settings"]))[0]
    assert float(first["attack_success"]) == numbers["as_it_is"]["asr"]["value"]
    assert float(first["control_high"]) == numbers["as_it_is"]["control"]["high"]
    assert float(first["difference_low"]) == numbers["as_it_is"]["difference"]["low"]
    components = rows_of(as_csv(tables["components"]))
    assert [float(row["push"]) for row in components] == [p["push"] for p in numbers["infection"]["parts"]]
    assert sum(row["infected"] == "1" for row in components) == len(result.infection.infected)
    repairs = rows_of(as_csv(tables["repairs"]))
    for row, repair in zip(repairs, numbers["repairs"], strict=True):
        assert float(row["saved"]) == repair["change"]["saved"]["value"]
        assert float(row["accuracy_lost_high"]) == repair["change"]["cost"]["high"]
    scores = rows_of(as_csv(tables["scores"]))
    assert [int(row["suspect"]) for row in scores] == numbers["suspicion"]["suspect_counts"]
    assert len(rows_of(as_csv(tables["layers"]))) == 2 * 3 * result.n_layers
    assert {row["detector"] for row in rows_of(as_csv(tables["detectors"]))} >= {"without a hint"}


def test_what_is_not_known_is_an_empty_cell(make: Make) -> None:
    (first, *_) = rows_of(as_csv(tables_of(make(labelled=False))["settings"]))
    assert first["clean_accuracy"] == "" and first["clean_accuracy_images"] == "0"
    assert all(row["restored"] == "" for row in rows_of(as_csv(tables_of(make(labelled=False))["repairs"])))


def test_names_from_outside_stay_in_their_cell(make: Make) -> None:
    evil = 'a,"b"<c>'
    rows = rows_of(unquote(as_link(tables_of(make(classes=("x", "y", evil)))["classes"]).split(",", 1)[1]))
    assert rows[-1]["class"] == evil


def test_no_cell_is_a_formula_whatever_the_separator(make: Make) -> None:
    names = ("=HYPERLINK(1)", "a;=1+1", "b\t@c")
    text = as_csv(tables_of(make(classes=names))["classes"])
    assert [row["class"] for row in rows_of(text)] == ["'=HYPERLINK(1)", "a;=1+1", "b\\t@c"]
    assert '"a;=1+1",' in text  # quoted: one cell where ";" parts cells too
    assert as_csv([{"a": -0.5, "b": "-0.5", "c": -3}]) == '"a","b","c"\n-0.5,"-0.5",-3\n'


def test_the_page_offers_each_table(make: Make) -> None:
    result = make()
    page = render([result])
    links = dict(re.findall(r'download="audit0-(\w+)\.csv" href="data:text/csv;charset=utf-8,([^"]*)"', page))
    assert set(links) == set(tables_of(result))
    for name, rows in tables_of(result).items():
        assert unquote(links[name]) == as_csv(rows)


@pytest.mark.parametrize("rows", [[], [{"a": 1}, {"b": 2}]])
def test_any_rows_are_a_table(rows: list[dict[str, int]]) -> None:
    assert as_csv(rows) == ("\n" if not rows else '"a","b"\n1,""\n"",2\n')
