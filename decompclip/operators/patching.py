"""Patching: what one run's activations do in another's, place by place.

The base images run with one activation of the source images' run written in. How far the score moves from the base's
toward the source's is the effect of that place. Base clean, source triggered: where the attack can be written in; the
other way round: where it can be taken out.

`activation_patching` is exact, one forward pass a place. `attribution_patching` estimates all places at once (Syed,
Rager and Conmy, 2023; Nanda, 2023): to first order, writing the source's activation into the base run moves the score
by the gradient there times the difference of the two activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.api import check_choice, renamed
from decompclip.display import Result
from decompclip.models.clip import differentiable
from decompclip.operators.scores import ImageScore, Text, Toward, score_toward
from decompclip.tower.vit import Hook, HookedViT, tower

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP


Site = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"]
SITE_NAMES = {
    "resid_pre": "stream before the block",
    "resid_mid": "stream between attention and MLP",
    "resid_post": "stream after the block",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "z": "heads (z)",
}
ImageBatches = Float[Tensor, "batch 3 h w"] | Iterable[Float[Tensor, "_ 3 h w"]]
POINTS: dict[str, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
}


class TwoRuns(Result):
    """What the results of patching share: the scores of the two runs."""

    base: Float[Tensor, " batch"]
    source: Float[Tensor, " batch"]

    @property
    def gap(self) -> float:
        """By how much the source's mean score exceeds the base's: the effect of patching everything."""
        return float((self.source - self.base).mean())

    def merge(self, other: Any) -> Any:
        """The effects over the images of both."""
        raise NotImplementedError

    def _with(self, other: TwoRuns) -> tuple[Tensor, Tensor, float]:
        """The scores of both, and the other's weight among them."""
        base, source = torch.cat([self.base, other.base]), torch.cat([self.source, other.source])
        return base, source, len(other.base) / len(base)


@dataclass(frozen=True, eq=False, repr=False)
class Patching(TwoRuns):
    """Effects of patching, by site.

    Attributes:
        effects: the mean change of the score; axes `[layer]`, and for z `[layer head]`; then `token` where patched
            token by token.
        base, source: the scores of the two runs as they are.
        by_token: whether each token was patched alone.
        method: "exact", or "attribution" where estimated from gradients.
        checks: of an estimate, some places and their exact effects: site, place in `effects`, effect.
    """

    effects: Mapping[str, Float[Tensor, "layer ..."]]
    base: Float[Tensor, " batch"]
    source: Float[Tensor, " batch"]
    by_token: bool
    method: Literal["exact", "attribution"]
    checks: tuple[tuple[Site, tuple[int, ...], float], ...] = ()

    largest = "effect"

    def merge(self, other: Patching) -> Patching:
        """The effects over the images of both; checks, which are of one batch, are dropped.

        Raises:
            ValueError: the two were not patched at the same places, or not in the same way.
        """
        ours, theirs = ((x.effects.keys(), x.by_token, x.method) for x in (self, other))
        if ours != theirs:
            raise ValueError(
                f"expected patches of the same places in the same way; received {self!r} and {other!r}"
            )
        base, source, weight = self._with(other)
        effects = {site: x.lerp(other.effects[site].to(x), weight) for site, x in self.effects.items()}
        return Patching(effects, base, source, self.by_token, self.method)

    def shares(self, site: Site) -> Float[Tensor, "layer ..."]:
        """The effects of a site as shares of the gap."""
        return self.effects[site] / self.gap

    def correlation(self, other: Patching) -> dict[str, float]:
        """Pearson's correlation of the effects of each common site with another method's; nan where all effects of
        a site are equal, as those of the whole stream are.

        Raises:
            ValueError: the two were not patched at the same places.
        """
        found = {}
        for site in [site for site in self.effects if site in other.effects]:
            ours, theirs = self.effects[site], other.effects[site]
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"expected effects {list(ours.shape)} of {site}, as the first has them; received "
                    f"{list(theirs.shape)}; patch both with the same by_token"
                )
            both = torch.stack([ours.flatten(), theirs.flatten()]).double()
            varies = both.std(dim=1) > 1e-5 * both.abs().amax(1)
            found[site] = float(torch.corrcoef(both)[0, 1]) if bool(varies.all()) else float("nan")
        return found

    @property
    def agreement(self) -> float:
        """Pearson's correlation of an estimate with its checks, all sites together; nan without checks."""
        if not self.checks:
            return float("nan")
        pairs = [(float(self.effects[site][place]), exact) for site, place, exact in self.checks]
        return float(torch.corrcoef(torch.tensor(pairs).double().T)[0, 1])

    def to_frame(self) -> pd.DataFrame:
        """One row a place: site, layer, head, token (none where not taken apart), effect, share; and `exact`, the
        effect where an estimate was checked, if it was."""
        import pandas as pd

        exact = {(site, place): effect for site, place, effect in self.checks}
        rows = []
        for site, effects in self.effects.items():
            for place in torch.ones(effects.shape).nonzero().tolist():
                layer, *rest = place
                head = rest.pop(0) if site == "z" else None
                token = rest.pop(0) if self.by_token else None
                effect = float(effects[tuple(place)])
                share = effect / self.gap if self.gap else float("nan")
                rows.append((site, layer, head, token, effect, share, exact.get((site, tuple(place)))))
        names = ["site", "layer", "head", "token", "effect", "share", "exact"]
        frame = pd.DataFrame(rows, columns=names).astype(
            {"head": "Int64", "token": "Int64", "exact": "float"}
        )
        return frame if self.checks else frame.drop(columns="exact")

    def figure(self, *, shares: bool = True) -> go.Figure:
        """Heat maps on common colours, one for each site.

        Args:
            shares: of the gap between the two runs: 1 does what patching everything does; else changes of the score.
        """
        from decompclip.figures.heatmaps import Grid, grid_maps

        scale = 1 / self.gap if shares and self.gap else 1.0
        grids = []
        for site, effects in self.effects.items():
            names = [".".join(map(str, place)) for place in product(*map(range, effects.shape[1:]))]
            axis = ".".join(["head"] * (site == "z") + ["token"] * self.by_token)
            grids.append(Grid(SITE_NAMES[site], scale * effects.reshape(-1, len(names)), names, axis))
        top = max(float(grid.values.abs().max()) for grid in grids)
        return grid_maps(grids, unit="share of the gap" if shares else "change of the score", top=top)

    def __repr__(self) -> str:
        places = {site: "x".join(map(str, effects.shape)) for site, effects in self.effects.items()}
        sites = ", ".join(f"{site} {shape}" for site, shape in places.items())
        checked = (
            f", correlation {self.agreement:.2f} with {len(self.checks)} exact runs" if self.checks else ""
        )
        return f"Patching({self.method}{checked}: {sites}; {len(self.base)} images, gap {self.gap:.3f})"


