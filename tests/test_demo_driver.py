"""The demo's driver: steps once each however it is stopped, beside each other where they may."""

import io
import os
import re
import signal
import subprocess
import sys
import time

import commands
import pytest

from dreamlite_jax import cli
from launch.demos import driver
from launch.demos.driver import Step
from launch.files import read_json


def make_steps(*names):
    return [Step(name, name.title(), lambda name=name: ("command", name), 10.0) for name in names]


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    assert true()


class Runner:
    """Stands for processes: exit codes by step in their order, 0 where none is left."""

    def __init__(self, **codes):
        self.codes, self.ran = codes, []

    def __call__(self, step, arguments, log, asked, on_line):
        assert arguments == ["command", step.name]
        self.ran.append(step.name)
        on_line("step 1/4  loss 1  0:00:30 left\n")
        log.write_text(f"{step.name} begins\nerror: no luck with {step.name}\n")
        codes = self.codes.get(step.name, [])
        code = codes.pop(0) if codes else 0
        if code == "signal":
            os.kill(os.getpid(), signal.SIGINT)
            until(asked)
            return 75
        if code == "waits":  # until it is told to leave
            until(asked)
            return 75
        return code


def run(folder, names, runner):
    shown = []
    driver.run_all(make_steps(*names), folder, lambda p: shown.append(driver.lines(p)), runner)
    return shown


def test_every_step_is_run_once(tmp_path):
    runner = Runner()
    shown = run(tmp_path, "abc", runner)
    run(tmp_path, "abcd", runner)
    assert runner.ran == list("abcd")
    assert "step 1 of 3" in shown[0][0] and shown[0][1].startswith("A: ")


def test_an_interrupted_step_is_run_again_and_its_time_adds_up(tmp_path):
    runner = Runner(b=["signal", "signal"])
    for _ in range(2):
        with pytest.raises(driver.Interrupted):
            run(tmp_path, "abc", runner)
    before = read_json(tmp_path / "done" / "b.part")
    run(tmp_path, "abc", runner)
    assert runner.ran == list("abbbc")
    assert read_json(tmp_path / "done" / "b.json")["seconds"] >= before > 0
    assert not (tmp_path / "done" / "b.part").exists()


def test_a_step_that_asks_for_another_try_gets_it(tmp_path):
    runner = Runner(a=[75, 75])
    run(tmp_path, "ab", runner)
    assert runner.ran == list("aaab")


def test_a_failed_step_ends_all_with_its_last_line(tmp_path):
    runner = Runner(b=[2])
    with pytest.raises(cli.CommandError, match="B ended with exit code 2: no luck with b"):
        run(tmp_path, "abc", runner)
    run(tmp_path, "abc", runner)
    assert runner.ran == list("abbc")


def run_beside(folder, runner):
    """a, then b and the modest m beside c, which needs b alone; d waits for all."""
    a, b, m, c, d = make_steps(*"abmcd")
    steps = [a, b, m._replace(needs=("b",), modest=True), c._replace(needs=("b",)), d]
    driver.run_all(steps, folder, lambda _: None, runner)


def test_steps_run_beside_each_other_where_they_may(tmp_path):
    runner, under_way, most = Runner(), set(), []

    def watched(step, *how):
        under_way.add(step.name)
        most.append(set(under_way))
        if step.name in "mc":
            until(lambda: {"m", "c"} <= set().union(*most))
        code = runner(step, *how)
        under_way.remove(step.name)
        return code

    run_beside(tmp_path, watched)
    assert runner.ran[:2] == list("ab") and set(runner.ran[2:4]) == set("mc")
    assert runner.ran[4:] == ["d"]
    assert {"m", "c"} in most and all(len(names) <= driver.AT_ONCE for names in most)
    took = [read_json(tmp_path / "done" / f"{name}.json") for name in "abmcd"]
    assert took[-1]["clock"] >= max(step["seconds"] for step in took)


@pytest.mark.parametrize("code", ["signal", 2])
def test_all_that_are_under_way_leave_together(code, tmp_path):
    runner = Runner(c=[code], m=["waits"])
    expected = driver.Interrupted if code == "signal" else cli.CommandError
    with pytest.raises(expected, match=None if code == "signal" else "no luck with c"):
        run_beside(tmp_path, runner)
    clock = read_json(tmp_path / driver.CLOCK)
    run_beside(tmp_path, runner)
    assert sorted(runner.ran) == sorted("abmcmcd")
    assert read_json(tmp_path / "done" / "d.json")["clock"] > clock


