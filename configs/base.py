"""All keys of a config with their defaults; what a key means stands beside it.

A config file is `get_config(variant)`; `--config=configs/sft.py:quick` asks for the variant
"quick", two steps of a tiny model on the shapes world. Keys are overridden by
`--config.optim.lr=3e-4`; an unknown key or a wrong type is an error.
"""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """Every key. Values marked "ours" have no public source."""
    config = ConfigDict()
    config.stage = "diffusion"  # or "autoencoder", "grpo", "nft", "dmd2"
    config.seed = 0
    config.steps = 100_000
    config.batch_size = 256  # global
    config.accumulation = 1  # micro-batches of a batch
    config.image_size = 256  # side of the square bucket, pixels
    config.max_ratio = 1.0  # aspect ratio of the widest bucket; 1: squares only
    config.random_crop = True

    # Encoders, tokenizer and the default U-Net: a model directory, or, for random ones, "tiny" or
    # "shapes", which can learn the shapes world.
    config.model = "tiny"
    # Another U-Net's preset: "dreamlite", "tiny", "nano"; empty: that of config.model.
    config.unet = ""
    config.overrides = ConfigDict()  # of the U-Net's hyper-parameters, by their diffusers names
    # Likewise of a fresh autoencoder (stage "autoencoder"), and of the runs that start from it.
    config.autoencoder = ConfigDict()
    # Zeros beside what is generated, not edited, as the released model has them. False halves the
    # U-Net's arithmetic as long as there are no edits; a later run learns the pane in a few hundred
    # steps.
    config.pane = True
    config.train = ("unet",)  # networks that are trained: "unet", "text_encoder", "vae"
    config.init_from = ""  # a run's workdir or a model directory; empty: fresh parameters
    config.dtype = "bfloat16"  # what networks compute in; parameters are float32
    config.remat = "none"  # see dreamlite_jax/models/blocks.py

    # Dicts with "source", "weight", ...: see dreamlite_jax/data/streams.py.
    config.data = ()
    config.validation = ()  # the same, for a loss on fixed batches; empty: none
    config.text_length = 0  # tokens of a row, template included; 0: 256, with edits 512
    config.workers = 0  # processes that make batches; 0: threads
    config.threads = 4  # batches that each process makes at a time
    config.allow_changed_data = False  # go on although the data is not that of the run so far

    # How often a condition is left out. T2I: diffusers' and SANA's 0.1; edits: InstructPix2Pix.
    config.dropout = ConfigDict(
        {"t2i_text": 0.1, "edit_text": 0.05, "edit_both": 0.05, "edit_source": 0.05}
    )
    config.rl = ConfigDict()  # of the stages "grpo" and "nft": configs/rl_grpo.py has its keys
    config.distill = ConfigDict()  # of the stage "dmd2" alone: configs/distill_dmd2.py has its keys
    # dreamlite_jax/objectives/: flow_matching.py, or the page of another stage's objective
    config.loss = ConfigDict(
        {
            "density": "logit_normal",  # Esser et al. 2024
            "mean": 0.0,
            "std": 1.0,
            "edit_offset": 0.0,
            "shift": True,
            "weight": "unit",
            "weight_changed": False,
        }
    )
    # dreamlite_jax/train/optim.py
    config.optim = ConfigDict(
        {
            "lr": 1e-4,
            "schedule": "constant",
            "warmup": 1000,
            "decay_from": 0.0,
            "lr_end": 0.0,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "weight_decay": 1e-4,  # the authors' LoRA scripts
            "decayed": r"/kernel$",
            "clip": 1.0,  # the authors' LoRA scripts
            "trained": "",
            "moments": "float32",
        }
    )
    config.ema_decay = 0.9999

    config.mesh = ConfigDict({"data": 1, "fsdp": -1})  # -1: what the other leaves
    # (regex, spec) pairs before those of dreamlite_jax/train/sharding.py
    config.sharding = ()

    config.checkpoint = ConfigDict({"every": 1000, "keep": 3, "keep_every": 0})
    config.log = ConfigDict({"every": 50})
    # What is shown, after every so many steps and the last one; every 0: never.
    config.sample = ConfigDict({"every": 1000, "rows": 8, "steps": 28, "guidance": 3.5})
    config.patience = 20  # updates in a row that may be skipped for not being finite
    config.profile_at = 0  # the step from which on a few are traced; 0: never
    return config.lock()  # no key is added by a slip of the pen


def quick(config: ConfigDict) -> ConfigDict:
    """Two steps of the smallest model on the shapes world, with whatever else a config sets."""
    config.steps, config.batch_size = 2, 8
    config.accumulation = min(config.accumulation, 2)
    if config.stage in ("grpo", "nft"):
        config.rl.group, config.rl.updates, config.rl.parts = 4, 2, 1
        config.accumulation, config.rl.process.steps, config.rl.process.window = 1, 3, 1
        config.rl.rewards = ({"reward": "shapes"}, {"reward": "saturation", "weight": 0.0})
        config.rl.limits.dropped, config.rl.limits.spread = 1.0, 0.0
    if config.stage == "grpo":
        config.loss.clip, config.loss.guard = 1e-3, True
    if config.stage == "dmd2":
        config.distill.steps, config.distill.ratio, config.distill.warmup = 2, 1, 1
        config.distill.score_lr = 3e-4
        config.loss.guidance = config.loss.edit_guidance = 2.0
    config.image_size, config.max_ratio = 64, 1.0
    config.text_length = 160  # of edits 141; 0 for models that see sources at 512 px
    config.model, config.unet, config.init_from = "tiny", "nano", ""
    config.overrides, config.autoencoder = ConfigDict(), ConfigDict()
    config.dtype, config.remat = "float32", "none"
    config.workers, config.threads = 0, 1
    config.validation = ()
    config.data = tuple(
        {"source": f"shapes:quick:{split}", "task": task, "count": 64}
        for task, split in splits(config).items()
    )
    # The same for all, so that what was compiled for one serves the next.
    config.optim.lr, config.optim.schedule, config.optim.decay_from = 1e-3, "constant", 0.0
    config.optim.warmup, config.ema_decay = 0, 0.9
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.checkpoint.every = 0  # but at the end
    config.log.every = config.sample.every = 1
    config.sample.rows, config.sample.steps = 2, 2
    return config


def splits(config: ConfigDict) -> dict[str, str]:
    """The tasks that a config's data says it has, each with the split of the shapes world that it
    is about, train where it is about another world.

    Raises:
      ValueError: an entry without a task. Its prepared set knows that, but need not be here.
    """
    named = {}
    for number, entry in enumerate(config.data):
        source = entry.get("source", "")
        if "task" not in entry:
            raise ValueError(
                f"data[{number}] ({source}) says no task, which its quick variant has to know; "
                'add "task": "t2i", or "edit"'
            )
        split = source.split(":")[-1] if source.startswith("shapes:") else "train"
        named.setdefault(entry["task"], split)
    return named or {"t2i": "train"}


def finished(config: ConfigDict, variant: str | None) -> ConfigDict:
    """What a config's file returns: itself or its quick variant."""
    if variant not in (None, "", "quick"):
        raise ValueError(f"unknown variant {variant!r}; known is quick")
    return (quick(config) if variant == "quick" else config).lock()
