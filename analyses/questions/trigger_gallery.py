"""Every kind of trigger of the bundled twins on one image: clean, triggered, difference times ten.

Command:   python -m analyses.trigger_gallery
Run time:  seconds.
Writes:    analyses/results/trigger_gallery.png
"""

from __future__ import annotations

from pathlib import Path

from decompclip.attacks.preview import preview, save_gallery
from decompclip.attacks.registry import from_card
from decompclip.data.shapes import Shapes
from decompclip.models.bundled import bundled, card

RESULT = Path(__file__).parent.with_name("results") / "trigger_gallery.png"
IMAGE_SEED = 3


def run(path: Path = RESULT) -> Path:
    """One row a trigger of the world of shapes, of the first seed."""
    backdoors = [card(name)["backdoor"] for name in bundled() if name.startswith("shapes-")]
    triggers = [from_card(backdoor["trigger"]) for backdoor in backdoors]
    image = Shapes(1, seed=IMAGE_SEED).draw(range(1)).images
    path.parent.mkdir(exist_ok=True)
    return save_gallery([preview(trigger, image) for trigger in triggers if trigger.seed == 0], path)


if __name__ == "__main__":
    print(run())
