"""Direct beside causal effects: a component's own term, and all that reads it (docs/method.md, section 2).

The paper edits terms alone, and names that as its first limitation. Here every component is edited both ways:

    direct      score of the features with the component's term edited
    causal      score of a forward pass in which the component is edited, and later layers see it
    difference  causal - direct: what later layers make of the edit, the last LayerNorm's new scale included

Path patching (Goldowsky-Dill et al., 2023; Wang et al., 2023): what one head sends to one later component, all other ways
held fixed. The message is what the sender's contribution to the stream changes by, from the base run to the source run. It is
added to the receiver's input alone. The receiver's new output is written into the base run, and later layers see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.api import check_choice, renamed
from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import Components, Part, everything, heads, mlps, resolve
from decompclip.decomposition.maps import Convention
from decompclip.intervals import half_width
from decompclip.operators.inputs import TextFeatures
from decompclip.operators.intervention import Intervention
from decompclip.operators.parts import KIND_NAMES, ByPart, parts_of
from decompclip.operators.patching import ImageBatches, TwoRuns, over_batches, record, writing
from decompclip.operators.scores import (
    Classes,
    ClassScore,
    ImageScore,
    Metric,
    Text,
    Toward,
    class_score,
    direction,
    score_toward,
)
from decompclip.tower.config import ViTConfig
from decompclip.tower.vit import HookedViT, tower

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP


Mode = Literal["direct", "causal", "difference"]


@dataclass(frozen=True, eq=False, repr=False)
class Effects(ByPart):
    """Mean change of a score when each component is edited, both ways.

    Attributes:
        parts: the components edited, each alone.
        direct, causal: edited minus as it is, mean over images.
        direct_error, causal_error, difference_error: half-widths of 95 % intervals over images; nan for one image.
        baseline: the score as it is.
        metric: "logit", "logit_difference", "accuracy", or "score".
        intervention: what was done, in words, of the first part.
        n_images: behind the means.
    """

    parts: tuple[Part, ...]
    direct: Float[Tensor, " part"]
    causal: Float[Tensor, " part"]
    direct_error: Float[Tensor, " part"]
    causal_error: Float[Tensor, " part"]
    difference_error: Float[Tensor, " part"]
    baseline: float
    metric: Metric | Literal["score"]
    intervention: str
    n_images: int
    n_layers: int
    n_heads: int

    largest = "causal"

    @property
    def difference(self) -> Float[Tensor, " part"]:
        """Causal minus direct: the indirect effect."""
        return self.causal - self.direct

    @property
    def correlation(self) -> float:
        """Pearson's, of direct and causal effects over the parts; nan for one part, or where either is the same for all."""
        if len(self.parts) < 2:
            return float("nan")
        return float(torch.corrcoef(torch.stack([self.direct, self.causal]))[0, 1])

    def heads(self, mode: Mode = "difference") -> Float[Tensor, "layer head"]:
        """Effects of single heads; nan where not measured.

        Raises:
            ValueError: an unknown mode.
        """
        return self._grid(self._mode(mode))[0]

    def mlps(self, mode: Mode = "difference") -> Float[Tensor, " layer"]:
        """Effects of the MLPs; nan where not measured.

        Raises:
            ValueError: an unknown mode.
        """
        return self._grid(self._mode(mode))[1]

    def _mode(self, mode: Mode) -> Tensor:
        check_choice("mode", mode, Mode)
        return getattr(self, mode)

    def __getitem__(self, part: Part | str) -> dict[Mode, float]:
        """The effects of one part, by its name: `effects["heads[5, 2]"]["causal"]`.

        Raises:
            KeyError: it was not measured.
        """
        i = self._at(part)
        return {mode: float(self._mode(mode)[i]) for mode in get_args(Mode)}

    def to_frame(self) -> pd.DataFrame:
        """One row a part."""
        columns = {}
        for mode in get_args(Mode):
            columns |= {mode: self._mode(mode), f"{mode}_error": getattr(self, f"{mode}_error")}
        return self._frame(**columns)

    def figure(self, *, mode: Mode | None = None) -> go.Figure:
        """Causal over direct, one marker a part; with a mode, its heat map, layers by heads."""
        what = self.metric.replace("_", " ")
        if mode is None:
            from decompclip.figures.scatter import Effect, effect_scatter

            names, kinds = [str(part) for part in self.parts], [KIND_NAMES[part.kind] for part in self.parts]
            found = Effect(names, kinds, self.direct, self.causal, self.direct_error, self.causal_error)
            return effect_scatter(
                found, x=f"direct effect on the {what}", y="causal effect", equal="causal = direct"
            )
        from decompclip.figures.heatmaps import component_map

        shown = [x.abs().nan_to_num().max() for m in get_args(Mode) for x in (self.heads(m), self.mlps(m))]
        return component_map(
            self.heads(mode),
            self.mlps(mode),
            unit=f"{mode}{'' if mode == 'difference' else ' effect'} ({what})",
            scale="diverging",
            top=float(max(shown)),  # of all three, which are to be compared
        )

    def __repr__(self) -> str:
        n = len(self.parts)
        what = (
            f"{n} part{'s' if n > 1 else ''} on the {self.metric.replace('_', ' ')}, {self.n_images} images"
        )
        if n == 1:
            return f"Effects({what}; direct {float(self.direct[0]):.4g}, causal {float(self.causal[0]):.4g})"
        return f"Effects({what}; correlation of direct and causal {self.correlation:.2f})"


