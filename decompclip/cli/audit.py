"""`decompclip audit`: a checkpoint, and images that it may fall for, or clean images alone. `decompclip demo`: bundled models audited."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decompclip.cli import options
from decompclip.cli.console import first_process, imports, plain_errors, progress, say
from decompclip.files import alone_in, check_folder

if TYPE_CHECKING:
    from decompclip.audit import AuditResult
    from decompclip.audit.scan import ScanResult

KEPT = ".scan"
"""Where a killed scan goes on from."""


def audit(
    model: options.ModelOptions,
    clean: Annotated[str, typer.Option(help=f"Clean images: {options.IMAGES}.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and audit.json.")],
    suspect: Annotated[
        str | None,
        typer.Option(
            help="Suspect images, likewise. Of a folder that `decompclip poison` wrote, FOLDER/poisons.json takes the poisoned "
            "ones alone. Without suspect images or a trigger: a scan of clean images over the classes for a target."
        ),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            help=f"With --clean shapes, in place of --suspect: the same world with this trigger. own: the one that MODEL "
            f"remembers. {options.TRIGGER}."
        ),
    ] = None,
    classes: options.Classes = None,
    target: Annotated[
        str | None, typer.Option(help="The class that the attacker wants; inferred if not given.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="A clean model to compare with, on the same images; like MODEL.")
    ] = None,
    reference_pretrained: Annotated[str | None, typer.Option(help="Its tag of weights.")] = None,
    reference_checkpoint: Annotated[Path | None, typer.Option(help="Its local weights.")] = None,
    limit: options.Limit = 2000,
    on_error: options.OnError = options.Unreadable.skip,
    root: options.Root = None,
    convention: Annotated[
        options.Convention, typer.Option(help="Bookkeeping of means and biases.")
    ] = options.Convention.centred,
    epsilon: Annotated[float, typer.Option(help="Fixed threshold of Decomp-Rep and Decomp-Det.")] = 0.002,
    quantile: Annotated[float, typer.Option(help="Clean quantile of their other threshold.")] = 0.05,
    zeta: Annotated[
        int, typer.Option(min=0, help="Decomp-Det: suspicious with more flagged heads than this.")
    ] = 5,
    false_positives: Annotated[
        float, typer.Option(help="Share of clean images that detection without a hint may flag.")
    ] = 0.05,
    examples: Annotated[int, typer.Option(min=0, max=12, help="Images to draw maps over.")] = 3,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
) -> None:
    """Audit MODEL for a backdoor: one HTML report that opens offline, and a JSON with every number.

    With suspect images: do they do to it what clean ones do not, where, and what helps? With clean images alone: is
    one class far easier to reach than the others? The report says what either can conclude. torchrun and accelerate
    launch spread the work over processes.
    """
    with plain_errors(lambda: _kept(out, suspect), shared=True) as held:
        check_folder(out, "the report")
        suspect = _suspect(clean, suspect, trigger)
        if reference is None and (reference_pretrained or reference_checkpoint):
            raise ValueError(
                "expected --reference NAME with --reference-pretrained and --reference-checkpoint"
            )
        if suspect is None and target is not None:
            raise ValueError(
                f"expected --suspect images with --target {target}; a scan of clean images alone looks at every class"
            )
        options.check_images(clean, suspect)
        options.check_files(classes=classes)
        models = {model.model: model}
        if reference is not None:
            models[f"{reference} (reference)"] = replace(
                model,
                model=reference,
                checkpoint=reference_checkpoint,
                pretrained=reference_pretrained,
                prefix=None,
                image_size=None,
            )
        for each in models.values():
            each.check()
        with imports():
            from decompclip.attacks.registry import remembered
            from decompclip.audit import AuditConfig
            from decompclip.audit.collect import attack_in, check_source
            from decompclip.data.processes import Processes

        clean, limit = options.sized(clean, limit)
        known = remembered(model.model, model.checkpoint)
        for spec in filter(None, (clean, suspect)):
            check_source(spec, known)
        names = options.known_classes(classes, model.model, *filter(None, (clean, suspect)))
        if target is not None:
            _check_target(target, names, classes)
        config = AuditConfig(
            convention=convention.value,
            epsilon=epsilon,
            quantile=quantile,
            zeta=zeta,
            false_positives=false_positives,
            examples=examples,
            batch_size=batch_size,
            seed=seed,
        )
        usual = vars(AuditConfig(batch_size=batch_size, seed=seed))
        idle = [name.replace("_", "-") for name, value in vars(config).items() if value != usual[name]]
        if suspect is None and idle:
            raise ValueError(
                f"expected --suspect images with --{' and --'.join(idle)}; a scan of clean images alone does not use it"
            )
        accelerator, device = held.enter_context(options.joined(model.device))
        Processes(accelerator).in_first(lambda: held.enter_context(alone_in(out)))
        loaded = {name: replace(each, device=device).load() for name, each in models.items()}
        given_options = {"limit": limit, "seed": seed, "on_error": on_error.value, "root": root}
        if suspect is None:
            found = _scan(loaded, clean, names, given_options, batch_size, out / KEPT, accelerator)
            if first_process():
                _finish([found], out)
                shutil.rmtree(out / KEPT, ignore_errors=True)
            return
        given_options |= {"known": known}
        results = _pair(loaded, (clean, suspect), names, target, config, given_options, accelerator)
        if not first_process():
            return
        if attack := attack_in(suspect, known):
            facts = {"suspect_trigger": str(attack)}
            results = [replace(one, provenance={**one.provenance, **facts}) for one in results]
            say(f"Trigger: {attack}")
        _finish(results, out)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and audit.json.")],
    count: Annotated[
        int, typer.Option(min=50, help="Images of each set; of photographs at most 400.")
    ] = 1500,
    images: options.OldImages = None,
    seed: options.Seed = 0,
) -> None:
    """Audit the bundled backdoored models, each beside the clean model they were made from."""
    with plain_errors() as held:
        check_folder(out, "the report")
        with imports():
            from decompclip.audit import AuditConfig
            from decompclip.audit.pipeline import run_demo

        held.enter_context(alone_in(out))
        with progress() as track:
            results = run_demo(
                images=options.count_of(count, images),
                config=AuditConfig(batch_size=250, seed=seed),
                track=track,
            )
        _finish(results, out, title="Backdoored CLIPs, each beside its clean model")


def _suspect(clean: str, suspect: str | None, trigger: str | None) -> str | None:
    """What the library takes for suspect images: a place of images, or `shapes:` and a trigger.

    Raises:
        ValueError: a trigger together with suspect images, or with clean ones that are not the bundled world's.
    """
    from decompclip.data.files import parse_source

    if trigger is not None:
        if suspect is not None or parse_source(clean).kind != "shapes":
            raise ValueError(
                f"expected --trigger with --clean shapes and without --suspect; received --clean {clean}"
                f"{f' --suspect {suspect}' if suspect else ''}; put a trigger into images of your own with apply-trigger"
            )
        options.check_trigger(trigger)
        return f"shapes:{trigger}"
    if suspect is not None and (source := parse_source(suspect)).kind == "shapes" and source.detail:
        options.renamed(f"--suspect {suspect}", f"--trigger {source.detail}")
    return suspect


def _pair(
    loaded: dict[str, Any],
    specs: tuple[str, str],
    class_names: tuple[str, ...],
    target: str | None,
    config: Any,
    given_options: dict[str, Any],
    accelerator: Any,
) -> list[AuditResult]:
    """The model, and its reference, on clean and suspect images."""
    from decompclip.audit import run_audit
    from decompclip.audit.collect import open_pair
    from decompclip.audit.components import weights_alone

    results: list[AuditResult] = []
    with progress() as track:
        for name, clip in loaded.items():
            clean, suspect = open_pair(specs, clip, class_names, **given_options)
            result = run_audit(
                clip,
                clean,
                suspect,
                class_names,
                target=results[0].target if results else target,  # the same for both
                name=name,
                clean_name=specs[0],
                suspect_name=specs[1],
                config=config,
                accelerator=accelerator,
                track=track,
            )
            results.append(result)
    if len(results) > 1 and first_process():
        (_, model), (name, reference) = loaded.items()
        weights = weights_alone(model, reference, class_names, name=name)
        results[0] = results[0].beside(results[1], weights=weights)
    return results


def _scan(
    loaded: dict[str, Any],
    clean: str,
    class_names: tuple[str, ...],
    given_options: dict[str, Any],
    batch_size: int,
    keep: Path,
    accelerator: Any,
) -> ScanResult:
    """The model, and its reference, on clean images alone."""
    from decompclip.audit.collect import open_source
    from decompclip.audit.scan import ScanConfig, run_scan

    (name, clip), *others = loaded.items()
    config = ScanConfig(batch_size=batch_size, seed=given_options["seed"])
    enough = config.fit + config.held_out  # of a folder a random subset, not the first classes
    given_options = given_options | {"limit": min(given_options["limit"] or enough, enough)}
    with progress() as track:
        return run_scan(
            clip,
            open_source(clean, clip, class_names, **given_options),
            class_names,
            reference=others[0][1] if others else None,
            name=name,
            reference_name=others[0][0] if others else None,
            clean_name=clean,
            config=config,
            accelerator=accelerator,
            track=track,
            keep=keep,
        )


def _kept(out: Path, suspect: str | None) -> str:
    """What a stopped audit leaves."""
    if suspect is None and (out / KEPT).is_dir():
        return f"what was scanned is kept in {out / KEPT}; the same command goes on from there"
    return "nothing was written; run the same again to start anew"


def _check_target(target: str, class_names: tuple[str, ...], classes: Path | None) -> None:
    from decompclip.data.images import class_index

    try:
        class_index(target, class_names)
    except ValueError as error:
        where = f" (class file {classes})" if classes else ""
        raise ValueError(f"--target: {error}{where}") from error


def _finish(results: Sequence[AuditResult | ScanResult], out: Path, *, title: str | None = None) -> None:
    """Write the report, and print each result's finding and where the report lies."""
    from decompclip.report import write_report

    path = write_report(results, out, title=title)
    for result in results:
        say(result.in_short, err=True)
        found = result.verdict
        say(f"{found.headline} ({found.level}, {found.confidence} confidence)")
        if found.repair is not None:
            say(f"  Repair: {found.repair}")
    say(f"Report: {path.resolve()}")
