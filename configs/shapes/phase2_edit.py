"""Phase 2 on the shapes world: editing and, in a quarter of the rows, text to image; from phase 1.

python -m launch.train --config=configs/shapes/phase2_edit.py --workdir=runs/shapes/phase2
"""

from configs.base import finished
from configs.shapes import lessons, phase1_t2i


def get_config(variant=None):
    config = phase1_t2i.get_config()
    config.init_from = "runs/shapes/phase1"
    config.pane = True
    config.data = (
        *lessons("edit"),
        {"source": "shapes:told:train", "task": "t2i", "weight": 1.0},  # or it is forgotten
    )
    config.validation = ({"source": "shapes:demo:held_out", "task": "edit"},)
    config.text_length = 120
    # No weights for what changes: at this size it is copying the rest that is hard to learn.
    config.steps = 2400
    config.optim.lr = 1.5e-3
    return finished(config, variant)
