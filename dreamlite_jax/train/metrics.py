"""What a run reports: TensorBoard, `metrics.jsonl`, pictures, and the line on the console.

Steps are counted in updates, times in seconds, rates over an interval that the caller chooses.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from dreamlite_jax.data.pictures import replaced_file, write_png

FILE = "metrics.jsonl"
# Keys of what depends on the clock; without them two runs of the same config write the same file.
TIME_PREFIX = "time/"

# Peak bfloat16 FLOP/s, dense, of what JAX calls a device, by `device_kind`. For TPUs the pages
# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} give it for a chip.
PEAK_FLOPS = {
    "TPU v4": 275e12,  # both cores are one device
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p; both cores are one device
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # its two cores are two devices
    "NVIDIA H100 80GB HBM3": 989e12,  # NVIDIA's data sheet, SXM: 1979e12 with sparsity
    "NVIDIA H100 PCIe": 756e12,  # the same: 1513e12 with sparsity
}


# --- Rates ----------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """How fast a run was over an interval."""

    steps_per_second: float
    images_per_second: float
    mfu: float | None  # model FLOPs utilization, 0..1; None where the peak is not known
    seconds_left: float

    def metrics(self) -> dict[str, float]:
        """As they are written beside a run's metrics."""
        named = {f"{TIME_PREFIX}{name}": value for name, value in self._asdict().items()}
        return {name: value for name, value in named.items() if value is not None}


class Interval(NamedTuple):
    """The time since `step`: where rates are measured from."""

    step: int
    start: float  # time.monotonic()
    left_out: float = 0.0
    making: float = 0.0  # seconds in which batches were made of others: rollouts

    def without(self, seconds: float) -> "Interval":
        """The same, with a pause left out: compilation, a checkpoint, evaluation."""
        return self._replace(left_out=self.left_out + seconds)

    def plus_making(self, seconds: float) -> "Interval":
        """The same, with so many seconds more in which a batch was made of another."""
        return self._replace(making=self.making + seconds)

    def making_share(self, now: float) -> float:
        """What share of the time up to `now` went into making batches."""
        return self.making / self._passed(now)

    def rates(
        self,
        step: int,
        now: float,
        steps: int,
        batch_size: int,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
    ) -> Rates:
        """Rates from the interval's step to `step`.

        Args:
          step: steps done at the time `now`, of time.monotonic().
          steps: where the run ends.
          batch_size: images per step, over all devices.
          flops_per_step: of the model, forward and backward, over the whole batch.
          peak_flops: of all devices together, see `peak_flops`.
        """
        speed = (step - self.step) / self._passed(now)
        known = flops_per_step is not None and peak_flops is not None
        return Rates(
            steps_per_second=speed,
            images_per_second=speed * batch_size,
            mfu=flops_per_step * speed / peak_flops if known else None,
            seconds_left=(steps - step) / speed if speed > 0 else math.inf,
        )

    def _passed(self, now: float) -> float:
        return max(now - self.start - self.left_out, 1e-9)


def peak_flops(devices: list[jax.Device] | None = None) -> float | None:
    """Peak bfloat16 FLOP/s of the devices together (default: all); None if one is not known."""
    peaks = [PEAK_FLOPS.get(device.device_kind) for device in devices or jax.devices()]
    return None if None in peaks else sum(peaks)


def progress_line(step: int, steps: int, metrics: Mapping[str, Any], rates: Rates) -> str:
    """step 1200/50000  loss 0.123  3.41 steps/s  218 images/s  mfu 31 %  2:15:04 left

    Args:
      metrics: what to show between step and speed, by name; others stay in the files.
    """
    parts = [f"step {step}/{steps}"]
    parts += [f"{name} {float(value):.4g}" for name, value in metrics.items()]
    if not rates.steps_per_second:  # the first step was compiled; how long it took says nothing
        return "  ".join(parts)
    parts += [f"{_short(rates.steps_per_second)} steps/s"]
    parts += [f"{_short(rates.images_per_second)} images/s"]
    if rates.mfu is not None:
        parts.append(f"mfu {100 * rates.mfu:.0f} %")
    parts.append(f"{_clock(rates.seconds_left)} left")
    return "  ".join(parts)