@renamed(classifier="toward")
@torch.no_grad()
def direct_and_causal(
    model: HookedViT | HookedCLIP,
    images: Float[Tensor, "batch 3 h w"] | Iterable[Float[Tensor, "_ 3 h w"]],
    intervene: Callable[[Components], Intervention],
    toward: Toward | TextFeatures | Float[Tensor, "class d_embed"],
    target: Classes | None = None,
    *,
    metric: Metric = "logit_difference",
    against: Classes | Text | None = None,
    components: Components = heads | mlps,
    convention: Convention = "centred",
    normalize: bool = False,
) -> Effects:
    """Edit every component alone, directly and causally, and score both. One forward pass a component and batch.

        direct_and_causal(model, images, edit, "a star", against="a ring")
        direct_and_causal(model, images, edit, classifier, target, metric="accuracy")

    Args:
        model: a model, or its image tower.
        images: a batch as the tower takes it, or batches one after the other.
        intervene: the edit of some components, for instance `lambda parts: MeanAblate(parts, moments)`.
        toward: what features are scored by: a text, a direction `[d_embed]` with which they are multiplied, or a function
            of them. With `target`, the text features of all classes, or `encode_texts` of them.
        target: the class scored (`ClassScore`): one for all images, or one for each.
        metric: of a target: "logit", "logit_difference" or "accuracy".
        against: of a target, the other class of the logit difference (by default the mean of all others); else a text or
            direction, whose score is subtracted.
        components: which; by default all heads and all MLPs.
        convention: of the terms that the direct edit acts on, as `decompose` has it (and moments were fitted with).
        normalize: whether those terms, and all features, are divided by the length of the unedited feature.

    Returns:
        The effects, one of each kind a component.

    Raises:
        IndexError: a component, or a class, that there is not.
        TypeError: `intervene` returns no intervention.
        ValueError: as `ClassScore`; `against` beside a function; no images; or an intervention that does not fit the model.
    """
    visual, score = tower(model), _score(model, toward, target, metric, against)
    parts: tuple[Part, ...] = ()
    scores: list[Tensor] = []
    words, start = "", 0
    for given in [images] if isinstance(images, Tensor) else images:
        batch = given.to(visual.device, visual.dtype)
        d = decompose(visual, batch, convention=convention, normalize=normalize)
        parts = parts or parts_of(components, d)
        edits = [_intervention(intervene, part) for part in parts]
        words = words or repr(edits[0])
        rows = slice(start, start := start + len(batch))
        scale = 1 / visual(batch).norm(dim=-1, keepdim=True) if normalize else 1.0
        scores.append(
            torch.stack(
                [
                    score(d.features, rows),
                    *(score(edit(d).features, rows) for edit in edits),
                    *(score(_causal(visual, batch, edit) * scale, rows) for edit in edits),
                ]
            )
        )
    if not start:
        raise ValueError("expected at least one image; received none; check the image source")
    if isinstance(score, ClassScore):
        score.check(start)
    plain, direct, causal = torch.cat(scores, dim=1).split([1, len(parts), len(parts)])
    return Effects(
        parts=parts,
        direct=(direct - plain).mean(1),
        causal=(causal - plain).mean(1),
        direct_error=half_width((direct - plain).T),
        causal_error=half_width((causal - plain).T),
        difference_error=half_width((causal - direct).T),
        baseline=float(plain.mean()),
        metric=score.metric if isinstance(score, ClassScore) else "score",
        intervention=words,
        n_images=start,
        n_layers=visual.cfg.n_layers,
        n_heads=visual.cfg.n_heads,
    )


