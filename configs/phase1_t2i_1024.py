"""Phase 1, last size: text to image at 1024 px, from the run at 512 px.

    python -m launch.precompute --data=data/t2i --model=models/dreamlite \\
      --image_size=1024 --max_ratio=2
    python -m launch.train --config=configs/phase1_t2i_1024.py --workdir=runs/phase1_1024

Not run on a pod yet.
"""

from configs import phase1_t2i_512
from configs.base import finished


def get_config(variant=None):
    config = phase1_t2i_512.get_config()
    config.init_from = "runs/phase1_512"
    config.image_size = 1024
    config.batch_size = 512  # Lumina-Image 2.0's at 1024 px
    config.steps = 40_000  # likewise
    config.optim.lr = 5e-5  # ours: batches are half as large
    config.remat = "products"
    return finished(config, variant)
