"""open_clip's image towers into `HookedViT` and back: the same weights, the same features."""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decompclip.tower.config import UnsupportedTowerError
from decompclip.tower.families import SUPPORTED, config_of, rope_of, rules_of
from decompclip.tower.layers import blocks
from decompclip.tower.vit import HookedViT


def convert_open_clip(visual: nn.Module, *, copy: bool = True) -> HookedViT:
    """A `HookedViT` that computes what `visual` computes in evaluation mode.

    Args:
        visual: open_clip's image tower (`model.visual`).
        copy: own the weights; `False` shares them with `visual` where shapes and types are the same, for callers
            who drop it.

    Raises:
        UnsupportedTowerError: any other tower.
    """
    return Source(visual, copy=copy).adopt()


class Source:
    """A source tower, emptied of weights: how its weights become a `HookedViT`, and the way back.

    Args:
        visual: as `convert_open_clip` takes it.
        copy: as `convert_open_clip` takes it.
    """

    def __init__(self, visual: nn.Module, *, copy: bool = True) -> None:
        config, self.rules = config_of(visual), rules_of(visual)
        self.skeleton = _skeleton(visual)
        state = visual.state_dict(keep_vars=True)
        self.dtypes = {name: x.dtype for name, x in state.items()}
        # open_clip keeps norms and embeddings of half models in fp32; a HookedViT has one type, that of the patches' map.
        self.dtype = next(x.dtype for x in state.values() if x.ndim == 4)
        trainable = {name: x.requires_grad for name, x in state.items()}
        if any(x.is_floating_point() and x.dtype != self.dtype for x in state.values()):
            state = {n: x.to(self.dtype) if x.is_floating_point() else x for n, x in state.items()}
            state = {n: x.detach().requires_grad_(trainable[n]) for n, x in state.items()}
        unknown = set(state) - {name for rule in self.rules for name in rule.names}
        if unknown:
            raise UnsupportedTowerError(
                f"the image tower has weights of unknown use: {', '.join(sorted(unknown)[:4])}. Supported: {SUPPORTED}"
            )
        self.shapes = {name: x.shape for name, x in state.items()}
        # On "meta" there is no memory and no random draw for weights that are replaced.
        stem = visual.get_submodule("trunk.patch_embed") if config.stem == "conv" else None
        with torch.device("meta"):
            tower = HookedViT(config, None if stem is None else copying.deepcopy(_skeleton(stem)))
        if config.relative_position:  # biases are computed by the source's own modules
            for layer, block in enumerate(blocks(tower)):
                block.attn.rel_pos = _skeleton(visual.get_submodule(f"trunk.blocks.{layer}.attn.rel_pos"))
        ours = {name: x.shape for name, x in tower.state_dict().items() if name != "rope"}
        weights = {name: x for rule in self.rules for name, x in rule.forward(state, ours).items()}
        trained = {name: all(trainable[n] for n in rule.names) for rule in self.rules for name in rule.ours}
        if tower.rope is not None:
            weights["rope"] = rope_of(visual)
        # `load_state_dict` makes parameters of what it is assigned, with the flags of those before.
        for name, parameter in tower.named_parameters():
            parameter.requires_grad_(trained[name])
        weights = {name: x.clone() if copy else _shared(x, state) for name, x in weights.items()}
        tower.load_state_dict(weights, strict=True, assign=True)
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
                parameters[name].requires_grad_(all(trained[n] for n in rule.ours))
        if "rope" in ours:  # computed once, kept in no file, and rounded where the tower was cast
            visual.trunk.rope.pos_embed = torch.cat(ours["rope"].unbind(0), dim=-1)
        return visual.eval()


def _shared(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The source's own of these numbers where it has one of their shape, else the numbers."""
    return next((own for own in state.values() if (own.data_ptr(), own.shape) == (x.data_ptr(), x.shape)), x)


def _skeleton(module: nn.Module) -> nn.Module:
    """The module without its weights; buffers, which may be computed once and kept in no file, stay."""
    weights = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return copying.deepcopy(module, weights)