def _score(
    model: HookedViT | HookedCLIP, toward: Any, target: Any, metric: Metric, against: Any
) -> Callable[[Tensor, slice], Tensor]:
    """A function of features, and of the numbers of their images."""
    if target is not None:
        return class_score(toward, target, metric, against)
    if callable(toward):
        function: Any = score_toward(model, cast(ImageScore, toward), against)
        if isinstance(function, ClassScore):
            return function
        return lambda features, rows: function(features).double().cpu()
    along = direction(model, toward, against).double()
    return lambda features, rows: (features.double() @ along.to(features.device)).cpu()


def _intervention(intervene: Callable[[Components], Intervention], part: Part) -> Intervention:
    edit = intervene(part)
    if not isinstance(edit, Intervention):
        raise TypeError(
            f"expected intervene to return an intervention; received {edit!r} for {part}; e.g. "
            "lambda parts: MeanAblate(parts, moments)"
        )
    return edit


def _causal(visual: HookedViT, images: Tensor, edit: Intervention) -> Float[Tensor, "batch d_embed"]:
    with visual.hooks(fwd_hooks=edit.fwd_hooks(visual)):
        return visual(images)


@dataclass(frozen=True, eq=False, repr=False)
class PathPatching(TwoRuns):
    """Effects of a head through each later component.

    Attributes:
        sender: the head, as an expression.
        heads, mlps: the mean change of the score by receiver; nan for those that are not later, or not asked for.
        base, source: the scores of the two runs as they are.
    """

    sender: Components
    heads: Float[Tensor, "layer head"]
    mlps: Float[Tensor, " layer"]
    base: Float[Tensor, " batch"]
    source: Float[Tensor, " batch"]

    largest = "effect"

    def merge(self, other: PathPatching) -> PathPatching:
        """The effects over the images of both.

        Raises:
            ValueError: the two are of different senders.
        """
        if self.sender != other.sender:
            raise ValueError(f"expected paths of one sender; received {self.sender!r} and {other.sender!r}")
        base, source, weight = self._with(other)
        of_heads, of_mlps = self.heads.lerp(other.heads, weight), self.mlps.lerp(other.mlps, weight)
        return PathPatching(self.sender, of_heads, of_mlps, base, source)

    def to_frame(self) -> pd.DataFrame:
        """One row a receiver: layer, head (none for an MLP), effect, share of the gap."""
        import pandas as pd

        rows: list[tuple[int, int | None, float]] = [
            (int(layer), int(head), float(self.heads[layer, head]))
            for layer, head in (~self.heads.isnan()).nonzero()
        ]
        rows += [(int(layer), None, float(self.mlps[layer])) for layer in (~self.mlps.isnan()).nonzero()]
        frame = pd.DataFrame(rows, columns=["layer", "head", "effect"]).astype({"head": "Int64"})
        return frame.assign(share=frame["effect"] / self.gap)

    def figure(self) -> go.Figure:
        """A map of the receivers."""
        from decompclip.figures.heatmaps import component_map

        title = f"message of {self.sender!r} to each of them"
        return component_map(
            self.heads, self.mlps, unit="change of the score", scale="diverging", title=title
        )

    def __repr__(self) -> str:
        receivers = int((~self.heads.isnan()).sum() + (~self.mlps.isnan()).sum())
        return f"PathPatching({self.sender!r} to {receivers} receivers, {len(self.base)} images)"


