"""Evaluation on the shapes world: its prompts, its judge's verdicts, the intervals."""

import json
import math
import os

import commands
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax import generation, system
from dreamlite_jax.data import pictures
from dreamlite_jax.data import shapes as world
from dreamlite_jax.errors import UserError
from dreamlite_jax.evals import shapes, statistics
from dreamlite_jax.train import checkpoint, origins
from launch.variants import made as variants_of


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (180, 256)])
def test_wilson_solves_its_equation(hits, n):
    """The ends are the p at which the observed share is z standard errors away (Wilson 1927)."""
    share = statistics.wilson(hits, n)
    assert share.value == hits / n and 0 <= share.low <= share.value <= share.high <= 1
    for end in (share.low, share.high):
        if end in (0, 1):
            assert hits in (0, n)
        else:
            away = abs(hits / n - end) / math.sqrt(end * (1 - end) / n)
            assert away == pytest.approx(1.959964, rel=1e-6)


def test_wilson_refuses_what_is_no_share():
    for hits, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="must"):
            statistics.wilson(hits, n)


def test_wilson_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for p in (0.05, 0.5, 0.9):
        hits = rng.binomial(60, p, 2000)
        inside = [
            statistics.wilson(int(h), 60).low <= p <= statistics.wilson(int(h), 60).high
            for h in hits
        ]
        assert 0.92 < np.mean(inside) < 0.98


def test_changes_are_paired():
    before = [True, False, False, True, False, False, True, False]
    after = [True, True, True, True, False, False, True, False]
    found = statistics.change(before, after)
    d = np.array(after, float) - np.array(before, float)
    assert found.value == 0.25
    assert found.half == pytest.approx(1.959964 * d.std(ddof=1) / math.sqrt(8), rel=1e-6)
    same = statistics.change(before, before)
    assert same.value == 0 and same.half == 1 / 8  # never a certainty
    with pytest.raises(ValueError, match="same ones"):
        statistics.change([True], [True, False])


def test_drawings_are_compared_over_the_prompts_of_both():
    before = {"exact": np.array([False, True]), "prompts": np.array(["a", "b"])}
    after = {"exact": np.array([True, True, False]), "prompts": np.array(["a", "b", "c"])}
    found = statistics.change_of_drawn(before, after)
    assert (found["value"], found["count"]) == (0.5, 2)
    assert found["low"] < 0.5 < found["high"]
    assert "runs_low" not in found
    with pytest.raises(UserError, match="different prompts"):
        statistics.change_of_drawn(before, after | {"prompts": np.array(["a", "x", "c"])})


def test_several_runs_have_an_interval_over_prompts_and_one_over_runs():
    prompts = np.array(list("abcd"))
    drawn = [
        {"exact": np.array(exact, bool), "prompts": prompts}
        for exact in ([0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0])
    ]
    found = statistics.change_of_drawn(*drawn)
    assert found["value"] == pytest.approx(0.75) and found["count"] == 4
    by_prompt = np.std([1, 1, 2 / 3, 1 / 3], ddof=1) / 2
    assert found["high"] - found["value"] == pytest.approx(1.959964 * by_prompt)
    # Runs gain 0.5, 1 and 0.75: a deviation of 0.25, times 4.3027 of Student's t of 2.
    assert found["runs_high"] - found["value"] == pytest.approx(4.30265 * 0.25 / math.sqrt(3))
    assert found["runs_low"] + found["runs_high"] == pytest.approx(2 * found["value"])


@pytest.mark.parametrize("task", ["t2i", "edit"])
@pytest.mark.parametrize("split", shapes.SPLITS)
def test_cases_are_fixed_and_their_targets_are_right(task, split):
    given = shapes.cases(task, split, 12, 32)
    assert [case.prompt for case in given] == [c.prompt for c in shapes.cases(task, split, 12, 32)]
    assert [case.prompt for case in given[:5]] == [
        case.prompt for case in shapes.cases(task, split, 5, 64)
    ]
    assert all(v.exact for v in shapes.verdicts([case.target for case in given], given))
    assert all((case.source is None) == (task == "t2i") for case in given)
    other = shapes.cases(task, split, 12, 32, seed=1)
    assert [case.prompt for case in given] != [case.prompt for case in other]


