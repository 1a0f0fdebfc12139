"""Example pictures and the maps over them, ready to be laid out."""

from __future__ import annotations

from typing import Any

from decompclip.audit.result import AuditResult
from decompclip.figures.pictures import attention_overlay, contribution_overlay, picture


def maps_of(result: AuditResult, index: int) -> dict[str, Any] | None:
    shown = result.examples
    if shown is None:
        return None
    heads = []
    for head in shown.heads:
        attention_top = float(head.attention.max())
        contribution_top = float(head.contribution.abs().max())
        heads.append(
            {
                "name": f"{head.layer}.{head.head}",
                "affected": head.affected,
                "attention_top": f"{attention_top:.2f}",
                "contribution_top": f"{contribution_top:.4f}",
                "cells": [
                    {
                        "attention": attention_overlay(attention, attention_top),
                        "class_token": f"{float(own):.2f}",
                        "contribution": contribution_overlay(contribution, contribution_top),
                        "sum": f"{float(contribution.sum()):+.4f}".replace("-", "−"),
                    }
                    for attention, own, contribution in zip(
                        head.attention, head.class_token, head.contribution, strict=True
                    )
                ],
            }
        )
    images = [
        {"class": f"picture-{index}-{i}", "uri": picture(pixels), "caption": caption, "side": side}
        for i, (pixels, caption, side) in enumerate(
            zip(shown.pictures, shown.captions, shown.sides, strict=True)
        )
    ]
    return {"images": images, "heads": heads, "small": shown.pictures.shape[1] < 128}
