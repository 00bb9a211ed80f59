"""What `convert.verify` starts to run a .tflite file: LiteRT and NumPy alone, for a quick start."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

from convert.litert import CompiledModel, StillCompilingError
from dreamlite_jax.train import signals

INPUTS, OUTPUTS = "inputs.npz", "outputs.npz"


def main(
    file: str, signature: str, accelerator: str, precision: str, folder: str, parent: int
) -> None:
    """Runs a file for each of the inputs "0/name", "1/name", ... of the folder's INPUTS; OUTPUTS
    gets their outputs "0", "1", ..."""
    leave_with(parent)
    with np.load(Path(folder) / INPUTS) as arrays:
        inputs: dict[int, dict] = {}
        for key in arrays.files:
            i, name = key.split("/", 1)
            inputs.setdefault(int(i), {})[name] = arrays[key]
    try:
        model = CompiledModel(os.path.abspath(file), signature, accelerator, precision)
        outputs = {str(i): next(iter(model(**one).values())) for i, one in inputs.items()}
    except StillCompilingError:
        os._exit(signals.EXIT_TO_RESUME)  # what is compiled is kept
    np.savez(Path(folder) / OUTPUTS, **outputs)
    os._exit(0)  # the driver's threads may outlive the interpreter, which ends badly


def leave_with(parent: int) -> None:
    """Ends this process soon after its parent of that number, however that one was ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.write(2, b"the process that asked for this one has ended\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
