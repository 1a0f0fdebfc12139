"""Every public name of the package, and the module that it stands in."""

from .attacks.badclip import (
    BadCLIP as BadCLIP,
)
from .attacks.badclip import (
    optimise_patch as optimise_patch,
)
from .attacks.badnet import (
    BadNet as BadNet,
)
from .attacks.blended import (
    Blended as Blended,
)
from .attacks.crossing import (
    crossing as crossing,
)
from .attacks.issba import (
    ISSBA as ISSBA,
)
from .attacks.kitty import (
    Kitty as Kitty,
)
from .attacks.label_consistent import (
    LabelConsistent as LabelConsistent,
)
from .attacks.poison_record import (
    PoisonRecord as PoisonRecord,
)
from .attacks.poisoned import (
    PoisonedPairs as PoisonedPairs,
)
from .attacks.preview import (
    preview as preview,
)
from .attacks.reflection import (
    Reflection as Reflection,
)
from .attacks.registry import (
    Backdoor as Backdoor,
)
from .attacks.registry import (
    backdoor as backdoor,
)
from .attacks.sig import (
    SIG as SIG,
)
from .attacks.trigger import (
    Trigger as Trigger,
)
from .attacks.wanet import (
    WaNet as WaNet,
)
from .audit import (
    AuditConfig as AuditConfig,
)
from .audit import (
    AuditResult as AuditResult,
)
from .audit import (
    run_audit as run_audit,
)
from .audit.scan import (
    ScanConfig as ScanConfig,
)
from .audit.scan import (
    ScanResult as ScanResult,
)
from .audit.scan import (
    run_scan as run_scan,
)
from .data.cifar10 import (
    cifar10 as cifar10,
)
from .data.datasets import (
    DatasetPairs as DatasetPairs,
)
from .data.datasets import (
    folder_pairs as folder_pairs,
)
from .data.images import (
    FolderSource as FolderSource,
)
from .data.images import (
    ShapesSource as ShapesSource,
)
from .data.pairs import (
    Pairs as Pairs,
)
from .data.pixels import (
    to_pixels as to_pixels,
)
from .data.shapes import (
    PROPERTIES as PROPERTIES,
)
from .data.shapes import (
    Shapes as Shapes,
)
from .data.shapes_pairs import (
    ShapesPairs as ShapesPairs,
)
from .data.shards import (
    ShardPairs as ShardPairs,
)
from .data.streams import (
    PairStream as PairStream,
)
from .data.tables import (
    CsvPairs as CsvPairs,
)
from .data.texts import (
    load_texts as load_texts,
)
from .decomposition.components import (
    Components as Components,
)
from .decomposition.components import (
    embed as embed,
)
from .decomposition.components import (
    everything as everything,
)
from .decomposition.components import (
    heads as heads,
)
from .decomposition.components import (
    layers as layers,
)
from .decomposition.components import (
    mlps as mlps,
)
from .decomposition.components import (
    neurons as neurons,
)
from .decomposition.components import (
    pool as pool,
)
from .decomposition.decomposition import (
    Decomposition as Decomposition,
)
from .decomposition.moments import (
    Moments as Moments,
)
from .defenses.agnostic_det import (
    AgnosticDet as AgnosticDet,
)
from .defenses.agnostic_rep import (
    AgnosticRep as AgnosticRep,
)
from .defenses.bake import (
    bake as bake,
)
from .defenses.bake import (
    even as even,
)
from .defenses.clean_finetuning import (
    PAR as PAR,
)
from .defenses.clean_finetuning import (
    CleanCLIP as CleanCLIP,
)
from .defenses.clean_finetuning import (
    CleanFineTuning as CleanFineTuning,
)
from .defenses.component_distances import (
    ComponentDistances as ComponentDistances,
)
from .defenses.decomp_det import (
    DecompDet as DecompDet,
)
from .defenses.decomp_rep import (
    DecompRep as DecompRep,
)
from .defenses.detectors import (
    DETECTORS as DETECTORS,
)
from .defenses.detectors.detector import (
    Detector as Detector,
)
from .defenses.guard import (
    Guard as Guard,
)
from .defenses.guard_files import (
    load as load,
)
from .defenses.guard_files import (
    load_guard as load_guard,
)
from .defenses.guard_files import (
    save_guard as save_guard,
)
from .diagnosis import (
    Diagnosis as Diagnosis,
)
from .diagnosis.run import (
    diagnose as diagnose,
)
from .evaluation.evaluate import (
    evaluate as evaluate,
)
from .evaluation.metrics import (
    attack_report as attack_report,
)
from .evaluation.metrics import (
    auroc as auroc,
)
from .intervals import (
    Rate as Rate,
)
from .models.bundled import (
    bundled as bundled,
)
from .models.clip import (
    HookedCLIP as HookedCLIP,
)
from .models.folders import (
    save_model as save_model,
)
from .operators.ablation import (
    MeanAblate as MeanAblate,
)
from .operators.ablation import (
    ZeroAblate as ZeroAblate,
)
from .operators.attention import (
    attention_maps as attention_maps,
)
from .operators.attention import (
    contribution_maps as contribution_maps,
)
from .operators.attention import (
    rollout as rollout,
)
from .operators.attribution import (
    attribution_patching as attribution_patching,
)
from .operators.effects import (
    direct_and_causal as direct_and_causal,
)
from .operators.intervention import (
    Intervention as Intervention,
)
from .operators.mask_scores import (
    MaskScores as MaskScores,
)
from .operators.mask_scores import (
    score_masks as score_masks,
)
from .operators.mmd import (
    head_mmd as head_mmd,
)
from .operators.mmd import (
    layer_mmd as layer_mmd,
)
from .operators.naming import (
    agreement as agreement,
)
from .operators.neurons import (
    AblateNeurons as AblateNeurons,
)
from .operators.neurons import (
    mean_neurons as mean_neurons,
)
from .operators.neurons import (
    neuron_terms as neuron_terms,
)
from .operators.noise import (
    RandomAblate as RandomAblate,
)
from .operators.patching import (
    activation_patching as activation_patching,
)
from .operators.paths import (
    path_patching as path_patching,
)
from .operators.probes import (
    Probes as Probes,
)
from .operators.probes import (
    probe as probe,
)
from .operators.roles import (
    role_change as role_change,
)
from .operators.splits import (
    Evaluation as Evaluation,
)
from .operators.splits import (
    Validation as Validation,
)
from .operators.sweeps import (
    ablation_sweep as ablation_sweep,
)
from .operators.sweeps import (
    most_damaging as most_damaging,
)
from .operators.textspan import (
    fit_textspans as fit_textspans,
)
from .operators.textspan import (
    textspan as textspan,
)
from .operators.textspan import (
    textspans as textspans,
)
from .operators.textspan_inputs import (
    TextFeatures as TextFeatures,
)
from .operators.textspan_inputs import (
    encode_texts as encode_texts,
)
from .operators.textspan_result import (
    TextSpan as TextSpan,
)
from .operators.textspan_result import (
    TextSpans as TextSpans,
)
from .operators.token_maps import (
    TokenMaps as TokenMaps,
)
from .operators.tokens import (
    AblateTokens as AblateTokens,
)
from .operators.transplant import (
    Patch as Patch,
)
from .operators.transplant import (
    Repair as Repair,
)
from .operators.transplant import (
    ResampleAblate as ResampleAblate,
)
from .operators.transplant import (
    decomp_reverse as decomp_reverse,
)
from .report import (
    write_report as write_report,
)
from .tower.cache import (
    ViTCache as ViTCache,
)
from .tower.config import (
    ViTConfig as ViTConfig,
)
from .tower.vit import (
    HookedViT as HookedViT,
)
from .training.finetune import (
    FineTuned as FineTuned,
)
from .training.finetune import (
    finetune as finetune,
)
from .training.monitor import (
    Monitor as Monitor,
)
from .training.recipes import (
    RECIPES as RECIPES,
)
from .training.recipes import (
    FineTuning as FineTuning,
)

__all__: list[str]
__version__: str
