"""The stages on the shapes world, which needs no download."""


def lessons(task: str) -> tuple[dict, ...]:
    """Entries of `config.data` of weight 3: a third has captions that leave as much open as those
    of the tests, the others leave out nothing, from which attributes are learnt sooner.

    Both draw from the same random numbers, so that many scenes come in both wordings. Half of the
    edits that leave out nothing are of a world of more shapes, colours and grounds, where what an
    edit leaves alone can only be copied, not known by heart.
    """
    told = {"told": 1.0, "wide": 1.0} if task == "edit" else {"told": 2.0}
    return tuple(
        {"source": f"shapes:{name}:train", "task": task, "weight": weight}
        for name, weight in {"demo": 1.0, **told}.items()
    )
