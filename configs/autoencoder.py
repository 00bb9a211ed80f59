"""An autoencoder (TAESD's architecture) from scratch, on 256 px crops.

    python -m launch.train --config=configs/autoencoder.py --workdir=runs/autoencoder

DreamLite uses TAESDXL as it is, and so do the other configs here: this one is for pictures that it
was not made for, or for another number of latent channels
(`--config.autoencoder.latent_channels=16`). Everything is ours: TAESD's training was not published.
Not run on a pod yet.
"""

from configs.base import base, finished


def get_config(variant=None):
    config = base()
    config.stage, config.train = "autoencoder", ("vae",)
    config.model = "models/dreamlite"
    config.data = ({"source": "data/t2i", "task": "t2i", "precomputed": False},)
    config.image_size = 256
    config.batch_size = 256
    config.steps = 200_000
    config.autoencoder = {"latent_channels": 4}
    config.loss = {"moments": 1e-3, "noise": 0.05}
    config.dtype = "float32"
    config.optim.lr = 3e-4
    config.optim.schedule = "cosine"
    config.optim.weight_decay = 0.0
    config.ema_decay = 0.999
    return finished(config, variant)
