"""The first signal asks a run to leave, the second ends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreamlite_jax.train import signals

ROOT = Path(__file__).parent.parent
LOOP = """
import sys, threading, time
from dreamlite_jax.train import signals

with signals.asked_to_leave() as asked:
    threading.Thread(target=time.sleep, args=(60,)).start()  # as one that still saves
    print("up", flush=True)
    while not asked() or "busy" in sys.argv:
        time.sleep(0.01)
    print("saved", flush=True)
    import os; os._exit(signals.EXIT_TO_RESUME)
"""


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_sets_the_flag(number, capfd):
    before = [signal.getsignal(each) for each in signals.SIGNALS]
    with signals.asked_to_leave() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        assert signals.on_any_process(asked())
    assert [signal.getsignal(each) for each in signals.SIGNALS] == before
    assert capfd.readouterr().err.startswith(f"{number.name}: saves and leaves")


def test_the_second_signal_leaves_at_once():
    def started(*arguments):
        command = [sys.executable, "-c", LOOP, *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        return process

    busy = {number: started("busy") for number in signals.SIGNALS}
    asked = started()
    for process in (*busy.values(), asked):
        assert process.stdout.readline() == "up\n"
    asked.send_signal(signal.SIGTERM)
    assert asked.communicate(timeout=20)[0] == "saved\n"
    assert asked.returncode == signals.EXIT_TO_RESUME == 75
    for process in busy.values():
        process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    for number, process in busy.items():
        assert process.poll() is None
        process.send_signal(number)
        assert process.communicate(timeout=20)[0] == ""
        assert process.returncode == 128 + number
