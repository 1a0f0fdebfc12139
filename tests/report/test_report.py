from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from decompclip.audit.components import WeightsAlone
from decompclip.audit.result import AuditResult
from decompclip.audit.scan_result import ScanResult
from decompclip.data.images import SkippedFile
from decompclip.report import render, write_report
from decompclip.report.write import cell, coded, tied

Make = Callable[..., AuditResult]
EVIL = "<script>alert(1)</script>"
FIGURES = 9
"""Of one audit."""


class Elements(HTMLParser):
    """Elements with their attributes, and the JSON of the figures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.scripts and self.found[-1][0] == "script":
            self.scripts[-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_stands_alone(make: Make) -> None:
    page = render([make()])
    elements = Elements(page)
    sources = [a[key] for _, a in elements.found for key in ("src", "href") if a.get(key)]
    assert sources and all(str(s).startswith(("data:", "#")) or s == "audit.json" for s in sources)
    assert not elements.of("link")[1:]
    assert page.count("Plotly.newPlot") == 1
    assert len(re.findall(r"plotly\.js v\d", page)) == 1  # the library's own header, once


def test_every_figure_is_json_that_a_browser_can_read(make: Make) -> None:
    elements = Elements(render([make(), make(name="other")]))
    figures = [
        json.loads(s) for s, a in zip(elements.scripts, elements.of("script"), strict=True) if "type" in a
    ]
    assert len(figures) == 2 * FIGURES
    assert all({"data", "layout"} <= set(figure) for figure in figures)


def test_names_from_outside_are_shown_and_not_run(make: Make) -> None:
    result = make(name=EVIL, classes=("a", "b", EVIL), skipped=(SkippedFile(EVIL, EVIL),))
    elements = Elements(render([result]))
    assert len(elements.of("script")) == FIGURES + 2
    assert "alert(1)" in render([result])


def test_it_says_what_was_skipped_and_where_it_came_from(make: Make) -> None:
    page = render([make(skipped=(SkippedFile("cats/broken.png", "is no picture"),))])
    assert "cats/broken.png" in page and "is no picture" in page
    assert "ab" * 32 in page and "activation" in page and "3.0e-07" in page
    assert "None: every image could be read" in render([make()])


def test_detection_without_a_hint_is_told_by_all_that_it_asks(make: Make) -> None:
    page = " ".join(render([make()]).split())
    for words in ("how odd", "contribute", "how early", "how long its feature is"):
        assert page.count(words) >= 2, words


def test_asr_never_stands_without_its_control(make: Make) -> None:
    elements = re.findall(r"<thead>.*?</thead>", render([make(), make()]), flags=re.DOTALL)
    with_asr = [head for head in elements if "Attack success" in head]
    assert len(with_asr) == 5
    assert all("Control" in head and "Difference" in head for head in with_asr)


def test_files_are_whole_and_agree(make: Make, tmp_path: Path) -> None:
    path = write_report([make(), make(name="other")], tmp_path / "new" / "report")
    assert path.name == "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["audit.json", "report.html"]
    found = json.loads((path.parent / "audit.json").read_text(encoding="utf-8"))
    assert found["schema"] == 2
    assert [audit["name"] for audit in found["audits"]] == ["tiny", "other"]
    assert found["audits"][0]["as_it_is"]["asr"]["value"] == pytest.approx(0.95)
    title = found["audits"][0]["findings"][0]["title"]
    assert title in path.read_text(encoding="utf-8")


def test_weights_alone_are_shown_beside_a_reference_and_weigh_nothing(
    make: Make, make_scan: Callable[..., ScanResult], tmp_path: Path
) -> None:
    assert 'id="weights"' not in render([make(), make_scan(reference=False)])
    scan = make_scan()
    assert scan.weights is not None
    audits = [
        replace(make(), weights=w) for w in (scan.weights, WeightsAlone("x", left_out="two architectures"))
    ]
    assert [audit.verdict for audit in audits] == [make().verdict] * 2
    page = write_report([*audits, scan], tmp_path).read_text(encoding="utf-8")
    section = page[page.index('<section id="weights"') :].partition("</section>")[0]
    assert section.count("<article") == 3 and section.count('class="figure"') == 2
    assert section.count("No verdict rests on it") == 1
    assert section.count("Both towers changed most along “star”, 2.00 times as much as along “circle”.") == 2
    assert "Beside x: Not compared: two architectures." in section
    assert section.count('download="audit2-weights-parts.csv"') == 1 and "audit1-weights" not in section
    first, second, third = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))["audits"]
    assert (
        first["weights"] == third["weights"]
        and first["weights"]["parts"][0]["texts"] == "star 0.40, a cup 0.10"
    )
    assert second["weights"]["left_out"] == "two architectures"


def test_a_report_of_nothing_and_onto_a_file_are_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one audit"):
        write_report([], tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="a folder to write the report to"):
        write_report(make(), file)


def test_values_keep_together() -> None:
    assert (
        tied("90.0 % [86.1, 92.9]; +0.20 ± 0.01")
        == "90.0\u00a0%\u00a0[86.1,\u00a092.9]; +0.20\u00a0±\u00a00.01"
    )
    assert cell("0.93 [0.90, 0.95]") == '0.93 <span class="interval">[0.90,\u00a00.95]</span>'
    assert cell("<b>") == "&lt;b&gt;"


def test_options_never_part_and_nothing_else_becomes_markup() -> None:
    assert coded("a <b> (--reference)") == 'a &lt;b&gt; (<code class="option">--reference</code>)'
    assert coded("try `decompclip repair`") == 'try <code class="option">decompclip repair</code>'
    assert coded("`<b>`") == '<code class="option">&lt;b&gt;</code>'
    assert coded("one - two `") == "one - two `"
