"""How the processes of one command find each other, on a pod or anywhere."""

from collections.abc import Callable

import jax
from absl import flags

from dreamlite_jax import cli

flags.disclaim_key_flags()  # they are those of the command that calls `define`


def define() -> Callable[[], None]:
    """Defines --coordinator, --processes and --process; returns what joins the other processes,
    where there are any, once the flags are parsed and before JAX is used.

    Raises (what is returned):
      CommandError: some of the three flags are given, but not all; hosts of a pod have not found
        each other.
    """
    coordinator = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0")
    processes = flags.DEFINE_integer("processes", None, "how many processes there are")
    process = flags.DEFINE_integer("process", None, "which of them this one is, from 0")

    def connect() -> None:
        given = (coordinator.value, processes.value, process.value)
        if any(value is not None for value in given):
            if any(value is None for value in given):
                raise cli.CommandError("--coordinator, --processes and --process go together")
            jax.distributed.initialize(*given)
        elif "tpu" in (jax.config.jax_platforms or ""):  # JAX's own choice where there are chips
            join_pod()

    return connect


def join_pod() -> None:
    """Joins the hosts of a TPU pod, whose environment or metadata server says who they are.

    Raises:
      CommandError: the hosts have not found each other.
    """
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError, OSError) as error:  # one host alone may have neither
        if jax.process_count() > 1:
            raise cli.CommandError(
                f"{jax.process_count()} hosts share these TPUs, but have not found each other "
                f"({error}): say --coordinator=HOST:PORT, --processes and --process on each"
            ) from error
