"""What a run reports: files that can be read back, and that an interruption does not change."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreamlite_jax.train import metrics
from dreamlite_jax.train.metrics import Interval, Writer


def tensorboard(workdir) -> EventAccumulator:
    read = EventAccumulator(str(workdir / "tensorboard"))
    read.Reload()
    return read


def run(workdir, steps, resumed_at=None):
    """Writes metrics that depend on the step alone, and a speed that does not."""
    with Writer(workdir, resumed_at) as writer:
        for step in steps:
            loss = jnp.float32(1) / (step + 1)
            writer.write(step, {"loss": loss, "lr": 1e-4, "time/steps_per_second": 3.0 + loss})


def test_what_is_written_is_read_back(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write(0, {"loss": np.float32(0.1), "lr": jnp.bfloat16(0.5), "count": jnp.int32(3)})
        writer.write(10, {"loss": np.float32("nan"), "time/mfu": 0.25})
    lines = metrics.read_metrics(tmp_path, times=False)
    assert lines == [
        {"step": 0, "loss": 0.1, "lr": 0.5, "count": 3},
        {"step": 10, "loss": "nan"},
    ]
    text = (tmp_path / metrics.FILE).read_text()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in text.splitlines()]
    assert metrics.read_metrics(tmp_path)[1]["time/mfu"] == 0.25

    read = tensorboard(tmp_path)
    assert set(read.Tags()["scalars"]) == {"loss", "lr", "count", "time/mfu"}
    first, second = read.Scalars("loss")
    assert (first.step, first.value) == (0, np.float32(0.1))
    assert second.step == 10 and math.isnan(second.value)


def test_pictures(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    with Writer(tmp_path) as writer:
        writer.write_images(1200, "ema/grid", picture)
        writer.write_images(2400, "ema/grid", Image.fromarray(picture))
    for step in (1200, 2400):
        with Image.open(tmp_path / "samples" / f"{step:07d}_ema-grid.png") as image:
            np.testing.assert_array_equal(image, picture)
    shown = tensorboard(tmp_path).Images("ema/grid")
    assert [(image.step, image.width, image.height) for image in shown] == [
        (1200, 20, 12),
        (2400, 20, 12),
    ]


def test_an_interrupted_run_writes_the_same(tmp_path):
    run(tmp_path / "whole", range(0, 100, 10))
    broken = tmp_path / "broken"
    run(broken, range(0, 60, 10))
    with (broken / metrics.FILE).open("a") as file:
        file.write('{"step": 60, "lo')  # killed while writing
    run(broken, range(40, 100, 10), resumed_at=35)
    lines = metrics.read_metrics(broken, times=False)
    assert lines == metrics.read_metrics(tmp_path / "whole", times=False)
    assert len(lines) == 10
    assert not [file for file in broken.iterdir() if file.name.startswith(".")]
    assert [point.step for point in tensorboard(broken).Scalars("loss")] == [*range(0, 100, 10)]


def test_from_the_start_nothing_stays(tmp_path):
    run(tmp_path, [0, 10, 20])
    run(tmp_path, [0, 10])
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [0, 10]
    assert [point.step for point in tensorboard(tmp_path).Scalars("lr")] == [0, 10]


def test_events_are_read_in_the_order_of_runs(tmp_path):
    """Their files' names begin with the second, and no two runs have the same one: what follows it
    does not sort ("10" stands before "9")."""
    for steps in ([0, 10, 20], [0, 10], [0]):
        run(tmp_path, steps)
    seconds = [file.name.split(".")[3] for file in (tmp_path / "tensorboard").iterdir()]
    assert len(seconds) == len(set(seconds)) == 3
    assert [point.step for point in tensorboard(tmp_path).Scalars("lr")] == [0]


def test_a_torn_file_is_mended(tmp_path):
    run(tmp_path, [0, 10])
    file = tmp_path / metrics.FILE
    file.write_bytes(file.read_bytes() + b"\0" * 40 + b"\n" + b'{"step": 20')
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [0, 10]
    run(tmp_path, [20], resumed_at=10)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 10, 20]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Writer(tmp_path / "run") as writer:
        writer.write(1, {"loss": 1.0})
        writer.write_images(1, "grid", np.zeros((2, 2, 3), np.uint8))
        writer.flush()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told_with_the_file(tmp_path):
    with Writer(tmp_path) as writer, Path("/dev/full").open("ab", buffering=0) as full:
        writer._lines.close()
        writer._lines = full
        where = rf"No space left on device \(checkpoints are intact\): '{tmp_path}/metrics.jsonl'"
        with pytest.raises(OSError, match=where):
            writer.write(1, {"loss": 1.0})


def test_a_metric_is_a_scalar(tmp_path):
    with Writer(tmp_path) as writer, pytest.raises(ValueError, match=r"loss .*\(2,\)"):
        writer.write(1, {"loss": jnp.ones(2)})


def test_rates():
    interval = Interval(step=1000, start=50.0).without(5.0).without(15.0)
    rates = interval.rates(1200, now=170.0, steps=50000, batch_size=64)
    assert rates == (2.0, 128.0, None, 24400.0)
    assert "time/mfu" not in rates.metrics() and rates.metrics()["time/images_per_second"] == 128
    rates = interval.rates(1200, 170.0, 50000, 64, flops_per_step=3e12, peak_flops=20e12)
    assert rates.mfu == pytest.approx(0.3)
    line = metrics.progress_line(1200, 50000, {"loss": jnp.float32(0.12345)}, rates)
    assert line == (
        "step 1200/50000  loss 0.1235  2.00 steps/s  128 images/s  mfu 30 %  6:46:40 left"
    )
    assert interval.plus_making(20.0).plus_making(5.0).making_share(170.0) == 0.25
    slow = interval.rates(1000, 170.0, 50000, 64)
    assert metrics.progress_line(1000, 50000, {}, slow) == "step 1000/50000"
    assert [metrics._short(x) for x in (0.00312, 0.51, 9.999, 21.84, 3210.6)] == [
        "0.00312",
        "0.510",
        "10.00",
        "21.8",
        "3211",
    ]


def test_peaks():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    assert metrics.peak_flops([Device("TPU v5 lite")] * 4) == 4 * 197e12
    assert metrics.peak_flops([Device("TPU7x")] * 2) == 2307e12
    assert metrics.peak_flops([Device("TPU v5 lite"), Device("abacus")]) is None
    assert metrics.peak_flops() is None  # of a CPU nothing is known
