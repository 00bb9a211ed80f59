"""What can be wrong with a config by itself, before anything that it names is opened."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dreamlite_jax import pretrained, system
from dreamlite_jax.data import transforms
from dreamlite_jax.errors import UserError
from dreamlite_jax.train import optim

DIFFUSION, AUTOENCODER, DMD2 = "diffusion", "autoencoder", "dmd2"
GRPO, NFT = REWARDED = "grpo", "nft"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class ConfigError(UserError):
    """A config that cannot be run: all that is wrong with it, in one line."""


def settings_of(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """A NamedTuple with defaults from a config's section.

    Raises:
      ConfigError: unknown keys, or values of another type than the default's.
    """
    defaults, values = kind._field_defaults, dict(values)
    problems = [
        f"{where}.{key} is unknown; known are {', '.join(defaults)}"
        for key in sorted(values.keys() - defaults.keys())
    ]
    for key in values.keys() & defaults.keys():
        wanted, value = type(defaults[key]), values[key]
        if wanted is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is not wanted:
            problems.append(f"{where}.{key} is {value!r}, should be {wanted.__name__}")
    if problems:
        raise ConfigError("; ".join(problems))
    return kind(**values)


_POSITIVE = (
    *("steps", "batch_size", "accumulation", "image_size", "threads"),
    *("log.every", "checkpoint.keep", "sample.rows", "sample.steps"),
)
_NOT_NEGATIVE = (
    *("seed", "workers", "text_length", "patience", "profile_at"),
    *("checkpoint.every", "checkpoint.keep_every", "sample.every"),
)
_TRAINED = {
    AUTOENCODER: ("vae",),
    GRPO: ("unet",),
    NFT: ("unet",),
    DMD2: ("unet",),
}  # what a stage can train; others: both


def wrong_numbers(raw: ConfigDict) -> list[str]:
    """Values out of their range and names that are not known, a line each."""
    found = []
    for key in _POSITIVE:
        if _at(raw, key) < 1:
            found.append(f"{key} is {_at(raw, key)}, should be at least 1")
    for key in _NOT_NEGATIVE:
        if _at(raw, key) < 0:
            found.append(f"{key} is {_at(raw, key)}, should not be negative")
    if raw.seed >= 2**32:  # JAX would drop the upper bits
        found.append(f"seed is {raw.seed}, should be below {2**32}")
    if not math.isfinite(raw.sample.guidance):
        found.append(f"sample.guidance is {raw.sample.guidance}, should be finite")
    if not 0 <= raw.ema_decay < 1:
        found.append(f"ema_decay is {raw.ema_decay}, should be in [0, 1)")
    if raw.dtype not in DTYPES:
        found.append(f"dtype is {raw.dtype!r}, known are {', '.join(DTYPES)}")
    networks = _TRAINED.get(raw.stage, ("unet", "text_encoder"))
    if not raw.train or set(raw.train) - set(networks):
        found.append(f"train is {tuple(raw.train)}, should name some of {', '.join(networks)}")
    if not raw.data:
        found.append("data is empty; give at least one source")
    return found


def wrong_rates(dropout: transforms.Dropout) -> list[str]:
    """Rates that are no shares, a line each."""
    found = [
        f"dropout.{name} is {rate}, should be in [0, 1]"
        for name, rate in dropout._asdict().items()
        if not 0 <= rate <= 1
    ]
    of_edits = dropout.edit_text + dropout.edit_both + dropout.edit_source
    if of_edits > 1 and not found:
        found.append(f"the rates dropout.edit_* add up to {of_edits:g}, should be at most 1")
    return found


def without_pane(raw: ConfigDict, edits: bool) -> list[str]:
    """Where the pane beside the target is missed, a line each; `edits`: whether there are any."""
    found = []
    if not raw.pane and raw.stage in (*REWARDED, DMD2):
        found.append(f"pane is False, but the stage {raw.stage} makes a model that has it")
    if not raw.pane and edits:
        found.append("pane is False, but there are edits, whose source stands in it")
    return found


def _at(raw: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        raw = raw[part]
    return raw


def nothing_trained(raw: ConfigDict, config: system.Config, settings: optim.Settings) -> list[str]:
    """Names in `train` of which `optim.trained` chooses nothing."""
    found = []
    for name in sorted(set(raw.train) & set(system.NETWORKS)) if settings.trained else ():
        shapes = pretrained.param_shapes(system.NETWORKS[name], getattr(config, name))
        if not any(jax.tree.leaves(optim.matching({name: shapes}, settings.trained))):
            path = optim.path_name(jax.tree_util.tree_leaves_with_path({name: shapes})[0][0])
            found.append(
                f"optim.trained {settings.trained!r} matches no parameter of the {name}, whose "
                f"paths are such as {path}; leave {name} out of train, or change the regex"
            )
    return found
