"""All results of a folder as one page that opens offline: findings, tables and interactive figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from analyses.study.command import Analysis
from analyses.study.registry import ANALYSES, load
from analyses.study.results import MissingResult, command, read
from decompclip.display import printable, shown
from decompclip.figures.theme import content_policy, figure_json, plotly_script
from decompclip.files import write_text


def write_index(folder: Path) -> Path:
    """`index.html` in the folder, of all families that have a result there.

    Raises:
        MissingResult: the folder holds none.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    families = [found for name in names if (found := _family(name, folder))]
    if not families:
        raise MissingResult(
            f"expected results in {folder}; there are none; run: python -m analyses --all --model-family shapes"
        )
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
    own = Path(__file__).with_name("index.html").read_text(encoding="utf-8")
    css = (files("decompclip.report") / "templates" / "report.css").read_text(encoding="utf-8")
    css += Path(__file__).with_name("index.css").read_text(encoding="utf-8")
    js, plotly = Path(__file__).with_name("index.js").read_text(encoding="utf-8"), plotly_script()
    page = environment.from_string(own).render(
        families=families,
        policy=Markup(content_policy(styles=[css], scripts=[plotly, js])),
        css=Markup(css),
        js=Markup(js),
        plotly=plotly,
    )
    return write_text(folder / "index.html", page)


def _family(name: str, folder: Path) -> dict[str, Any] | None:
    """What the page shows of a family; None without any result."""
    entries = [_entry(analysis, name, folder) for analysis in ANALYSES]
    if all(entry["missing"] for entry in entries):
        return None
    title = next(entry["family"] for entry in entries if not entry["missing"])
    return {"name": name, "title": title, "entries": entries}


def _entry(name: str, family: str, folder: Path) -> dict[str, Any]:
    analysis = load(name)
    shown = {
        "id": f"{family}-{name}",
        "title": analysis.TITLE,
        "command": command(name, family),
        "about": {head: _inline(text) for head, text in about(analysis).items()},
        "missing": "",
    }
    try:
        record = read(name, family, folder=folder)
    except MissingResult as error:
        return shown | {"missing": str(error)}
    return shown | {
        "family": record["family"]["title"],
        "finding": _inline(analysis.finding(record)),
        "tables": [as_html(block) for block in analysis.table(record).split("\n\n") if block.strip()],
        "figures": [figure_json(figure) for figure in analysis.plot(record).values()],
        "made": provenance(record),
    }


def about(analysis: Analysis) -> dict[str, str]:
    """The remarks after the heads of the docstring, `Paper:` and `Expected:`; and its last paragraph, on how it was done."""
    text = analysis.__doc__ or ""
    found = re.findall(r"^(Paper|Expected):\s+(.*(?:\n {11}.*)*)", text, flags=re.MULTILINE)
    found.append(("How", text.strip().rsplit("\n\n", 1)[-1]))
    return {head: re.sub(r"\s+", " ", body) for head, body in found}


def provenance(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    config = ", ".join(f"{key} = {value}" for key, value in record["config"].items())
    return (
        f"{record['made']}, {record['seconds']:.0f} s; {len(record['models'])} models; {config}; {versions}"
    )


def as_html(block: str) -> Markup:
    """A table, or a paragraph, of the Markdown that analyses write."""
    lines = block.strip().splitlines()
    if not lines[0].startswith("|"):
        return Markup("<p>{}</p>").format(_inline(" ".join(lines)))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, body = rows[0], rows[2:]
    cells = Markup("").join(Markup("<th scope='col'>{}</th>").format(_inline(cell)) for cell in head)
    parts = [
        Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(_inline(x)) for x in row))
        for row in body
    ]
    return Markup(
        "<div class='scroll'><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(cells, Markup("").join(parts))


def _inline(text: str) -> Markup:
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(printable(text)))))
