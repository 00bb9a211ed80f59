"""Phase 1, second size: text to image at 512 px, from the run at 256 px.

    python -m launch.precompute --data=data/t2i --model=models/dreamlite \\
      --image_size=512 --max_ratio=2
    python -m launch.train --config=configs/phase1_t2i_512.py --workdir=runs/phase1_512

As configs/phase1_t2i_256.py, with sigma shifted further towards noise, as the sampler does at this
size. Not run on a pod yet.
"""

from configs import phase1_t2i_256
from configs.base import finished


def get_config(variant=None):
    config = phase1_t2i_256.get_config()
    config.init_from = "runs/phase1_256"
    config.image_size = 512
    config.batch_size = 1024
    config.steps = 60_000  # ours: 3 epochs
    config.optim.warmup = 1000
    return finished(config, variant)