def test_a_failure_is_said_even_if_a_signal_comes_later(tmp_path):
    def runner(step, arguments, log, asked, on_line):
        log.write_text(f"no luck with {step.name}\n")
        if step.name == "m":  # told to leave because c failed
            until(asked)
            os.kill(os.getpid(), signal.SIGINT)
        return {"c": 2, "m": 75}.get(step.name, 0)

    with pytest.raises(cli.CommandError, match="no luck with c"):
        run_beside(tmp_path, runner)


def test_a_step_that_could_never_begin_is_refused(tmp_path):
    first, second = make_steps("a", "b")
    with pytest.raises(ValueError, match=r"a needs \['b'\]"):
        driver.run_all([first._replace(needs=("b",)), second], tmp_path, lambda _: None, Runner())


def test_an_error_of_the_driver_itself_ends_the_others(tmp_path):
    def fails():
        raise OSError("no such file")

    first, second = make_steps("a", "b")
    steps = [first, second._replace(arguments=fails, needs=())]
    with pytest.raises(OSError, match="no such file"):
        driver.run_all(steps, tmp_path, lambda _: None, Runner(a=["waits"]))


def test_another_command_in_the_same_folder_is_refused(tmp_path):
    run(tmp_path, "a", Runner())
    changed = [make_steps("a")[0]._replace(arguments=lambda: ("command", "other"))]
    with pytest.raises(cli.CommandError, match="begun with other flags"):
        driver.run_all(changed, tmp_path, lambda _: None, Runner())


def test_two_demos_in_a_folder_are_refused(tmp_path):
    with (
        driver.only_one(tmp_path),
        pytest.raises(cli.CommandError, match="another demo is at work"),
    ):
        run(tmp_path, "a", Runner())


PROGRAM = """
import signal, sys, time
left = []
signal.signal(signal.SIGTERM, lambda *_: left.append(1))
for k in range(600):
    print(f"step {k + 1}/600", flush=True)
    time.sleep(0.1)
    if left:
        print("saved")
        sys.exit(75)
"""


