"""Checksums of arrays, computed where they are and the same for every sharding of them."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Of each array 32 bits that depend on all of its bits, and on nothing else.

    Every device sums what it holds; the devices exchange nothing, as thousands of small programs
    that do are slow on a pod and can wait for each other in vain on CPUs.
    """
    parts = [_parts(array) for array in arrays.values()]  # all dispatched, then read
    sums = [sum(map(int, found)) % 2**32 for found in jax.device_get(parts)]
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(np.array(sums, np.uint32)).sum(0, dtype=np.uint32)
    return dict(zip(arrays, map(int, sums), strict=True))


def _parts(array: jax.Array) -> list[jax.Array]:
    """The checksums of this process's shards; of copies, only the first one's counts."""
    shape = jax.eval_shape(_words, array).shape
    strides = [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]
    found = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            starts = [
                part.indices(size)[0] for part, size in zip(shard.index, array.shape, strict=True)
            ]
            starts += [0] * (len(shape) - len(starts))
            found.append(_checksum(shard.data, np.array([starts, strides], np.uint32)))
    return found


@jax.jit
def _checksum(part: jax.Array, place: jax.Array) -> jax.Array:
    """Sum of the words times odd numbers that go up with their index in the array, modulo 2^32.

    Addition modulo 2^32 knows no order, hence the sharding does not matter; a change of any one
    word changes the sum, as an odd number has an inverse.

    Args:
      part: of an array.
      place: uint32 [2, axes]; for each axis of its words, where the part starts, and the stride.
    """
    words = _words(part)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += (along + place[0, axis]) * place[1, axis]
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits of an array as uint32; 64-bit numbers and complex ones give two along new last
    axes."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], -1)
    if array.dtype == bool:
        return array.astype(jnp.uint32)
    info = jnp.finfo if jnp.issubdtype(array.dtype, jnp.floating) else jnp.iinfo
    unsigned = f"uint{min(info(array.dtype).bits, 32)}"
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
