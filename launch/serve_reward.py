"""Hosts a reward for training runs elsewhere, in an environment of its own.

    python -m launch.serve_reward --reward=hpsv3 --port=8001
    python -m launch.serve_reward --reward=editreward --port=8002 \\
      --reward_config=EditReward/config/EditReward-MiMo-VL-7B-SFT-2508.yaml --checkpoint=DIR
    python -m launch.serve_reward --reward=mine:beauty --port=8003

`mine:beauty` is a function (images, prompts, sources, metadata) -> scores in mine.py, or a
`rewards.base.Reward` with its range and examples: pairs of pictures of which the first has to score
higher, with which every run tests it before its first step. A function alone is tested with
pictures of shapes, which have to score higher than noise. Needs NumPy, Pillow and absl-py; run it
from a checkout. Runs name it as {"reward": "http://HOST:8001"}; dreamlite_jax/rewards/protocol.py
says what is spoken. There is no password: keep it within a network that you trust.
"""

import importlib
import os
import sys

from absl import flags

from dreamlite_jax import cli
from dreamlite_jax.rewards import serving
from dreamlite_jax.rewards.base import Reward, self_test
from dreamlite_jax.rewards.opening import BUILT_IN
from launch.reward_models import MODELS

REWARD = flags.DEFINE_string(
    "reward", None, f"{', '.join((*MODELS, *BUILT_IN))}, or MODULE:NAME", required=True
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen at; 0.0.0.0: all")
PORT = flags.DEFINE_integer("port", 8001, "0: a free one", lower_bound=0, upper_bound=65535)
DEVICE = flags.DEFINE_string("device", "cuda", "of a preference model")
SETTINGS = flags.DEFINE_string("reward_config", None, "a preference model's config file")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "a preference model's weights")


def main() -> None:
    reward = find(REWARD.value)
    if reward.examples is not list:  # a function that brings none is tested by its clients
        self_test(reward)
    made = serving.server(reward, HOST.value, PORT.value)
    host, port = made.server_address[:2]
    print(f"{reward.name} at http://{host}:{port}", flush=True)
    with made:
        made.serve_forever()


def find(name: str) -> Reward:
    """The reward of a name."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        if name in MODELS:
            return MODELS[name](DEVICE.value, SETTINGS.value, CHECKPOINT.value)
        module, colon, attribute = name.partition(":")
        if not colon:
            known = ", ".join((*MODELS, *BUILT_IN))
            raise cli.CommandError(f"--reward={name}: known are {known}, and MODULE:NAME")
        sys.path.insert(0, os.getcwd())
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise cli.CommandError(f"--reward={name}: {error}") from error
    if isinstance(found, Reward):
        return found
    if not callable(found):
        raise cli.CommandError(f"--reward={name}: neither a function nor a Reward")
    return Reward(attribute, found)


if __name__ == "__main__":
    cli.run(main)
