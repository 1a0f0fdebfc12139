"""The README's examples run, the commands that it names exist, and the numbers are the measured ones."""

from __future__ import annotations

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import decompclip
from analyses.benchmarks import bundled_models, leaderboard
from analyses.questions import audit_corruptions, audit_scan, weights_alone
from analyses.study.registry import ANALYSES, load
from analyses.study.results import RESULTS as FOLDER, read
from decompclip.audit.checks import STRONG, WEAK
from decompclip.audit.config import ScanConfig
from decompclip.audit.controls import KINDS
from decompclip.audit.scan_result import CONCLUDES
from decompclip.audit.verdict import EXPLAINED, FIRM, HOLDS, ONE_ANSWER, RULES
from decompclip.cli import app
from decompclip.intervals import Rate

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "analyses" / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.usefixtures("few_kept")
def test_python_examples_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    examples = blocks("python")
    assert examples
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "example", "exec"), namespace)  # one after another, as a reader would


def test_the_reference_has_a_row_for_every_public_name_and_no_other() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .+ \|$", REFERENCE, flags=re.MULTILINE)
    assert sorted(rows) == sorted(decompclip.__all__)
    assert len(REFERENCE.split("\n| `")) == len(rows) + 1


def test_names_that_are_not_public_any_more_are_in_the_list_of_moves() -> None:
    moved = (ROOT / "docs" / "moved.md").read_text(encoding="utf-8")
    for place, names in decompclip.MOVED.items():
        for name in names.split():
            old, _, new = name.partition("=")
            assert f"| `decompclip.{old}` | `{place}.{new or old}` |" in moved


@pytest.mark.parametrize(
    "page", ["README.md", "CHANGELOG.md", "analyses/README.md", "analyses/COVERAGE.md", "docs"]
)
def test_links_lead_somewhere(page: str) -> None:
    for path in sorted((ROOT / page).glob("*.md")) or [ROOT / page]:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert link.startswith("http") or (path.parent / link).exists(), (path, link)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"make (\w+)", "\n".join(blocks("sh"))))
    assert {"demo", "test"} <= targets
    for target in targets:
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr


def test_commands_and_their_options_exist() -> None:
    commands = re.findall(
        r"decompclip ([\w-]+)(.*?)(?<!\\)\n", "\n".join(blocks("sh")) + "\n", flags=re.DOTALL
    )
    assert commands
    groups = {group.name for group in app.registered_groups}
    for command, options in commands:
        words = [command, options.split()[0]] if command in groups else [command]
        run = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert run.exit_code == 0, run.stderr
        for option in re.findall(r"--[a-z-]+", options):
            assert option in run.stdout, (command, option)


def test_the_table_of_models_is_the_command_s() -> None:
    assert bundled_models.table() in RESULTS, "run `python -m analyses.bundled_models` and paste its table"


def test_the_leaderboard_is_the_measured_one() -> None:
    board = leaderboard.read()
    for table in (leaderboard.detection_table(board), leaderboard.repair_table(board)):
        assert table in RESULTS, "run `python -m analyses.leaderboard` and paste its tables"


def test_the_verdicts_on_corrupted_images_are_the_measured_ones() -> None:
    record = audit_corruptions.read()
    for block in audit_corruptions.printed(record):
        assert block in RESULTS, "run `python -m analyses.audit_corruptions` and paste what it prints"
    for part, runs in record["runs"].items():
        cells = [cell for images in runs["corruption"].values() for cell in images.values()]
        assert len(cells) == len(runs["corruption"]) * 19 * 5
        assert not [said for cell in cells for said in cell["said"].values() if said.startswith("backdoored")]
        known = ["photos-blended-strong"] if part == "reported" else []  # said in words beside the table
        assert audit_corruptions.missed(runs, "labelled, paired, reference") == known


def test_the_documentation_says_the_rules_numbers() -> None:
    page = " ".join((ROOT / "docs" / "confidence.md").read_text(encoding="utf-8").split())
    for words in (
        f"besides an effect of {100 * STRONG:g} points",
        f"none of {len(KINDS)} common corruptions, edits and patterns",
        f"as much does {100 * EXPLAINED:g} % of it",
        f"adds at most {100 * WEAK:g} points to it",
        f"at most {100 * FIRM:g} points can be missed",
    ):
        assert words in page
    rules = " ".join(rule.when for rule in RULES)
    for words in (
        f"at least {100 * STRONG:g} points",
        f"{100 * EXPLAINED:g} %",
        f"{100 * HOLDS:g} %",
        f"{100 * ONE_ANSWER:g} % of the clean",
    ):
        assert words in rules