@renamed(score="toward")
def activation_patching(
    model: HookedViT | HookedCLIP,
    base: ImageBatches,
    source: ImageBatches,
    toward: Toward,
    *,
    against: Text | None = None,
    sites: Sequence[Site] = get_args(Site),
    by_token: bool = False,
) -> Patching:
    """Patch each layer of each site alone (each head of z, and each token with `by_token`): a forward pass each.

    Args:
        model: a model, or its image tower.
        base: images that run with the patch; one batch, or batches one after the other.
        source: images whose activations are written in: image i of the source into image i of the base.
        toward: what images are scored by: a text, a direction that unit features are multiplied with, or a function of
            features (`decompclip.operators.scores`).
        against: a text or direction whose score is subtracted.
        sites: hook points of the blocks; "z" is patched head by head.
        by_token: whether each token is patched alone.

    Returns:
        The mean change of the score at every place.

    Raises:
        ValueError: an unknown site, no batches of images, not as many source as base images, or as
            `decompclip.operators.scores.direction`.
    """
    visual, score = tower(model), score_toward(model, toward, against)
    return over_batches(partial(_patch_all, visual, score, _known(sites), by_token), base, source)


@torch.no_grad()
def _patch_all(
    visual: HookedViT, judge: ImageScore, sites: Sequence[Site], by_token: bool, base: Tensor, source: Tensor
) -> Patching:
    n_layers = visual.cfg.n_layers
    names = {site: [f"blocks.{layer}.{POINTS[site]}" for layer in range(n_layers)] for site in sites}
    donor = record(visual, source, [name for each in names.values() for name in each])
    before = judge(visual(base))
    effects = {}
    for site, of_layers in names.items():
        layers = []
        for name in of_layers:
            given, found = donor[name], []
            for place in _places(given, site, by_token):
                with visual.hooks(fwd_hooks=[(name, writing(given, place))]):
                    found.append((judge(visual(base)) - before).mean())
            layers.append(torch.stack(found).view(_units(given, site, by_token)))
        effects[site] = torch.stack(layers)
    after = judge(visual(source))
    return Patching(effects, before, after, by_token, "exact")


