"""An autoencoder of one's own photographs, at 64 px.

    python -m launch.train --config=configs/photographs/autoencoder.py \\
      --workdir=runs/photographs/autoencoder
"""

from configs.base import finished
from configs.shapes import autoencoder


def get_config(variant=None):
    config = autoencoder.get_config()
    config.image_size = 64
    config.autoencoder = {"num_encoder_blocks": (0, 0, 0)}  # at 64 px those of shapes/ take long
    config.data = ({"source": "runs/photographs/set", "task": "t2i"},)
    config.validation = config.data  # the same without random crops: few pictures spare none
    config.batch_size = 8
    config.steps = 2000
    config.loss = {"moments": 1e-2, "noise": 0.05}
    config.checkpoint.every = config.sample.every = 1000
    return finished(config, variant)
