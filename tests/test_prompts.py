"""Tags, templates, tokens and what is dropped, cut and refused."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dreamlite_jax import tiny
from dreamlite_jax.data import prompts
from dreamlite_jax.data.prompts import EDIT, GENERATE, Prompter, PromptError

IMAGE_TOKENS = (512 // 32) ** 2  # patches of 16 pixels, merged 2 x 2


@pytest.fixture(scope="module")
def prompter():
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Prompter(tiny.tokenizer(), processor, tiny.config().text_encoder.input_numbers)


def kept(inputs, drop, b=0):
    """The tokens of row b that stay after the drop."""
    return inputs["input_ids"][b][inputs["attention_mask"][b]][drop:]


@pytest.mark.parity
def test_templates_are_those_of_diffusers():
    pipelines = pytest.importorskip("diffusers.pipelines.dreamlite.pipeline_dreamlite")
    from diffusers import AutoencoderTiny

    parts = dict.fromkeys(["text_encoder", "tokenizer", "processor", "unet", "scheduler"])
    pipe = pipelines.DreamLitePipeline(vae=AutoencoderTiny(), **parts)
    for mode in prompts.MODES:
        theirs = getattr(pipe, f"prompt_template_encode_{mode}")
        assert prompts.templated(mode, "a {b}") == theirs.format("a {b}")
        dropped = getattr(pipe, f"prompt_template_encode_{mode}_start_idx")
        assert getattr(prompts.DropCounts(), mode) == dropped


def test_the_tiny_tokenizer_splits_the_templates_as_qwens():
    """Every word of a template is one token, so the prefixes have Qwen's lengths."""
    tokenizer = tiny.tokenizer()
    assert prompts.drop_counts(tokenizer) == prompts.DropCounts(34, 64)
    assert len(tokenizer) <= tiny.VOCAB_SIZE
    assert tokenizer.convert_tokens_to_ids(list(tiny.SPECIAL_TOKENS)) == list(range(256, 263))
    text = "Ein naïver 🚤 — 你好\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_what_stays_of_a_prompt(prompter):
    texts = [prompts.NULL, prompts.tagged(GENERATE, "a red boat")]
    inputs = prompts.prompt_inputs(prompter, GENERATE, texts)
    decode = prompter.tokenizer.decode
    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert decode(kept(inputs, 34, 0)) == end
    assert decode(kept(inputs, 34, 1)) == f"[Generate]: a red boat{end}"
    assert inputs["input_ids"].shape == (2, 64)
    assert "pixel_values" not in inputs


def test_the_image_stays_too(prompter):
    images = [Image.new("RGB", (70, 33), "red"), Image.new("RGB", (1000, 800), "blue")]
    texts = [prompts.NULL, prompts.tagged(EDIT, "a blue sail")]
    inputs = prompts.prompt_inputs(prompter, EDIT, texts, images)
    for b, text in enumerate(texts):
        pads = "<|image_pad|>" * IMAGE_TOKENS
        expected = f"<|vision_start|>{pads}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
        assert prompter.tokenizer.decode(kept(inputs, 64, b)) == expected
    assert inputs["pixel_values"].shape == (2, 1024, 1536)
    np.testing.assert_allclose(inputs["pixel_values"][:, 0, 0], [1, -1])  # red, seen in [-1, 1]
    assert (inputs["image_index"].max(1) == IMAGE_TOKENS - 1).all()


def test_the_encoders_view_is_lanczos_at_512(prompter):
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    got = prompts.image_patches(prompter.image_processor, [image])
    view = image.resize((512, 512), Image.Resampling.LANCZOS)
    expected = prompter.image_processor(images=[view], return_tensors="np")
    np.testing.assert_array_equal(got["pixel_values"], expected["pixel_values"])
    np.testing.assert_array_equal(got["image_grid_thw"], [[1, 32, 32]])


def test_too_long_says_by_how_much_and_cuts_only_when_told(prompter):
    texts = ["short", "a " * 300]
    tokens = len(prompter.tokenizer(prompts.templated(GENERATE, texts[1]))["input_ids"]) - 34
    with pytest.raises(PromptError, match=f"{tokens} tokens, the limit is 200") as refused:
        prompts.prompt_inputs(prompter, GENERATE, texts)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200
    cut = prompts.prompt_inputs(prompter, GENERATE, texts, truncate=True)
    assert cut["attention_mask"].sum(1).max() == 234
    whole = prompts.prompt_inputs(prompter, GENERATE, texts, max_tokens=tokens)
    assert whole["attention_mask"].sum(1).max() == 34 + tokens
    np.testing.assert_array_equal(kept(cut, 0, 1), kept(whole, 0, 1)[:234])


def test_cutting_is_what_the_tokenizer_does_for_diffusers(prompter):
    text = prompts.tagged(GENERATE, "boats and " * 200)
    cut = prompts.prompt_inputs(prompter, GENERATE, [text], truncate=True)
    theirs = prompter.tokenizer(
        text=[prompts.templated(GENERATE, text)], max_length=234, padding=True, truncation=True
    )
    np.testing.assert_array_equal(kept(cut, 0), theirs["input_ids"][0])


def test_what_is_refused(prompter):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(PromptError, match="reserved"):
        prompts.prompt_inputs(prompter, EDIT, ["a <|image_pad|>"], [image])
    for mode, images in ((EDIT, None), (GENERATE, [image]), (EDIT, [image, image])):
        with pytest.raises(ValueError, match="1 texts and images"):
            prompts.prompt_inputs(prompter, mode, ["a"], images)


def test_a_prompter_travels_to_a_worker(prompter):
    copy = pickle.loads(pickle.dumps(prompter))
    ours, theirs = (prompts.prompt_inputs(p, GENERATE, ["a boat"]) for p in (prompter, copy))
    np.testing.assert_array_equal(ours["input_ids"], theirs["input_ids"])


def test_neither_jax_nor_torch_is_imported():
    code = (
        "import sys, dreamlite_jax.data.prompts, dreamlite_jax.data.pictures;"
        "print({'jax', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