@renamed(score="toward")
@differentiable
def attribution_patching(
    model: HookedViT | HookedCLIP,
    base: ImageBatches,
    source: ImageBatches,
    toward: Toward,
    *,
    against: Text | None = None,
    sites: Sequence[Site] = get_args(Site),
    by_token: bool = False,
    check: int = 0,
) -> Patching:
    """`activation_patching`, estimated: one forward pass a run, and one backward pass, for all places at once.

    `check` measures how good the estimate is; so does `exact.correlation(estimate)`, with all exact runs.

    Args:
        model: a model, or its image tower.
        base: images that run with the patch; one batch, or batches one after the other.
        source: images whose activations are written in, image by image.
        toward: what images are scored by, as in `activation_patching`.
        against: a text or direction whose score is subtracted.
        sites: hook points of the blocks; "z" is patched head by head.
        by_token: whether each token is patched alone.
        check: places that are patched exactly too, a forward pass each; they stand in the result's `checks`, and
            `agreement` is their correlation with the estimates. Taken at equal steps down the order of the estimates'
            sizes, the largest and the smallest among them.

    Returns:
        The estimated change of the score at every place.

    Raises:
        ValueError: as `activation_patching`; a check with a stream of batches; or a check of one or two places, which
            correlate whatever they are.
    """
    if check < 0 or check in (1, 2):
        raise ValueError(
            f"expected a check of at least 3 places, or of 0 for none; received {check}; two places always correlate"
        )
    if check and not isinstance(base, Tensor):
        raise ValueError(f"expected one batch to check places in; received batches and check={check}")
    visual, score = tower(model), score_toward(model, toward, against)
    one = partial(_attribute, visual, score, _known(sites), by_token, check)
    return over_batches(one, base, source)


@differentiable
def _attribute(
    visual: HookedViT,
    judge: ImageScore,
    sites: Sequence[Site],
    by_token: bool,
    check: int,
    base: Tensor,
    source: Tensor,
) -> Patching:
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
            before = judge(visual(images))
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
            checks.append((site, place, float((judge(visual(base)) - before).mean())))
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


def writing(given: Tensor, place: tuple[Any, ...]) -> Callable[[Tensor, Any], Tensor]:
    """A hook that writes another run's activation at one place, `(image, token)` or `(image, token, head)`."""

    def write(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[place] = given[place]
        return x

    return write


def _places(given: Tensor, site: str, by_token: bool) -> Iterator[tuple[Any, ...]]:
    everything = slice(None)
    tokens: list[Any] = list(range(given.shape[1])) if by_token else [everything]
    units: list[Any] = list(range(given.shape[2])) if site == "z" else [everything]
    yield from ((everything, token, unit) for unit in units for token in tokens)


def _units(given: Tensor, site: str, by_token: bool) -> tuple[int, ...]:
    return (*([given.shape[2]] if site == "z" else []), *([given.shape[1]] if by_token else []))


Runs = TypeVar("Runs", bound=TwoRuns)


def over_batches(patch: Callable[[Tensor, Tensor], Runs], base: ImageBatches, source: ImageBatches) -> Runs:
    """The results of one batch, or of several one after the other, as one.

    Raises:
        ValueError: there are no batches, not as many of the source, or not as many source as base images.
    """
    if isinstance(base, Tensor) != isinstance(source, Tensor):
        raise ValueError(
            "expected base and source both as one batch or both as batches; received batches and a tensor"
        )
    pairs: Any = [(base, source)] if isinstance(base, Tensor) else zip(base, source, strict=True)
    found = None
    for ours, theirs in pairs:
        for name, images in (("base", ours), ("source", theirs)):
            if not isinstance(images, Tensor) or images.ndim != 4:
                form = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
                raise ValueError(f"expected {name} as batches of images [batch, 3, h, w]; received {form}")
        if len(ours) != len(theirs) or not len(ours):
            raise ValueError(
                f"expected a source image for each base image, and at least one; received {len(ours)} base and "
                f"{len(theirs)} source images; pair them first"
            )
        result = patch(ours, theirs)
        found = result if found is None else found.merge(result)
    if found is None:
        raise ValueError("expected at least one batch of images; received none; check the image source")
    return found


def _known(sites: Sequence[Site]) -> Sequence[Site]:
    for site in sites or ("none",):
        check_choice("sites", site, Site)
    return sites


def record(visual: HookedViT, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Activations of one run, with their graph where gradients are on; a hook in the last block sees all tokens."""
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        kept[hook.name] = x

    with visual.hooks(fwd_hooks=[(name, keep) for name in names]):
        visual(images)
    return kept
