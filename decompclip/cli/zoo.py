"""`decompclip zoo`: the bundled models, their cards, and how to build a backdoored twin anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from decompclip.cli import options
from decompclip.cli.console import imports, plain_errors, say
from decompclip.files import alone_in, check_folder
from decompclip.models.names import bundled, card

zoo = typer.Typer(
    no_args_is_help=True, help="The bundled small CLIPs: clean ones and their backdoored twins."
)


@zoo.command("list")
def list_models(as_json: options.AsJson = False) -> None:
    """Every bundled model: what it was trained on, its trigger, and how well both work."""
    with plain_errors():
        rows = [_row(card(name)) for name in bundled()]
        if as_json:
            say(json.dumps(rows, indent=1), lines=True)
            return
        head = ("model", "trigger", "kind", "target", "accuracy %", "ASR %", "control %", "poisons %")
        cells = [tuple("" if row[key] is None else str(row[key]) for key in _KEYS) for row in rows]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        for line in (head, *cells):
            say("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


@zoo.command("card")
def show_card(
    name: Annotated[str, typer.Argument(help="A bundled model; `decompclip zoo list` names them.")],
) -> None:
    """Everything that is known of one model: data, seeds, recipe, hash, results with intervals; as JSON."""
    with plain_errors():
        say(json.dumps(card(name), indent=1, ensure_ascii=False), lines=True)


@zoo.command()
def build(
    name: Annotated[str, typer.Argument(help="A backdoored twin, as shapes-badnet.")],
    out: Annotated[Path, typer.Option(help="Folder for its weights, its card and the checkpoint.")],
    threads: Annotated[
        int, typer.Option(min=1, help="Threads to train with; their number changes rounding and weights.")
    ] = 1,
) -> None:
    """Train a backdoored twin again from its recipe, and compare it with the bundled one.

    Five to ten minutes on one core, of photos-badclip twenty-five with its patch; the others of photos take hours there: `python -m analyses.train_photos`
    takes an hour, and twenty seconds on a GPU. A killed run goes on where it was. On the same machine with one thread the weights are
    the card's, byte for byte. Elsewhere rounding differs: attack success must come within 5 points of the card's, accuracy
    within 2; if not, it ends with exit code 1.
    """
    with plain_errors(lambda: options.going_on(out / f"{name}.pt")) as held:
        check_folder(out, "the twin")
        with imports(name):
            import torch

            from decompclip.zoo.build import build_twin

        torch.set_num_threads(threads)
        held.enter_context(alone_in(out))
        built = build_twin(name, out, progress=True)
        say(str(built), lines=True)
        say(f"Weights and card: {out.resolve()}")
    if built.reproduced is False:
        raise typer.Exit(1)


_KEYS = ("name", "trigger", "kind", "target", "accuracy", "asr", "control", "poisons")


def _row(facts: dict[str, Any]) -> dict[str, Any]:
    """One model's main numbers; rates in per cent."""
    accuracy = facts["accuracy"]
    row = dict.fromkeys(_KEYS) | {"name": facts["name"]}
    row["accuracy"] = f"{100 * accuracy.get('shape', accuracy.get('class')):.1f}"
    if backdoor := facts["backdoor"]:
        trigger = backdoor["trigger"]
        row |= {
            "trigger": trigger["name"],
            "kind": f"{trigger['extent']}, {trigger['structure']}",
            "target": backdoor["target"],
            "asr": f"{100 * backdoor['results']['asr']['value']:.1f}",
            "control": f"{100 * backdoor['results']['control']['value']:.1f}",
            "poisons": f"{100 * backdoor['poison_rate']:g}",
        }
    return row