def test_processes_are_told_and_waited_for(tmp_path, monkeypatch):
    (tmp_path / "slow_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    step, lines = make_steps("a")[0], []
    asked = lambda: len(lines) > 2  # noqa: E731
    code = driver.run_process(step, ["slow_program"], tmp_path / "log", asked, lines.append)
    assert code == 75 and (tmp_path / "log").read_text().endswith("saved\n")


def test_two_processes_are_stopped_and_go_on(tmp_path, monkeypatch):
    (tmp_path / "slow_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    steps = [
        step._replace(arguments=lambda: ("slow_program",), needs=())
        for step in make_steps("a", "b")
    ]
    said = []

    def show(progress):
        said.append(driver.lines(progress))
        if not progress.leaving() and all("step" in line for line in said[-1]) and said[-1][2:]:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(driver.Interrupted):
        driver.run_all(steps, tmp_path, show)
    assert said[-1][0].endswith("saves and leaves")
    for name in "ab":
        assert (tmp_path / "logs" / f"{name}.log").read_text().endswith("saved\n")
        assert read_json(tmp_path / "done" / f"{name}.part") <= read_json(tmp_path / driver.CLOCK)


def test_a_modest_process_leaves_time_to_others(tmp_path, monkeypatch):
    (tmp_path / "says.py").write_text(
        "import os, time; time.sleep(0.5); print(os.getpriority(os.PRIO_PROCESS, 0))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = {}
    for modest in (False, True):
        step, lines = make_steps("a")[0]._replace(modest=modest), []
        assert not driver.run_process(step, ["says"], tmp_path / "log", lambda: False, lines.append)
        said[modest] = int("".join(lines))
    assert said[True] == 19 and said[False] < 19


# As XLA does: memory of a step, taken and given back by a thread that is not the first.
STEPS = """
import ctypes, resource, threading
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def steps():
    for step in range(20):
        if step == 1:
            before = faults()
        memory = libc.malloc(2**27)
        libc.memset(memory, 1, 2**27)
        libc.free(memory)
    print(faults() - before)

thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_memory_that_is_given_back_is_kept():
    said = (commands.ROOT / "README.md").read_text("utf-8")
    first, more = re.findall(r"export GLIBC_TUNABLES=(\S+)", said)
    assert more.replace("$GLIBC_TUNABLES", first) == driver.KEEP_MEMORY

    def faults(tunables):
        command, env = [sys.executable, "-c", STEPS], os.environ | {"GLIBC_TUNABLES": tunables}
        return int(subprocess.run(command, env=env, capture_output=True, check=True).stdout)

    assert faults(driver.KEEP_MEMORY) < faults(driver.KEEP_MEMORY.split(":")[0]) / 10


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_a_killed_driver_leaves_no_process(tmp_path):
    (tmp_path / "slow_program.py").write_text(PROGRAM)
    code = (
        "import pathlib; from launch.demos import driver; "
        "step = driver.Step('a', 'A', None, 0, modest=True); "
        "driver.run_process(step, ['slow_program'], pathlib.Path('log'), lambda: False, print)"
    )
    env = {**os.environ, "PYTHONPATH": f"{commands.ROOT}:{tmp_path}"}
    started = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    )
    assert any(line.startswith("step") for line in started.stdout)
    started.kill()
    started.wait()
    log = tmp_path / "log"
    time.sleep(0.5)
    size = log.stat().st_size
    alive = [
        line
        for line in subprocess.run(
            ["ps", "-eo", "args"], capture_output=True, text=True
        ).stdout.splitlines()
        if line.endswith("-m slow_program")
    ]
    assert not alive and log.stat().st_size == size


def test_time_left():
    now = [0.0]
    progress = driver.Progress(make_steps("a", "b", "c"), lambda: now[0])
    first, second, _ = progress.steps
    progress.begin(first, 0.0)
    assert progress.left() == 30
    now[0] = 4
    progress.read(first, "step 50/100  loss 0.1  3 steps/s  0:00:06 left")
    assert progress.step_left(first) == 6 and progress.left() == 26
    now[0] = 6
    assert progress.step_left(first) == 4
    now[0] = 40
    progress.end(first)
    assert progress.left() == 20  # one short step says little of the machine's speed
    progress.steps = [step._replace(seconds=100.0) for step in progress.steps]
    assert progress.left() == 80  # 2 x 100 s at 40 s for each 100
    assert progress.share() == pytest.approx(1 / 3)
    progress.begin(second, 5.0)
    progress.read(second, "3/4 sft t2i held_out: 70 % exact")
    assert progress.step_left(progress.steps[1]) == pytest.approx(10)
    assert progress.elapsed(second) == 5


def test_time_left_where_steps_are_beside_each_other():
    a, b, m, c, d = (step._replace(seconds=100.0) for step in make_steps(*"abmcd"))
    m, c = m._replace(needs=("b",), seconds=30.0, modest=True), c._replace(needs=("b",))
    progress = driver.Progress([a, b, m, c, d], lambda: 0.0)
    assert progress.left() == 400  # m in the time of c
    progress.steps[2] = m._replace(seconds=130.0)
    assert progress.left() == 430


def test_a_display_says_little_where_it_is_not_watched():
    stream = io.StringIO()
    display = driver.Display(stream, every=1000)
    progress = driver.Progress(make_steps("a", "b"))
    for step in progress.steps:
        progress.begin(step, 0.0)
        for k in range(5):
            progress.read(step, f"step {k}/5")
            display(progress)
        progress.end(step)
    said = stream.getvalue().splitlines()
    assert len(said) == 2 and "step 1 of 2" in said[0] and "| B: " in said[1].replace("|  ", "| ")


def test_a_display_that_is_watched_has_a_line_for_each_step(monkeypatch):
    stream = io.StringIO()
    stream.isatty, stream.fileno = lambda: True, lambda: 1
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((40, 24)))
    display = driver.Display(stream, every=0)
    progress = driver.Progress(make_steps("a", "b"))
    for step in progress.steps:
        progress.begin(step, 0.0)
        display(progress)
    progress.end(progress.steps[0])
    display(progress)
    drawn = stream.getvalue().split("\x1b[J")[1:]
    assert [text.count("\n") for text in drawn] == [1, 2, 1]
    ups = [text.rsplit("\r")[0][-4:] for text in drawn[:2]]
    assert ups == ["\x1b[1A", "\x1b[2A"]  # over what was drawn before
    assert all(len(line) < 40 for line in drawn[-1].splitlines())
