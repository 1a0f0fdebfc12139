"""Every public name of the package, and the module that it stands in; docs/reference.md says what each is for."""

from .attacks.issba import ISSBA as ISSBA
from .attacks.patch import (
    BadCLIP as BadCLIP,
    BadNet as BadNet,
    Kitty as Kitty,
    LabelConsistent as LabelConsistent,
)
from .attacks.poisoned import PoisonedPairs as PoisonedPairs
from .attacks.registry import backdoor as backdoor
from .attacks.trigger import Trigger as Trigger
from .attacks.whole_image import SIG as SIG, Blended as Blended, Reflection as Reflection, WaNet as WaNet
from .audit import run_audit as run_audit
from .audit.scan import run_scan as run_scan
from .data.datasets import folder_pairs as folder_pairs
from .data.photos import cifar10 as cifar10
from .data.pixels import to_pixels as to_pixels
from .data.shapes import Shapes as Shapes, ShapesPairs as ShapesPairs
from .data.shards import ShardPairs as ShardPairs
from .data.tables import CsvPairs as CsvPairs
from .decomposition.components import (
    Components as Components,
    embed as embed,
    everything as everything,
    features as features,
    heads as heads,
    layers as layers,
    mlps as mlps,
    neurons as neurons,
    pool as pool,
)
from .decomposition.decomposition import Decomposition as Decomposition
from .decomposition.moments import Moments as Moments
from .decomposition.store import Store as Store
from .defenses.agnostic import AgnosticDet as AgnosticDet, AgnosticRep as AgnosticRep
from .defenses.bake import average_over_tokens as average_over_tokens, bake as bake
from .defenses.clean_finetuning import PAR as PAR, CleanCLIP as CleanCLIP
from .defenses.decomp import DecompDet as DecompDet, DecompRep as DecompRep
from .defenses.detectors import DETECTORS as DETECTORS
from .defenses.detectors.detector import Detector as Detector
from .defenses.detectors.token_rep import TokenRep as TokenRep
from .defenses.guard import Guard as Guard, load as load, save_guard as save_guard
from .diagnosis.run import diagnose as diagnose
from .evaluation.evaluate import evaluate as evaluate
from .explorer.explore import explore as explore
from .models.clip import HookedCLIP as HookedCLIP
from .models.folders import save_model as save_model
from .models.names import bundled as bundled
from .operators.ablation import MeanAblate as MeanAblate, ZeroAblate as ZeroAblate
from .operators.attention import (
    attention_maps as attention_maps,
    contribution_maps as contribution_maps,
    rollout as rollout,
)
from .operators.attribution import attribute as attribute
from .operators.checkpoints import compare_checkpoints as compare_checkpoints
from .operators.effects import direct_and_causal as direct_and_causal, path_patching as path_patching
from .operators.extract import extract as extract
from .operators.inputs import encode_texts as encode_texts
from .operators.intervention import Intervention as Intervention
from .operators.lens import logit_lens as logit_lens
from .operators.mmd import head_mmd as head_mmd, layer_mmd as layer_mmd
from .operators.neurons import AblateNeurons as AblateNeurons
from .operators.noise import RandomAblate as RandomAblate
from .operators.patching import (
    activation_patching as activation_patching,
    attribution_patching as attribution_patching,
)
from .operators.probes import probe as probe
from .operators.retrieval import heads_for as heads_for, nearest as nearest
from .operators.second_order import second_order as second_order
from .operators.sweeps import ablation_sweep as ablation_sweep
from .operators.textspan import textspan as textspan, textspans as textspans
from .operators.tokens import AblateTokens as AblateTokens
from .operators.transplant import (
    Repair as Repair,
    ResampleAblate as ResampleAblate,
    decomp_reverse as decomp_reverse,
)
from .report import write_report as write_report
from .tower.vit import HookedViT as HookedViT
from .training.finetune import finetune as finetune
from .training.recipes import RECIPES as RECIPES

MOVED: dict[str, str]
__all__: list[str]
__version__: str
