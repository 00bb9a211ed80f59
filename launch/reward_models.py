"""Published preference models as rewards; their packages are imported only when one is asked for.

Both pin versions of transformers that neither each other nor this project can share: each lives in
an environment of its own, which needs nothing of this project's but NumPy, Pillow and absl, and is
served from a checkout by `launch.serve_reward`. `tests/preference_models.py` runs both packages so,
on small networks.
"""

from typing import Any

from PIL import Image

from dreamlite_jax.rewards.base import EDIT, T2I, Reward
from dreamlite_jax.rewards.shapes import examples


def hpsv3(device: str = "cuda", config: str | None = None, checkpoint: str | None = None) -> Reward:
    """HPSv3 (Ma et al. 2025), human preference for generated pictures: about 10 to 13 for strong
    models, unbounded. `pip install hpsv3==1.0.0 matplotlib tensorboard`, the last two of which it
    needs without saying so; without a checkpoint it downloads its own."""
    from hpsv3 import HPSv3RewardInferencer

    model = HPSv3RewardInferencer(config_path=config, checkpoint_path=checkpoint, device=device)

    def score(images, prompts, sources, metadata) -> list[float]:
        # By keyword: versions differ in the order. Of mean and deviation the mean counts.
        return _first(model.reward, image_paths=_pictures(images), prompts=list(prompts))

    return Reward("hpsv3", score, tasks=(T2I,), examples=_of(edits=False))


def editreward(device: str = "cuda", config: str | None = None, checkpoint: str | None = None):
    """EditReward (TIGER-Lab 2025), instruction following and quality of an edit: two passes of a 7B
    model. From its repository; config and checkpoint are needed."""
    from EditReward import EditRewardInferencer

    if not (config and checkpoint):
        raise ValueError("editreward needs --reward_config and --checkpoint")
    model = EditRewardInferencer(
        config_path=config,
        checkpoint_path=checkpoint,
        device=device,
        reward_dim="overall_detail",
        rm_head_type="ranknet_multi_head",
    )

    def score(images, prompts, sources, metadata) -> list[float]:
        return _first(
            model.reward,
            prompts=list(prompts),
            image_src=_pictures(sources),
            image_paths=_pictures(images),
        )

    return Reward("editreward", score, tasks=(EDIT,), examples=_of(edits=True))


MODELS = {"hpsv3": hpsv3, "editreward": editreward}


def _pictures(images) -> list[Image.Image]:
    """Both packages take Pillow's pictures where they say paths."""
    return [Image.fromarray(image) for image in images]


def _first(model: Any, **inputs: Any) -> list[float]:
    """The first of each row's values, without gradients: the packages would keep their graphs."""
    import torch

    with torch.inference_mode():
        return [float(row[0]) for row in model(**inputs)]


def _of(edits: bool):
    return lambda: [e for e in examples() if (e.source is not None) == edits]
