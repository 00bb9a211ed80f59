"""From gradients to updates: AdamW, a schedule, masks by regex (optax)."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from dreamlite_jax.train.state import Params

SCHEDULES = ("constant", "linear", "cosine")


class Settings(NamedTuple):
    lr: float = 1e-4  # peak
    schedule: str = "constant"  # after the warm-up: constant, or falling to lr * lr_end
    warmup: int = 0  # steps that the learning rate rises from 0
    decay_from: float = 0.0  # share of the steps after which "linear" and "cosine" begin to fall
    lr_end: float = 0.0  # share of lr that is left when the steps are over
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decayed: str = r"/kernel$"  # regex of the parameters that decay
    clip: float = 1.0  # of the gradient's global norm; 0: none
    trained: str = r""  # regex of the parameters that are trained; the others stay as they are
    moments: str = "float32"  # dtype of the first moment

    def problems(self, steps: int) -> list[str]:
        """What is wrong with them, a line each."""
        found = []
        if self.schedule not in SCHEDULES:
            found.append(f"schedule is {self.schedule!r}, known are {', '.join(SCHEDULES)}")
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                found.append(f"{name} is {getattr(self, name)}, should be positive")
        if not 0 <= self.warmup <= steps:
            found.append(f"warmup is {self.warmup}, should be from 0 to the {steps} steps")
        for name in ("decay_from", "lr_end"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name} is {getattr(self, name)}, should be in [0, 1]")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}, should be in [0, 1)")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"{name} is {getattr(self, name)}, should be 0 or more")
        if self.moments not in ("float32", "bfloat16"):
            found.append(f"moments is {self.moments!r}, known are float32, bfloat16")
        for name in ("decayed", "trained"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                found.append(f"{name} is no regex: {error}")
        return found


def learning_rate(settings: Settings, steps: int) -> optax.Schedule:
    """The learning rate by the number of the update: warm-up, plateau, fall."""
    lr, end = settings.lr, settings.lr * settings.lr_end
    start = max(settings.warmup, int(settings.decay_from * steps))
    left = max(steps - start, 1)
    falls = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, end, left),
        "cosine": optax.cosine_decay_schedule(lr, left, settings.lr_end),
    }
    pieces = [optax.linear_schedule(0.0, lr, settings.warmup)] if settings.warmup else []
    pieces += [optax.constant_schedule(lr), falls[settings.schedule]]
    borders = [settings.warmup, start] if settings.warmup else [start]
    joined = optax.join_schedules(pieces, borders)
    return lambda count: once(joined(count))


def once(scalar: Array) -> Array:
    """A scalar that XLA computes once, not again within the fusion of every parameter it scales.

    Copies of the schedule, the norm's sum and the finite check in a thousand fusions made the
    program ten times as large. XLA's CPU compiler drops barriers before it fuses, so there the
    scalar passes through a loop that it cannot know to run once.
    """

    def looped(x: Array) -> Array:
        bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
        rounds = jnp.minimum(lax.population_count(bits) + 1, 1)  # 1
        start = (0, jnp.zeros_like(x))
        return lax.while_loop(lambda c: c[0] < rounds, lambda c: (c[0] + 1, x), start)[1]

    return lax.platform_dependent(scalar, cpu=looped, default=lax.optimization_barrier)


_SMALL = 4096  # numbers of an array that costs less to copy than a kernel costs to compile


def norm(tree: Any) -> Array:
    """The global norm, `optax.tree.norm`, float32 [], of real arrays.

    XLA's CPU compiler makes several kernels of each array's sum of squares: those of three norms of
    400 parameters took a fifth of a step's compilation. There all small arrays are summed as one.
    """

    def together(tree: Any) -> Array:
        leaves = jax.tree.leaves(tree)
        small = [x.ravel() for x in leaves if x.size <= _SMALL]
        large = [x for x in leaves if x.size > _SMALL]
        return optax.tree.norm([*large, *([jnp.concatenate(small)] if small else ())])

    return lax.platform_dependent(tree, cpu=together, default=optax.tree.norm)


def scale_by_adam(
    beta1: float, beta2: float, eps: float, moments: str
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015, algorithm 1), as `optax.scale_by_adam` but for `once`."""
    plain = optax.scale_by_adam(beta1, beta2, eps, mu_dtype=jnp.dtype(moments))

    def update(grads: Params, state: optax.ScaleByAdamState, params: Params = None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, beta1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, beta2, 2)
        first, second = (once(1 - beta**count) for beta in (beta1, beta2))
        updates = jax.tree.map(lambda m, v: (m / first) / (jnp.sqrt(v / second) + eps), mu, nu)
        mu = optax.tree.cast(mu, jnp.dtype(moments))
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(plain.init, update)


def make_tx(settings: Settings, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019). Clipping is `update.make_update`'s."""
    tx = optax.chain(
        scale_by_adam(settings.beta1, settings.beta2, settings.eps, settings.moments),
        optax.add_decayed_weights(
            settings.weight_decay, lambda params: matching(params, settings.decayed)
        ),
        optax.scale_by_learning_rate(learning_rate(settings, steps)),
    )
    if not settings.trained:
        return tx

    def label(params):
        chosen = matching(params, settings.trained)
        return jax.tree.map(lambda yes: "trained" if yes else "frozen", chosen)

    return optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, label)


def matching(params: Params, regex: str) -> Any:
    """A tree of bools: whether a parameter's path, such as "unet/conv_in/kernel", matches
    somewhere."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: re.search(regex, path_name(path)) is not None, params
    )


def path_name(path: tuple) -> str:
    """A leaf's path with slashes, whatever holds it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
