"""Operations of two arrays, linear in each, that have a form of their own on the CPU.

Each is a JAX primitive, because a choice of platform within a function with a hand-written gradient
would leave either forward mode or second derivatives behind. Where every transpose of such an
operation is another one of them, every order and mode of differentiation works on every platform.
"""

from collections.abc import Callable

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Form = Callable[..., Array]  # (left, right, **static) -> the result


def operation(
    name: str, abstract: Callable, cpu: Form, default: Form, batched: Callable
) -> Primitive:
    """A primitive with two lowerings; `abstract` makes the result's aval of the operands' and
    `batched(primitive, args, dims, **static)` is its rule under vmap."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(abstract)

    def evaluated(left: Array, right: Array, **static) -> Array:
        return jax.jit(primitive.bind, static_argnames=tuple(static))(left, right, **static)

    primitive.def_impl(evaluated)
    mlir.register_lowering(primitive, mlir.lower_fun(default, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")
    batching.primitive_batchers[primitive] = lambda args, dims, **static: batched(
        primitive, args, dims, **static
    )
    return primitive


def transposes(primitive: Primitive, by_left: Form, by_right: Form) -> None:
    """Both gradients, `(cotangent, left, right, **static)`; the operand that is asked for has only
    an aval."""
    ad.defbilinear(primitive, by_left, by_right)