@renamed(score="toward")
def path_patching(
    model: HookedViT | HookedCLIP,
    base: ImageBatches,
    source: ImageBatches,
    toward: Toward,
    sender: Part,
    *,
    against: Text | None = None,
    receivers: Components = everything,
) -> PathPatching:
    """The effect of one head through each later head and MLP, its own layer's MLP among them.

    Args:
        model: a model, or its image tower.
        base: images that run with the patch; one batch, or batches one after the other.
        source: images whose activations are written in, image by image.
        toward: what images are scored by, as in `activation_patching`.
        sender: one head, such as `heads[3, 1]`.
        against: a text or direction whose score is subtracted.
        receivers: of which those later than the sender are looked at.

    Returns:
        The mean change of the score by receiver.

    Raises:
        ValueError: the sender is not one head, or as `activation_patching`.
        IndexError: a layer or head that the tower does not have.
    """
    visual, score = tower(model), score_toward(model, toward, against)
    return over_batches(partial(_patch_paths, visual, score, sender, receivers), base, source)


@torch.no_grad()
def _patch_paths(
    visual: HookedViT, judge: ImageScore, sender: Part, receivers: Components, base: Tensor, source: Tensor
) -> PathPatching:
    cfg = visual.cfg
    layer, head = _one_head(sender, cfg)
    mask = resolve(receivers, cfg)
    z_name, out_name = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_attn_out"
    donor = record(visual, source, [z_name])[z_name]
    of_base = record(visual, base, [out_name])[out_name]
    before, after = judge(visual(base)), judge(visual(source))
    with visual.hooks(fwd_hooks=[(z_name, writing(donor, (slice(None), slice(None), head)))]):
        # What the sender changes in the stream, past the output projection and any LayerScale.
        message = record(visual, base, [out_name])[out_name] - of_base

    def answer(entry: str, name: str) -> Tensor:
        """What a block puts out at `name` when the message is added at `entry`; the rest is thrown away."""
        with visual.hooks(fwd_hooks=[(entry, lambda x, hook: x + message)]):
            return record(visual, base, [name])[name]

    def effect(name: str, given: Tensor, *place: Any) -> float:
        with visual.hooks(fwd_hooks=[(name, writing(given, place))]):
            return float((judge(visual(base)) - before).mean())

    of_heads = torch.full((cfg.n_layers, cfg.n_heads), torch.nan)
    of_mlps = torch.full((cfg.n_layers,), torch.nan)
    for later in range(layer, cfg.n_layers):
        if later > layer and mask.heads[later].any():
            name = f"blocks.{later}.attn.hook_z"
            given = answer(f"blocks.{later}.hook_resid_pre", name)
            for number in mask.heads[later].nonzero().flatten().tolist():
                of_heads[later, number] = effect(name, given, slice(None), slice(None), number)
        if mask.mlps[later]:
            name = f"blocks.{later}.hook_mlp_out"
            of_mlps[later] = effect(name, answer(f"blocks.{later}.hook_resid_mid", name), slice(None))
    return PathPatching(sender, of_heads, of_mlps, before, after)


def _one_head(sender: Components, cfg: ViTConfig) -> tuple[int, int]:
    places = resolve(sender, cfg).heads.nonzero().tolist()
    if len(places) != 1 or not isinstance(sender, Part) or sender.kind != "heads":
        raise ValueError(
            f"expected one head as the sender, such as heads[3, 1]; received {sender!r}; patch several one by one"
        )
    return places[0][0], places[0][1]