def _short(value: float) -> str:
    """Three digits, never an exponent."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(digits, 0), 6)}f}"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


# --- Files ----------------------------------------------------------------------------------------


class Writer:
    """Writes a run's metrics and pictures, on the first process only; elsewhere it does nothing.

    `metrics.jsonl` has one object a line: the step, the metrics, and under `time/` what depends on
    the clock. What belongs to a step is written before that step's checkpoint is saved; a run that
    was interrupted then ends with the file of one that was not.

    TensorBoard's files lie in `tensorboard/`, pictures in `samples/`.
    """

    def __init__(self, workdir: str | os.PathLike, resumed_at: int | None = None):
        """
        Args:
          workdir: on a file system that can append to files.
          resumed_at: the step of the checkpoint that was restored: what stands in the files of
            later steps is cut away. None for a run from the start, which begins new files.
        """
        self.workdir = Path(workdir)
        self._events = self._lines = None
        if jax.process_index() != 0:
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        _cut(self.workdir / FILE, resumed_at)
        self._lines = (self.workdir / FILE).open("ab", buffering=0)
        self._events = _event_file(self.workdir / "tensorboard")
        # TensorBoard drops what earlier files hold of this step and later ones.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first = 0 if resumed_at is None else resumed_at + 1
        self._events.add_event(
            event_pb2.Event(wall_time=time.time(), step=first, session_log=start)
        )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes scalars: numbers, or arrays of no axes (which are waited for)."""
        if self._events is None:
            return
        values = {k: _number(k, v) for k, v in jax.device_get(dict(metrics)).items()}
        line = {"step": int(step), **values, f"{TIME_PREFIX}unix": round(time.time(), 3)}
        self._append(json.dumps({k: _json(v) for k, v in line.items()}).encode() + b"\n")
        scalars = [summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._add(step, scalars)

    def write_images(self, step: int, name: str, picture: np.ndarray | Image.Image) -> None:
        """Writes a picture, uint8 [H, W, 3], e.g. a contact sheet: samples/<step>_<name>.png."""
        if self._events is None:
            return
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        file = self.workdir / "samples" / f"{step:07d}_{name.replace('/', '-')}.png"
        write_png(file, image)
        shown = summary_pb2.Summary.Image(
            height=image.height,
            width=image.width,
            colorspace=3,
            encoded_image_string=file.read_bytes(),
        )
        self._add(step, [summary_pb2.Summary.Value(tag=name, image=shown)])

    def flush(self) -> None:
        """Everything written so far is in the files after this."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Idempotent; nothing can be written afterwards."""
        if self._events is not None:
            self._events.close()
            self._lines.close()
            self._events = self._lines = None

    def _append(self, line: bytes) -> None:
        with _named(self.workdir / FILE):
            while line:
                line = line[self._lines.write(line) :]

    def _add(self, step: int, values: list[summary_pb2.Summary.Value]) -> None:
        summary = summary_pb2.Summary(value=values)
        with _named(self.workdir / "tensorboard"):
            self._events.add_event(
                event_pb2.Event(wall_time=time.time(), step=int(step), summary=summary)
            )


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors of a file that is open already do not name it."""
    try:
        yield
    except OSError as error:
        said = f"{error.strerror} (checkpoints are intact)"
        raise OSError(error.errno, said, str(file)) from error


def read_metrics(workdir: str | os.PathLike, times: bool = True) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; without `times` only what does not depend on the clock.

    A last line that a kill has cut short is left out. Values that are no finite numbers are the
    strings "nan", "inf" and "-inf", which `float` reads.
    """
    return [
        {k: v for k, v in values.items() if times or not k.startswith(TIME_PREFIX)}
        for _, values in _lines(Path(workdir) / FILE)
    ]


def _event_file(folder: Path) -> EventFileWriter:
    """A new file of events, behind all others of the folder.

    TensorBoard reads files in the order of their names. These begin with the second, but go on with
    the process and a number without leading zeros: two of one second may be read in either order.
    """
    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)
    return EventFileWriter(str(folder), flush_secs=30)


def _cut(file: Path, resumed_at: int | None) -> None:
    """Takes the future that is given up, and a truncated last line, out of a file of metrics."""
    if not file.exists():
        return
    kept = () if resumed_at is None else _lines(file)
    with replaced_file(file) as stream:
        for line, values in kept:
            if values["step"] <= resumed_at:
                stream.write(line)


def _lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Whole lines and what they say."""
    for line in file.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # what a kill or a power failure leaves
            if line.endswith(b"\n"):
                yield line, json.loads(line)


def _number(name: str, value: Any) -> int | float:
    """A Python number; of a float32 the shortest that gives it back."""
    array = np.asarray(value)
    if array.shape:
        raise ValueError(f"the metric {name} has shape {array.shape}, expected a scalar")
    return int(array) if array.dtype.kind in "biu" else float(str(array[()]))


def _json(value: int | float) -> int | float | str:
    return value if math.isfinite(value) else str(value)
