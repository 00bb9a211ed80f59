"""Batches: what they hold, and that they are a function of the step and of nothing else."""

import copy
import hashlib
import itertools
import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import stored
from PIL import Image

from dreamlite_jax import tiny
from dreamlite_jax.data import mixture, pictures, pipeline, prompts, shapes, streams, transforms
from dreamlite_jax.data.mixture import EDIT, T2I, TASKS, MixtureError
from dreamlite_jax.data.pipeline import Recipe

SHAPES = {"source": "shapes:quick:train", "count": 40}
BOTH = [{**SHAPES, "task": T2I, "weight": 1.0}, {**SHAPES, "task": EDIT, "weight": 1.0}]


@pytest.fixture(scope="module")
def prompter(tmp_path_factory):
    from dreamlite_jax import system

    side = prompts.IMAGE_SIDE  # as a released model, unlike the pictures' and tiny models'
    folder = tiny.tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny", image_side=side)
    return system.load_prompter(folder, system.read_config(folder).text_encoder)


def recipe(entries=BOTH, **settings):
    made = {"batch_size": 8, "image_size": 64, **settings}
    return Recipe(streams.open_streams(entries, made["image_size"]), **made)


def first(made, step=0, steps=1, **how):
    batches = pipeline.batches_from(made, step, **how)
    return [next(batches) for _ in range(steps)]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_shapes_and_dtypes_are_those_of_the_documented_type(prompter):
    batch = first(recipe(prompter=prompter))[0]
    patches = (prompts.IMAGE_SIDE // prompter.image_processor.patch_size) ** 2
    dim = prompter.numbers["patch_dim"]
    expected = {
        "task": ("int32", (8,)),
        "stream": ("int32", (8,)),
        "index": ("int64", (8,)),
        "time_ids": ("float32", (8, 2)),
        "original_size": ("int32", (8, 2)),
        "crop": ("float32", (8, 4)),
        "has_source": ("bool", (8,)),
        "changed": ("bool", (8, 8, 8)),
        "target": ("float32", (8, 64, 64, 3)),
        "source": ("float32", (8, 64, 64, 3)),
        "drop": ("int32", (8,)),
        "input_ids": ("int32", (8, 512)),
        "attention_mask": ("bool", (8, 512)),
        "position_ids": ("int32", (8, 3, 512)),
        "pixel_values": ("float32", (8, patches, dim)),
        "patch_mask": ("bool", (8, patches)),
        "patch_positions": ("int32", (8, patches, 2)),
        "interp_indices": ("int32", (8, patches, 4)),
        "interp_weights": ("float32", (8, patches, 4)),
        "image_index": ("int32", (8, 512)),
    }
    assert {key: (str(a.dtype), a.shape) for key, a in batch.items()} == expected
    documented = pipeline.Batch.__annotations__
    assert batch.keys() <= documented.keys()


def test_rows_are_the_samples_they_say():
    made = recipe(dropout=transforms.Dropout(0, 0, 0, 0))
    for batch in first(made, 3, 5):
        for b, index in enumerate(batch["index"]):
            at = (shapes.QUICK, "train", 0, int(index))
            if TASKS[batch["task"][b]] == T2I:
                target, source = shapes.sample_t2i(*at).scene, None
                assert not batch["has_source"][b] and batch["changed"][b].all()
                assert not batch["source"][b].any()
            else:
                edit = shapes.sample_edit(*at)
                target, source = edit.target, edit.source
                assert batch["has_source"][b] and not batch["changed"][b].all()
            for key, scene in (("target", target), ("source", source)):
                if scene is not None:
                    drawn = pictures.to_floats(shapes.render(scene, 64, 64))
                    np.testing.assert_array_equal(batch[key][b], drawn)
            assert batch["time_ids"][b].tolist() == [64, 64]


def test_both_modes_are_tokenised_as_sampling_does(prompter):
    made = recipe(prompter=prompter, dropout=transforms.Dropout(0, 0, 0, 0))
    batch = first(made)[0]
    assert set(batch["task"]) == {0, 1}
    for b, index in enumerate(batch["index"]):
        at = (shapes.QUICK, "train", 0, int(index))
        if batch["task"][b] == TASKS.index(T2I):
            mode, text, images = prompts.GENERATE, shapes.sample_t2i(*at).caption, None
        else:
            edit = shapes.sample_edit(*at)
            mode, text = prompts.EDIT, edit.instruction
            images = [Image.fromarray(shapes.render(edit.source, 64, 64))]
        alone = prompts.prompt_inputs(prompter, mode, [prompts.tagged(mode, text)], images)
        n = int(alone["attention_mask"].sum())
        assert batch["attention_mask"][b].sum() == n
        for key in ("input_ids", "position_ids"):
            np.testing.assert_array_equal(batch[key][b][..., :n], alone[key][0][..., :n])
        assert batch["drop"][b] == getattr(prompter.drop, mode)
        if images:
            np.testing.assert_array_equal(batch["pixel_values"][b], alone["pixel_values"][0])
            np.testing.assert_array_equal(batch["image_index"][b][:n], alone["image_index"][0][:n])
        else:
            assert not batch["patch_mask"][b].any() and (batch["image_index"][b] == -1).all()


def test_dropped_texts_are_null_and_dropped_sources_blank(prompter):
    made = recipe(prompter=prompter, dropout=transforms.Dropout(1.0, 0, 1.0, 0), batch_size=4)
    batch = first(made)[0]
    assert not batch["has_source"].any()
    lengths = batch["attention_mask"].sum(1) - batch["drop"]
    end = len(prompter.tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    image = 2 + prompter.image_tokens
    expected = np.where(batch["task"] == TASKS.index(EDIT), image + end, end)
    np.testing.assert_array_equal(lengths, expected)


def test_long_captions_are_cut_and_images_stay_whole(prompter):
    texts, image = ["word " * 600, "word " * 600], Image.new("RGB", (64, 64))
    made = pipeline.text_inputs(prompter, texts, [None, image], 512)
    assert made["attention_mask"].sum(1).tolist() == [prompter.drop.generate + 200, 512]
    assert (made["image_index"][1] >= 0).sum() == prompter.image_tokens


def test_without_edits_there_are_no_images(prompter):
    batch = first(recipe(BOTH[:1], prompter=prompter))[0]
    assert batch["input_ids"].shape == (8, 256)
    assert not {"source", "pixel_values"} & batch.keys()


def test_any_step_can_be_the_first():
    made = recipe()
    run = first(made, 0, 6)
    assert_equal(first(made, 4)[0], run[4])
    assert_equal(pipeline.batch(made, pipeline.check(made), range(8), 5), run[5])
    assert any((a["index"] != b["index"]).any() for a, b in itertools.pairwise(run))


def test_what_is_asked_for_is_what_the_batch_holds():
    """Captions, what edits start from, and which samples they are: enough for the judge."""
    made = recipe(dropout=transforms.Dropout(0, 0, 0, 0))
    plan, rows = pipeline.check(made), [1, 2, 6, 7]
    batch, asked = pipeline.batch(made, plan, rows, 5), pipeline.asked(made, plan, rows, 5)
    assert [one.caption for one in asked] == pipeline.captions(made, plan, rows, 5)
    assert {one.task for one in asked} == set(TASKS)
    for b, one in enumerate(asked):
        at = {"settings": "quick", "split": "train", "task": one.task, "seed": 0}
        assert one.metadata == {**at, "index": int(batch["index"][b])}
        assert TASKS[batch["task"][b]] == one.task
        if one.task == EDIT:
            np.testing.assert_array_equal(pictures.to_bytes(batch["source"][b]), one.source)
        else:
            assert one.source is None


def test_null_texts_beside_the_others_are_those_of_dropped_texts(prompter):
    both = first(recipe(prompter=prompter, with_null=True, dropout=transforms.Dropout(0, 0, 0, 0)))
    dropped = first(recipe(prompter=prompter, dropout=transforms.Dropout(1, 1, 0, 0)))
    null = {k.removeprefix("null_"): v for k, v in both[0].items() if k.startswith("null_")}
    assert {"input_ids", "attention_mask", "pixel_values", "drop"} <= null.keys()
    assert_equal(null, {key: dropped[0][key] for key in null})


def test_pictures_are_decoded_one_by_one():
    """A batch of large ones, all held at once, took hundreds of MiB and a third of the time."""
    opened, most = [], 0

    class Large:
        task, fingerprint, sizes = T2I, "large", np.full((8, 2), 200)

        def __len__(self):
            return 8

        def read(self, index, size):
            nonlocal most
            picture = Image.new("RGB", (200, 200), (index, 0, 0))
            opened.append(weakref.ref(picture))
            most = max(most, sum(one() is not None for one in opened))
            return pipeline.Sample(["a picture"], picture.size, picture)

    made = Recipe((mixture.Stream("large", Large()),), batch_size=8, image_size=64)
    batch = pipeline.batch(made, pipeline.check(made), range(8), 0)
    np.testing.assert_array_equal(pictures.to_bytes(batch["target"])[:, 0, 0, 0], batch["index"])
    assert len(set(batch["index"])) == 8 and most <= 2


def test_threads_change_nothing():
    made = recipe()
    for a, b in zip(first(made, 2, 4), first(made, 2, 4, threads=4), strict=True):
        assert_equal(a, b)


def test_hosts_share_a_batch():
    made = recipe()
    whole = first(made, 7)[0]
    for hosts in (2, 4, 8):
        rows = [pipeline.host_rows(8, host, hosts) for host in range(hosts)]
        parts = [first(made, 7, rows=own)[0] for own in rows]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in whole}
        assert_equal(joined, whole)


_HOST = """
import hashlib, json, sys
from dreamlite_jax.data import pipeline, streams
from dreamlite_jax.data.pipeline import Recipe
if __name__ == "__main__":
    entries, host, hosts, start, stop, workers = json.loads(sys.argv[1])
    made = Recipe(streams.open_streams(entries, 64), batch_size=8, image_size=64)
    rows = pipeline.host_rows(8, host, hosts)
    batches = pipeline.batches_from(made, start, rows=rows, workers=workers)
    digests = []
    for _ in range(start, stop):
        batch = next(batches)
        for b in range(len(batch["index"])):
            row = b"".join(batch[key][b].tobytes() for key in sorted(batch))
            digests.append(hashlib.sha256(row).hexdigest())
    print(json.dumps(digests))
"""


def host_rows(start, stop, hosts, workers=0):
    """Digests of all rows of some steps, [steps * B], each host's from a process of its own."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _HOST, json.dumps([BOTH, host, hosts, start, stop, workers])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        for host in range(hosts)
    ]
    said = [process.communicate() for process in started]
    assert not any(process.returncode for process in started), [err for _, err in said]
    own, n = [json.loads(out) for out, _ in said], 8 // hosts
    return [row for k in range(stop - start) for part in own for row in part[k * n : (k + 1) * n]]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("start", "hosts", "workers"), [(0, 1, 0), (2, 1, 2), (1, 2, 0), (0, 4, 0), (3, 8, 0)]
)
def test_real_processes_agree_whatever_their_number_and_wherever_they_start(start, hosts, workers):
    batches = first(recipe(), 0, 5)
    expected = [
        hashlib.sha256(b"".join(b_[key][b].tobytes() for key in sorted(b_))).hexdigest()
        for b_ in batches
        for b in range(8)
    ]
    assert host_rows(start, 5, hosts, workers) == expected[start * 8 :]


def test_an_epoch_of_a_run_that_restarts_on_other_hosts_holds_every_sample_once():
    """40 samples, batches of 16: epochs end within batches."""
    made = recipe(BOTH[:1], batch_size=16)
    seen = []
    for step, hosts in enumerate((1, 2, 4, 8, 16)):
        for host in range(hosts):
            own = pipeline.host_rows(16, host, hosts)
            seen += first(made, step, rows=own)[0]["index"].tolist()
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40)) and seen[:40] != seen[40:]


def test_changed_data_is_noticed():
    before = pipeline.description(recipe())
    assert pipeline.check_unchanged(json.loads(json.dumps(before)), recipe()) == []
    for other, said in (
        (recipe([BOTH[0], {**BOTH[1], "weight": 2.0}]), "weight was 1.0, is 2.0"),
        (recipe([BOTH[0], {**BOTH[1], "count": 41}]), "data was"),
        (recipe(batch_size=16), "batch_size was 8, is 16"),
        (recipe(BOTH[:1]), "is absent"),
        (recipe(BOTH[::-1]), r"streams was .*:t2i', .*:edit'\], is .*:edit', .*:t2i'\]"),
    ):
        with pytest.raises(MixtureError, match=said):
            pipeline.check_unchanged(before, other)
        assert pipeline.check_unchanged(before, other, allow=True)


def test_another_tokenizer_is_noticed(prompter):
    before = pipeline.description(recipe(prompter=prompter))
    other = copy.deepcopy(prompter.tokenizer)
    made = recipe(prompter=prompter._replace(tokenizer=other))
    assert pipeline.check_unchanged(before, made) == []
    other.add_tokens(["zyzzyva"])
    made = recipe(prompter=prompter._replace(tokenizer=other))
    with pytest.raises(MixtureError, match=r"so far: prompts was '[0-9a-f]+', is"):
        pipeline.check_unchanged(before, made)


@pytest.mark.parametrize(
    "entry, said",
    [
        ({"source": "shapes:demo:train"}, "needs a task, t2i or edit"),
        ({"source": "shapes:demo", "task": T2I}, "should be shapes:SETTINGS:SPLIT"),
        ({"source": "shapes:demi:train", "task": T2I}, "unknown shapes settings 'demi'"),
        ({"source": "shapes:demo:test", "task": T2I}, "unknown split 'test'"),
        ({"source": "shapes:demo:train", "task": T2I, "wieght": 1}, "unknown keys wieght"),
        ({"source": "/nowhere"}, "/nowhere: no such folder"),
        ({}, "`source` is missing"),
    ],
)
def test_wrong_entries_are_named(entry, said):
    with pytest.raises(MixtureError, match=r"data\[1\]: ") as caught:
        streams.open_streams([BOTH[0], entry], 64)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_all_that_is_wrong_comes_in_one_line():
    with pytest.raises(MixtureError) as caught:
        pipeline.check(recipe(batch_size=0, image_size=60))
    assert "batch size is 0" in str(caught.value) and "multiple of 32" in str(caught.value)


def test_a_batch_that_hosts_cannot_share_is_refused():
    with pytest.raises(MixtureError, match="no multiple of 4 hosts"):
        pipeline.host_rows(6, 0, 4)


def test_a_text_length_without_room_for_the_image_is_refused(prompter):
    with pytest.raises(MixtureError, match="cannot hold"):
        pipeline.check(recipe(prompter=prompter, text_length=256))


def test_the_mixture_is_that_of_the_plan():
    made = recipe([BOTH[0], {**BOTH[1], "weight": 3.0}])
    tasks = np.concatenate([batch["task"] for batch in first(made, 0, 10)])
    assert np.bincount(tasks).tolist() == [20, 60]
    assert mixture.bucket_of(pipeline.check(made), 9) == (0, 9)


def test_precomputed_samples_keep_their_sizes(tmp_path):
    """Alone the second set kept its wide ones; in the mixture they are less than a batch."""
    sizes = {"a": [(64, 64)] * 60, "b": [(64, 64)] * 5 + [(96, 32)] * 3}
    entries = [
        {"source": str(stored.write_set(tmp_path / name, own, 64, {}))}
        for name, own in sizes.items()
    ]
    made = Recipe(streams.open_streams(entries, 64, {}), batch_size=8, image_size=64, max_ratio=3.0)
    plan = pipeline.check(made)
    seen = {
        pipeline.batch(made, plan, range(8), step)["target_latents"].shape[1:3]
        for step in [int(np.flatnonzero(plan.cycle == b)[0]) for b in range(len(plan.buckets))]
    }
    assert seen == {(8, 8), (4, 12)}
    other = [{"source": str(stored.write_set(tmp_path / "c", [(80, 80)], 64, {}))}]
    with pytest.raises(MixtureError, match=r"c was precomputed at 80x80 pixels \(record 0\)"):
        pipeline.check(made._replace(streams=streams.open_streams(other, 64, {})))
