"""How the processes of one command find each other, on a pod or anywhere."""

import os
from collections.abc import Callable

import jax
from absl import flags

from dreamlite_jax import cli

flags.disclaim_key_flags()  # they are those of the command that calls `define`


def define() -> Callable[[], None]:
    """Defines --coordinator, --processes and --process; returns what joins the other processes,
    where there are any, once the flags are parsed and before JAX is used.

    Raises (what is returned):
      CommandError: some of the three flags are given, but not all.
    """
    coordinator = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0")
    processes = flags.DEFINE_integer("processes", None, "how many processes there are")
    process = flags.DEFINE_integer("process", None, "which of them this one is, from 0")

    def connect() -> None:
        given = (coordinator.value, processes.value, process.value)
        # Where there is no TPU, libtpu leaves a sentence there for whoever inherits it.
        hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
        if any(value is not None for value in given):
            if any(value is None for value in given):
                raise cli.CommandError("--coordinator, --processes and --process go together")
            jax.distributed.initialize(*given)
        elif "," in hosts and " " not in hosts:
            jax.distributed.initialize()  # a TPU pod's environment says the rest

    return connect
