"""Where each network of a run comes from, and how a run becomes a model again.

A run starts from an earlier run, which started from another: the encoder of the first, the U-Net of
the last, the autoencoder of neither. Every checkpoint's meta therefore says which run trained which
network last, and all others are those of its model directory.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from dreamlite_jax import pretrained, system
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.unet_config import UNetConfig
from dreamlite_jax.train import checkpoint
from dreamlite_jax.train.state import Params

Part = Literal["ema", "params"]


class OriginError(UserError):
    """A run that a network cannot be taken from: one line."""


class Origin(NamedTuple):
    """Where the parameters of a network start from: the run that trained it last, a model
    directory, scratch, or (of a run that goes on) its own checkpoint."""

    kind: Literal["own", "run", "model", "scratch"]
    folder: str = ""

    def __str__(self) -> str:
        words = {"own": "its own checkpoint in", "run": "the run", "model": "the model"}
        return f"{words[self.kind]} {self.folder}" if self.folder else self.kind


def trained_by(workdir: str | Path) -> dict[str, str]:
    """Which run trained each network last, up to the run in `workdir`; networks that none of them
    trained are left out.

    Raises:
      checkpoint.CheckpointError: no checkpoint, or none that can be read.
    """
    meta = checkpoint.read_meta(workdir)[1]
    return {**meta["trained_by"], **dict.fromkeys(meta["trained"], str(Path(workdir).resolve()))}


def choose(
    names: Iterable[str],
    trained: Iterable[str],
    fresh: str,
    workdir: str | Path,
    init_from: str,
    model_dir: str | Path,
) -> dict[str, Origin]:
    """Where each network of a run comes from.

    In this order: the run's own checkpoint; the run in `init_from`, or the run before it that
    trained the network; the model directory in `init_from`; scratch; the run's model directory.

    Args:
      names, trained: the networks that the run computes with, and those that it trains.
      fresh: the network that may start from scratch.

    Raises:
      OriginError: `init_from` is neither a run nor a model directory.
      checkpoint.CheckpointError: its checkpoints cannot be read.
    """
    own = checkpoint.folder_kind(workdir, workdir) == "own"
    kind = checkpoint.folder_kind(init_from) if init_from and not own else "nothing"
    if init_from and not own and kind == "nothing":
        raise OriginError(
            f"init_from {init_from} is neither a run with a checkpoint nor a model directory"
        )
    start = workdir if own else init_from
    runs = trained_by(start) if own or kind == "run" else {}

    def origin(name: str) -> Origin:
        if own and name in trained:
            return Origin("own", str(workdir))
        if name in runs:
            return Origin("run", runs[name])
        if kind == "model" and (name == fresh or name in trained):
            return Origin("model", str(init_from))
        if name == fresh:
            return Origin("scratch")
        return Origin("model", str(model_dir))

    return {name: origin(name) for name in names}


def reference(init_from: str, model_dir: str | Path) -> Origin:
    """Where a run's U-Net came from before its first checkpoint: what a policy is held to, the
    teacher of a student. Raises as `choose`."""
    # A model directory is no workdir: there is no checkpoint of its own.
    return choose(("unet",), (), "unet", model_dir, init_from, model_dir)["unet"]


def is_mobile(origin: Origin, older: bool = False) -> bool:
    """Whether a network comes from a model for few steps without guidance; `older` of a run that
    does not say."""
    match origin.kind:
        case "model":
            return system.read_config(origin.folder).mobile
        case "run" | "own":
            return checkpoint.read_meta(origin.folder)[1].get("mobile", older)
        case "scratch":
            return False


def mobile_steps(origin: Origin, older: int = system.MOBILE_STEPS) -> int:
    """In how many steps the model that a network comes from draws, where it is a mobile one;
    `older` of a run that does not say."""
    match origin.kind:
        case "model":
            return system.read_config(origin.folder).mobile_steps
        case "run" | "own":
            return _steps_of(checkpoint.read_meta(origin.folder)[1], older)
        case "scratch":
            return older


def _steps_of(meta: Mapping[str, Any], older: int) -> int:
    """As a run with this meta says, of one that does not its config where it is a distillation."""
    if "inside" in meta:
        older = meta["config"]["distill"]["steps"]
    return meta.get("mobile_steps", older)


def lacks_pane(origin: Origin) -> bool:
    """Whether a network comes from a run that did without the source's pane (`system.Config`)."""
    return origin.kind == "run" and not checkpoint.read_meta(origin.folder)[1].get("pane", True)