def test_held_out_prompts_name_what_training_never_shows():
    pairs = set(world.DEMO.held_out)
    for case in shapes.cases("t2i", "held_out", 20, 32):
        named = {(s, c) for want in case.spec.wants for s in want.shapes for c in want.colours}
        assert named & pairs, case.prompt
    for case in shapes.cases("t2i", "iid", 20, 32):
        named = {(s, c) for want in case.spec.wants for s in want.shapes for c in want.colours}
        assert not named & pairs, case.prompt


def test_summary_counts_by_kind():
    given = shapes.cases("edit", "iid", 20, 32)
    images = [case.target if k % 4 else case.source for k, case in enumerate(given)]
    found = shapes.verdicts(images, given)
    said = shapes.summary(found, given)
    assert said["count"] == 20 and said["exact"] == 15 and said["accuracy"] == 0.75
    assert said["low"] < 0.75 < said["high"] and said["score"] > 0.75
    assert [sum(column) for column in zip(*said["kinds"].values(), strict=True)] == [15, 20]


def test_summary_says_what_was_asked_and_how_much_of_it_is_there():
    given = shapes.cases("t2i", "iid", 40, 32)
    images = [np.zeros_like(c.target) if k % 4 else c.target for k, c in enumerate(given)]
    demands = shapes.summary(shapes.verdicts(images, given), given)["demands"]
    asked = [k for k, case in enumerate(given) if any(want.shapes for want in case.spec.wants)]
    share, count = demands["shape"]
    assert count == len(asked) < 40
    assert share == pytest.approx(sum(k % 4 == 0 for k in asked) / count)  # nothing is on black
    assert demands["count"] == [0.25, 40]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("t2v", "iid", 1, 32), "task is 't2v', known are t2i, edit"),
        (("t2i", "test", 1, 32), "split is 'test', known are"),
        (("t2i", "iid", 1, 8), "8 px are too small"),
        (("t2i", "iid", 1, 32, "big"), "world is 'big'"),
    ],
)
def test_impossible_cases_are_refused(arguments, reason):
    with pytest.raises(shapes.EvalError, match=reason):
        shapes.cases(*arguments)


@pytest.fixture
def oracle(monkeypatch, cache):
    """A model that draws the right answer of every prompt but each third."""
    asked = []

    def generate(model, requests, noise, settings, sources=None, on_step=None, seeds=None):
        asked.append((settings, len(requests)))
        task = "t2i" if sources is None else "edit"
        known = {c.prompt: c.target for c in shapes.cases(task, "iid", 9, settings.height)}
        for k, request in enumerate(requests):
            picture = known[request] if k % 3 else np.zeros_like(known[request])
            yield noise[k], picture

    monkeypatch.setattr(generation, "generate", generate)
    config = system.read_config(cache / "model")
    return system.System(config, {}, None, cache / "model"), asked


def test_pictures_are_asked_for_with_their_own_noise(oracle):
    model, asked = oracle
    given, counted = shapes.cases("t2i", "iid", 9, 32), []
    settings = generation.Settings(steps=28, guidance=3.5, height=32)
    images = shapes.pictures(model, given, settings, lambda: counted.append(1))
    assert [v.exact for v in shapes.verdicts(images, given)] == [k % 3 > 0 for k in range(9)]
    assert len(counted) == 9 and len(asked) == 1
    noise = shapes.noise(model.config, given, 32)
    assert len({row.tobytes() for row in noise}) == 9
    np.testing.assert_array_equal(noise[2], generation.initial_noise(model.config, 2, 32, 32))


def test_repeated_prompts_differ_in_their_noise_only():
    given = shapes.cases("t2i", "iid", 3, 32)
    again = shapes.repeated(given, 2, 4)
    assert [case.prompt for case in again] == [given[0].prompt] * 4 + [given[1].prompt] * 4
    assert len({case.seed for case in (*given, *again)}) == 11
    images = np.stack([case.target for case in again])
    assert shapes.diversity(images, 4) == 0
    images[0] = 255 - images[0]
    assert shapes.diversity(images, 4) > 0.1


