"""The stages on the shapes world, which needs no download."""


def lessons(task: str) -> tuple[dict, ...]:
    """Entries of `config.data` of weight 3: a third has captions that leave as much open as those
    of the tests, the others leave out nothing, from which attributes are learnt sooner.

    Both draw from the same random numbers, so that many scenes come in both wordings.
    """
    return (
        {"source": "shapes:demo:train", "task": task, "weight": 1.0},
        {"source": "shapes:told:train", "task": task, "weight": 2.0},
    )
