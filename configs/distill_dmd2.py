"""Step distillation: DMD2, from a guided teacher of 28 steps to a student of 4 without guidance.

    python -m launch.train --config=configs/distill_dmd2.py --workdir=runs/distill
    python -m convert.export --workdir=runs/distill --out=models/mobile

Both tasks by halves (Qwen-Image-Flash finds that best). The paper's own stage is DMD2, too, its
numbers are not public: learning rates and the rest are those of public DMD2 runs on flow models of
similar size, marked "ours" where there is none. Not run on a pod yet.
"""

from ml_collections import ConfigDict

from configs import phase3_joint
from configs.base import finished


def get_config(variant=None):
    config = phase3_joint.get_config()
    config.stage = "dmd2"
    config.init_from = "runs/sft"  # QF: the base model teaches better than one after RL
    config.batch_size = 256  # DMD2's for SDXL is 128, SnapGen++'s 512
    config.steps = 50_000  # ours: 10,000 updates of the student, DMD2's for SDXL are 19,000
    config.distill = distill()
    config.loss = loss()
    config.optim.lr = 2e-6  # rCM's for the student
    config.optim.beta1, config.optim.beta2 = 0.0, 0.99  # rCM, SnapGen++
    config.optim.warmup = 100
    config.ema_decay = 0.999  # ours
    config.checkpoint.every = config.sample.every = 1000
    return finished(config, variant)


def distill() -> ConfigDict:
    """Every key of `distill`: dreamlite_jax/train/distillation.py."""
    return ConfigDict(
        {
            "steps": 4,
            "ratio": 5,  # DMD2's for SDXL
            "warmup": 100,  # ours
            "score_lr": 1e-5,  # ours: the fake score has to keep up
            # dreamlite_jax/objectives/flow_matching.py
            "score": {
                "density": "logit_normal",
                "mean": 0.0,
                "std": 1.0,
                "edit_offset": 0.0,
                "shift": True,
                "weight": "unit",
                "weight_changed": False,
            },
        }
    )


def loss() -> ConfigDict:
    """Every key of `loss` in this stage: dreamlite_jax/objectives/dmd2.py."""
    return ConfigDict(
        {
            "guidance": 3.5,  # the release's
            "edit_guidance": 3.5,  # the release's
            "image_guidance": 1.0,  # the release's; 1 saves the teacher a branch
            "jitter": 0.0,
            "least": 0.02,  # DMD2
            "most": 0.98,
            "shift": True,
            "within": False,  # DMD2; TDM True
            "gan": 0.0,  # off at first; DMD2 5e-3
            "gan_score": 0.01,  # DMD2
            "trajectory": 0.0,
            "trajectory_steps": 8,
        }
    )
