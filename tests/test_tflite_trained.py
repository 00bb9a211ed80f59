"""The files of networks that have learnt something: activations larger than those of random ones,
weights no longer independent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convert import lowering, manifest, parts, verify
from dreamlite_jax import pretrained, system, tiny
from dreamlite_jax.models import unet_config
from dreamlite_jax.models.qwen3_vl.model import blank_inputs

CONFIG = tiny.config(mobile=True)._replace(unet=unet_config.NANO)
STEPS, TOKENS = 40, 12


@functools.cache
def trained(network):
    """Parameters of a network after steps of Adam towards random outputs, and the losses."""
    component, config = system.NETWORKS[network], getattr(CONFIG, network)
    rng, module = np.random.default_rng(1), component.module(config)

    def drawn(leaf):
        return rng.standard_normal(leaf.shape, np.float32) if leaf.dtype == jnp.float32 else leaf

    example = jax.tree.map(drawn, component.example(config))
    if component is pretrained.TEXT_ENCODER:
        ids = rng.integers(0, 256, (2, TOKENS), np.int32)
        places = jnp.broadcast_to(jnp.arange(TOKENS), (2, 3, TOKENS))
        example = ({**blank_inputs(config, 2, TOKENS), "input_ids": ids, "position_ids": places},)
    params, adam, losses = tiny.random_params(component, config), optax.adam(1e-2), []
    target = drawn(jax.eval_shape(lambda p: module.apply({"params": p}, *example), params))

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.mean((module.apply({"params": params}, *example) - target) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = adam.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state = adam.init(params)
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    return jax.tree.map(np.asarray, params), losses


@pytest.mark.parametrize("name", parts.PARTS)
def test_cpu_computes_what_jax_computes(name, tmp_path):
    params, losses = trained(parts.PARTS[name])
    assert losses[-1] < losses[0] / 2
    (graph,) = parts.part(name, CONFIG, params, 32, 64, (12,), prompt_length=10)
    lowering.write([graph], tmp_path / "f.tflite")
    case = verify.case(name, graph, CONFIG, params)
    (output,) = verify.run(tmp_path / "f.tflite", graph.signature, [case.inputs])
    assert manifest.psnr(output, case.expected) >= verify.DEMANDS["cpu", "fp32"]
