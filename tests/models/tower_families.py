"""Every configuration of open_clip's, by the family of its image tower.

The table is written down, not computed, so that a new release of open_clip fails a test until somebody has looked
at what it brings (tests/models/test_towers.py). Put its names into the family that its tower belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Configurations whose image towers are built alike.

    Attributes:
        kind: whose code the tower is, and what sets it apart.
        why_not: a key of `decompclip.tower.families.WHY_NOT`, for towers without a decomposition.
    """

    name: str
    kind: str
    configurations: tuple[str, ...]
    why_not: str | None = None


def _family(name: str, kind: str, configurations: str, *, why_not: str | None = None) -> Family:
    return Family(name, kind, tuple(configurations.split()), why_not)


SUPPORTED = (
    _family(
        "ViT",
        "native ViT: class token, GELU",
        """
        coca_base coca_roberta-ViT-B-32 mt5-base-ViT-B-32 mt5-xl-ViT-H-14 nllb-clip-base nllb-clip-large
        ViT-B-16 ViT-B-16-plus ViT-B-16-plus-240 ViT-B-32 ViT-B-32-256 ViT-B-32-plus-256
        ViT-bigG-14 ViT-bigG-14-worldwide ViT-bigG-14-worldwide-378 ViT-e-14 ViT-g-14
        ViT-H-14 ViT-H-14-378 ViT-H-14-worldwide ViT-H-14-worldwide-378 ViT-H-16
        ViT-L-14 ViT-L-14-280 ViT-L-14-336 ViT-L-14-worldwide ViT-L-16 ViT-L-16-320
        ViT-M-16 ViT-M-32 ViT-M-32-alt ViT-S-16 ViT-S-16-alt ViT-S-32 ViT-S-32-alt
        xlm-roberta-base-ViT-B-32 xlm-roberta-large-ViT-H-14
        """,
    ),
    _family(
        "ViT, QuickGELU",
        "native ViT: class token, QuickGELU",
        """
        roberta-ViT-B-32 ViT-B-16-quickgelu ViT-B-32-quickgelu ViT-bigG-14-quickgelu
        ViT-H-14-378-quickgelu ViT-H-14-quickgelu ViT-H-14-worldwide-quickgelu
        ViT-L-14-336-quickgelu ViT-L-14-quickgelu ViT-L-14-worldwide-quickgelu
        """,
    ),
    _family("ViT, LayerScale", "native ViT: class token, LayerScale", "ViT-M-16-alt"),
    _family(
        "CLIPA",
        "native ViT: no ln_pre, mean of the patches, then LayerNorm",
        """
        ViT-bigG-14-CLIPA ViT-bigG-14-CLIPA-336 ViT-H-14-CLIPA ViT-H-14-CLIPA-336
        ViT-L-14-CLIPA ViT-L-14-CLIPA-336
        """,
    ),
    _family("CoCa", "native ViT: attention pool with two LayerNorms", "coca_ViT-B-32 coca_ViT-L-14"),
    _family(
        "SigLIP",
        "timm ViT: attention pool with an MLP, no projection, no class token",
        """
        nllb-clip-base-siglip nllb-clip-large-siglip ViT-B-16-SigLIP ViT-B-16-SigLIP2
        ViT-B-16-SigLIP2-256 ViT-B-16-SigLIP2-384 ViT-B-16-SigLIP2-512 ViT-B-16-SigLIP-256
        ViT-B-16-SigLIP-384 ViT-B-16-SigLIP-512 ViT-B-16-SigLIP-i18n-256 ViT-B-32-SigLIP2-256
        ViT-gopt-16-SigLIP2-256 ViT-gopt-16-SigLIP2-384 ViT-L-16-SigLIP2-256 ViT-L-16-SigLIP2-384
        ViT-L-16-SigLIP2-512 ViT-L-16-SigLIP-256 ViT-L-16-SigLIP-384 ViT-SO400M-14-SigLIP
        ViT-SO400M-14-SigLIP2 ViT-SO400M-14-SigLIP2-378 ViT-SO400M-14-SigLIP-378
        ViT-SO400M-14-SigLIP-384 ViT-SO400M-16-SigLIP2-256 ViT-SO400M-16-SigLIP2-384
        ViT-SO400M-16-SigLIP2-512 ViT-SO400M-16-SigLIP-i18n-256
        """,
    ),
    _family(
        "MobileCLIP-B", "timm hybrid ViT: stem of convolutions, class token", "MobileCLIP-B MobileCLIP2-B"
    ),
    _family("MobileCLIP-L", "timm ViT: class token", "MobileCLIP2-L-14"),
    _family(
        "ViT, gap", "timm ViT: LayerScale, mean of the patches, no class token", "vit_medium_patch16_gap_256"
    ),
    _family(
        "ViT, relative position",
        "timm ViT: class token, relative positions, LayerScale",
        "vit_relpos_medium_patch16_cls_224",
    ),
    _family(
        "ViTamin",
        "timm hybrid ViT: stem of convolutions, GeGLU, mean of the patches",
        """
        ViTamin-B ViTamin-B-LTT ViTamin-L ViTamin-L2 ViTamin-L2-256 ViTamin-L2-336 ViTamin-L2-384
        ViTamin-L-256 ViTamin-L-336 ViTamin-L-384 ViTamin-S ViTamin-S-LTT
        ViTamin-XL-256 ViTamin-XL-336 ViTamin-XL-384
        """,
    ),
    _family("EVA01", "timm Eva: class token", "EVA01-g-14 EVA01-g-14-plus"),
    _family(
        "EVA02",
        "timm Eva: class token, rotary positions, SwiGLU, LayerNorm across the heads",
        "EVA02-B-16 EVA02-L-14 EVA02-L-14-336",
    ),
    _family("EVA02-E", "timm Eva: class token, post-norm blocks", "EVA02-E-14 EVA02-E-14-plus"),
    _family(
        "PE",
        "timm Eva: rotary positions, attention pool with an MLP",
        "PE-Core-B-16 PE-Core-bigG-14-448 PE-Core-L-14-336 PE-Core-S-16-384 PE-Core-T-16-384",
    ),
)

REFUSED = (
    _family(
        "ResNet",
        "native ResNet",
        """
        RN50 RN50-quickgelu RN50x4 RN50x4-quickgelu RN50x16 RN50x16-quickgelu RN50x64 RN50x64-quickgelu
        RN101 RN101-quickgelu
        """,
        why_not="resnet",
    ),
    _family(
        "ConvNeXt",
        "timm ConvNeXt",
        """
        convnext_base convnext_base_w convnext_base_w_320 convnext_large convnext_large_d
        convnext_large_d_320 convnext_small convnext_tiny convnext_xlarge convnext_xxlarge
        convnext_xxlarge_320
        """,
        why_not="conv",
    ),
    _family(
        "FastViT",
        "timm FastViT (MobileCLIP-S)",
        """
        MobileCLIP-S1 MobileCLIP-S2 MobileCLIP2-S0 MobileCLIP2-S2 MobileCLIP2-S3 MobileCLIP2-S4
        """,
        why_not="conv",
    ),
    _family("Swin", "timm Swin Transformer", "swin_base_patch4_window7_224", why_not="windows"),
)

FAMILY_OF = {name: family for family in (*SUPPORTED, *REFUSED) for name in family.configurations}
"""By a configuration's name."""
