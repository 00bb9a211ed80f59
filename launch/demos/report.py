"""A demo's page: one HTML file without scripts or anything from elsewhere.

What it says follows from the demo's folder and its metrics; parts without results are left out, so
that the page of half a demo is a page, too.
"""

import base64
import html
import io
import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamlite_jax.data.pictures import replaced_file
from launch.demos import charts, plan, summary
from launch.demos.charts import Curve, Measured
from launch.demos.summary import NAMES, TASKS, VARIANTS, points
from launch.files import read_json

Metrics = Mapping[str, Any]
PAGE = Path(__file__).with_name("page.html")
TITLE = "DreamLite on the shapes world"

STAGES = {stage.config: stage for stage in plan.STAGES}
TEACHING = {
    "rl": "teacher, 28 guided steps",
    "teacher_4step": "teacher, 4 unguided steps",
    "distilled": "student, 4 unguided steps",
}
# Columns of the grids: short names, five of which fit on a phone.
SHOWN = {
    "pretrain": "First",
    "joint": "Joint",
    "sft": "Tuned",
    "rl": "RL",
    "distilled": "Student",
}


def write(file: Path, folder: Path, found: Metrics) -> None:
    """Writes the page of a demo's folder and its metrics (`summary.collect`)."""
    parts = (header, aims, road, accuracies, curves, drawings, edits, before_after, students)
    made = [part(folder, found) for part in (*parts, bundles, comparison, reproduce)]
    body = "\n".join(section for section in made if section)
    page = string.Template(PAGE.read_text("utf-8")).substitute(title=TITLE, body=body)
    with replaced_file(file) as stream:
        stream.write(page.encode())


# --- Pieces ---------------------------------------------------------------------------------------


def text(value: Any) -> str:
    return html.escape(str(value))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Cells are HTML; columns in `numbers` stand to the right."""

    def kind(k: int) -> str:
        return ' class="number"' if k in numbers else ""

    lines = ["".join(f"<th{kind(k)}>{text(name)}</th>" for k, name in enumerate(head))]
    # On a narrow screen cells stand below each other, with the column's name before them.
    names = ["", *(f' data-name="{text(name)}"' if name else "" for name in head[1:])]
    for row in rows:
        cells = (f"<td{kind(k)}{names[k]}>{cell}</td>" for k, cell in enumerate(row))
        lines.append("".join(cells))
    return f'<table class="wide">{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


def embedded(picture: np.ndarray) -> str:
    """uint8 [H, W, 3] as the address of a PNG."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def shot(picture: np.ndarray, caption: str, alt: str) -> str:
    """A small picture with a caption, which is HTML."""
    return f'<figure class="shot">{image(picture, alt)}<figcaption>{caption}</figcaption></figure>'


def image(picture: np.ndarray, alt: str) -> str:
    height, width = picture.shape[:2]
    return f'<img src="{embedded(picture)}" alt="{text(alt)}" width="{width}" height="{height}">'


def judged(arrays: Mapping[str, np.ndarray], k: int, label: str) -> str:
    """A variant's k-th picture with the judge's verdict."""
    if arrays["exact"][k]:
        mark = '<b class="met">&#10003;</b>'
    else:
        mark = f'<b class="missed">&#10007;</b> {arrays["score"][k]:.2f}'
    return shot(arrays["images"][k], f"{text(label)}<br>{mark}", f"{label}: {arrays['prompts'][k]}")


def sheet(
    columns: Mapping[str, Mapping[str, np.ndarray]], rows: Sequence[int], kind: str = ""
) -> str:
    """A card for each prompt: the source of an edit, then a picture of each column."""
    cards, first = [], next(iter(columns.values()))
    editing = "sources" in first
    for k in rows:
        shots = [judged(arrays, k, label) for label, arrays in columns.items()]
        if editing:
            source = shot(first["sources"][k], "Source", "the picture to edit")
            shots = [source, '<i class="arrow" aria-hidden="true"></i>', *shots]
        count = len(columns) + editing
        strip = f'<div class="strip{" edits" if editing else ""}" style="--n:{count}">'
        ask = f'<p class="ask">{text(first["prompts"][k])}</p>'
        cards.append(f'<div class="card">{ask}{strip}{"".join(shots)}</div></div>')
    return f'<div class="sheet {kind}">{"".join(cards)}</div>'


