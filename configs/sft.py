"""Supervised fine-tuning: both tasks on a small set of the best pictures, from phase 3.

    python -m launch.train --config=configs/sft.py --workdir=runs/sft

The paper takes about 500,000 samples. The learning rate falls, so that the end is not left to the
average alone. Not run on a pod yet.
"""

from configs import phase3_joint
from configs.base import finished


def get_config(variant=None):
    config = phase3_joint.get_config()
    config.init_from = "runs/phase3_joint"
    config.data = (
        {"source": "data/sft_t2i", "task": "t2i", "weight": 1.0},
        {"source": "data/sft_edit", "task": "edit", "weight": 1.0},
    )
    config.batch_size = 512
    config.steps = 10_000  # ours; Lumina-Image 2.0 takes 15,000 on its best million
    config.optim.lr = 2e-5  # ours
    config.optim.schedule = "cosine"
    config.optim.warmup = 500
    config.ema_decay = 0.999
    return finished(config, variant)