def pane_problems(origin: Origin) -> list[str]:
    """What is wrong with a network that is to generate as released models do."""
    if not lacks_pane(origin):
        return []
    return [
        f"{origin} has never seen the source's pane (its config.pane was False); train it on with "
        "the pane first"
    ]


def learned_pane(meta: Mapping[str, Any]) -> bool:
    """Whether the U-Net of a run with this meta knows the pane: as the run says that trained it."""
    if "unet" in meta["trained"]:
        return meta.get("pane", True)
    runs = meta["trained_by"]
    return "unet" not in runs or not lacks_pane(Origin("run", runs["unet"]))


def described(origin: Origin) -> str:
    """An origin with the step of its checkpoint, which says whether it is still the same."""
    step = checkpoint.latest_step(origin.folder) if origin.kind == "run" else None
    return str(origin) if step is None else f"{origin} at step {step}"


def problems(origins: Mapping[str, Origin], config: system.Config) -> list[str]:
    """Networks whose origin holds another network than the run's config asks for, a line each."""
    found = []
    for name, origin in origins.items():
        wanted = getattr(config, name)
        if origin.kind == "run":
            saved = checkpoint.read_meta(origin.folder)[1]["configs"][name]
            theirs = system.NETWORKS[name].config.from_dict(saved)
        elif origin.kind == "model":
            theirs = pretrained.read_config(origin.folder, system.NETWORKS[name])
        else:
            continue
        same = _in_one_spelling(theirs)
        differing = [
            f"{key} is {theirs.to_dict().get(key)!r} there, {wanted.to_dict()[key]!r} here"
            for key, value in _in_one_spelling(wanted).items()
            if plain(same.get(key)) != plain(value) and key != "sample_size"
        ]
        if differing:
            found.append(f"{origin} has another {name}: {', '.join(differing)}")
    return found


def _in_one_spelling(config: Any) -> dict[str, Any]:
    """A network's settings; those of U-Nets may be written in several ways."""
    return (config.canonical() if isinstance(config, UNetConfig) else config).to_dict()


def stage_problems(origins: Mapping[str, Origin], stage: str) -> list[str]:
    """What is wrong with going on from the run's own checkpoint: it may be another stage's."""
    found = []
    for folder in dict.fromkeys(o.folder for o in origins.values() if o.kind == "own"):
        before = checkpoint.read_meta(folder)[1].get("config", {}).get("stage", stage)
        if before != stage:
            found.append(
                f"{folder} is the workdir of a run of the stage {before}, which cannot go on as "
                f"{stage}; name another workdir, and {folder} as init_from to start from it"
            )
    return found


def precomputed_problems(
    where: str,
    origins: Mapping[str, Origin],
    trained: Iterable[str],
    init_from: str,
    model_dir: str | Path,
) -> list[str]:
    """Encoders whose outputs lie beside the data of a config's key `where`, but which are no longer
    those that made them, a line each.

    Args:
      origins: of `choose`, with the arguments below.
    """
    off = f'set "precomputed" to False in {where}'
    mend = off
    # A run that goes on keeps its encoders, whatever the config says. Another takes them from
    # `model_dir` only where init_from is no run: its export, which has its U-Net, too, or nothing
    # where no U-Net was trained.
    if not any(origin.kind == "own" for origin in origins.values()):
        start = '""' if origins["unet"].kind == "scratch" else "it"
        mend += (
            f", or export the run {init_from} (python -m convert.export), precompute with the "
            f"result, and set model to it and init_from to {start}"
        )
    found = []
    for name in [name for name in origins if name != "unet"]:
        stored = f"{where} holds what the {name} of {model_dir} gave"
        if name in trained:
            found.append(f"train names {name}, but {stored}: {off}")
        elif origins[name].kind == "run":
            found.append(f"{stored}, but this run takes its {name} from {origins[name]}: {mend}")
    return found


