"""Phase 3 on the shapes world: text to image and editing together, from phase 2.

python -m launch.train --config=configs/shapes/phase3_joint.py --workdir=runs/shapes/phase3
"""

from configs.base import finished
from configs.shapes import lessons, phase2_edit


def get_config(variant=None):
    config = phase2_edit.get_config()
    config.init_from = "runs/shapes/phase2"
    config.data = (*lessons("t2i"), *lessons("edit"))
    config.validation = tuple(
        {"source": "shapes:demo:held_out", "task": task} for task in ("t2i", "edit")
    )
    config.steps = 2400
    return finished(config, variant)
