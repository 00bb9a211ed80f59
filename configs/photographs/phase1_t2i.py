"""Phase 1 on one's own photographs: text to image at 64 px.

    python -m launch.train --config=configs/photographs/phase1_t2i.py \\
      --workdir=runs/photographs/phase1
"""

from configs.base import finished
from configs.photographs import autoencoder
from configs.shapes import phase1_t2i


def get_config(variant=None):
    config = phase1_t2i.get_config()
    config.init_from = "runs/photographs/autoencoder"
    config.autoencoder = autoencoder.get_config().autoencoder
    config.pane, config.loss.mean = True, 0.0  # what is exported has the pane
    config.image_size, config.text_length = 64, 128
    config.data = ({"source": "runs/photographs/set", "task": "t2i"},)
    config.validation = config.data  # nothing is held out: what is shown is known by heart
    config.random_crop = False  # of few pictures; of thousands True
    config.batch_size = 16
    config.steps = 800
    config.sample.rows = 14
    config.checkpoint.every = config.sample.every = 400
    return finished(config, variant)
