"""The demo in one picture: what the phone's bundle draws of the first held-out prompts and edits,
as they come. A green frame: the judge finds it exactly right."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dreamlite_jax.data import pictures
from launch.demos import summary

BUNDLE = "bundle_fp16"
PROMPTS, EDITS = 8, 4
SIDE, GAP, LINE, LINES = 128, 14, 15, 3  # pixels; an edit's two pictures share a caption
RIGHT, WRONG, FRAME = (18, 128, 46), (190, 190, 190), 2


def write(file: Path, folder: Path) -> None:
    """The picture of a demo's folder; none where its bundle has not drawn both tasks."""
    drawn, edited = (summary.arrays(folder, BUNDLE, task) for task in summary.TASKS)
    if drawn is None or edited is None:
        return
    upper = [
        ([drawn["images"][k]], drawn["exact"][k], drawn["prompts"][k])
        for k in range(min(PROMPTS, len(drawn["images"])))
    ]
    lower = [
        ([edited["sources"][k], edited["images"][k]], edited["exact"][k], edited["prompts"][k])
        for k in range(min(EDITS, len(edited["images"])))
    ]
    width, height = PROMPTS * (SIDE + GAP) + GAP, SIDE + LINES * LINE + GAP
    sheet = Image.new("RGB", (width, 2 * height + GAP), "white")
    for row, shown in enumerate((upper, lower)):
        place(sheet, shown, GAP + row * height)
    pictures.write_png(file, sheet)


def place(
    sheet: Image.Image, shown: Sequence[tuple[Sequence[np.ndarray], bool, str]], top: int
) -> None:
    """A row of (pictures side by side, whether the last is right, caption below them)."""
    draw, left = ImageDraw.Draw(sheet), GAP
    for images, right, caption in shown:
        start = left
        for image in images:
            sheet.paste(pictures.thumbnail(image, SIDE), (left, top))
            box = (left - FRAME, top - FRAME, left + SIDE + FRAME - 1, top + SIDE + FRAME - 1)
            left += SIDE + GAP
        draw.rectangle(box, outline=RIGHT if right else WRONG, width=FRAME)
        text = wrapped(str(caption), left - GAP - start)
        draw.multiline_text((start, top + SIDE + 2 * FRAME), text, "black", font(), spacing=2)


def font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(LINE - 3)


def wrapped(caption: str, width: int) -> str:
    """The caption on up to LINES lines of `width` pixels; what is longer ends in dots."""
    words, known = caption.split(), font()
    for kept in range(len(words), 0, -1):
        shown = words if kept == len(words) else [*words[:kept], "..."]
        lines = [shown[0]]
        for word in shown[1:]:
            longer = f"{lines[-1]} {word}"
            if known.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
        if len(lines) <= LINES:
            break
    return "\n".join(lines[:LINES])
