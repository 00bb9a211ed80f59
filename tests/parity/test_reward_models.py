"""How the preference models' packages are called, with doubles in their place.

The doubles have the constructors and methods of HPSv3 1.0.0 and of EditReward's
`inference_edit.py`, and answer as these do: with a tensor of two columns that has a gradient.
"""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from dreamlite_jax.rewards import base
from launch import reward_models

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


def rows(pictures):
    """Their brightness, and something else beside it."""
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    light = torch.tensor([np.asarray(p).mean() for p in pictures], requires_grad=True)
    assert torch.is_inference_mode_enabled()
    return torch.stack([light, -light], 1)


class HPSv3RewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, device="cuda", differentiable=False):
        self.made = config_path, checkpoint_path, device
        LAST.append(self)

    def reward(self, image_paths, prompts):
        assert all(isinstance(prompt, str) for prompt in prompts)
        return rows(image_paths)


class EditRewardInferencer:
    def __init__(
        self,
        config_path=None,
        checkpoint_path=None,
        device="cuda",
        differentiable=False,
        reward_dim="dim1",
        rm_head_type="ranknet_multi_head",
    ):
        self.made = config_path, checkpoint_path, device, reward_dim, rm_head_type
        LAST.append(self)

    def reward(self, prompts, image_src, image_paths):
        assert all(isinstance(prompt, str) for prompt in prompts)
        return rows(image_paths) - rows(image_src)


LAST = []


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    for name, model in (("hpsv3", HPSv3RewardInferencer), ("EditReward", EditRewardInferencer)):
        module = types.ModuleType(name)
        setattr(module, model.__name__, model)
        monkeypatch.setitem(sys.modules, name, module)


def requests(sources):
    images = [np.full((4, 6, 3), value, np.uint8) for value in (10, 200, 90)]
    return base.Requests(images, ["a", "b", "c"], sources, [{}] * 3)


def test_hpsv3():
    reward = reward_models.hpsv3("cpu", None, "weights")
    assert LAST[-1].made == (None, "weights", "cpu")
    assert reward.tasks == ("t2i",)
    np.testing.assert_array_equal(base.scored(reward, requests([None] * 3)), [10, 200, 90])
    assert [example.source for example in reward.examples()] == [None, None]


def test_editreward():
    reward = reward_models.editreward("cpu", "config", "weights")
    assert LAST[-1].made == ("config", "weights", "cpu", "overall_detail", "ranknet_multi_head")
    assert reward.tasks == ("edit",)
    sources = [np.full((4, 6, 3), value, np.uint8) for value in (5, 100, 90)]
    np.testing.assert_array_equal(base.scored(reward, requests(sources)), [5, 100, 0])
    assert all(example.source is not None for example in reward.examples())


@pytest.mark.parametrize("given", [(None, "weights"), ("config", None)])
def test_editreward_needs_its_config_and_weights(given):
    with pytest.raises(ValueError, match="needs --reward_config and --checkpoint"):
        reward_models.editreward("cpu", *given)
