"""Take a CLIP's image feature apart into heads and MLPs, and audit it for backdoors.

The public names are listed in `__init__.pyi`, once, and explained in `docs/reference.md`. Each is imported when it is first
used, so that `import decompclip` is instant.
"""

from __future__ import annotations

import lazy_loader

from decompclip.api import still_found

__version__ = "0.1.0"

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

MOVED = {
    "decompclip": "even=average_over_tokens",
    "decompclip.attacks.patch": "optimise_patch",
    "decompclip.attacks.poisoned": "PoisonRecord",
    "decompclip.attacks.preview": "preview",
    "decompclip.attacks.registry": "Backdoor crossing=trigger_grid",
    "decompclip.audit": "AuditConfig AuditResult ScanConfig",
    "decompclip.audit.scan": "ScanResult",
    "decompclip.data.datasets": "DatasetPairs PairStream",
    "decompclip.data.images": "FolderSource",
    "decompclip.data.pairs": "Pairs",
    "decompclip.data.shapes": "PROPERTIES ShapesSource",
    "decompclip.defenses.clean_finetuning": "CleanFineTuning",
    "decompclip.defenses.distances": "ComponentDistances",
    "decompclip.defenses.guard": "load_guard",
    "decompclip.diagnosis": "Diagnosis",
    "decompclip.evaluation.evaluate": "Evaluation",
    "decompclip.evaluation.metrics": "attack_report auroc",
    "decompclip.intervals": "Rate",
    "decompclip.operators.inputs": "TextFeatures load_texts",
    "decompclip.operators.mask_scores": "MaskScores score_masks",
    "decompclip.operators.naming": "agreement",
    "decompclip.operators.neurons": "mean_neurons neuron_terms",
    "decompclip.operators.probes": "Probes",
    "decompclip.operators.roles": "role_change",
    "decompclip.operators.sweeps": "most_damaging",
    "decompclip.operators.textspan": "fit_textspans",
    "decompclip.operators.textspan_result": "TextSpan TextSpans",
    "decompclip.operators.tokens": "TokenMaps",
    "decompclip.operators.transplant": "Patch",
    "decompclip.tower.cache": "ViTCache",
    "decompclip.tower.config": "ViTConfig",
    "decompclip.training.finetune": "FineTuned",
    "decompclip.training.loop": "Monitor",
    "decompclip.training.recipes": "FineTuning",
}
"""Names that were public: by the module that has them."""

__getattr__ = still_found(__name__, MOVED, _public)
