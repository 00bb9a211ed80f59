"""The demo: its steps, its numbers, its page in a real browser."""

import itertools
import json
import shutil
from pathlib import Path

import browser
import commands
import demo_results
import numpy as np
import pytest

from launch.demos import charts, comparing, driver, picture, plan, report, summary
from launch.files import write_json

# --- The steps of the demo ------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
def test_each_stage_starts_from_the_one_before(quick, tmp_path):
    made = plan.of(tmp_path, 3, quick, "cache")
    steps = plan.steps(made)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    configs = {stage.config for stage in plan.STAGES}
    trained = [step for step in steps if step.name in configs]
    assert [step.name for step in trained] == [stage.config for stage in plan.STAGES]
    before = None
    for step in trained:
        given = step.arguments()
        starts = [flag for flag in given if flag.startswith("--config.init_from=")]
        assert starts == ([f"--config.init_from={before}"] if before else [])
        assert "--config.seed=3" in given
        assert any(flag.endswith(".py:quick") for flag in given) == quick
        (before,) = (flag.split("=")[1] for flag in given if flag.startswith("--workdir="))
    assert names[-1] == "evaluate-bundles" and ("evaluate-sft" in names) != quick
    # One after the other each, and judging beside training.
    for chain in (trained, [step for step in steps if step.name.startswith("evaluate")]):
        for one, next_one in itertools.pairwise(chain):
            assert next_one.needs is None or one.name in next_one.needs
    driver.check(steps)
    assert all(step.modest == ("evaluate" in step.name) for step in steps[:-8])


def test_every_accuracy_that_is_promised_is_asked_for(tmp_path):
    asked = set()
    for step in plan.steps(plan.of(tmp_path, 0, False, "cache")):
        if step.name.startswith("evaluate"):
            (flag,) = (f for f in step.arguments() if f.startswith("--variants="))
            for one in json.loads(flag.removeprefix("--variants=")):
                asked |= {(one["name"], task) for task in one.get("task", summary.TASKS)}
    assert {name for name, _ in asked} == set(summary.VARIANTS)
    wanted = set(summary.VARIANTS) - {"edit", *summary.BUNDLES}
    assert {(name, task) for name in wanted for task in summary.TASKS} <= asked


@pytest.mark.parametrize("stage", [stage.config for stage in plan.STAGES[1:]])
def test_no_lesson_shows_a_picture_of_a_held_out_pair(stage, tmp_path):
    """Reinforcement learning and distillation ask about them, of other seeds than the tests', and
    do not look at targets."""
    config = plan.config_of(plan.of(tmp_path, 0, False, "cache"), stage)
    asked = {"rl_nft": {"edit held_out"}, "distill_dmd2": {"t2i all", "edit all"}}.get(stage, set())
    seeds = {}
    for one in config.data:
        split = one["source"].split(":")[2]
        seeds[f"{one['task']} {split}"] = one.get("seed", 0)
    assert all(seeds.pop(name) != 0 for name in asked)
    assert all(name.endswith(" train") for name in seeds)
    assert stage != "distill_dmd2" or config.loss.gan == 0


def costs(made, *flops):
    for phase, of_step in zip(comparing.PHASES, flops, strict=True):
        write_json(comparing.cost_file(made, phase), {"flops": of_step})


def flags_of(steps):
    return {step.name: step.arguments() for step in steps}


def test_the_direct_way_takes_the_same_compute_and_schedule(tmp_path):
    from configs.shapes import phase1_t2i, phase2_edit, phase3_joint

    made = plan.of(tmp_path, 1, False, "cache")
    costs(made, 4e9, 5e9, 5e9)
    given = flags_of(comparing.steps(made))
    for k, config in enumerate((phase1_t2i, phase2_edit, phase3_joint), 1):
        own = config.get_config()
        paid = own.steps * 4 // 5 if k == 1 else own.steps
        assert f"--config.steps={paid}" in given[f"direct{k}"]
        assert "--config=configs/shapes/phase3_joint.py" in given[f"direct{k}"]
        assert f"--config.optim.lr={own.optim.lr}" in given[f"direct{k}"]
        assert f"--config.optim.warmup={own.optim.warmup}" in given[f"direct{k}"]


