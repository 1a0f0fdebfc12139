"""Attribution patching: every patch estimated from one gradient (Syed, Rager and Conmy, 2023; Nanda, 2023).

To first order, writing the source's activation into the base run moves the score by the gradient there times the
difference of the two. One forward pass a run and one backward pass serve all places at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.models.gradients import differentiable
from decompclip.operators.patching import (
    POINTS,
    ImageBatches,
    Patching,
    Score,
    Site,
    check_request,
    over_batches,
    record,
    scorer,
    writing,
)
from decompclip.tower.vit import Hook, HookedViT

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP


@differentiable
def attribution_patching(
    model: HookedViT | HookedCLIP,
    base: ImageBatches,
    source: ImageBatches,
    score: Float[Tensor, " d_embed"] | Score,
    *,
    sites: Sequence[Site] = get_args(Site),
    by_token: bool = False,
    check: int = 0,
) -> Patching:
    """`activation_patching`, estimated. How well tell `check`, or `exact.correlation(estimate)` with all exact runs.

    Args:
        check: places that are patched exactly too, a forward pass each; they stand in the result's `checks`, and
            `agreement` is their correlation with the estimates. Taken at equal steps down the order of the estimates'
            sizes, the largest and the smallest among them.

    Raises:
        ValueError: as `activation_patching`; a check with a stream of batches; or a check of one or two places, which correlate whatever they are.
    """
    if check < 0 or check in (1, 2):
        raise ValueError(
            f"expected a check of at least 3 places, or of 0 for none; received {check}; two places always correlate"
        )
    if not isinstance(base, Tensor):
        if check:
            raise ValueError(f"expected one batch to check places in; received batches and check={check}")
        return over_batches(
            partial(attribution_patching, model, score=score, sites=sites, by_token=by_token), base, source
        )
    visual, source = check_request(model, base, source, sites)
    judge = scorer(score, visual)
    n_layers = visual.cfg.n_layers
    names = [f"blocks.{layer}.{POINTS[site]}" for site in sites for layer in range(n_layers)]
    with torch.no_grad():
        donor = record(visual, source, names)
        after = judge(visual(source))
    with torch.enable_grad():
        # The images carry the graph, so that towers with frozen weights have one too.
        images = base.detach().clone().requires_grad_()
        kept: dict[str, Tensor] = {}
        hooks: list[Hook] = [(name, lambda x, hook: kept.__setitem__(hook.name, x)) for name in names]
        with visual.hooks(fwd_hooks=hooks):
            before = judge(visual(images, pooled_rows=False))
        gradients = torch.autograd.grad(before.sum(), [kept[name] for name in names], allow_unused=True)
    estimates = {}
    for name, gradient in zip(names, gradients, strict=True):
        difference = donor[name] - kept[name].detach()
        product = torch.zeros_like(difference) if gradient is None else gradient * difference
        estimates[name] = product.sum(-1).mean(0)  # [token], or [token head]
    effects: dict[str, Tensor] = {}
    for site in sites:
        of_layers = torch.stack([estimates[f"blocks.{layer}.{POINTS[site]}"] for layer in range(n_layers)])
        of_layers = of_layers if by_token else of_layers.sum(1)
        effects[site] = of_layers.mT if by_token and site == "z" else of_layers
    before = before.detach()
    checks = []
    for site, place in _spread(effects, sites, check):
        layer, *rest = place
        unit = [rest.pop(0)] if site == "z" else []
        at = (slice(None), rest[0] if by_token else slice(None), *unit)
        name = f"blocks.{layer}.{POINTS[site]}"
        with torch.no_grad(), visual.hooks(fwd_hooks=[(name, writing(donor[name], at))]):
            checks.append((site, place, float((judge(visual(base, pooled_rows=False)) - before).mean())))
    return Patching(effects, before, after, by_token, "attribution", tuple(checks))


def _spread(
    effects: Mapping[str, Tensor], sites: Sequence[Site], count: int
) -> list[tuple[Site, tuple[int, ...]]]:
    """Places at equal steps down the order of sizes; all where there are no more."""
    places = [
        (abs(float(effects[site][tuple(place)])), site, tuple(place))
        for site in sites
        for place in torch.ones(effects[site].shape).nonzero().tolist()
    ]
    places.sort(reverse=True)
    chosen = torch.linspace(0, len(places) - 1, min(count, len(places))).round().long().tolist()
    return [places[i][1:] for i in chosen]
