"""Attribution patching: every patch estimated from one gradient (Syed, Rager and Conmy, 2023; Nanda, 2023).

To first order, writing the source's activation into the base run moves the score by the gradient there times the
difference of the two. One forward pass a run and one backward pass serve all places at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.models.vit import Hook, HookedViT
from decompclip.operators.patching import POINTS, Patching, Score, Site, check_request, record, scorer

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP


def attribution_patching(
    model: HookedViT | HookedCLIP,
    base: Float[Tensor, "batch 3 h w"],
    source: Float[Tensor, "batch 3 h w"],
    score: Float[Tensor, " d_embed"] | Score,
    *,
    sites: Sequence[Site] = get_args(Site),
    by_token: bool = False,
) -> Patching:
    """`activation_patching`, estimated; how well is what `exact.correlation(estimate)` tells.

    Raises:
        ValueError: as `activation_patching`.
    """
    visual = check_request(model, base, source, sites)
    judge = scorer(score)
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
    effects = {}
    for site in sites:
        of_layers = torch.stack([estimates[f"blocks.{layer}.{POINTS[site]}"] for layer in range(n_layers)])
        of_layers = of_layers if by_token else of_layers.sum(1)
        effects[site] = of_layers.mT if by_token and site == "z" else of_layers
    return Patching(effects, before.detach(), after, by_token, "attribution")