def test_a_share_of_pretraining_and_nothing_behind_it(tmp_path):
    """In schedules as short, both ways."""
    from configs.shapes import phase1_t2i, phase2_edit

    made = plan.of(tmp_path, 1, False, "cache", share=0.25)
    whole = {step.name: step.seconds for step in plan.steps(plan.of(tmp_path, 1, False, "cache"))}
    assert made.folder == tmp_path / "pretraining_0.25-1"
    steps = plan.steps(made)
    trained = [step for step in steps if not step.name.startswith("evaluate")]
    assert [step.name for step in trained] == ["autoencoder", *comparing.PHASES]
    assert steps[-1].name == "evaluate-phase3_joint"
    shares = [step.seconds / whole[step.name] for step in trained]
    assert shares == pytest.approx([1, 0.25, 0.25, 0.25])

    costs(made, 4e9, 5e9, 5e9)
    given = flags_of([*trained, *comparing.steps(made)])
    assert not any(flag.startswith("--config.steps") for flag in given["autoencoder"])
    first, second = phase1_t2i.get_config(), phase2_edit.get_config()
    for name, count in (
        ("phase1_t2i", first.steps // 4),
        ("direct1", first.steps // 5),
        ("phase2_edit", second.steps // 4),
        ("direct2", second.steps // 4),
    ):
        assert f"--config.steps={count}" in given[name]
    for name in ("phase1_t2i", "direct1"):
        assert f"--config.optim.warmup={first.optim.warmup // 4}" in given[name]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--pretraining=0.5"], "add --compare=direct_joint, without --quick"),
        (["--pretraining=0.5", "--compare=direct_joint", "--quick"], "without --quick"),
        (["--pretraining=0", "--compare=direct_joint"], "should be a share of its steps"),
        (["--pretraining=nan", "--compare=direct_joint"], "should be a share of its steps"),
    ],
)
def test_flags_that_contradict_each_other(given, said, tmp_path, capsys):
    assert commands.run("demo", f"--out={tmp_path / 'demo'}", *given) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1
    assert not (tmp_path / "demo").exists()


# --- Numbers and page -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return demo_results.make(tmp_path_factory.mktemp("demo") / "full")


@pytest.fixture(scope="module")
def found(results):
    return summary.collect(results, quick=False, seed=0)


def test_a_comparison_s_steps_are_no_part_of_a_demo(results, found, tmp_path):
    folder = tmp_path / "full"
    shutil.copytree(results, folder)
    for name in ("cost-sft", "direct1", "evaluate-direct"):
        write_json(folder / "done" / f"{name}.json", {"seconds": 1e4, "clock": 1e5})
    assert summary.collect(folder, quick=False, seed=0) == found


def test_tables_are_kept_apart():
    names = {summary.tables_file(Path("x"), *how).name for how in ((False,), (True,), (False, 0.2))}
    assert names == {"compare.json", "compare_quick.json", "compare_pretraining_0.2.json"}


def test_where_bundles_drew_is_said(found):
    assert "LiteRT's GPU accelerator" in report.where(found)
    one = {**found, "bundle_int8_on_gpu": False}
    assert "Bundle, int8: TFLite files on LiteRT's CPU" in report.where(one)
    assert "GPU accelerator" in report.where(one)
    assert "bundle_int8 drew on the CPU: no GPU driver here" in "\n".join(summary.said(one))
    neither = {**one, "bundle_fp16_on_gpu": False}
    assert "GPU accelerator" not in report.where(neither)
    assert "drew on" not in "\n".join(summary.said(found))


def test_the_numbers_are_flat_and_whole(results, found):
    assert all(isinstance(value, int | float) for value in found.values())
    assert found["minutes"] == pytest.approx(sum(demo_results.SECONDS.values()) / 60)
    for task in summary.TASKS:
        for variant in demo_results.RIGHT:
            if (task, variant) != ("edit", "edit"):
                low, value, high = (
                    found[f"{task}_accuracy_{variant}{end}"] for end in ("_low", "", "_high")
                )
                assert low < value < high
    images = summary.arrays(results, "rl", "t2i")
    assert found["t2i_accuracy_rl"] == images["exact"].mean()
    assert found["t2i_rl_gain"] == pytest.approx(
        found["t2i_accuracy_rl"] - found["t2i_accuracy_sft"]
    )
    unguided = [found[f"edit_accuracy_{name}_unguided"] for name in ("rl", "sft")]
    assert found["edit_rl_gain_unguided"] == pytest.approx(unguided[0] - unguided[1])


def test_bundles_are_compared_with_their_source_over_the_same_prompts(results, found):
    ours, theirs = (summary.arrays(results, v, "t2i") for v in ("bundle_int8", "distilled"))
    assert len(ours["exact"]) == 12 and len(theirs["exact"]) == 24
    expected = ours["exact"].mean() - theirs["exact"][:12].mean()
    assert found["t2i_bundle_int8_minus_source"] == pytest.approx(expected)
    errors = ((ours["images"].astype(float) - theirs["images"][:12]) ** 2).mean((1, 2, 3))
    same = errors == 0
    expected = np.where(same, 99.0, 10 * np.log10(255**2 / np.where(same, 1, errors))).mean()
    assert found["t2i_psnr_bundle_int8"] == pytest.approx(expected)


def test_aims_say_what_was_reached(found):
    changed = dict(found)
    for key, value in (("", 0.61), ("_low", 0.55), ("_high", 0.67)):
        changed[f"t2i_accuracy_sft{key}"] = value
    changed |= {"edit_rl_gain": 0.08, "edit_rl_gain_low": -0.01, "edit_rl_gain_high": 0.17}
    changed |= {"t2i_distilled_minus_teacher": -0.06, "edit_distilled_minus_teacher": -0.05}
    changed |= {"t2i_bundle_fp16_minus_source": 0.02, "edit_bundle_fp16_minus_source": -0.01}
    aims = {aim.what: aim for aim in summary.aims(changed)}
    one = aims["Text to image, held-out combinations, after fine-tuning"]
    assert one.met and one.result == "61.0 % (55.0 to 67.0)"
    assert not aims["Editing: reinforcement learning gains"].met  # its interval holds 0
    assert not aims["Text to image: 4 distilled steps and the guided 28"].met
    assert aims["Editing: 4 distilled steps and the guided 28"].met
    assert not aims["Text to image: Bundle with fp16 weights"].met  # 2 points above, too, is far
    assert aims["Editing: Bundle with fp16 weights"].met
    nothing = {aim.what: aim for aim in summary.aims(changed | {"edit_accuracy_distilled": 0.0})}
    assert not nothing["Editing: 4 distilled steps and the guided 28"].met  # none is right
    assert all(aim.met is None for aim in summary.aims({}))


def test_several_seeds_make_a_table(tmp_path):
    made = [plan.of(tmp_path, seed, False, "cache") for seed in range(3)]
    for k, one in enumerate(made):
        for variant, value in (("joint", 0.6 + 0.01 * k), ("direct", 0.5)):
            for task, split in itertools.product(summary.TASKS, ("held_out", "iid")):
                cell = {"accuracy": value, "score": 0.5, "sharpness": 1.0, "diversity": None}
                cell |= {"low": 0.1, "high": 0.9, "count": 10}
                write_json(summary.scores(one.folder, variant, task, split, ".json"), cell)
    seeds, ways = comparing.tables(made)
    assert seeds["rows"] == [["Both together", *["61.0 ± 1.0"] * 4]]
    # 11 points, t = 4.303 for two degrees of freedom, standard error 1 / sqrt(3)
    assert ways["rows"][0][1:] == ["61.0 ± 1.0", "50.0 ± 0.0", "+11.0 (+8.5 to +13.5)"]
    assert "| Both together |" in "\n".join(comparing.said([seeds]))
    short = [one._replace(share=0.25) for one in made]
    assert all(
        table["note"].endswith(" 25 % of the demo's steps.") for table in comparing.tables(short)
    )


def test_curves_stand_where_their_numbers_do():
    svg = charts.curves("a", [charts.Curve([0, 50, 100], [1.0, 0.1, 0.01], "t2i")], log=True)
    points = [
        tuple(map(float, p.split(","))) for p in svg.split('points="')[1].split('"')[0].split()
    ]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert y0 < y2
    assert charts.curves("a", [charts.Curve([1], [float("nan")], "t2i")]) == ""
    assert charts.ticks(0.0, 1.0, False) == [0.0, 0.5, 1.0]


def test_long_captions_end_in_dots():
    assert picture.wrapped("a red square", 200) == "a red square"
    lines = picture.wrapped("a picture of a blue circle and a pink triangle " * 3, 128).split("\n")
    assert len(lines) == picture.LINES and lines[-1].endswith("...")
    assert max(map(picture.font().getlength, lines)) <= 128


@pytest.fixture(scope="module")
def page(results, found, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    tables = [{"title": "A", "note": "n", "head": ["", "t2i"], "rows": [["rl", "80.0 ± 1.0"]]}]
    write_json(results.parent / "compare.json", {"tables": tables})
    report.write(file, results, found)
    return file


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_the_page_in_a_browser(page, width):
    """Every picture loads, nothing is wider than the screen."""
    seen = browser.seen(page, width)
    assert seen["width"] == width and seen["height"] > 2000
    assert seen["images"] > 100 and not seen["broken"]
    assert seen["scroll"] <= width and not seen["wide"], seen["wide"]


def test_the_browser_sees_what_is_wrong(tmp_path):
    body = '<img src="data:image/png;base64,AAAA" alt="broken"><div style="width:900px">wide</div>'
    (tmp_path / "page.html").write_text(f"<!doctype html><html><body>{body}</body></html>")
    seen = browser.seen(tmp_path / "page.html", 390)
    assert seen["broken"] == ["broken"] and seen["scroll"] > 390 and seen["wide"]


def test_the_page_says_what_reinforcement_learning_gains_without_guidance(page, found):
    for task in summary.TASKS:
        said = summary.points(found, f"{task}_rl_gain_unguided")
        assert f"<p>Without guidance: {said}.</p>" in page.read_text()


def test_the_page_needs_nothing_from_elsewhere(page):
    html = page.read_text()
    for word in ("http:", "https:", "<script", "<link", "@import", "url("):
        assert word not in html, word
    for section in (
        "Aims and results",
        "Curves",
        "Editing",
        "teacher and student",
        "The bundle",
        "Several seeds",
    ):
        assert section in html, section


def test_the_page_of_half_a_demo(tmp_path):
    folder = tmp_path / "quick"
    (folder / "done").mkdir(parents=True)
    found = summary.collect(folder, quick=True, seed=0)
    report.write(tmp_path / "report.html", folder, found)
    html = (tmp_path / "report.html").read_text()
    assert "quick run" in html and "not measured" in html and "The bundle" not in html
