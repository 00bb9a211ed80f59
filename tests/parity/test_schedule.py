"""Our sigmas and random steps against diffusers' scheduler and pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.diffusion import flow, sde

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("settings", [{"max_shift": 1.16}, {"base_shift": 0.3}, {}])
@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("side", [(8, 12), (32, 32), (128, 160)])
def test_sigmas_agree(settings, steps, side):
    from diffusers.pipelines.dreamlite.pipeline_dreamlite import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **settings)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(side[0] * side[1] // 4, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    shift = flow.ResolutionShift.from_scheduler(dict(scheduler.config))
    ours = flow.sigma_list(steps, flow.resolution_mu(*side, shift))
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=3e-7)
    np.testing.assert_allclose(flow.timestep(ours[:-1]), scheduler.timesteps.numpy(), rtol=3e-7)


def test_a_fixed_shift_agrees():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5, sigmas=np.linspace(1.0, 1 / 5, 5))
    shift = flow.ResolutionShift.from_scheduler(dict(scheduler.config))
    ours = flow.sigma_list(5, flow.resolution_mu(16, 16, shift))
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=3e-7)


def test_random_steps_of_level_1_are_those_of_stochastic_sampling(monkeypatch):
    """Given the same fresh noise."""
    import torch
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as theirs

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.7, stochastic_sampling=True)
    scheduler.set_timesteps(5, sigmas=np.linspace(1.0, 1 / 5, 5))
    sigmas = scheduler.sigmas.numpy()
    keys = jax.random.split(jax.random.key(3), 2)
    start = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)

    def velocity(x, sigma):
        return jnp.sin(3 * x) - sigma * x

    def drawn(step):
        draw = [jax.random.normal(jax.random.fold_in(key, step), start.shape[1:]) for key in keys]
        return torch.from_numpy(np.array(draw))

    x = torch.from_numpy(start)
    for step, timestep in enumerate(scheduler.timesteps):
        monkeypatch.setattr(theirs, "randn_tensor", lambda *a, step=step, **kw: drawn(step))
        v = torch.from_numpy(np.array(velocity(jnp.asarray(x.numpy()), sigmas[step])))
        x = scheduler.step(v, timestep, x).prev_sample
    ours, _ = sde.sample(velocity, start, sigmas, "cps", 1.0, 0, 4, keys)
    np.testing.assert_allclose(ours, x.numpy(), atol=2e-5)
