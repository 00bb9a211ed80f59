"""What every command shares: flags that are wrong and errors that users can mend end in one line.

Exit codes: 0 success, 2 wrong use or unusable input (one line on stderr), 130 interrupted.
Anything else is a fault of ours and shows its traceback.
"""

import logging as std_logging
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from dreamlite_jax.errors import UserError


class CommandError(Exception):
    """Wrong use of a command: one line that says what to do."""


# OSError: a full disk, a folder without permission; the message names the file.
_EXPECTED = (CommandError, UserError, OSError)


def run(main: Callable[[], Any], argv: list[str] | None = None) -> None:
    """Parses the flags of a command and runs it; never returns.

    Args:
      main: the command; reads `flags.FLAGS`.
      argv: with the program's name first; None: the process's own.
    """

    def guarded(_):
        # What JAX reports of accelerators that are not there.
        std_logging.getLogger("jax._src.xla_bridge").setLevel(std_logging.WARNING)
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            main()
        except _EXPECTED as error:
            fail(str(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, argv, flags_parser=_parse)


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def fail(message: str) -> None:
    """Ends the process with one line on stderr and exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        fail(f"{error} (--help lists the flags)")
    if rest[1:]:
        fail(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    return rest