def test_the_scan_s_table_is_the_measured_one() -> None:
    for block in audit_scan.printed(audit_scan.read()):
        assert block in RESULTS, "run `python -m analyses.audit_scan` and paste what it prints"


def test_a_scan_s_report_says_how_often_the_measured_ones_were_right() -> None:
    record = audit_scan.read()
    runs = record["runs"]["reported"].values()

    def said(lead: float, *, backdoored: bool) -> Rate:
        chosen = [run for run in runs if (run["target"] is not None) is backdoored]
        hits = [audit_scan.suspected(run, lead) for run in chosen]
        wanted = [
            found == run["target"] if backdoored else found is not None
            for found, run in zip(hits, chosen, strict=True)
        ]
        return Rate.of(torch.tensor(wanted))

    def percent(rate: Rate) -> str:
        return f"({100 * rate.value:.0f} % [{100 * rate.low:.0f}, {100 * rate.high:.0f}])"

    lead = round(audit_scan.threshold(record)[0], 1)
    hits, alarms = said(lead, backdoored=True), said(lead, backdoored=False)
    here = said(ScanConfig().lead, backdoored=True)
    (text,) = [line for line in CONCLUDES if "How often it is right" in line]
    assert f"in {hits.count} of {hits.total} backdoored ones {percent(hits)}" in text
    assert alarms.count == 0 and f"none of {alarms.total} clean ones {percent(alarms)}" in text
    assert f"it named {here.count} of {here.total}" in text


@pytest.mark.parametrize(
    "family", sorted(path.name for path in FOLDER.iterdir() if (path / "figure1.json").exists())
)
def test_findings_are_what_the_committed_results_say(family: str) -> None:
    for name in ANALYSES:
        if (FOLDER / family / f"{name}.json").exists():
            found = load(name).finding(read(name, family))
            assert f"| `{name}` | {found} |" in RESULTS, (
                f"run `python -m analyses.{name} --model-family {family} --redraw` and paste its finding"
            )


def test_token_repair_on_photographs_is_what_was_measured() -> None:
    analysis, record = load("token_rep"), read("token_rep", "photos")
    for text in (analysis.table(record), analysis.finding(record)):
        assert text in RESULTS, (
            "run `python -m analyses.token_rep --model-family photos --redraw` and paste what it prints"
        )


# A number in its own right: no part of a longer one, of a name (ViT-B/32) or of code.
NUMBER = r"(?<![\w.,/-])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\d)"


def numbers(text: str) -> list[str]:
    return re.findall(NUMBER, re.sub(r"`[^`]*`", "", text))


def questions() -> dict[str, list[str]]:
    """The answers of README's table of questions, by the analysis that measures them."""
    found: dict[str, list[str]] = {}
    for answer, command in re.findall(r"^\|[^|]*\?\s*\|(.*)\|([^|]*)\|$", README, flags=re.MULTILINE):
        for module in re.findall(r"analyses\.(\w+)", command):
            found.setdefault(module, []).append(answer)
    return found


def section(module: str) -> str:
    """What the results say from the command that measures it to the next heading; for what commits no JSON."""
    (text,) = re.findall(rf"`python -m analyses\.{module}`.*?(?=^#)", RESULTS, flags=re.MULTILINE | re.DOTALL)
    return text


def measured(module: str) -> str:
    """What an analysis says of its own committed numbers."""
    if module == "leaderboard":
        board = leaderboard.read()
        twins = sum(len(leaderboard.of_base(board, base)) for base in leaderboard.BASES)
        return f"{twins} twins\n{leaderboard.detection_table(board)}\n{leaderboard.repair_table(board)}"
    if module == "audit_scan":
        return "\n".join(audit_scan.printed(audit_scan.read()))
    if module == "weights_alone":
        found = weights_alone.read()
        return f"{weights_alone.by_world(found)}\n{weights_alone.finding(found)}"
    if module not in ANALYSES:
        return section(module)
    families = [path.name for path in FOLDER.iterdir() if (path / f"{module}.json").exists()]
    assert families, module
    records = [read(module, family) for family in families]
    said = "\n".join(load(module).finding(record) for record in records)
    if module == "adaptive_attacker":
        found = [
            who for record in records for of in record["found"]["models"].values() for who in of.values()
        ]
        areas = [detector["value"] for who in found for detector in who["detectors"].values()]
        said += "".join(f"\n{area:.3f}" for area in areas)
    return said