def test_the_command(oracle, monkeypatch, cache, tmp_path, capsys):
    model, asked = oracle
    monkeypatch.setattr(system, "load", lambda folder: model)
    flags = ("--split=iid", "--count=9", f"--out={tmp_path}", "--compilation_cache=")
    assert commands.run("evaluate", f"--model={cache / 'model'}", *flags) == 0
    out = capsys.readouterr().out
    assert "1/2 model t2i iid: 66.7 % exact (35.4 to 87.9, n = 9)" in out
    found = json.loads((tmp_path / "scores.json").read_text())
    assert [(one["task"], one["exact"]) for one in found] == [("t2i", 6), ("edit", 6)]
    assert found[0]["steps"] == 28 and found[0]["guidance"] == 3.5
    with np.load(tmp_path / "model" / "edit_iid.npz") as arrays:
        assert arrays["exact"].sum() == 6 and arrays["sources"].shape == arrays["images"].shape
    assert (tmp_path / "model" / "t2i_iid.png").is_file()
    # What is there is not drawn again.
    assert commands.run("evaluate", f"--model={cache / 'model'}", *flags) == 0
    assert len(asked) == 2


@pytest.fixture
def scored(oracle, monkeypatch, tmp_path, capsys):
    """Evaluates a folder, of which the oracle is made: what was said, and the calls of it."""
    model, asked = oracle
    monkeypatch.setattr(system, "load", lambda folder: model)
    monkeypatch.setattr(origins, "load_run", lambda folder, step: model)
    monkeypatch.setattr(system, "read_config", lambda folder: model.config)

    def evaluate(folder, *more):
        flags = ("--split=iid", "--task=t2i", f"--out={tmp_path / 'out'}", "--compilation_cache=")
        assert commands.run("evaluate", f"--model={folder}", "--count=9", *flags, *more) == 0
        return "".join(capsys.readouterr()), len(asked)

    return evaluate


def test_what_was_made_otherwise_is_made_anew(scored, tmp_path):
    index, result = tmp_path / "m" / "model_index.json", tmp_path / "out" / "m" / "t2i_iid.json"
    index.parent.mkdir()
    index.write_text("{}")
    out, calls = scored(index.parent)
    assert calls == 1 and "anew" not in out
    flags = ["--steps=4", "--guidance=1", "--stochastic=0.5", "--count=6", "--diversity=2"]
    for k, flag in enumerate(flags):
        name, value = flag[2:].split("=")
        out, calls = scored(index.parent, *flags[: k + 1])
        assert calls == k + 2 and f"m t2i iid: made anew, as {name} was " in out
        assert f", is {value}" in out and out.count(" was ") == 1
        assert scored(index.parent, *flags[: k + 1])[1] == k + 2  # what is there stays
    assert scored(index.parent, *flags, "--image_guidance=2")[1] == 6  # of edits alone
    os.utime(index, (0, 0))
    out, calls = scored(index.parent, *flags)
    assert calls == 7 and "is 1970-01-01T00:00:00" in out
    weights = index.parent / "unet" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir()
    weights.touch()
    os.utime(weights, (86400, 86400))  # newer than the index
    out, calls = scored(index.parent, *flags)
    assert calls == 8 and "is 1970-01-02T00:00:00" in out
    (index.parent / "notes.txt").touch()  # no part of the model
    assert scored(index.parent, *flags)[1] == 8
    before = json.loads(result.read_text())
    del before["made_with"]  # as it was written once
    result.write_text(json.dumps(before))
    out, calls = scored(index.parent, *flags)
    assert calls == 9 and "it does not say what it was made with" in out
    assert scored(index.parent, *flags)[1] == 9


@pytest.mark.parametrize("kind", ["model", "run"])
def test_a_mobile_model_has_its_own_steps_and_no_guidance(
    kind, oracle, scored, monkeypatch, tmp_path
):
    """Guidance that is given is neither recorded nor a reason to draw again; that is said."""
    model, asked = oracle
    config = model.config._replace(mobile=True, mobile_steps=8)
    monkeypatch.setattr(system, "load", lambda folder: model._replace(config=config))
    monkeypatch.setattr(origins, "load_run", lambda *_: model._replace(config=config))
    monkeypatch.setattr(system, "read_config", lambda folder: config)
    (tmp_path / "m").mkdir()
    if kind == "run":
        with checkpoint.open_manager(tmp_path / "m") as manager:
            checkpoint.save(manager, 1, {"x": jnp.ones(1)}, {"mobile": True})
    for flags, calls in (([], 1), (["--guidance=2"], 1), (["--guidance=2", "--task=t2i,edit"], 2)):
        said, drawn = scored(tmp_path / "m", *flags)
        assert drawn == calls and asked[-1][0].steps == 8
        assert ("m: guidance and image_guidance are ignored by a mobile" in said) == bool(flags)
        for one in json.loads((tmp_path / "out" / "scores.json").read_text()):
            assert (one["steps"], one["guidance"], one["image_guidance"]) == (8, None, None)


