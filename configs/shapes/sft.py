"""Supervised fine-tuning on the shapes world: few samples, the encoder frozen, from phase 3.

python -m launch.train --config=configs/shapes/sft.py --workdir=runs/shapes/sft
"""

from configs.base import finished
from configs.shapes import phase3_joint


def get_config(variant=None):
    config = phase3_joint.get_config()
    config.init_from = "runs/shapes/phase3"
    config.train = ("unet",)
    config.data = tuple(
        {"source": "shapes:demo:train", "task": task, "weight": 1.0, "count": 20_000, "seed": 1}
        for task in ("t2i", "edit")
    )
    config.loss.mean = 0.0  # detail, once the rest is there
    config.steps = 300
    config.optim.lr, config.optim.warmup = 3e-4, 20
    config.optim.schedule, config.optim.decay_from = "cosine", 0.0
    config.ema_decay = 0.99
    return finished(config, variant)
