"""Checksums of arrays, computed where they are and the same for every sharding of them."""

import math
from collections.abc import Mapping
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Of each array 32 bits that depend on all of its bits, and on nothing else.

    An array is spread over all processes, or it is one that each of them has for itself. Every
    device sums what it holds; the devices exchange nothing, as thousands of small programs
    that do are slow on a pod and can wait for each other in vain on CPUs.
    """
    parts = [_parts(array) for array in arrays.values()]  # all dispatched, then read
    sums = [sum(map(int, found)) % 2**32 for found in jax.device_get(parts)]
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(np.array(sums, np.uint32))
        own = [array.is_fully_addressable for array in arrays.values()]
        sums = np.where(own, sums, found.sum(0, dtype=np.uint32))
    return dict(zip(arrays, map(int, sums), strict=True))


def _parts(array: jax.Array) -> list[jax.Array]:
    """The checksums of this process's shards; of copies, only the first one's counts."""
    shape = array.shape + _words(np.zeros((), array.dtype), np).shape
    strides = [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]
    found = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            starts = [
                part.indices(size)[0] for part, size in zip(shard.index, array.shape, strict=True)
            ]
            starts += [0] * (len(shape) - len(starts))
            place = np.array([starts, strides], np.uint32)
            # What a CPU holds is the host's already, and a program for each shape takes seconds.
            if shard.device.platform == "cpu":
                found.append(_sum(_words(np.asarray(shard.data), np), place, np))
            else:
                found.append(_checksum(shard.data, place))
    return found


@jax.jit
def _checksum(part: jax.Array, place: jax.Array) -> jax.Array:
    return _sum(_words(part), place)


def _sum(words: jax.Array, place: jax.Array, xp: ModuleType = jnp) -> jax.Array:
    """Sum of the words times odd numbers that go up with their index in the array, modulo 2^32.

    Addition modulo 2^32 knows no order, hence the sharding does not matter; a change of any one
    word changes the sum, as an odd number has an inverse.

    Args:
      words: uint32, of a part of an array.
      place: uint32 [2, axes]; for each axis of the words, where the part starts, and the stride.
    """
    index = xp.zeros((), xp.uint32)
    for axis, size in enumerate(words.shape):
        along = xp.arange(size, dtype=xp.uint32) + place[0, axis]
        index = index[..., None] + along * place[1, axis]
    return xp.sum(words * (2 * index + 1), dtype=xp.uint32)


def _words(array: jax.Array, xp: ModuleType = jnp) -> jax.Array:
    """The bits of an array as uint32; 64-bit numbers and complex ones give two along new last
    axes."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = xp.stack([array.real, array.imag], -1)
    if array.dtype == bool:
        return array.astype(xp.uint32)
    info = jnp.finfo if jnp.issubdtype(array.dtype, jnp.floating) else jnp.iinfo
    bits = info(array.dtype).bits
    if xp is jnp:
        words = jax.lax.bitcast_convert_type(array, f"uint{min(bits, 32)}")
    elif bits == 64:
        words = np.asarray(array, order="C")[..., None].view(np.uint32)
    else:  # a number of fewer than 8 bits has a byte of its own, and its sign fills that
        words = np.asarray(array, order="C").view(f"uint{8 * array.itemsize}") & (2**bits - 1)
    return words.astype(xp.uint32)
