"""Phase 3: text to image and editing together at 1024 px, from phase 2.

    python -m launch.train --config=configs/phase3_joint.py --workdir=runs/phase3_joint

Both tasks in equal parts, as in the paper: its ablation gives GenEval 0.71 to the three phases and
0.65 to joint training right after phase 1. Not run on a pod yet.
"""

from configs import phase2_edit
from configs.base import finished


def get_config(variant=None):
    config = phase2_edit.get_config()
    config.init_from = "runs/phase2_edit"
    config.data = (
        {"source": "data/t2i", "task": "t2i", "weight": 1.0},
        {"source": "data/edit", "task": "edit", "weight": 1.0},
    )
    config.steps = 40_000  # ours
    return finished(config, variant)