def test_a_run_that_went_on_is_drawn_again(scored, tmp_path):
    for step in (1, 2):
        with checkpoint.open_manager(tmp_path / "run") as manager:
            checkpoint.save(manager, step, {"x": jnp.ones(1)}, {})
        out, calls = scored(tmp_path / "run")
        assert calls == step and ("step was 1, is 2" in out) == (step == 2)
        assert scored(tmp_path / "run")[1] == step


def test_a_kill_leaves_no_scores_of_other_pictures(scored, monkeypatch, tmp_path):
    (tmp_path / "m").mkdir()
    scored(tmp_path / "m")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="130"):
        patch.setattr(pictures, "write_png", killed)
        scored(tmp_path / "m", "--steps=4")
    assert scored(tmp_path / "m")[1] == 3  # the pictures are those of 4 steps


def test_pictures_of_another_program_are_judged(tmp_path, capsys):
    given = shapes.cases("t2i", "held_out", 5, 32)
    images = np.stack([case.target for case in given])
    np.savez(tmp_path / "t2i_held_out.npz", images=images)
    one = {"name": "phone", "pictures": str(tmp_path), "task": ["t2i"], "split": ["held_out"]}
    flags = (f"--variants={json.dumps([one])}", f"--out={tmp_path / 'out'}")
    assert commands.run("evaluate", *flags, "--compilation_cache=") == 0
    assert "phone t2i held_out: 100.0 % exact (56.6 to 100.0, n = 5)" in capsys.readouterr().out
    np.savez(tmp_path / "t2i_held_out.npz", images=0 * images)
    assert commands.run("evaluate", *flags, "--compilation_cache=") == 0
    out = capsys.readouterr().out
    assert "made anew, as written was" in out and "phone t2i held_out: 0.0 % exact" in out


def test_pictures_of_other_prompts_are_refused(tmp_path, capsys):
    given = shapes.cases("t2i", "held_out", 3, 32)
    images = np.stack([case.target for case in given])
    wanted = [case.prompt for case in given]
    one = {"name": "phone", "pictures": str(tmp_path), "task": ["t2i"], "split": ["held_out"]}
    flags = f"--variants={json.dumps([one])}", f"--out={tmp_path / 'out'}", "--compilation_cache="
    file = tmp_path / "t2i_held_out.npz"
    np.savez(file, images=images, prompts=wanted)
    assert commands.run("evaluate", *flags) == 0
    capsys.readouterr()
    assert commands.run("evaluate", *flags, "--seed=1") == 2
    said = capsys.readouterr().err
    assert f"picture 0 is of '{wanted[0]}', but of --seed=1 and --world=demo it would be" in said
    for prompts, number in (([*wanted[:2], "a hat"], 2), (wanted[:2], 2), ([*wanted, "a hat"], 3)):
        np.savez(file, images=images, prompts=prompts)
        assert commands.run("evaluate", *flags) == 2
        said = capsys.readouterr().err
        assert f"{file}: picture {number} is of " in said and said.count("\n") == 1


def test_variants_are_compared_with_the_first(tmp_path, capsys):
    """Two of its five pictures are blank; of the third variant there are only the first four."""
    images = np.stack([case.target for case in shapes.cases("t2i", "held_out", 5, 32)])
    blank = np.where(np.arange(5)[:, None, None, None] < 2, 255, images).astype(np.uint8)
    variants = []
    for name, made in (("old", blank), ("new", images), ("few", images[:4])):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "t2i_held_out.npz", images=made)
        one = {"name": name, "pictures": str(tmp_path / name)}
        variants.append({**one, "task": ["t2i"], "split": ["held_out"]})
    flags = (f"--variants={json.dumps(variants)}", f"--out={tmp_path / 'out'}")
    assert commands.run("evaluate", *flags, "--compilation_cache=") == 0
    old, new, few = capsys.readouterr().out.splitlines()
    assert "60.0 % exact" in old and "points" not in old
    # The differences are 1, 1, 0, 0, 0: their mean's deviation is 0.5477 / sqrt(5).
    assert "+40.0 points (-8.0 to +88.0) against old" in new
    assert "+50.0 points" in few
    first, second, third = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert "change" not in first
    assert second["change"]["against"] == "old" and second["change"]["count"] == 5
    assert third["change"]["count"] == 4


