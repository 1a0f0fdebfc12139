"""What is done for a user who says nothing: a change of it changes numbers, so that it is made on purpose."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import Any

import pytest
import torch

from decompclip.decomposition.capture import decompose, decompose_pool
from decompclip.decomposition.components import Components, Joined, Part, everything, heads, mlps, resolve
from decompclip.decomposition.maps import TermMaps
from decompclip.decomposition.moments import Moments, check_finite
from decompclip.decomposition.store import Store
from decompclip.defenses.agnostic import AgnosticDet, AgnosticRep
from decompclip.defenses.decomp import DecompDet, DecompRep
from decompclip.defenses.distances import ComponentDistances
from decompclip.defenses.guard import AtRandom, Guard
from decompclip.defenses.selector import Selector
from decompclip.evaluation.metrics import GroupAccuracy
from decompclip.models.clip import HookedCLIP
from decompclip.models.zero_shot import zero_shot_classifier
from decompclip.operators.attention import attention_maps, contribution_maps, rollout
from decompclip.operators.attribution import Attribution, attribute
from decompclip.operators.checkpoints import CheckpointDifference, MovedClasses, compare_checkpoints
from decompclip.operators.effects import direct_and_causal
from decompclip.operators.extract import extract
from decompclip.operators.features import Splice, feature_terms, top_images
from decompclip.operators.lens import LogitLens, logit_lens
from decompclip.operators.mask_scores import Segmentation
from decompclip.operators.mmd import MMD, head_mmd, layer_mmd
from decompclip.operators.naming import agreement
from decompclip.operators.neurons import mean_neurons, neuron_terms
from decompclip.operators.noise import RandomAblate
from decompclip.operators.patching import Patching, activation_patching, attribution_patching
from decompclip.operators.probes import probe
from decompclip.operators.retrieval import PropertyHeads, heads_for, nearest
from decompclip.operators.roles import role_change
from decompclip.operators.second_order import SecondOrder, second_order
from decompclip.operators.sweep_results import Sweep
from decompclip.operators.sweeps import ablation_sweep, most_damaging
from decompclip.operators.textspan import fit_textspans, textspan, textspans
from decompclip.operators.textspan_result import TextSpans
from decompclip.operators.transplant import ResampleAblate, decomp_reverse
from decompclip.operators.weights import weight_directions
from decompclip.tower.cache import ViTCache
from decompclip.tower.config import ViTConfig
from decompclip.tower.convert import convert_open_clip

BOTH = heads | mlps
SPANS = {"n_texts": 20, "centred": False, "rank": "auto", "tolerance": None}

# A tower's: what its variant has is said by its name.
PLAIN = dict.fromkeys(("gated", "mlp_norm", "mlp_norm_in", "attn_norm", "layer_scale", "patch_bias"), False)
PLAIN |= dict.fromkeys(("relative_position", "pool_norm", "proj_bias"), False)
SHAPE = {"ln_eps": 1e-5, "ln_pre": True, "n_prefix": 1, "pos": True, "projection": True, "pool_prefix": True}
SHAPE |= {"pool_heads": 0, "pool_queries": 1, "d_pool": 0, "pool_mlp": 0}

LABELLED = {"apply_ln": False, "mlp_input": False, "return_labels": False}

DEFAULTS: list[tuple[Any, dict[str, Any]]] = [
    (ViTConfig, PLAIN | SHAPE),
    (decompose, {"normalize": False, "convention": "centred"}),
    (decompose_pool, {"normalize": False, "tokens": False}),
    (resolve, {"neurons": False, "features": 0}),
    *((kind.resolve, {"pool": False, "d_mlp": 0, "d_sae": 0}) for kind in (Components, Part, Joined)),
    (TermMaps, {"extras": 0}),
    (Store, {"check": True}),
    (check_finite, {"first": 0}),
    (Moments.fit, {"normalize": False, "second": True, "stream": True}),
    (Moments.of, {"second": True}),
    (ViTCache.accumulated_resid, LABELLED | {"incl_mid": False}),
    (ViTCache.decompose_resid, LABELLED | {"incl_embeds": True}),
    (
        ViTCache.stack_head_results,
        {"layer": -1, "return_labels": False, "incl_remainder": False, "apply_ln": False},
    ),
    (ViTCache.stack_neuron_results, LABELLED | {"layer": -1, "incl_remainder": False}),
    (ViTCache.get_full_resid_decomposition, LABELLED | {"expand_neurons": True}),
    (ViTCache.logit_attrs, {"has_batch_dim": True}),
    (ViTCache, {"has_batch_dim": True}),
    (ViTCache.apply_ln_to_stack, {"mlp_input": False, "has_batch_dim": True, "recompute_ln": False}),
    (HookedCLIP.from_open_clip, {"copy": True}),
    (convert_open_clip, {"copy": True}),
    (HookedCLIP.encode_image, {"normalize": False}),
    (HookedCLIP.encode_text, {"normalize": False}),
    (HookedCLIP.decompose, {"normalize": False}),
    (HookedCLIP.decompose_pool, {"normalize": False, "tokens": False}),
    (zero_shot_classifier, {"allow_duplicates": False}),
    *((method, {"draws": 2000, "seed": 0}) for method in (GroupAccuracy.interval, GroupAccuracy.gain)),
    (attention_maps, {"components": heads, "pictures": True}),
    (contribution_maps, {"components": heads, "normalize": True, "pictures": True}),
    (rollout, {"residual": 0.5, "fuse": "mean", "pictures": True}),
    (attribute, {"components": everything, "tokens": False}),
    (Attribution.top, {"k": 10}),
    (Attribution.to_frame, {"images": False}),
    *((method, {"text": 0}) for method in (Attribution.heads, Attribution.mlps, Attribution.figure)),
    (extract, {"normalize": False, "moments_only": False}),
    (Splice, {"error": True}),
    (feature_terms, {"normalize": False}),
    (top_images, {"k": 8}),
    (logit_lens, {"patches": True, "normalize": True}),
    (LogitLens.maps, {"text": 0}),
    (nearest, {"k": 8, "centred": False}),
    (heads_for, {"components": heads}),
    *((kind.top, {"k": 10}) for kind in (PropertyHeads, SecondOrder, MovedClasses, CheckpointDifference)),
    (second_order, {"n_texts": 5, "normalize": False}),
    (weight_directions, {"components": BOTH, "n_directions": 3, "n_texts": 5}),
    (compare_checkpoints, {"n_directions": 1, "n_texts": 5}),
    *((method, {"draws": 2000, "seed": 0}) for method in (Segmentation.intervals, Segmentation.difference)),
    (Patching.figure, {"shares": True}),
    (TextSpans.figure, {"n_texts": 3}),
    (direct_and_causal, {"components": BOTH, "normalize": False}),
    (head_mmd, {"components": BOTH, "kernel": "unbiased", "paired": False, "seed": 0}),
    (layer_mmd, {"kernel": "unbiased", "paired": False, "seed": 0}),
    (MMD.significant, {"rate": 0.05}),
    (agreement, {"least": 0.2}),
    (neuron_terms, {"normalize": False}),
    (mean_neurons, {"normalize": False}),
    (RandomAblate, {"scale": "matched", "seed": 0, "rows": "all"}),
    (ResampleAblate, {"seed": 0, "rows": "all"}),
    (decomp_reverse, {"components": heads}),
    (activation_patching, {"by_token": False}),
    (attribution_patching, {"by_token": False, "check": 0}),
    (probe, {"components": heads, "held_out": 0.3, "seed": 0}),
    (role_change, {"draws": 1000, "seed": 0}),
    (ablation_sweep, {"each_head": False, "entry": False}),
    (Sweep, {"entry": False}),
    (most_damaging, {"candidates": BOTH, "size": 5}),
    (textspan, SPANS),
    (textspans, SPANS | {"components": BOTH}),
    (fit_textspans, SPANS | {"components": BOTH}),
    (AgnosticDet, {"folds": 5, "seed": 0}),
    (AgnosticRep, {"budget": 0.01, "folds": 5, "seed": 0}),
    (AgnosticDet.predict, {"fpr": 0.05}),
    (ComponentDistances, {"folds": 5, "seed": 0}),
    (ComponentDistances.flags, {"fpr": 0.01}),
    (DecompRep, {"seed": 0, "mlps": 0}),
    (DecompDet, {"zeta": 5}),
    (DecompRep.paper, {"epsilon": 0.002}),
    (DecompDet.paper, {"epsilon": 0.002}),
    (Guard.encode_image, {"normalize": False}),
    (Guard.check, {"normalize": False}),
    (AtRandom, {"seed": 0}),
    (Selector, {"epsilon": 0.002, "quantile": 0.05, "components": heads[-1]}),
    (Selector.fit, {"deviations": False}),
]

CONSTANTS: dict[str, dict[str, Any]] = {
    "decomposition.store": {"VERSION": 1, "NO_CLASS": -1},
    "defenses.bake": {"SAME": 1e-6},
    "defenses.distances": {"PSEUDO_COUNT": 5.0, "MAX_DIRECTIONS": 32, "RIDGE": 3e-3, "CALIBRATION": 5000},
    "evaluation.metrics": {"ENOUGH": 20},
    "operators.attribution": {"SHOWN": 20},
    "operators.checkpoints": {"CLASSES": 3, "STILL": 1e-6, "SHOWN": 20},
    "operators.extract": {"SHARD_SIZE": 1024, "EVERY": 30.0},
    "operators.features": {"PICTURED": 32},
    "operators.inputs": {"N_IMAGES": 1024, "SEED": 20_240_507, "UNIT": 1e-3},
    "operators.lens": {"LINES": 6},
    "operators.mask_scores": {"MAX_ROWS": 24},
    "operators.mmd": {"FIRST": 999, "ENOUGH": 100, "MEDIAN_OF": 1000},
    "operators.neurons": {"SHOWN": 30},
    "operators.probes": {"COPY": 1e-5},
    "operators.retrieval": {"ALIKE": 1e-6},
    "operators.roles": {"EXACT": 1e-6, "CHANCE_DRAWS": 200},
    "operators.second_order": {"SHOWN": 30, "ROUNDING": 8},
    "operators.textspan": {"TIE": 1e-9, "FLOOR": 1e-13, "PAPER_RANK": 80},
    "operators.transplant": {"SAME": {torch.float16: 2e-2, torch.bfloat16: 5e-2}},
    "operators.weights": {"COHERENCE": 0.3, "ALIKE": 5},
}
"""Bounds, bootstraps, files' marks, and how much a figure shows."""


@pytest.mark.parametrize(("function", "expected"), DEFAULTS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_who_says_nothing_gets_what_is_documented(function: Any, expected: dict[str, Any]) -> None:
    parameters = signature(function).parameters
    for name, value in expected.items():
        found = parameters[name].default
        assert found == value and isinstance(found, Components) == isinstance(value, Components), name


@pytest.mark.parametrize(("module", "expected"), CONSTANTS.items())
def test_constants_are_what_is_documented(module: str, expected: dict[str, Any]) -> None:
    found = import_module(f"decompclip.{module}")
    assert {name: getattr(found, name) for name in expected} == expected
