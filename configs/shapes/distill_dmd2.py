"""Step distillation on the shapes world: 4 steps without guidance, from fine-tuning.

python -m launch.train --config=configs/shapes/distill_dmd2.py --workdir=runs/shapes/distill
"""

from configs import distill_dmd2
from configs.base import finished
from configs.shapes import sft


def get_config(variant=None):
    config = sft.get_config()
    config.stage = "dmd2"
    config.init_from = "runs/shapes/sft"
    # A prompt, and what an edit starts from, are enough: the student draws, the teacher judges. So
    # they may be about the four pairs, too, of which no lesson has shown a picture. After
    # reinforcement learning guidance hardly changes pictures of the others, so that these teach
    # little of what it does. (loss.gan would show the targets: with it, train's.)
    config.data = tuple(
        {"source": "shapes:demo:all", "task": task, "weight": 1.0, "count": 20_000, "seed": 3}
        for task in ("t2i", "edit")
    )
    config.batch_size = 32
    config.steps = 400
    config.distill = distill_dmd2.distill()
    config.distill.ratio, config.distill.warmup, config.distill.score_lr = 2, 40, 2e-4
    config.loss = distill_dmd2.loss()
    # Twice what the demo samples with: the student follows in part.
    config.loss.guidance, config.loss.edit_guidance = 4.0, 1.5
    config.optim.lr = 5e-5
    config.optim.beta1, config.optim.beta2 = 0.0, 0.99
    config.optim.schedule, config.optim.warmup = "constant", 10
    config.ema_decay = 0.98
    config.checkpoint.every = config.sample.every = 200
    return finished(config, variant)