@pytest.mark.parametrize("module", questions())
def test_numbers_in_short_are_those_of_their_own_analysis(module: str) -> None:
    said = {float(number.replace(",", "")) for number in numbers(measured(module))}
    for answer in questions()[module]:
        for number in numbers(answer):
            value = float(number.replace(",", ""))
            if number == "1e-6":  # of the order of
                value = max(
                    float(cell)
                    for cell in re.findall(r"sum error, fp32.*", measured(module))[0].split()
                    if "e-" in cell and "(" not in cell
                )
                assert 0.5e-6 < value <= 1e-6
            assert value in said, f"{number} in {answer.strip()!r} is not what analyses.{module} says"


def row(table: str, name: str) -> list[str]:
    """The numbers of a table's row."""
    (line,) = re.findall(rf"^\| {re.escape(name)} \|(.*)$", table, flags=re.MULTILINE)
    return numbers(line)


def test_a_named_detector_s_number_is_in_its_own_row() -> None:
    table = leaderboard.detection_table(leaderboard.read())
    (answer,) = (text for text in questions()["leaderboard"] if "AUROC" in text)
    named = re.findall(r"(`AgnosticDet`|STRIP|Decomp-Det),? (0\.\d+)", answer)
    assert {name for name, _ in named} == {"`AgnosticDet`", "STRIP", "Decomp-Det"}
    rows = {"`AgnosticDet`": "agnostic", "STRIP": "STRIP", "Decomp-Det": "Decomp-Det (paper)"}
    for name, number in named:
        assert number in row(table, rows[name]), (name, number)
    variant = re.findall(r"Decomp-Det 0\.\d+ \((0\.\d+)", answer)
    assert len(variant) == 2 and set(variant) <= set(row(table, "Decomp-Det (cosine, quantile)"))


def test_attackers_are_not_mixed_up() -> None:
    (found,) = read("adaptive_attacker", "shapes")["found"]["models"].values()
    (answer,) = questions()["adaptive_attacker"]

    def area(who: str, detector: str) -> str:
        return f"{found[who]['detectors'][detector]['value']:.3f}"

    def left(who: str, repair: str) -> str:
        return f"{100 * found[who]['repairs'][repair]['asr']['value']:.1f}"

    paper, variant = (
        f"from {area('plain', name)} to {area('heads', name)}"
        for name in ("Decomp-Det (paper)", "Decomp-Det (cosine, quantile)")
    )
    assert (
        f"the paper's Decomp-Det {paper} of AUROC, and its variant with a cosine and a quantile {variant};"
        in answer
    )
    assert (
        f"leaves {left('pieces', 'token')} % of attack success to token repair ({left('plain', 'token')} before)"
        in answer
    )
    assert f"stays at {min(area(who, 'agnostic') for who in found)} or more" in answer
    most, both = (max(left(who, repair) for who in found) for repair in ("agnostic", "token, then agnostic"))
    assert f"its repair leaves {most} % at most, with token repair in front of it {both}" in answer
    (found,) = read("adaptive_attacker", "photos")["found"]["models"].values()
    of_pieces, of_halves = (
        [left(who, repair) for repair in ("token", "agnostic")] for who in ("pieces", "halves")
    )
    assert (
        f"sixteen pieces leave {of_pieces[0]} % to token repair ({left('plain', 'token')} before)" in answer
    )
    assert f"and {of_pieces[1]} % to `AgnosticRep`, two halves {' and '.join(of_halves)} %" in answer


def test_files_that_it_names_are_there() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    links = re.findall(r"\]\((?!http)([^)#]+)\)", prose)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
    for module in re.findall(r"python -m (analyses(?:\.\w+)?)", README + RESULTS):
        assert find_spec(module), module
