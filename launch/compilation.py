"""Compiled programs that are kept on disk, so that the next process need not compile them."""

import os
from collections.abc import Callable

import jax
from absl import flags

flags.disclaim_key_flags()  # it is that of the command that calls `define`


def define() -> Callable[[], None]:
    """Defines --compilation_cache; the function turns the cache on, before anything is compiled."""
    folder = flags.DEFINE_string(
        "compilation_cache", "~/.cache/dreamlite_jax", "folder for compiled programs; empty: none"
    )

    def use() -> None:
        if folder.value:
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder.value))
            # Hundreds of small ones, a program for each shape, take seconds together.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    return use
