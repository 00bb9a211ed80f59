"""Phase 2: editing at 1024 px, from phase 1.

    python -m launch.precompute --data=data/edit --model=models/dreamlite \\
      --image_size=1024 --max_ratio=2
    python -m launch.train --config=configs/phase2_edit.py --workdir=runs/phase2_edit

`data/edit` is a prepared set of edits (instruction, source, target); the paper has 1.74M. What an
edit changes weighs more, as the paper is reported to do. Not run on a pod yet.
"""

from configs import phase1_t2i_1024
from configs.base import finished


def get_config(variant=None):
    config = phase1_t2i_1024.get_config()
    config.init_from = "runs/phase1_1024"
    config.data = ({"source": "data/edit", "task": "edit"},)
    config.loss.weight_changed = True
    config.steps = 20_000  # ours: 6 epochs
    return finished(config, variant)
