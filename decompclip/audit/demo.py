"""The demonstration: both bundled backdoors, each beside the clean model that they were made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from decompclip.attacks.registry import backdoor
from decompclip.audit.collect import WORLD, datasets, open_source
from decompclip.audit.config import AuditConfig, Track, silently
from decompclip.audit.pipeline import Names, run_audit
from decompclip.audit.result import AuditResult
from decompclip.data.images import ImageBatch, ImageSource, SkippedFile
from decompclip.data.shapes import PROPERTIES
from decompclip.models.loading import load

SHOWN = ("shapes:badnet", "shapes:blended")
"""A local trigger and a global one, of all that are bundled."""


@dataclass(frozen=True)
class Held:
    """Images drawn once and gone through by several models."""

    drawn: tuple[ImageBatch, ...]

    @property
    def skipped(self) -> tuple[SkippedFile, ...]:
        return ()

    def __len__(self) -> int:
        return sum(len(batch.paths) for batch in self.drawn)

    def batches(self, batch_size: int = 64) -> Iterator[ImageBatch]:
        """The batches as they were drawn, whatever size is asked for."""
        del batch_size
        yield from self.drawn


def run_demo(*, images: int, config: AuditConfig, track: Track = silently) -> list[AuditResult]:
    """For each trigger the clean model and the backdoored one, on the same images.

    All of them take the same pixels alike, so that every image set is drawn only once.

    Raises:
        ValueError: the bundled models are not there.
    """
    poisoned = {spec: name for spec, name in datasets().items() if name is not None and spec in SHOWN}
    if not poisoned:
        raise ValueError("expected the bundled models; this installation has none: reinstall decompclip")
    models = {name: load(name) for name in (WORLD, *poisoned.values())}

    def draw(spec: str) -> Held:
        source: ImageSource = open_source(
            spec, models[WORLD], PROPERTIES["shape"], limit=images, seed=config.seed
        )
        total = -(-len(source) // config.batch_size)
        return Held(tuple(track(source.batches(config.batch_size), f"drawing {spec}", total)))

    clean = draw(WORLD)
    results = []
    for spec, name in poisoned.items():
        suspect, target = draw(spec), backdoor(name).target
        audited = [
            run_audit(
                models[model],
                clean,
                suspect,
                PROPERTIES["shape"],
                target=target,
                names=Names(model, WORLD, spec),
                config=config,
                track=track,
            )
            for model in (WORLD, name)
        ]
        results += [audited[0], audited[1].beside(audited[0])]
    return results
