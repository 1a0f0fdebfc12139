"""Sweeps: one ablation after another, layer by layer or head by head, all in one pass (METHOD 2; paper, section 3.2).

Settings differ by whole layers, so that their features are prefix sums of the layers' changes. The changes are
taken to the classes first (`term @ classifier.T`), and the sums run over logits: a setting costs one addition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.cache.capture import decompose
from decompclip.cache.decomposition import Decomposition
from decompclip.cache.moments import Moments, check_finite
from decompclip.models.vit import HookedViT
from decompclip.operators.changes import Changes, Shared, check_classifier, predictions
from decompclip.operators.parts import check_alike
from decompclip.operators.splits import Evaluation, Validation, apart, moments_of
from decompclip.operators.sweep_results import FillKind, HeadSweep, Kind, Scheme, Sweep, SweepTable

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP

Data = Decomposition | Evaluation | Iterable[Decomposition | Evaluation]

CHUNK = 2**19
"""Logits worked on at a time: a chunk has as many images as make these (2 MiB in fp32, that caches hold)."""


def ablation_sweep(
    data: Data | Iterable[Float[Tensor, "_ 3 h w"]],
    moments: Moments | Validation | None,
    classifier: Float[Tensor, "class d_embed"],
    *,
    model: HookedViT | HookedCLIP | None = None,
    kinds: tuple[Kind, ...] = get_args(Kind),
    schemes: tuple[Scheme, ...] = get_args(Scheme),
    each_head: bool = False,
    entry: bool = False,
) -> SweepTable:
    """Predictions under every setting of every sweep, in one pass over the data and in bounded memory.

    In the published code's list of MLPs the stream's entry (the embedding) stands first, so that its curves of L layers have
    L + 1 settings and its "forward" ablates the embedding always, its "last five" being layers L-5..L-1 all the same.
    Here MLPs are MLPs; `entry=True` counts as the published code does.

    Args:
        data: a decomposition, or batches of them (from a store, say); with `model` also batches of images, which
            are decomposed in the moments' form. An `Evaluation` is held apart from a `Validation`.
        moments: their means are filled in; None fills in zero.
        each_head: whether to ablate also every head alone.
        entry: whether sweeps of MLPs begin with the stream's entry, in the place of a layer before the first.

    Raises:
        ValueError: an unknown kind or scheme, no data, moments that do not fit it, a classifier of another width,
            images that the moments were fitted on, or batches of different models or options.
        TypeError: images without a model.
    """
    for name, values, known in (("kind", kinds, get_args(Kind)), ("scheme", schemes, get_args(Scheme))):
        if isinstance(values, str) or not values:
            raise ValueError(f"expected {name}s as a tuple of some of {known}; received {values!r}")
        for value in values:
            if value not in known:
                raise ValueError(f"expected a {name} of {known}; received {value!r}")
    found: dict[tuple[Kind, Scheme] | Literal["before", "heads"], list[Tensor]] = {}
    n_heads = 0
    for changes in chunks(data, moments, classifier, model=model):
        n_heads = changes.n_heads
        for key, answers in _settings(changes, kinds, schemes, each_head, entry):
            found.setdefault(key, []).append(answers)
    if "before" not in found:
        raise ValueError("expected decompositions; received none; check the source of the data")
    joined = {key: torch.cat(parts, dim=-1) for key, parts in found.items()}
    fill: FillKind = "zero" if moments is None else "mean"
    before = joined.pop("before")
    alone = joined.pop("heads").unflatten(0, (-1, n_heads)) if each_head else None
    return SweepTable(
        before=before,
        each_head=None if alone is None else HeadSweep(alone, fill, before),
        sweeps={
            key: Sweep(joined[key], *key, fill, before, entry and key[0] == "mlps")
            for key in joined
            if isinstance(key, tuple)
        },
        fill=fill,
    )


def _decompositions(
    data: object, moments: Moments | Validation | None, model: object
) -> Iterator[Decomposition]:
    if isinstance(data, Tensor):
        raise ValueError(
            f"expected batches of images, one after another; received one tensor {list(data.shape)}; a single batch "
            "is [images]"
        )
    parts = [data] if isinstance(data, Decomposition | Evaluation) else data
    if not isinstance(parts, Iterable):
        raise TypeError(
            f"expected a Decomposition, an Evaluation, or batches of either; received {type(parts).__name__}"
        )
    for part in parts:
        if isinstance(part, Tensor):
            part = _decomposed(part, moments, model)  # noqa: PLW2901
        if not isinstance(part, Decomposition | Evaluation):
            raise TypeError(
                f"expected a Decomposition, an Evaluation, or batches of either; received {type(part).__name__}"
            )
        yield apart(moments, part)


def _decomposed(images: Tensor, moments: Moments | Validation | None, model: object) -> Decomposition:
    if model is None:
        raise TypeError(
            "expected decompositions, or images and a model; received images alone; pass model=, or decompose them"
        )
    visual = model if isinstance(model, HookedViT) else getattr(model, "visual")  # noqa: B009
    if moments is None:
        return decompose(visual, images)
    form = moments_of(moments)
    return decompose(visual, images, convention=form.maps.convention, normalize=form.normalized)


def chunks(
    data: object,
    moments: Moments | Validation | None,
    classifier: Tensor,
    *,
    model: HookedViT | HookedCLIP | None = None,
) -> Iterator[Changes]:
    """The changes of all the data, some images at a time; what belongs to the model is made once.

    Raises:
        ValueError, TypeError: as `ablation_sweep`.
    """
    means = None if moments is None else moments_of(moments)
    first, shared, seen = None, None, 0
    size = max(1, CHUNK // max(1, len(classifier)))
    for d in _decompositions(data, moments, model):
        if first is None or shared is None:
            check_classifier(classifier, d.d_embed)
            if means is not None:
                means.check(d)
            first, shared = d[:0], Shared.of(d, means, classifier)
        check_alike(first.maps, first.normalized, d.maps, d.normalized)
        for start in range(0, max(1, len(d)), size):
            changes = Changes(d[start : start + size], shared)
            if not changes.before.isfinite().all():  # as any term that is not, at the cost of a few numbers
                check_finite(changes.d, first=seen + start)
                raise ValueError(
                    "expected finite logits; received nan or inf of finite terms; check the classifier, or decompose "
                    "in fp32"
                )
            yield changes
        seen += len(d)


def _settings(
    changes: Changes, kinds: tuple[Kind, ...], schemes: tuple[Scheme, ...], each_head: bool, entry: bool
) -> Iterator[tuple[tuple[Kind, Scheme] | Literal["before", "heads"], Tensor]]:
    """The predictions of all settings, of one chunk."""
    before = changes.before
    n_layers = changes.n_layers
    yield "before", predictions(before)
    spare = torch.empty_like(before)
    if each_head:
        alone = [
            predictions(torch.add(before, changes.of_head(layer, head), out=spare))
            for layer in range(n_layers)
            for head in range(changes.n_heads)
        ]
        yield "heads", torch.stack(alone)
    for kind in kinds:
        found: dict[Scheme, list[Tensor]] = {scheme: [] for scheme in schemes}
        of_layers = changes.of_layers(kind)
        if entry and kind == "mlps":
            of_layers = [changes.of_entry(), *of_layers]
        for scheme, ordered in (("forward", of_layers), ("backward", of_layers[::-1])):
            if scheme in found:
                spare.copy_(before)
                for change in ordered:
                    spare += change
                    found[scheme].append(predictions(spare))
        if "backward" in found:
            found["backward"].reverse()
        if "separate" in found:
            found["separate"] = [predictions(torch.add(before, change, out=spare)) for change in of_layers]
        for scheme in schemes:
            yield (kind, scheme), torch.stack(found[scheme])
