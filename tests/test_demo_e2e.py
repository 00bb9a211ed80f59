"""The quick demo from nothing to its page, as `make demo QUICK=1` runs it."""

import json
import signal
import subprocess
import sys
import time

import browser
import commands
import numpy as np
import pytest
import training
from PIL import Image

from launch.demos import picture, plan, summary

pytestmark = pytest.mark.e2e


def start(out, cache):
    command = [sys.executable, "-m", "launch.demo", "--quick", f"--out={out}"]
    command.append(f"--compilation_cache={cache / 'programs'}")
    return subprocess.Popen(
        command,
        cwd=commands.ROOT,
        env=training.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_quick_demo(cache, tmp_path):
    process = start(tmp_path, cache)
    done = tmp_path / "quick" / "done"
    while process.poll() is None and not (done / "autoencoder.json").is_file():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 75, said
    assert "the same command goes on" in said
    before = (done / "autoencoder.json").read_bytes()

    process = start(tmp_path, cache)
    said = process.communicate(timeout=1800)[0]
    assert process.returncode == 0, said
    assert (done / "autoencoder.json").read_bytes() == before  # not done again
    found = json.loads((tmp_path / "metrics.json").read_text())
    for task in summary.TASKS:
        for variant in summary.VARIANTS:
            if (task, variant) != ("edit", "edit"):
                key = f"{task}_accuracy_{variant}"
                assert 0 <= found[f"{key}_low"] <= found[key] <= found[f"{key}_high"] <= 1
        for bundle in summary.BUNDLES:
            assert found[f"{task}_psnr_{bundle}"] > 25  # the phone draws what JAX draws
    assert found["minutes"] > 0 and found["quick"]
    trained = {stage.config for stage in plan.STAGES}
    assert trained <= {step.stem for step in done.glob("*.json")}
    with Image.open(tmp_path / "picture.png") as sheet:
        drawn = summary.arrays(tmp_path / "quick", picture.BUNDLE, "t2i")
        corner = np.asarray(sheet)[picture.GAP :, picture.GAP :][: picture.SIDE, : picture.SIDE]
    factor = picture.SIDE // drawn["images"].shape[1]
    np.testing.assert_array_equal(corner[::factor, ::factor], drawn["images"][0])
    for width in (390, 1280):
        seen = browser.seen(tmp_path / "report.html", width)
        assert seen["images"] > 20 and not seen["broken"]
        assert seen["scroll"] <= width and not seen["wide"], seen["wide"]
