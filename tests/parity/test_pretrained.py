"""Model directories that go to diffusers and come from it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dreamlite_jax import pretrained
from dreamlite_jax.models.unet import UNet
from dreamlite_jax.models.unet_config import DREAMLITE, TINY
from dreamlite_jax.tiny import random_params

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from diffusers import DreamLiteUNetModel  # noqa: E402
from reference import largest_error, reference_model, run_unet, unet_inputs  # noqa: E402

pytestmark = pytest.mark.parity


def test_every_tensor_of_the_released_network_has_its_name():
    with torch.device("meta"):
        settings = {k: v for k, v in DREAMLITE.to_dict().items() if not k.startswith("_")}
        theirs = DreamLiteUNetModel(**settings).state_dict()
    table = pretrained.tensor_table(pretrained.param_shapes(pretrained.UNET, DREAMLITE))
    assert {row.name: row.shape for row in table} == {k: tuple(v.shape) for k, v in theirs.items()}


@pytest.mark.parametrize("shard", [None, "2MB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_diffusers_and_back(shard, dtype, tmp_path):
    """Bit-exact through our parameters, in one file or many."""
    model = reference_model(TINY).to(dtype)
    kw = {"max_shard_size": shard} if shard else {}
    model.save_pretrained(tmp_path / "theirs" / "unet", **kw)
    config, params = pretrained.read(tmp_path / "theirs", pretrained.UNET, dtype=None)
    pretrained.write(tmp_path / "ours", pretrained.UNET, config, params, max_shard_bytes=2 * 10**6)
    assert len(list((tmp_path / "ours" / "unet").glob("*.safetensors"))) > 1
    again = DreamLiteUNetModel.from_pretrained(
        tmp_path / "ours", subfolder="unet", torch_dtype=dtype
    ).state_dict()
    assert again.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert again[name].dtype == dtype
        assert torch.equal(again[name], tensor), name


def test_what_we_write_computes_the_same_in_diffusers(tmp_path):
    params = random_params(pretrained.UNET, TINY, 0)
    pretrained.write(tmp_path, pretrained.UNET, TINY, params)
    model, info = DreamLiteUNetModel.from_pretrained(
        tmp_path, subfolder="unet", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = unet_inputs(TINY, 2, 8, 16, 5)
    ours = jax.jit(lambda p: UNet(TINY).apply({"params": p}, **inputs))(params)
    with torch.no_grad():
        assert largest_error(ours, run_unet(model.eval(), inputs)) < 1e-4


def test_dtypes(tmp_path):
    params = random_params(pretrained.UNET, TINY, 0)
    pretrained.write(tmp_path, pretrained.UNET, TINY, params, dtype=jnp.bfloat16)
    _, kept = pretrained.read(tmp_path, pretrained.UNET, dtype=None)
    _, widened = pretrained.read(tmp_path, pretrained.UNET)
    for written, a, b in zip(*map(jax.tree.leaves, (params, kept, widened)), strict=True):
        assert a.dtype == jnp.bfloat16 and b.dtype == jnp.float32
        np.testing.assert_array_equal(a, np.asarray(written).astype(ml_dtypes.bfloat16))
        np.testing.assert_array_equal(b, np.asarray(a).astype(np.float32))
