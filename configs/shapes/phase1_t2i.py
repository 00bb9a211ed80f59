"""Phase 1 on the shapes world: text to image.

    python -m launch.train --config=configs/shapes/phase1_t2i.py --workdir=runs/shapes/phase1

The small text encoder is random at first, so it is trained, too; a released one stays frozen.
"""

from configs.base import base, finished
from configs.shapes import lessons


def get_config(variant=None):
    config = base()
    config.init_from = "runs/shapes/autoencoder"
    config.pane = False  # no edits yet: on a CPU 1.7 times the steps in a minute
    config.train = ("unet", "text_encoder")
    config.model, config.image_size, config.text_length = "shapes", 32, 72
    config.dtype = "float32"
    config.data = lessons("t2i")
    config.validation = ({"source": "shapes:demo:held_out", "task": "t2i"},)
    # More noise than usual, at which counts, sizes and places are decided; for the edits of later
    # phases more still, as a source says nearly all.
    config.loss.mean, config.loss.edit_offset = 0.5, 1.0
    config.batch_size = 32
    config.steps = 4800
    config.optim.lr = 2e-3
    config.optim.schedule, config.optim.decay_from = "linear", 0.5
    config.optim.warmup = 100
    config.ema_decay = 0.995
    config.checkpoint.every = config.sample.every = 800
    config.sample.guidance = 2.0  # more is worse here
    return finished(config, variant)
