"""Which converter a tower goes through, and the way there and back."""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping
from typing import Any, cast

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from decompclip.tower.config import UnsupportedTowerError, ViTConfig
from decompclip.tower.convert import eva, native, timm_vit
from decompclip.tower.convert.rules import SUPPORTED, Rule, refuse
from decompclip.tower.vit import HookedViT


def config_of(visual: nn.Module) -> ViTConfig:
    """The configuration of a tower, read from its modules and not from its name.

    Raises:
        UnsupportedTowerError: it is none of open_clip's transformer towers.
    """
    return _family(visual).config_of(visual)


def convert_open_clip(visual: nn.Module, *, copy: bool = True) -> HookedViT:
    """A `HookedViT` that computes what `visual` computes in evaluation mode.

    Args:
        visual: open_clip's image tower (`model.visual`).
        copy: own the weights; `False` shares them with `visual` where their shapes are the same, for callers
            who drop it.

    Raises:
        UnsupportedTowerError: any other tower.
    """
    return Source(visual, copy=copy).adopt()


class Source:
    """A source tower, emptied of weights: how its weights become a `HookedViT`, and the way back."""

    def __init__(self, visual: nn.Module, *, copy: bool = True) -> None:
        config, rules = config_of(visual), _family(visual).rules_of(visual)
        self.rules: list[Rule] = rules
        self.skeleton = _skeleton(visual)
        state = visual.state_dict(keep_vars=True)
        self.dtypes = {name: x.dtype for name, x in state.items()}
        # open_clip keeps norms of half models in fp32; a HookedViT has one type, that of its matrices.
        self.dtype = next(x.dtype for x in state.values() if x.ndim > 1 and x.is_floating_point())
        if any(x.is_floating_point() and x.dtype != self.dtype for x in state.values()):
            copy = True
            trainable = {name: x.requires_grad for name, x in state.items()}
            state = {n: x.to(self.dtype) if x.is_floating_point() else x for n, x in state.items()}
            state = {n: x.detach().requires_grad_(trainable[n]) for n, x in state.items()}
        unknown = set(state) - {name for rule in rules for name in rule.names}
        if unknown:
            raise UnsupportedTowerError(
                f"the image tower has weights of unknown use: {', '.join(sorted(unknown)[:4])}. Supported: {SUPPORTED}"
            )
        self.shapes = {name: x.shape for name, x in state.items()}
        # On "meta" there is no memory and no random draw for weights that are replaced.
        stem = visual.get_submodule("trunk.patch_embed") if config.stem == "conv" else None
        with torch.device("meta"):
            tower = HookedViT(config, None if stem is None else copying.deepcopy(_skeleton(stem)))
        _adopt_positions(tower, visual)
        ours = {name: x.shape for name, x in tower.state_dict().items() if name != "rope"}
        weights = {name: x for rule in rules for name, x in rule.forward(state, ours).items()}
        trained = {
            name: all(state[theirs].requires_grad for theirs in rule.names)
            for rule in rules
            for name in rule.ours
        }
        if tower.rope is not None:
            weights["rope"] = eva.rope_of(cast(TimmModel, visual))
        parameters = dict(tower.named_parameters())
        for (
            name,
            parameter,
        ) in parameters.items():  # whose flag `load_state_dict` gives to what it is assigned
            parameter.requires_grad_(trained.get(name, False))
        tower.load_state_dict(
            {
                name: _owned(x, copy, name in parameters, trained.get(name, False), state)
                for name, x in weights.items()
            },
            strict=True,
            assign=True,
        )
        self._tower: HookedViT | None = tower.eval()

    def adopt(self) -> HookedViT:
        """The converted tower; handed out once, so that it is not kept alive here."""
        tower, self._tower = self._tower, None
        assert tower is not None, "the tower was handed out before"
        return tower

    def filled(self, tower: HookedViT) -> nn.Module:
        """A source tower of its own with the weights of `tower`.

        Raises:
            ValueError: `tower` was edited in a way that the source's architecture cannot hold.
        """
        ours = tower.state_dict()
        state = {name: x for rule in self.rules for name, x in rule.backward(ours, self.shapes).items()}
        trained = {name: p.requires_grad for name, p in tower.named_parameters()}
        visual: Any = copying.deepcopy(self.skeleton)
        own = tower.dtype == self.dtype  # the source's types, then, which may be several
        weights = {n: x.to(self.dtypes[n] if own else x.dtype, copy=True) for n, x in state.items()}
        visual.load_state_dict(weights, strict=True, assign=True)
        visual = visual.to(tower.device) if own else visual.to(tower.device, tower.dtype)
        parameters = dict(visual.named_parameters())
        for rule in self.rules:
            for name in parameters.keys() & set(rule.names):
                parameters[name].requires_grad_(all(trained.get(n, False) for n in rule.ours))
        if "rope" in ours:  # computed once, kept in no file, and rounded where the tower was cast
            visual.trunk.rope.pos_embed = torch.cat(ours["rope"].unbind(0), dim=-1)
        return visual.eval()


def _owned(x: Tensor, copy: bool, parameter: bool, trained: bool, state: Mapping[str, Tensor]) -> Tensor:
    if not parameter:
        return x.clone() if copy else x
    if not copy:
        for theirs in state.values():
            if (
                theirs.data_ptr() == x.data_ptr()
                and theirs.shape == x.shape
                and isinstance(theirs, nn.Parameter)
            ):
                return theirs
    return nn.Parameter(x.clone() if copy else x, requires_grad=trained)


def _family(visual: nn.Module) -> Any:
    if isinstance(visual, VisionTransformer):
        return native
    if isinstance(visual, TimmModel):
        trunk = visual.trunk
        if isinstance(trunk, Eva):
            return eva
        if isinstance(trunk, TimmViT | VisionTransformerRelPos):
            return timm_vit
        foreign = "block" if hasattr(trunk, "blocks") else "conv"
        refuse(type(trunk).__name__, ["windows" if isinstance(trunk, SwinTransformer) else foreign])
    refuse(type(visual).__name__, ["resnet" if isinstance(visual, ModifiedResNet) else "foreign"])


def _skeleton(module: nn.Module) -> nn.Module:
    """The module without its weights; buffers, which may be computed once and kept in no file, stay."""
    weights = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return copying.deepcopy(module, weights)


def _adopt_positions(tower: HookedViT, visual: nn.Module) -> None:
    """Relative position biases are computed by the source's own modules."""
    if tower.cfg.relative_position:
        for layer, block in enumerate(tower.blocks):
            attention: Any = block.attn
            attention.rel_pos = _skeleton(visual.get_submodule(f"trunk.blocks.{layer}.attn.rel_pos"))
