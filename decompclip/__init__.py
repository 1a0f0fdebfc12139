"""Take a CLIP's image feature apart into heads and MLPs, and audit it for backdoors.

Every public name is listed here and imported when it is first used, so that `import decompclip` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decompclip.attacks.badnet import BadNet
    from decompclip.attacks.blended import Blended
    from decompclip.audit import AuditConfig, AuditResult, run_audit
    from decompclip.cache.activations import ViTCache
    from decompclip.cache.components import Components, embed, everything, heads, mlps
    from decompclip.cache.decomposition import Decomposition
    from decompclip.cache.moments import Moments
    from decompclip.data.images import FolderSource, ShapesSource
    from decompclip.data.shapes import Shapes
    from decompclip.defenses.decomp_det import DecompDet
    from decompclip.defenses.decomp_rep import DecompRep
    from decompclip.models.clip import HookedCLIP
    from decompclip.models.config import ViTConfig
    from decompclip.models.loading import load
    from decompclip.models.vit import HookedViT
    from decompclip.models.zoo import bundled
    from decompclip.operators.ablation import MeanAblate, ZeroAblate
    from decompclip.report import write_report

__version__ = "0.1.0"

_HOME = {
    "load": "models.loading",
    "bundled": "models.zoo",
    "HookedCLIP": "models.clip",
    "HookedViT": "models.vit",
    "ViTConfig": "models.config",
    "ViTCache": "cache.activations",
    "Decomposition": "cache.decomposition",
    "Components": "cache.components",
    "heads": "cache.components",
    "mlps": "cache.components",
    "embed": "cache.components",
    "everything": "cache.components",
    "Moments": "cache.moments",
    "MeanAblate": "operators.ablation",
    "ZeroAblate": "operators.ablation",
    "DecompRep": "defenses.decomp_rep",
    "DecompDet": "defenses.decomp_det",
    "BadNet": "attacks.badnet",
    "Blended": "attacks.blended",
    "Shapes": "data.shapes",
    "ShapesSource": "data.images",
    "FolderSource": "data.images",
    "AuditConfig": "audit",
    "AuditResult": "audit",
    "run_audit": "audit",
    "write_report": "report",
}

__all__ = [  # noqa: RUF022 - in the order in which a user meets them
    "load",
    "bundled",
    "HookedCLIP",
    "HookedViT",
    "ViTConfig",
    "ViTCache",
    "Decomposition",
    "Components",
    "heads",
    "mlps",
    "embed",
    "everything",
    "Moments",
    "MeanAblate",
    "ZeroAblate",
    "DecompRep",
    "DecompDet",
    "BadNet",
    "Blended",
    "Shapes",
    "ShapesSource",
    "FolderSource",
    "AuditConfig",
    "AuditResult",
    "run_audit",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'decompclip' has no attribute {name!r}")
    value = getattr(import_module(f"decompclip.{_HOME[name]}"), name)
    globals()[name] = value  # asked for once, then an ordinary attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
