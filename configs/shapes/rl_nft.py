"""Reinforcement learning on the shapes world: the judge's score as reward, from fine-tuning.

    for seed in 0 1 2; do python -m launch.train --config=configs/shapes/rl_nft.py \\
      --config.seed=$seed --workdir=runs/shapes/rl_nft_$seed; done

`val/reward/shapes_exact/t2i/mean` and `.../edit/mean` of its metrics are the accuracies on the same
256 held-out prompts, by the averaged network, without guidance and in 10 steps. Data, rewards and
groups are those of configs/shapes/rl_grpo.py; the rest is ours.
"""

from configs import rl_nft
from configs.base import finished
from configs.shapes import rl_grpo


def get_config(variant=None):
    config = rl_grpo.get_config()
    config.stage = "nft"
    config.rl.process.steps = 6
    config.rl.limits.kl = 0.5  # of velocities here
    config.loss = rl_nft.loss()
    config.loss.kl, config.loss.shift = 0.0, False
    config.optim.lr = 1e-4
    return finished(config, variant)
