"""Reinforcement learning: HPSv3 for pictures and EditReward for edits, from the fine-tuned model.

    python -m launch.serve_reward --reward=hpsv3 --host=0.0.0.0 --port=8001
    python -m launch.serve_reward --reward=editreward --host=0.0.0.0 --port=8002 \\
      --reward_config=EditReward/config/EditReward-MiMo-VL-7B-SFT-2508.yaml --checkpoint=DIR
    python -m launch.train --config=configs/rl_grpo.py --workdir=runs/rl_grpo

Each server lives in an environment of its own. Every process asks them at `rl.rewards`' addresses,
so on several hosts these must name the servers' host:

    python -m launch.train --config=configs/rl_grpo.py --workdir=runs/rl_grpo \\
      '--config.rl.rewards[0].reward=http://HOST:8001' \\
      '--config.rl.rewards[1].reward=http://HOST:8002'

GRPO with coefficients-preserving noise in a window of early steps, GRPO-Guard's ratio, no guidance
inside the policy: the published settings are those of LoRA on larger models, so the learning rate,
which is for all parameters, is ours. The paper's own stage is ReFL on the same two rewards. Not run
on a pod yet.
"""

from ml_collections import ConfigDict

from configs.base import base, finished


def get_config(variant=None):
    config = base()
    config.stage = "grpo"
    config.model, config.unet = "models/dreamlite", "dreamlite"
    config.init_from = "runs/sft"
    config.image_size = 512
    config.overrides = {"sample_size": 128}  # still a model of 1024 px, though it learns at 512
    config.remat = "full"
    config.data = (
        {"source": "data/sft_t2i", "task": "t2i", "weight": 1.0},
        {"source": "data/sft_edit", "task": "edit", "weight": 1.0},
    )
    config.steps = 1000
    config.batch_size = 1536  # pictures of a rollout; Flow-GRPO: 48 prompts x 24
    config.accumulation = 2
    config.rl = rollouts()
    config.rl.rewards = (
        {"reward": "http://localhost:8001", "name": "hpsv3", "task": "t2i"},
        {"reward": "http://localhost:8002", "name": "editreward", "task": "edit"},
        {"reward": "saturation", "weight": 0.0},
        {"reward": "sharpness", "weight": 0.0},
    )
    config.loss = loss()
    config.optim.lr = 1e-5
    config.optim.warmup = 20
    config.ema_decay = 0.99
    config.patience = 0
    config.checkpoint.every = config.sample.every = 50
    config.log.every = 5
    # As it was drawn while learning: the policy needs no guidance any more.
    config.sample.steps, config.sample.guidance = 10, 1.0
    return finished(config, variant)


def rollouts() -> ConfigDict:
    """Every key of `rl`: dreamlite_jax/train/rollouts.py, reinforcement.py."""
    return ConfigDict(
        {
            "group": 24,  # pictures of each prompt
            "updates": 2,  # from each rollout, of a part of its pictures each
            "parts": 2,  # a rollout's pictures are drawn in so many parts
            "guidance": 1.0,  # inside the policy; 1: none
            "shared_noise": False,  # whether a group begins at the same noise; DanceGRPO: True
            "process": {  # dreamlite_jax/objectives/grpo.py
                "steps": 10,
                "form": "cps",  # or "flow", Flow-GRPO's own, with level 0.7
                "level": 0.8,
                "window": 2,  # random steps; 0: all but the last
                "order": "random",  # or "sliding"
                "within": 0.5,
                "every": 25,
            },
            "rewards": (),  # dreamlite_jax/rewards/opening.py
            # A run ends, with a message and a checkpoint, beyond these.
            "limits": {"kl": 0.1, "dropped": 0.95, "spread": 1e-3, "diversity": 0.02},
        }
    )


def loss() -> ConfigDict:
    """Every key of `loss` in this stage: dreamlite_jax/objectives/grpo.py."""
    return ConfigDict(
        {
            # GRPO-Guard's for preference rewards is 4e-6. Ours: in bfloat16 rounding alone moves
            # the first update's ratios, of a small network by 4e-5 to 8e-5 and at most 3e-4, and
            # 4e-6 would clip more than a third of its steps.
            "clip": 5e-4,
            "kl": 0.01,  # Flow-GRPO's for the same
            "scale": "group",  # or "global"
            "advantage_clip": 5.0,
            "least_spread": 0.0,
            "guard": True,
        }
    )
