"""Reinforcement learning by DiffusionNFT: the rewards and the data of configs/rl_grpo.py.

    python -m launch.train --config=configs/rl_nft.py --workdir=runs/rl_nft

It learns from whole pictures, drawn without random steps and noised anew, where GRPO learns from
the random steps that led to them: of `rl.process` the number of steps alone counts. Edit-R1 trains
edits so. Published settings are those of LoRA on larger models; the learning rate, which is for all
parameters, is ours. Not run on a pod yet.
"""

from ml_collections import ConfigDict

from configs import rl_grpo
from configs.base import finished


def get_config(variant=None):
    config = rl_grpo.get_config()
    config.stage = "nft"
    config.rl.updates, config.accumulation = 1, 4  # of each rollout, as published
    config.rl.limits.kl = 0.5  # of velocities here, whose mean square is about 2; ours
    config.loss = loss()
    return finished(config, variant)


def loss() -> ConfigDict:
    """Every key of `loss` in this stage: dreamlite_jax/objectives/nft.py."""
    return ConfigDict(
        {
            "strength": 1.0,  # the authors' for one reward, and Edit-R1's
            "kl": 2e-5,  # theirs is 1e-4, beside 5 times the rest
            "levels": 2,
            "shift": True,
            "scale": "group",  # or "global"
            "advantage_clip": 5.0,
            "least_spread": 0.0,
        }
    )