def percent(found: Metrics, key: str) -> str:
    return f"{100 * found[key]:.0f}&thinsp;%" if key in found else "&ndash;"


def clock(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes >= 2 else f"{60 * minutes:.0f} s"


# --- Sections -------------------------------------------------------------------------------------


def header(folder: Path, found: Metrics) -> str:
    tiles = [
        (percent(found, f"{task}_accuracy_{variant}"), what)
        for variant, task, what in (
            ("rl", "t2i", "of held-out prompts drawn exactly right, 28 guided steps"),
            ("rl", "edit", "of held-out edits exactly right, 28 guided steps"),
            ("distilled", "t2i", "drawn right by the student, 4 steps without guidance"),
        )
    ]
    if "bundle_int8_megabytes" in found:
        tiles.append((f"{found['bundle_int8_megabytes']:.1f} MB", "bundle with int8 weights"))
    tiles.append((clock(found["minutes"]), "from nothing to the bundle, on this machine"))
    banner = ""
    if found["quick"]:
        banner = (
            '<p class="banner">This is a quick run: a few steps of the smallest model. It shows '
            "that every stage works. Its pictures and accuracies mean nothing.</p>"
        )
    made = "".join(
        f'<div class="tile"><b>{n}</b><span>{text(what)}</span></div>' for n, what in tiles
    )
    return (
        f'<h1>{TITLE}</h1><p class="lead">One small network that draws and edits, trained from '
        "nothing by all of the paper's kinds of training, then packed for a phone. A judge that "
        "reads pictures says what is right.</p>"
        f'{banner}<div class="tiles">{made}</div>{hero(folder)}'
    )


def hero(folder: Path) -> str:
    """The first pictures of the last model, as they come."""
    for name in ("distilled", "rl", "sft", "joint", "pretrain"):
        if (arrays := summary.arrays(folder, name, "t2i")) is not None:
            shown = list(zip(arrays["images"], arrays["prompts"], strict=True))[:12]
            made = "".join(image(picture, prompt) for picture, prompt in shown)
            return (
                f'<div class="hero">{made}</div><p class="soft">{VARIANTS[name]}: the first '
                f"{len(shown)} held-out prompts, as they came.</p>"
            )
    return ""


def aims(folder: Path, found: Metrics) -> str:
    marks = {
        True: '<span class="mark met">&#10003; met</span>',
        False: '<span class="mark missed">&#10007; missed</span>',
        None: '<span class="mark open">&ndash; open</span>',
    }
    rows = [
        (text(a.what), text(a.aim), text(a.result).replace("-", "&minus;"), marks[a.met])
        for a in summary.aims(found)
    ]
    return (
        "<h2>Aims and results</h2><p>Accuracy is the share of pictures with nothing wrong. In "
        "brackets: 95&thinsp;% intervals, of differences over the same prompts and noise.</p>"
        f'<div class="card">{table(("", "Aim", "Result", ""), rows)}</div>'
    )


def road(folder: Path, found: Metrics) -> str:
    """What was trained, and how long all of it took."""
    spans = {
        key.removeprefix("minutes_"): value
        for key, value in found.items()
        if key.startswith("minutes_")
    }
    order = [name for name in STAGES if name in spans]
    order += [name for name in spans if name not in STAGES]
    if not order:
        return ""
    bar = "".join(
        f'<i class="{"train" if name in STAGES else ""}" style="flex:{spans[name]:.3f}" '
        f'title="{text(name)}: {clock(spans[name])}"></i>'
        for name in order
    )
    items = "".join(
        f"<li><b>{text(s.title)}<span>{clock(spans[name])}</span></b>{text(s.about)}</li>"
        for name, s in STAGES.items()
        if name in spans
    )
    rest = sum(spans[name] for name in spans if name not in STAGES)
    return (
        f"<h2>The road</h2><p>Training in colour, in its order; then judging, export and bundles "
        f"({clock(rest)}, judging beside the next stage's training).</p>"
        f'<div class="road" aria-hidden="true">{bar}</div>'
        f'<ol class="stages">{items}</ol>'
    )


def accuracies(folder: Path, found: Metrics) -> str:
    panels = [panel(found, task) for task in TASKS]
    if not any(panels):
        return ""
    return (
        '<h2>Right, stage by stage</h2><p><i class="key t2i"></i><i class="key edit"></i>held-out '
        'combinations with their 95&thinsp;% interval <i class="key seen"></i>combinations that '
        "training showed. Of held-out ones no lesson shows an answer; reinforcement learning asks "
        "for edits of them all the same, distillation for pictures, too (other ones than these). "
        'The dashed line is the aim after fine-tuning.</p><div class="two">'
        f"{''.join(panels)}</div>"
    )


def panel(found: Metrics, task: str) -> str:
    rows, aim = [], {"t2i": 0.6, "edit": 0.5}[task]
    for variant, name in VARIANTS.items():
        key = f"{task}_accuracy_{variant}"
        if key not in found:
            continue
        shares = [Measured(*(found[key + end] for end in ("", "_low", "_high")), task)]
        if f"{key}_iid" in found:
            seen = (found[f"{key}_iid{end}"] for end in ("", "_low", "_high"))
            shares.insert(0, Measured(*seen, "seen"))
        rows.append(
            f'<div class="row"><span>{text(name)}</span>{charts.track(shares, aim)}'
            f"<span>{percent(found, key)}</span></div>"
        )
    if not rows:
        return ""
    axis = '<div class="axis"><span>0</span><span>50</span><span>100&thinsp;%</span></div>'
    return f'<div class="card"><h3 class="first">{NAMES[task]}</h3>{"".join(rows)}{axis}</div>'


def curves(folder: Path, found: Metrics) -> str:
    """What the runs logged: of each stage the one thing that tells most."""
    figures = []
    for name, stage in STAGES.items():
        file = folder / "runs" / name / "metrics.jsonl"
        if file.is_file() and (chart := chart_of(name, logged(file))):
            figures.append(f"<figure>{chart}</figure>".replace("TITLE", text(stage.title)))
    if not figures:
        return ""
    return f'<h2>Curves</h2><div class="charts">{"".join(figures)}</div>'


def chart_of(name: str, lines: list[dict[str, Any]]) -> str:
    """A stage's chart with its caption; TITLE stands where the stage's goes."""

    def curve(key: str, kind: str = "t2i", smooth: Callable = charts.smoothed) -> Curve:
        points = [(line["step"], float(line[key])) for line in lines if key in line]
        return Curve([x for x, _ in points], smooth([y for _, y in points]), kind)

    if name == "autoencoder":
        given, what, log = [curve("val/psnr", smooth=list)], "reconstruction, dB", False
    elif name == "rl_nft":
        key = "reward/shapes/{}/mean"
        given = [curve(key.format(task), task) for task in TASKS]
        given += [curve(f"val/{key.format(task)}", f"{task} held", list) for task in TASKS]
        what, log = (
            'reward: <i class="key t2i"></i>text to image<i class="key edit"></i>edits, dashed: '
            "of held-out prompts",
            False,
        )
    else:
        given, what, log = [curve("loss")], "loss", True
    if not (chart := charts.curves(f"{name}: {what.split(':')[0]}", given, log)):
        return ""
    return f"{chart}<figcaption><b>TITLE</b> &middot; {what} over steps</figcaption>"


def logged(file: Path) -> list[dict[str, Any]]:
    """Whole lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines() if line[-1:] == "}"]


def columns(folder: Path, task: str, names: Mapping[str, str]) -> dict[str, dict]:
    """What variants drew, by their labels; those without pictures are left out."""
    made = {label: summary.arrays(folder, name, task) for name, label in names.items()}
    return {label: arrays for label, arrays in made.items() if arrays is not None}


def drawings(folder: Path, found: Metrics) -> str:
    given = columns(folder, "t2i", SHOWN)
    if not given:
        return ""
    rows = range(min(8, smallest(given)))
    return (
        "<h2>Text to image</h2><p>The first held-out prompts, not the best ones, from the same "
        "noise after every stage. A tick: nothing is wrong; else the judge's score.</p>"
        f"{sheet(given, rows)}"
    )


def edits(folder: Path, found: Metrics) -> str:
    given = columns(folder, "edit", SHOWN)
    if not given:
        return ""
    kinds = next(iter(given.values()))["kinds"][: smallest(given)]
    first = list(dict.fromkeys(int(np.argmax(kinds == kind)) for kind in dict.fromkeys(kinds)))
    rows = (first + [k for k in range(len(kinds)) if k not in first])[:8]
    return (
        "<h2>Editing</h2><p>A source and an instruction; everything else has to stay as it was. "
        f"The first held-out edit of each kind, and the next ones.</p>{sheet(given, rows)}"
    )


def smallest(given: Mapping[str, Mapping[str, np.ndarray]]) -> int:
    return min(len(arrays["images"]) for arrays in given.values())


def before_after(folder: Path, found: Metrics) -> str:
    """Where reinforcement learning changed the verdict, both ways in their proportion."""
    parts = []
    for task in TASKS:
        given = columns(folder, task, {"sft": "Before", "rl": "After"})
        if len(given) < 2:
            continue
        before, after = (arrays["exact"][: smallest(given)] for arrays in given.values())
        better, worse = np.flatnonzero(after & ~before), np.flatnonzero(before & ~after)
        total = len(better) + len(worse)
        count = round(6 * len(better) / total) if total else 0
        rows = [*better[:count], *worse[: 6 - count]] if total else range(min(6, len(before)))
        unguided = f"{task}_rl_gain_unguided"
        said = f"<p>Without guidance: {points(found, unguided)}.</p>" if unguided in found else ""
        parts.append(
            f"<h3>{NAMES[task]}: {len(better)} of {len(before)} became right, {len(worse)} wrong"
            f"</h3>{said}{sheet(given, [int(k) for k in rows], 'narrow')}"
        )
    if not parts:
        return ""
    return (
        "<h2>Reinforcement learning: before and after</h2><p>The same prompts and noise. Shown are "
        "pictures whose verdict changed, both ways in their proportion, with guidance; in "
        f"training it draws without.</p>{''.join(parts)}"
    )


def students(folder: Path, found: Metrics) -> str:
    """Student and teacher side by side."""
    names = {"rl": "28 guided", "teacher_4step": "Teacher, 4", "distilled": "Student, 4"}
    parts, rows = [], []
    for task in TASKS:
        given = columns(folder, task, names)
        if len(given) < len(names):
            continue
        shown = range(min(6, smallest(given)))
        parts.append(f"<h3>{NAMES[task]}</h3>{sheet(given, shown, 'narrow')}")
        for name in names:
            rows.append((f"{NAMES[task]}: {TEACHING[name]}", *quality(found, task, name)))
    if not parts:
        return ""
    head = ("", "Right", "Sharpness", "Diversity")
    return (
        "<h2>Distillation: teacher and student</h2><p>Sharpness is 1 for a crisp render, diversity "
        "the difference between four pictures of one prompt: a student must lose neither. What it "
        "is asked for is about held-out pairs, too; an answer it is never shown.</p>"
        f'<div class="card">{table(head, rows, (1, 2, 3))}</div>{"".join(parts)}'
    )


def quality(found: Metrics, task: str, variant: str) -> tuple[str, ...]:
    def number(what: str) -> str:
        key = f"{task}_{what}_{variant}"
        return f"{found[key]:.2f}" if key in found else "&ndash;"

    return percent(found, f"{task}_accuracy_{variant}"), number("sharpness"), number("diversity")


# --- The bundle -----------------------------------------------------------------------------------


def bundles(folder: Path, found: Metrics) -> str:
    parts = [bundle(folder, name, found) for name in summary.BUNDLES]
    if not any(parts):
        return ""
    shown = []
    for task in TASKS:
        names = {"distilled": "JAX", "bundle_fp16": "fp16", "bundle_int8": "int8"}
        if given := columns(folder, task, names):
            rows = range(min(6, smallest(given)))
            shown.append(f"<h3>{NAMES[task]}</h3>{sheet(given, rows, 'narrow')}")
    return (
        f"<h2>The bundle</h2><p>{where(found)} Captions are encoded by the bundle's own text "
        "tower; edits are given the embeddings that JAX computed, because the bundle holds no "
        f'vision tower.</p><div class="two">{"".join(parts)}</div>{"".join(shown)}'
    )


def where(found: Metrics) -> str:
    """On what the bundles drew."""
    names = [name for name in summary.BUNDLES if f"{name}_on_gpu" in found]
    elsewhere = [VARIANTS[name] for name in names if not found[f"{name}_on_gpu"]]
    on_gpu = (
        "TFLite files on LiteRT's GPU accelerator, in half precision, on this machine's Vulkan "
        "driver. Without a GPU that is a software driver: its times say nothing of a phone's."
    )
    on_cpu = (
        f"{' and '.join(elsewhere)}: TFLite files on LiteRT's CPU, because there is no driver here "
        "on which all of them run."
    )
    said = [on_gpu] * (len(elsewhere) < len(names)) + [on_cpu] * bool(elsewhere)
    return " ".join(said)


def bundle(folder: Path, name: str, found: Metrics) -> str:
    """A bundle's files with what the GPU report says of them."""
    if not (folder / name / "manifest.json").is_file():
        return ""
    files = read_json(folder / name / "manifest.json")["files"]
    said = read_json(folder / name / "gpu_report.json")
    rows = []
    for file, entry in sorted(files.items(), key=lambda item: -item[1]["bytes"]):
        if file in said:
            one = said[file]
            count = sum(sum(graph.values()) for graph in one["operations"].values())
            delegated = {True: f"all {count} operations", False: "refused", None: "not tried"}
            nearest = one["psnr"].get("gpu fp16") or one["psnr"]["cpu fp32"]
            size, reached = f"{entry['bytes'] / 1e6:.2f} MB", f"{min(nearest.values()):.0f} dB"
            part = text(file.removesuffix(".tflite").replace("_", " "))
            rows.append((part, size, delegated[one["delegated"]], reached))
    likeness = [
        f"{NAMES[task]}: {found[key]:.1f} dB of JAX's pictures, "
        f"{1e3 * found[f'{task}_seconds_{name}']:.0f} ms a picture."
        for task in TASKS
        if (key := f"{task}_psnr_{name}") in found
    ]
    total = found[f"{name}_megabytes"]
    return (
        f'<div class="card"><h3 class="first">{VARIANTS[name]}, {total:.1f} MB with its '
        f"tokenizer and golden cases</h3>"
        f"{table(('File', 'Size', 'On the GPU', 'Beside JAX'), rows, (1, 3))}"
        f'<p class="soft" style="margin:12px 0 0">{"<br>".join(likeness)}</p></div>'
    )


def comparison(folder: Path, found: Metrics) -> str:
    """The table of several seeds and of the order of stages, where one was made."""
    file = summary.tables_file(folder.parent, found["quick"])
    if not file.is_file():
        return ""
    made = read_json(file)
    parts = []
    for part in made["tables"]:
        rows = [[text(cell) for cell in row] for row in part["rows"]]
        numbers = range(1, len(part["head"]))
        parts.append(
            f'<h3>{text(part["title"])}</h3><p class="soft">{text(part["note"])}</p>'
            f'<div class="card">{table(part["head"], rows, numbers)}</div>'
        )
    return f"<h2>Several seeds</h2>{''.join(parts)}"


def reproduce(folder: Path, found: Metrics) -> str:
    command = "make demo QUICK=1" if found["quick"] else "make demo"
    if found["seed"]:
        command = f"python -m launch.demo --seed={found['seed']}"
        command += " --quick" if found["quick"] else ""
    return (
        f"<h2>Again</h2><pre><code>{command}</code></pre><p>Interrupted, the same command goes on. "
        "Accuracies, differences and times stand in <code>metrics.json</code>.</p>"
    )
