"""Runs the very packages of HPSv3 and EditReward behind launch.serve_reward, on small networks.

    python tests/preference_models.py --model=hpsv3 --python=ENV/bin/python [--checkout=DIR]

ENV has the package, absl-py and nothing of this project; DIR is the checkout that holds EditReward,
which is no package. Their networks are far narrower, of two layers, random at first, and taught
the very pictures of the self-test, so that the server begins; then it is asked in two orders. What
this shows is that the adapters speak to the packages, not what released weights say.
(Not a test that pytest collects: those environments are large.)
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH, LAYERS, HEADS = 64, 2, 4
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}
BASES = {  # model_type, and what its vision tower calls things
    "hpsv3": ("Qwen2VL", {"depth": LAYERS, "embed_dim": 32, "hidden_size": WIDTH}),
    "editreward": (
        "Qwen2_5_VL",
        {"depth": LAYERS, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": WIDTH},
    ),
}


# --- In the package's environment -----------------------------------------------------------------


def make(model: str, folder: Path) -> None:
    """The small base model, the package's config for it, and a checkpoint, below `folder`."""
    import torch
    import transformers

    name, vision = BASES[model]
    tokenizer = transformers.Qwen2TokenizerFast(
        tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
    )
    parts = [transformers.Qwen2VLImageProcessor(), tokenizer]
    if model == "editreward":
        parts.append(transformers.Qwen2VLVideoProcessor())
    processor = getattr(transformers, f"{name}Processor")(*parts, chat_template=TEMPLATE)
    processor.save_pretrained(folder / "base")
    tokens = {
        f"{what}_token_id": tokenizer.convert_tokens_to_ids(token)
        for what, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    config = getattr(transformers, f"{name}Config")(
        **TEXT, **tokens, vocab_size=len(tokenizer), vision_config={**vision, "num_heads": HEADS}
    )
    torch.manual_seed(0)
    base = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    base.save_pretrained(folder / "base")
    inferencer = opened(model, folder)
    teach(model, inferencer)
    save(model, inferencer.model, folder)


def opened(model: str, folder: Path):
    """The package's inferencer of the random model. It wants a checkpoint, which is made first."""
    import importlib

    from omegaconf import OmegaConf

    package, inference, trainer = {
        "hpsv3": ("hpsv3", "inference", "train"),
        "editreward": ("EditReward", "inference_edit", "train_qwen2_5_edit"),
    }[model]
    module = importlib.import_module(f"{package}.{inference}")
    shipped = Path(module.__file__).parent / "config"
    file = "HPSv3_7B.yaml" if model == "hpsv3" else "EditReward-MiMo-VL-7B-SFT-2508.yaml"
    settings = OmegaConf.load(shipped / file)
    settings.model_name_or_path = str(folder / "base")
    settings.output_dir = str(folder / "output")
    settings.bf16, settings.torch_dtype = False, "float32"  # a CPU's
    OmegaConf.save(settings, folder / "config.yaml")

    kinds = module.DataConfig, module.TrainingConfig, module.ModelConfig, module.PEFTLoraConfig
    parsed, _ = module.parse_args_with_yaml(kinds, str(folder / "config.yaml"), is_train=False)
    create = importlib.import_module(f"{package}.{trainer}").create_model_and_processor
    network, _, _ = create(
        model_config=parsed[2], peft_lora_config=parsed[3], training_args=parsed[1]
    )
    save(model, network, folder)
    return inferencer_of(model, folder)


def inferencer_of(model: str, folder: Path):
    given = {"config_path": str(folder / "config.yaml"), "device": "cpu"}
    if model == "hpsv3":
        from hpsv3 import HPSv3RewardInferencer

        return HPSv3RewardInferencer(checkpoint_path=checkpoint(model, folder), **given)
    from EditReward import EditRewardInferencer

    return EditRewardInferencer(
        checkpoint_path=checkpoint(model, folder),
        reward_dim="overall_detail",
        rm_head_type="ranknet_multi_head",
        **given,
    )


def checkpoint(model: str, folder: Path) -> str:
    """A file for HPSv3, a folder for EditReward."""
    return str(folder / ("checkpoint.safetensors" if model == "hpsv3" else "checkpoint"))


def save(model: str, network, folder: Path) -> None:
    from safetensors.torch import save_file

    file = Path(checkpoint(model, folder))
    if model == "editreward":
        file.mkdir(exist_ok=True)
        file = file / "model.safetensors"
    arrays = {name: x.clone().contiguous() for name, x in network.state_dict().items()}
    save_file(arrays, file)


def teach(model: str, inferencer) -> None:
    """A few steps on the self-test's pairs."""
    import torch
    from PIL import Image

    examples = shown(model)
    images = [Image.fromarray(picture) for e in examples for picture in (e.good, e.bad)]
    asked = {"prompts": [e.prompt for e in examples for _ in range(2)], "image_paths": images}
    if model == "editreward":
        asked["image_src"] = [Image.fromarray(e.source) for e in examples for _ in range(2)]
    optimiser = torch.optim.Adam(inferencer.model.parameters(), 1e-3)
    for _ in range(30):
        scores = inferencer.reward(**asked)[:, 0].reshape(-1, 2)
        loss = torch.nn.functional.softplus(scores[:, 1] - scores[:, 0]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"taught to tell good from bad: loss {loss.item():.3f}", flush=True)


def shown(model: str):
    from dreamlite_jax.rewards.shapes import examples

    return [e for e in examples() if (e.source is not None) == (model == "editreward")]


# --- In this one ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(BASES), required=True)
    parser.add_argument("--python", help="of the environment that has the package")
    parser.add_argument("--checkout", default="", help="that holds EditReward")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.model, given.make)
        return
    if not given.python:
        parser.error("--python is needed: of the environment that has the package")
    path = os.pathsep.join(filter(None, (str(ROOT), given.checkout)))
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as name:
        from dreamlite_jax import tiny

        folder = Path(name)
        tiny.tokenizer().save_pretrained(folder / "tokenizer")
        command = (given.python, __file__, f"--model={given.model}", f"--make={folder}")
        subprocess.run(command, env=env, check=True)
        command = (
            *(given.python, "-m", "launch.serve_reward", f"--reward={given.model}", "--port=0"),
            *("--device=cpu", f"--reward_config={folder / 'config.yaml'}"),
            f"--checkpoint={checkpoint(given.model, folder)}",
        )
        piped = {"stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=env, cwd=ROOT, **piped) as server:
            try:
                ask(given.model, server)
            finally:
                server.kill()


def ask(model: str, server: subprocess.Popen) -> None:
    """The served reward's scores of the examples, in two orders."""
    from dreamlite_jax.rewards.base import Requests, scored, self_test
    from dreamlite_jax.rewards.remote import Settings, open_remote

    started = next((line for line in server.stdout if " at http://" in line), None)
    if started is None:
        sys.exit(f"the server of {model} ended with exit code {server.wait()}")
    reward = open_remote(started.rsplit(" at ", 1)[1].strip(), Settings(batch_size=2))
    self_test(reward)
    rows = [(p, e.prompt, e.source, {}) for e in shown(model) for p in (e.good, e.bad)]
    requests = Requests(*map(list, zip(*rows, strict=True)))
    one, other = scored(reward, requests), scored(reward, requests.take(range(len(rows))[::-1]))
    np.testing.assert_allclose(other[::-1], one, atol=1e-4)
    print(f"{reward.name} of {', '.join(reward.tasks)}: good, bad, ... score {np.round(one, 3)}")


if __name__ == "__main__":
    main()