def plain(value: Any) -> Any:
    """A setting as JSON gives it back: tuples are lists."""
    return [plain(part) for part in value] if isinstance(value, tuple | list) else value


def load(name: str, origin: Origin, config: Any, seed: int = 0, part: Part = "ema") -> Params:
    """A network's parameters as float32 host arrays.

    Those of a run that goes on are zeros, which its checkpoint replaces.

    Args:
      config: the network's.
      seed: of fresh parameters.
      part: of a run's state.
    """
    component = system.NETWORKS[name]
    shapes = pretrained.param_shapes(component, config)
    match origin.kind:
        case "own":
            return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        case "run":
            inside = checkpoint.read_meta(origin.folder)[1].get("inside", "")
            return _host(checkpoint.read_part(origin.folder, f"{inside}{part}/{name}", shapes))
        case "model":
            return pretrained.read(origin.folder, component, put=lambda path, array: array)[1]
        case "scratch":
            return pretrained.init_params(component, config, seed)


def _host(tree: Params) -> Params:
    return jax.tree.map(np.asarray, tree)


def meta_of(
    config: system.Config,
    origins: Mapping[str, Origin],
    trained: Iterable[str],
    model_dir: Path,
) -> dict[str, Any]:
    """What a checkpoint says of its networks: for `trained_by`, `load_run` and `problems`.

    A stage with several states adds "inside", the path of the one that is the model, with a slash.
    What comes from a model for few steps stays one, "mobile", of as many; distillation makes one of
    any.
    """
    return {
        "trained": list(trained),
        "trained_by": {name: o.folder for name, o in origins.items() if o.kind == "run"},
        "model_dir": str(model_dir.resolve()),
        "configs": {name: getattr(config, name).to_dict() for name in system.NETWORKS},
        "pane": config.pane,
        "mobile": is_mobile(origins["unet"], config.mobile),
        "mobile_steps": mobile_steps(origins["unet"], config.mobile_steps),
    }


def load_run(
    workdir: str | Path, step: int | None = None, part: Part = "ema", mobile: bool | None = None
) -> system.System:
    """The model that a run has made so far: what it and the runs before it trained, the rest of its
    model directory.

    Args:
      step: of the run's checkpoint; None: the latest.
      part: "ema", the average, or "params", the parameters of the last step.
      mobile: whether it is a model for few steps without guidance; None: as the run says, or, where
        it does not, as its model directory is one.

    Raises:
      checkpoint.CheckpointError: the run, or one before it, has no such checkpoint.
      pretrained.ModelDirectoryError: its model directory cannot be read.
    """
    step, meta = checkpoint.read_meta(workdir, step)
    model_dir = Path(meta["model_dir"])
    networks = {
        name: component.config.from_dict(meta["configs"][name])
        for name, component in system.NETWORKS.items()
    }
    base = system.read_config(model_dir)
    made_mobile = meta.get("mobile", base.mobile) if mobile is None else mobile
    config = base._replace(
        **networks,
        mobile=made_mobile,
        mobile_steps=_steps_of(meta, base.mobile_steps),
        pane=learned_pane(meta),
    )
    runs, inside = meta["trained_by"], meta.get("inside", "")
    params = {}
    for name, network in networks.items():
        if name in meta["trained"]:
            shapes = pretrained.param_shapes(system.NETWORKS[name], network)
            where = f"{inside}{part}/{name}"
            params[name] = _host(checkpoint.read_part(workdir, where, shapes, step))
        else:
            origin = Origin("run", runs[name]) if name in runs else Origin("model", str(model_dir))
            params[name] = load(name, origin, network)
    prompter = system.load_prompter(model_dir, config.text_encoder)
    return system.System(config, params, prompter, model_dir)
