"""A procedural world of coloured shapes, to train on without a download, and its exact judge.

    sample = shapes.sample_t2i(shapes.DEMO, "train", seed=0, index=7)
    image = shapes.render(sample.scene, 64, 64)
    shapes.judge(image, sample.spec).exact  # True

`world` says what scenes and specs are, `words` puts specs into English, `sampling` and `editing`
draw samples, `judging` reads pictures. NumPy only.
"""

from dreamlite_jax.data.shapes.editing import EditSample, sample_edit
from dreamlite_jax.data.shapes.judging import (
    Judgement,
    Percept,
    diversity,
    judge,
    judge_batch,
    perceive,
    sharpness,
)
from dreamlite_jax.data.shapes.sampling import (
    CLEAR,
    DEMO,
    EDITS,
    HARD,
    QUICK,
    SETTINGS,
    SPLITS,
    TOLD,
    VERSION,
    Settings,
    T2ISample,
    sample_scene,
    sample_t2i,
)
from dreamlite_jax.data.shapes.world import (
    COLOURS,
    ELSEWHERE,
    GROUNDS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Spec,
    Thing,
    Want,
    changed_mask,
    exactly,
    grade,
    render,
    satisfies,
)

__all__ = [
    "CLEAR",
    "COLOURS",
    "DEMO",
    "EDITS",
    "ELSEWHERE",
    "GROUNDS",
    "HARD",
    "PLACES",
    "QUICK",
    "RELATIONS",
    "SETTINGS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "TOLD",
    "VERSION",
    "EditSample",
    "Judgement",
    "Percept",
    "Scene",
    "Settings",
    "Spec",
    "T2ISample",
    "Thing",
    "Want",
    "changed_mask",
    "diversity",
    "exactly",
    "grade",
    "judge",
    "judge_batch",
    "perceive",
    "render",
    "sample_edit",
    "sample_scene",
    "sample_t2i",
    "satisfies",
    "sharpness",
]
