"""Maps as segmentations of photographs: what is committed is what the page says, and a run on a few photographs."""

from __future__ import annotations

import json
import os

import pytest
import torch

from analyses.questions import segmentation
from analyses.study.results import RESULTS
from decompclip.operators.mask_scores import segment

PAGE = (RESULTS.parent / "README.md").read_text(encoding="utf-8")


def test_the_page_says_what_was_measured() -> None:
    said = json.loads((RESULTS / "segmentation" / "segmentation.json").read_text(encoding="utf-8"))
    assert segmentation.finding(said) in PAGE
    assert said["images"] == 200 * said["config"]["images_a_class"]


def test_the_record_is_that_of_the_scores() -> None:
    draws = torch.Generator().manual_seed(0)
    masks = torch.rand(9, 8, 8, generator=draws) > 0.5
    found = segment(
        {segmentation.OURS: masks.double(), "rollout": torch.rand(9, 4, 4, generator=draws)}, masks
    )
    said = json.loads(json.dumps(segmentation.record(found, segmentation.Config())))
    own = said["scores"][segmentation.OURS]
    assert all(x["value"] == x["low"] == x["high"] == 1 for x in own.values())
    value, low, high = said["contribution less"]["rollout"]["mean AP"]
    assert low < value < high and value == pytest.approx(1 - said["scores"]["rollout"]["mean AP"]["value"])
    assert "On 9 photographs contribution maps reach pixel accuracy 100.0 %" in segmentation.finding(said)


@pytest.mark.data
@pytest.mark.skipif(
    "DECOMPCLIP_DATA" not in os.environ, reason="DECOMPCLIP_DATA names no folder of photographs"
)
def test_boxes_are_those_of_the_photographs() -> None:
    """Size and position in words were made of the boxes: the boxes of small objects have the smallest areas."""
    from decompclip.data.photos import PhotoPairs

    pairs = PhotoPairs("validation")
    boxes = torch.tensor(pairs.boxes)
    area = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1) / 64**2
    sizes = pairs.properties["size"]
    assert [("small" if x < 0.25 else "large" if x > 0.75 else "medium") for x in area.tolist()] == sizes
