"""First steps without a released model: a tiny random one, and pictures from it in both modes.

    python -m launch.demo [--out=runs/demo]

The pictures are noise, because nothing was trained; files, commands and modes are the real ones.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from absl import flags

from dreamlite_jax import cli, tiny

OUT = flags.DEFINE_string("out", "runs/demo", "folder for everything that the demo makes")

PROMPTS = ("a red boat on a quiet lake", "two green apples beside a blue cup")


def main() -> None:
    out = Path(OUT.value)
    model = tiny.tiny_model_dir(out / "model")
    print(f"{model}: a tiny random model, a directory that diffusers opens too")
    listed = out / "prompts.txt"
    listed.write_text("\n".join(PROMPTS) + "\n")

    sample(
        f"--model={model}",
        f"--prompts_file={listed}",
        "--num_images=3",
        "--steps=4",
        f"--out={out / 'generated'}",
        f"--contact_sheet={out / 'generated.png'}",
    )
    print(f"{out / 'generated.png'}: {len(PROMPTS)} prompts, three pictures each")

    sample(
        f"--model={model}",
        "--prompt=a sail in the same colors",
        f"--image={out / 'generated' / '000.png'}",
        "--num_images=2",
        "--steps=4",
        f"--out={out / 'edited'}",
        f"--contact_sheet={out / 'edited.png'}",
    )
    print(f"{out / 'edited.png'}: the first of them, and two edits of it")


def sample(*arguments: str) -> None:
    """Shows the command and runs it as anyone would."""
    print(f"$ python -m launch.sample {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "launch.sample", *arguments])
    if done.returncode:
        raise cli.CommandError("the command above failed")


if __name__ == "__main__":
    cli.run(main)
