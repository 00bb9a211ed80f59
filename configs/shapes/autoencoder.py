"""The autoencoder of the shapes world; the other configs here start from it.

    python -m launch.train --config=configs/shapes/autoencoder.py --workdir=runs/shapes/autoencoder

It sees every combination of attributes: were some held out, it would blur them, and a later
accuracy on held-out prompts would measure the autoencoder.
"""

from configs.base import base, finished


def get_config(variant=None):
    config = base()
    config.stage, config.train = "autoencoder", ("vae",)
    config.model, config.image_size = "shapes", 32
    config.dtype = "float32"
    config.data = ({"source": "shapes:demo:all", "task": "t2i"},)
    config.batch_size = 16
    config.steps = 3000
    config.loss = {"moments": 1e-2, "noise": 0.3}
    config.optim.lr = 2e-3
    config.optim.schedule, config.optim.warmup = "cosine", 100
    config.optim.weight_decay = 0.0
    config.ema_decay = 0.995
    config.checkpoint.every = config.sample.every = 1000
    return finished(config, variant)
