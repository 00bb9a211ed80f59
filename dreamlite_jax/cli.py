"""What every command shares: flags that are wrong and errors that users can mend end in one line.

Exit codes: 0 success, 2 wrong use or unusable input (one line on stderr), 130 interrupted.
Anything else is a fault of ours and shows its traceback.
"""

import itertools
import logging as std_logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
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
        # What transformers says wherever PyTorch is not installed, which nothing here needs.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
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


def read_noise(file: str, shape: tuple[int, int, int, int]) -> np.ndarray:
    """The initial latents float32 [N, h, w, c] of a command's --noise.

    Raises:
      CommandError: no readable .npy file, or not of that shape and dtype.
    """
    try:
        with open(file, "rb") as stream:  # np.load would also open a .npz
            noise = np.lib.format.read_array(stream)
    except (OSError, ValueError) as error:
        raise CommandError(f"--noise={file}: not a readable .npy file ({error})") from error
    if noise.shape != shape or noise.dtype != np.float32:
        raise CommandError(
            f"--noise={file}: {noise.dtype} {list(noise.shape)}, expected float32 {list(shape)} "
            "(pictures, height / 8, width / 8, channels)"
        )
    return noise


def fail(message: str) -> None:
    """Ends the process with one line on stderr and exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _without_traceback(message: str) -> str:
    """What ml_collections says of a config's file that raises an error, which it does at length."""
    before, found, after = message.partition("Error whilst parsing config file:")
    return before + after.strip().splitlines()[-1] if found else message


def _unknown_key(message: str) -> str:
    """The key and ml_collections' guess at what was meant, without all the keys there are."""
    plain = message.replace("\\", "")
    key = re.search(r"lookup: ([\w.]+)", plain) or re.search(r"'(?:Key \")?(\w+)", plain)
    guess = re.search(r"Did you mean \"(\w+)\"", message)
    return (key[1] if key else message) + (f"; did you mean {guess[1]}?" if guess else "")


def _parse(argv: list[str]) -> list[str]:
    rest, problem = _read(argv)
    if problem:
        fail("; ".join(_problems(argv, problem)))
    if rest[1:]:
        fail(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    return rest


def _problems(argv: list[str], first: str) -> list[str]:
    """The first problem, and all that is wrong with a config's keys, each taken by itself."""
    keys, others = [], []
    for one, after in itertools.zip_longest(argv, argv[1:], fillvalue="-"):
        if re.match(r"--?(no)?config\.", one):
            keys.append([one] if "=" in one or after.startswith("-") else [one, after])
        elif not (keys and one is keys[-1][-1]):  # the value of the key before it
            others.append(one)
    if _read(others)[1]:
        return [first]
    found = dict.fromkeys(problem for key in keys if (problem := _read([*others, *key])[1]))
    return list(found) if first in found else [first, *found]


def _read(argv: list[str]) -> tuple[list[str], str]:
    """What is left of the arguments behind the flags, and the first thing that is wrong."""
    for name in [name for name in flags.FLAGS if "." in name]:  # a config's keys, read before
        delattr(flags.FLAGS, name)
    before, sys.argv = sys.argv, argv  # where ml_collections looks for these
    try:
        return flags.FLAGS(argv), ""
    except flags.Error as error:
        return [], f"{_without_traceback(str(error))} (--help lists the flags)"
    except (AttributeError, KeyError) as error:
        if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        return [], f"--config has no key {_unknown_key(str(error))} (see configs/base.py)"
    except OSError as error:
        return [], str(error)
    finally:
        sys.argv = before
