"""Phase 1, first size: text to image at 256 px from scratch.

    python -m launch.precompute --data=data/t2i --model=models/dreamlite \\
      --image_size=256 --max_ratio=2
    python -m launch.train --config=configs/phase1_t2i_256.py --workdir=runs/phase1_256

`data/t2i` is a prepared set of pictures with captions (`launch.prepare_data`), `models/dreamlite` a
model directory with the encoders. The paper trains on 20M pictures and tells no batch size, rate or
number of steps: those marked "ours" are to be questioned. Not run on a pod yet.
"""

from configs.base import base, finished


def get_config(variant=None):
    config = base()
    config.model, config.unet = "models/dreamlite", "dreamlite"
    config.data = ({"source": "data/t2i", "task": "t2i"},)
    config.image_size, config.max_ratio = 256, 2.0
    config.batch_size = 1024  # Lumina-Image 2.0's at 256 px
    config.steps = 200_000  # ours: 10 epochs; Lumina-Image 2.0 takes 144,000
    config.optim.lr = 1e-4  # SnapGen++'s and SANA's
    config.optim.warmup = 2000  # SANA's
    config.checkpoint.every = config.sample.every = 2000
    return finished(config, variant)
