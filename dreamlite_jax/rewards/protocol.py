"""How rewards travel: JSON over HTTP, pictures as PNG in base64.

    GET /   {"name": "hpsv3", "range": [null, null], "tasks": ["t2i"], "needs": [], "examples": [
             {"prompt": ..., "good": ..., "bad": ..., "source": ..., "metadata": {}}, ...],
             "answered": 12}
    POST /  {"id": "7f...", "items": [{"prompt": ..., "image": ..., "source": ..., "metadata": {}}]}
            {"id": "7f...", "scores": [{"item": 0, "score": 0.5}, ...]}

`source` is null where nothing is edited. A reply names its request and every score its item, so
that neither a late reply nor another order can be taken for what it is not. A range's null stands
for infinity. Errors are {"error": TEXT} with a status: 400 for what the client did wrong, 500 for a
reward that failed. Examples are pairs of which the first has to score higher, for the client's
self-test; `answered` is how many requests were scored while their client still waited, by which
others see that a server is busy and not stuck. It may leave out both. No pickle, which would run
what it is sent; no JPEG, whose artefacts preference models see.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dreamlite_jax.rewards.base import TASKS, Example, Picture, Requests, Reward, RewardError

_PICTURES = ("good", "bad", "source")  # of an example


def packed(image: Picture | None) -> str | None:
    """A picture as text."""
    if image is None:
        return None
    stream = io.BytesIO()
    # Quick rather than small: servers are near.
    Image.fromarray(np.asarray(image)).save(stream, "PNG", compress_level=1)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def unpacked(text: str | None) -> Picture | None:
    """`packed`'s inverse; ValueError for what is no picture."""
    if text is None:
        return None
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a PNG: {error}") from error


def request(name: str, requests: Requests) -> bytes:
    """The body of a request with this id."""
    items = [
        {"prompt": prompt, "image": packed(image), "source": packed(source), "metadata": dict(at)}
        for image, prompt, source, at in zip(*requests, strict=True)
    ]
    return json.dumps({"id": name, "items": items}).encode()


def read_request(body: bytes) -> tuple[str, Requests]:
    """Id and content of a request; ValueError where it is none."""
    try:
        found = json.loads(body)
        items = found["items"]
        return str(found["id"]), Requests(
            [unpacked(item["image"]) for item in items],
            [str(item["prompt"]) for item in items],
            [unpacked(item.get("source")) for item in items],
            [dict(item.get("metadata") or {}) for item in items],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no request: {type(error).__name__} {error}") from error


def reply(name: str, scores: Sequence[float]) -> bytes:
    """The body of a reply."""
    listed = [{"item": k, "score": float(score)} for k, score in enumerate(scores)]
    return json.dumps({"id": name, "scores": listed}).encode()


def read_reply(body: bytes, name: str, n: int) -> list[float]:
    """The scores of a request's n items, in their order; ValueError where it is no reply to it."""
    try:
        found = json.loads(body)
        if found["id"] != name:
            raise ValueError(f"a reply to another request, {found['id']!r}")
        by_item = {int(one["item"]): float(one["score"]) for one in found["scores"]}
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"no reply: {type(error).__name__} {error}") from error
    if len(found["scores"]) != n or by_item.keys() != set(range(n)):
        raise ValueError(f"scores of items {sorted(by_item)[:10]} for {n} pictures")
    return [by_item[k] for k in range(n)]


def describe(reward: Reward) -> bytes:
    """The body that says what a server's reward is."""
    limits = [x if math.isfinite(x) else None for x in (reward.least, reward.most)]
    about = {"name": reward.name, "range": limits, "tasks": reward.tasks, "needs": reward.needs}
    shown = [
        {
            "prompt": e.prompt,
            **{key: packed(getattr(e, key)) for key in _PICTURES},
            "metadata": dict(e.metadata),
        }
        for e in reward.examples()
    ]
    return json.dumps({**about, "examples": shown}).encode()


def with_answered(description: bytes, answered: int) -> bytes:
    """A description that also says how many requests the server has answered."""
    return json.dumps({**json.loads(description), "answered": answered}).encode()


def read_answered(description: bytes) -> int | None:
    """How many requests a server has answered; None where its description does not say."""
    found = json.loads(description)
    answered = found.get("answered") if isinstance(found, dict) else None
    return answered if isinstance(answered, int) else None


def read_description(body: bytes) -> dict[str, Any]:
    """Fields of a `Reward` from what a server says, `examples` a list; RewardError where it says
    something else."""
    try:
        found = json.loads(body)
        least, most = found["range"]
        tasks, needs = (tuple(map(str, found[key])) for key in ("tasks", "needs"))
        if not tasks or set(tasks) - set(TASKS):
            raise ValueError(f"tasks {tasks}, known are {TASKS}")
        return {
            "name": str(found["name"]),
            "least": -math.inf if least is None else float(least),
            "most": math.inf if most is None else float(most),
            "tasks": tasks,
            "needs": needs,
            "examples": [
                Example(
                    **{key: unpacked(e[key]) for key in _PICTURES},
                    prompt=str(e["prompt"]),
                    metadata=dict(e["metadata"]),
                )
                for e in found.get("examples", ())
            ],
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise RewardError(f"it does not describe a reward: {error}") from error


def failure(error: Exception) -> bytes:
    """The body that goes with an error's status."""
    return json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()


def read_failure(body: bytes) -> str:
    """What it says, in a line."""
    try:
        text = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        text = body[:200].decode("utf-8", "replace")
    return " ".join(str(text).split())[:200]