def test_runs_of_a_group_are_averaged(tmp_path, capsys):
    """Of five pictures, the first variant has none right, the group's 3 and 5."""
    images = np.stack([case.target for case in shapes.cases("t2i", "held_out", 5, 32)])
    variants = []
    for name, wrong in (("old", 5), ("seed_0", 2), ("seed_1", 0)):
        made = np.where(np.arange(5)[:, None, None, None] < wrong, 255, images).astype(np.uint8)
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "t2i_held_out.npz", images=made)
        one = {"name": name, "pictures": str(tmp_path / name)}
        group = {"group": "new"} if name != "old" else {}
        variants.append({**one, **group, "task": ["t2i"], "split": ["held_out"]})
    flags = (f"--variants={json.dumps(variants)}", f"--out={tmp_path / 'out'}")
    assert commands.run("evaluate", *flags, "--compilation_cache=") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    # Two runs' deviation is 0.2828, times 12.706 of Student's t of 1 / sqrt(2): 254.1 points.
    assert last.startswith("new t2i held_out: 80.0 % exact on average of 2, +80.0 points")
    assert "(-174.1 to +334.1 over runs) against old" in last
    found = json.loads((tmp_path / "out" / "scores.json").read_text())[-1]
    assert found["group"] == "new" and found["variants"] == ["seed_0", "seed_1"]
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["change"]["value"] == pytest.approx(0.8)


def test_a_name_may_stand_for_one_model_at_each_task():
    both = [{"name": "a", "model": task, "task": [task]} for task in ("t2i", "edit")]
    assert [one.model for one in variants_of(both, {})] == ["t2i", "edit"]


@pytest.mark.parametrize(
    ("variants", "reasons"),
    [
        ([{"name": "a", "model": None}], ["needs either a model or pictures"]),
        ([{"name": "a", "pictures": "there"}], ["needs either a model or pictures"]),
        ([{"name": "a"}, {"name": "b"}, {"name": "a"}], ["is asked for twice under that name"]),
        ([{"name": "a/b"}, {"name": ".."}], ["name is 'a/b', should be", "name is '..', should"]),
        ([{"name": ["a"]}], ["name is ['a'], should be the name of a folder"]),
        ([{"name": "a", "steps": 0, "count": -1}], ["steps is 0, should", "count is -1, should"]),
        ([{"name": "a", "guidance": "1"}], ["guidance is '1', should be a finite number"]),
        ([{"name": "a", "count": None}], ["count is None, should be a whole number of at least 1"]),
        ([{"name": "a", "task": "t2i"}], ["task is 't2i', should be a list of some of t2i, edit"]),
        ([{"name": "a", "task": []}], ["task is [], should be a list"]),
        ([{"name": "a", "split": ["iid", "test"]}], ["split is ['iid', 'test'], should be a list"]),
        ([{"name": "a", "stochastic": 2}], ["stochastic is 2, should be a number in [0, 1]"]),
        ([], ["expected a JSON list of objects"]),
    ],
)
def test_wrong_variants_are_one_line_before_a_model_is_opened(variants, reasons, tmp_path, capsys):
    """`model` is a path that nobody looks at."""
    given = json.dumps([{"model": "nowhere", **one} for one in variants])
    flags = f"--variants={given}", f"--out={tmp_path / 'out'}", "--compilation_cache="
    assert commands.run("evaluate", *flags) == 2
    err = capsys.readouterr().err
    assert all(reason in err for reason in reasons) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ((), "give either --model or --variants"),
        (("--variants=[",), "no JSON"),
        (('--variants={"name": "a"}',), "expected a JSON list of objects"),
        (('--variants=[{"name": "a", "stepps": 4}]',), "knows name, model"),
        (("--model=nowhere",), "no such directory"),
        (('--variants=[{"name": "a", "pictures": "nowhere"}]',), "no pictures of t2i_held_out"),
    ],
)
def test_wrong_use_is_one_line(flags, reason, tmp_path, capsys):
    given = (*flags, f"--out={tmp_path}", "--compilation_cache=")
    assert commands.run("evaluate", *given) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1
