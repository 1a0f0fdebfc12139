"""Take a CLIP's image feature apart into heads and MLPs, and audit it for backdoors.

Every public name is listed here and imported when it is first used, so that `import decompclip` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decompclip.attacks.badclip import BadCLIP
    from decompclip.attacks.badclip_optimise import optimise_patch
    from decompclip.attacks.badnet import BadNet
    from decompclip.attacks.blended import Blended
    from decompclip.attacks.bundled import Backdoor, backdoor
    from decompclip.attacks.crossing import crossing
    from decompclip.attacks.issba import ISSBA
    from decompclip.attacks.kitty import Kitty
    from decompclip.attacks.label_consistent import LabelConsistent
    from decompclip.attacks.poison_record import PoisonRecord
    from decompclip.attacks.poisoned import PoisonedPairs
    from decompclip.attacks.preview import preview
    from decompclip.attacks.reflection import Reflection
    from decompclip.attacks.sig import SIG
    from decompclip.attacks.trigger import Trigger
    from decompclip.attacks.wanet import WaNet
    from decompclip.audit import AuditConfig, AuditResult, run_audit
    from decompclip.audit.diagnose import diagnose
    from decompclip.audit.diagnosis import Diagnosis
    from decompclip.audit.scan import ScanConfig, ScanResult, run_scan
    from decompclip.cache.activations import ViTCache
    from decompclip.cache.components import Components, embed, everything, heads, layers, mlps, neurons, pool
    from decompclip.cache.decomposition import Decomposition
    from decompclip.cache.moments import Moments
    from decompclip.data.cifar10 import cifar10
    from decompclip.data.datasets import DatasetPairs, folder_pairs
    from decompclip.data.images import FolderSource, ShapesSource
    from decompclip.data.pairs import Pairs
    from decompclip.data.pixels import to_pixels
    from decompclip.data.shapes import PROPERTIES, Shapes
    from decompclip.data.shapes_pairs import ShapesPairs
    from decompclip.data.shards import ShardPairs
    from decompclip.data.streams import PairStream
    from decompclip.data.tables import CsvPairs
    from decompclip.data.texts import load_texts
    from decompclip.defenses.agnostic_det import AgnosticDet
    from decompclip.defenses.agnostic_rep import AgnosticRep
    from decompclip.defenses.bake import bake, even
    from decompclip.defenses.clean_finetuning import PAR, CleanCLIP, CleanFineTuning
    from decompclip.defenses.component_distances import ComponentDistances
    from decompclip.defenses.decomp_det import DecompDet
    from decompclip.defenses.decomp_rep import DecompRep
    from decompclip.defenses.detectors import DETECTORS
    from decompclip.defenses.detectors.detector import Detector
    from decompclip.defenses.guard import Guard
    from decompclip.defenses.guard_files import load_guard, save_guard
    from decompclip.evaluation.evaluate import evaluate
    from decompclip.evaluation.intervals import Rate
    from decompclip.evaluation.metrics import attack_report, auroc
    from decompclip.models.clip import HookedCLIP
    from decompclip.models.config import ViTConfig
    from decompclip.models.loading import load
    from decompclip.models.saving import save_model
    from decompclip.models.vit import HookedViT
    from decompclip.models.zoo import bundled
    from decompclip.operators.ablation import MeanAblate, ZeroAblate
    from decompclip.operators.attention import attention_maps, contribution_maps
    from decompclip.operators.attribution import attribution_patching
    from decompclip.operators.effects import direct_and_causal
    from decompclip.operators.greedy import most_damaging
    from decompclip.operators.intervention import Intervention
    from decompclip.operators.mask_scores import MaskScores, score_masks
    from decompclip.operators.mmd import head_mmd, layer_mmd
    from decompclip.operators.naming import agreement
    from decompclip.operators.neurons import AblateNeurons, mean_neurons, neuron_terms
    from decompclip.operators.noise import RandomAblate
    from decompclip.operators.patching import activation_patching
    from decompclip.operators.paths import path_patching
    from decompclip.operators.probes import Probes, probe
    from decompclip.operators.roles import role_change
    from decompclip.operators.rollout import rollout
    from decompclip.operators.splits import Evaluation, Validation
    from decompclip.operators.sweeps import ablation_sweep
    from decompclip.operators.textspan import fit_textspans, textspan, textspans
    from decompclip.operators.textspan_inputs import TextFeatures, encode_texts
    from decompclip.operators.textspan_result import TextSpan, TextSpans
    from decompclip.operators.token_maps import TokenMaps
    from decompclip.operators.tokens import AblateTokens
    from decompclip.operators.transplant import Patch, Repair, ResampleAblate, decomp_reverse
    from decompclip.report import write_report
    from decompclip.training.finetune import finetune
    from decompclip.training.monitor import Monitor
    from decompclip.training.recipes import RECIPES, FineTuning
    from decompclip.training.result import FineTuned

__version__ = "0.1.0"

_HOME = {
    "load": "defenses.guard_files",
    "bundled": "models.zoo",
    "HookedCLIP": "models.clip",
    "HookedViT": "models.vit",
    "ViTConfig": "models.config",
    "ViTCache": "cache.activations",
    "Decomposition": "cache.decomposition",
    "Components": "cache.components",
    "heads": "cache.components",
    "mlps": "cache.components",
    "layers": "cache.components",
    "neurons": "cache.components",
    "embed": "cache.components",
    "pool": "cache.components",
    "everything": "cache.components",
    "Moments": "cache.moments",
    "Validation": "operators.splits",
    "Evaluation": "operators.splits",
    "MeanAblate": "operators.ablation",
    "ZeroAblate": "operators.ablation",
    "RandomAblate": "operators.noise",
    "ResampleAblate": "operators.transplant",
    "Patch": "operators.transplant",
    "Repair": "operators.transplant",
    "decomp_reverse": "operators.transplant",
    "AblateNeurons": "operators.neurons",
    "neuron_terms": "operators.neurons",
    "mean_neurons": "operators.neurons",
    "AblateTokens": "operators.tokens",
    "ablation_sweep": "operators.sweeps",
    "most_damaging": "operators.greedy",
    "activation_patching": "operators.patching",
    "path_patching": "operators.paths",
    "attribution_patching": "operators.attribution",
    "textspan": "operators.textspan",
    "textspans": "operators.textspan",
    "fit_textspans": "operators.textspan",
    "TextFeatures": "operators.textspan_inputs",
    "encode_texts": "operators.textspan_inputs",
    "TextSpan": "operators.textspan_result",
    "TextSpans": "operators.textspan_result",
    "load_texts": "data.texts",
    "head_mmd": "operators.mmd",
    "layer_mmd": "operators.mmd",
    "role_change": "operators.roles",
    "probe": "operators.probes",
    "Probes": "operators.probes",
    "agreement": "operators.naming",
    "direct_and_causal": "operators.effects",
    "attention_maps": "operators.attention",
    "contribution_maps": "operators.attention",
    "rollout": "operators.rollout",
    "TokenMaps": "operators.token_maps",
    "score_masks": "operators.mask_scores",
    "MaskScores": "operators.mask_scores",
    "DecompRep": "defenses.decomp_rep",
    "DecompDet": "defenses.decomp_det",
    "AgnosticDet": "defenses.agnostic_det",
    "AgnosticRep": "defenses.agnostic_rep",
    "ComponentDistances": "defenses.component_distances",
    "Guard": "defenses.guard",
    "save_guard": "defenses.guard_files",
    "load_guard": "defenses.guard_files",
    "bake": "defenses.bake",
    "even": "defenses.bake",
    "CleanCLIP": "defenses.clean_finetuning",
    "CleanFineTuning": "defenses.clean_finetuning",
    "PAR": "defenses.clean_finetuning",
    "DETECTORS": "defenses.detectors",
    "save_model": "models.saving",
    "BadNet": "attacks.badnet",
    "Blended": "attacks.blended",
    "LabelConsistent": "attacks.label_consistent",
    "ISSBA": "attacks.issba",
    "BadCLIP": "attacks.badclip",
    "optimise_patch": "attacks.badclip_optimise",
    "Kitty": "attacks.kitty",
    "Reflection": "attacks.reflection",
    "SIG": "attacks.sig",
    "WaNet": "attacks.wanet",
    "PoisonedPairs": "attacks.poisoned",
    "PoisonRecord": "attacks.poison_record",
    "crossing": "attacks.crossing",
    "preview": "attacks.preview",
    "Shapes": "data.shapes",
    "PROPERTIES": "data.shapes",
    "Pairs": "data.pairs",
    "ShapesPairs": "data.shapes_pairs",
    "ShardPairs": "data.shards",
    "CsvPairs": "data.tables",
    "DatasetPairs": "data.datasets",
    "folder_pairs": "data.datasets",
    "PairStream": "data.streams",
    "cifar10": "data.cifar10",
    "finetune": "training.finetune",
    "RECIPES": "training.recipes",
    "Monitor": "training.monitor",
    "FineTuned": "training.result",
    "evaluate": "evaluation.evaluate",
    "ShapesSource": "data.images",
    "FolderSource": "data.images",
    "diagnose": "audit.diagnose",
    "Diagnosis": "audit.diagnosis",
    "AuditConfig": "audit",
    "AuditResult": "audit",
    "run_audit": "audit",
    "run_scan": "audit.scan",
    "ScanConfig": "audit.scan",
    "ScanResult": "audit.scan",
    "write_report": "report",
    "Intervention": "operators.intervention",
    "Trigger": "attacks.trigger",
    "Detector": "defenses.detectors.detector",
    "FineTuning": "training.recipes",
    "Backdoor": "attacks.bundled",
    "backdoor": "attacks.bundled",
    "to_pixels": "data.pixels",
    "attack_report": "evaluation.metrics",
    "auroc": "evaluation.metrics",
    "Rate": "evaluation.intervals",
}

# fmt: off
__all__ = [  # noqa: RUF022 - in the order in which a user meets them
    "load", "bundled", "HookedCLIP", "HookedViT", "ViTConfig", "ViTCache", "Decomposition", "Components",
    "heads", "mlps", "layers", "neurons", "embed", "pool", "everything", "Moments", "Validation",
    "Evaluation", "MeanAblate", "ZeroAblate", "RandomAblate", "ResampleAblate", "Patch", "Repair",
    "decomp_reverse", "AblateNeurons", "neuron_terms", "mean_neurons", "AblateTokens", "ablation_sweep",
    "most_damaging", "activation_patching", "path_patching", "attribution_patching", "textspan",
    "textspans", "fit_textspans", "TextFeatures", "encode_texts", "TextSpan", "TextSpans", "load_texts",
    "head_mmd", "layer_mmd", "role_change", "probe", "Probes", "agreement", "direct_and_causal",
    "attention_maps", "contribution_maps", "rollout", "TokenMaps", "score_masks", "MaskScores", "DecompRep",
    "DecompDet", "AgnosticDet", "AgnosticRep", "ComponentDistances", "Guard", "save_guard", "load_guard", "bake", "even", "CleanCLIP",
    "CleanFineTuning", "PAR", "DETECTORS", "save_model", "BadNet", "Blended", "LabelConsistent", "ISSBA",
    "BadCLIP", "optimise_patch", "Kitty", "Reflection", "SIG", "WaNet", "PoisonedPairs", "PoisonRecord",
    "crossing", "preview", "Shapes", "PROPERTIES", "Pairs", "ShapesPairs", "ShardPairs", "CsvPairs",
    "DatasetPairs", "folder_pairs", "PairStream", "cifar10", "finetune", "RECIPES", "Monitor", "FineTuned",
    "evaluate", "ShapesSource", "FolderSource", "diagnose", "Diagnosis", "AuditConfig", "AuditResult",
    "run_audit", "run_scan", "ScanConfig", "ScanResult", "write_report", "Intervention", "Trigger", "Detector",
    "FineTuning", "Backdoor", "backdoor", "to_pixels", "attack_report", "auroc", "Rate",
]
# fmt: on


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'decompclip' has no attribute {name!r}")
    value = getattr(import_module(f"decompclip.{_HOME[name]}"), name)
    globals()[name] = value  # asked for once, then an ordinary attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
