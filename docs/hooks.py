"""What the site has beside the files of this folder: pages that stand elsewhere in the project, and the reference's signatures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "analyses/README.md": "results.md",
    "analyses/COVERAGE.md": "coverage.md",
    "CHANGELOG.md": "changes.md",
}
"""Pages that stand elsewhere in the project, by path."""

LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


def on_config(config: Any) -> Any:
    """A page of signatures for each section of the reference."""
    own = [{title: _page(title)} for title in sections()]
    config["nav"] = [
        {"Reference": ["reference.md", *own]} if "Reference" in entry else entry for entry in config["nav"]
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    for title, names in sections().items():
        blocks = "\n\n".join(f"::: decompclip.{name}" for name in names)
        files.append(File.generated(config, _page(title), content=f"# {title}\n\n{blocks}\n"))
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for path in sorted(_assets()):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they work on the site; in the reference, names lead to their signatures."""
    if page.file.src_uri == "reference.md":
        markdown = re.sub(r"^\| `(\w+)` \|", r"| [`\1`][decompclip.\1] |", markdown, flags=re.MULTILINE)
    source = next((path for path, own in PAGES.items() if own == page.file.src_uri), "")
    folder = (ROOT / source if source else ROOT / "docs" / page.file.src_uri).parent
    return LINK.sub(lambda link: f"]({_on_site(link[1], folder)}", markdown)


def sections() -> dict[str, list[str]]:
    """The reference's public names, by section."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    parts = (part.split("\n", 1) for part in text.split("\n## ")[1:])
    return {title: re.findall(r"^\| `(\w+)` \|", body, flags=re.MULTILINE) for title, body in parts}


def _page(section: str) -> str:
    return f"reference/{section.lower().replace(' ', '-')}.md"


def _on_site(link: str, folder: Path) -> str:
    """Where a link from this folder of the project leads on the site; as it is, where the site has no such page."""
    target = (folder / link).resolve()
    if not target.is_relative_to(ROOT):
        return link
    path = target.relative_to(ROOT).as_posix()
    return PAGES.get(path, path.removeprefix("docs/"))


def _assets() -> set[str]:
    """Figures and other files outside this folder that its pages link to."""
    found: set[str] = set()
    for page in (*(ROOT / "docs").glob("*.md"), *(ROOT / path for path in PAGES)):
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve()
            if target.is_file() and target.suffix != ".md" and not target.is_relative_to(ROOT / "docs"):
                found.add(target.relative_to(ROOT).as_posix())
    return found
