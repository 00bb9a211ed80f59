"""The whole way, prompt to picture, against diffusers' pipelines: text to image and editing."""

import numpy as np
import pytest
from commands import run
from PIL import Image

from dreamlite_jax import system, tiny
from dreamlite_jax.data import prompts

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
torch.set_num_threads(1)  # more of them fight with JAX for the cores, at a hundred times the cost

HEIGHT, WIDTH, STEPS = 64, 96, 3
PROMPT = "a red boat, with 2 white sails — très joli"
KINDS = {"base": diffusers.DreamLitePipeline, "mobile": diffusers.DreamLiteMobilePipeline}


def randomised(module, seed):
    """Every parameter random: ones and zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.1 * noise + float("norm" in name and name.endswith("weight")))
            else:
                p.copy_(noise * (1.0 if "embed_tokens" in name else p[0].numel() ** -0.5))
    return module.eval()


@pytest.fixture(scope="module")
def processor():
    """A real Qwen3VLProcessor around the image processor that needs no torchvision.

    torchvision is needed for its video processor alone, which no picture touches: a stand-in takes
    that one's place, and the check of its type is left out while the processor is constructed.

    It pads prompts on the left, so the edits are compared with that; a pipeline's tokenizer, which
    text to image uses, pads on the right.
    """
    from transformers.video_processing_utils import BaseVideoProcessor

    class NoVideos(BaseVideoProcessor):
        def __init__(self):
            pass

        def to_dict(self):
            return {"video_processor_type": "Qwen3VLVideoProcessor"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformers.Qwen3VLProcessor, "check_argument_for_proper_class", lambda *_: None
        )
        images = transformers.Qwen2VLImageProcessorPil(
            patch_size=16,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            size={"shortest_edge": 65536, "longest_edge": 16777216},
        )
        tokenizer = tiny.tokenizer()
        tokenizer.padding_side = "left"
        return transformers.Qwen3VLProcessor(
            image_processor=images, tokenizer=tokenizer, video_processor=NoVideos()
        )


@pytest.fixture(scope="module", params=KINDS)
def saved(request, processor, tmp_path_factory):
    """(pipeline of random torch components, the directory that its save_pretrained wrote); the
    mobile one's U-Net and encoder in several files each."""
    config = tiny.config()
    encoder = transformers.Qwen3VLConfig.from_dict(config.text_encoder.to_dict())
    pipe = KINDS[request.param](
        text_encoder=randomised(transformers.Qwen3VLForConditionalGeneration(encoder), 0),
        tokenizer=tiny.tokenizer(),
        processor=processor,
        vae=randomised(diffusers.AutoencoderTiny.from_config(config.vae.to_dict()), 1),
        unet=randomised(diffusers.DreamLiteUNetModel.from_config(config.unet.to_dict()), 2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=1.15 if request.param == "mobile" else 1.4
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    mobile = request.param == "mobile"
    pipe.save_pretrained(folder, **({"max_shard_size": "300KB"} if mobile else {}))
    assert len(list(folder.glob("*/*.safetensors.index.json"))) == (2 if mobile else 0)
    return pipe, folder


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    """A mobile model's directory as our own code writes it."""
    folder = tmp_path_factory.mktemp("ours") / "mobile"
    return tiny.tiny_model_dir(folder, seed=1, mobile=True, image_side=prompts.IMAGE_SIDE)


def reference(pipe, seed=0, **settings):
    """Initial noise, final latents (both as ours: [1, h, w, 4]) and picture of a pipeline."""
    size = (1, 4, HEIGHT // 8, WIDTH // 8)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    latents, decode = [], pipe.vae.decode
    pipe.vae.decode = lambda z, **kw: latents.append(z) or decode(z, **kw)
    try:
        picture = pipe(
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(seed),
            **settings,
        ).images[0]
    finally:
        pipe.vae.decode = decode
    noise, latent = (x.permute(0, 2, 3, 1).numpy() for x in (noise, latents[0]))
    return noise, latent, np.asarray(picture)


def photograph(height=77, width=130):
    """Something with edges and ramps, of an odd size."""
    rows, columns = np.mgrid[:height, :width]
    channels = [
        255 * rows / height,
        255 * columns / width,
        200.0 * ((rows // 9 + columns // 7) % 2),
    ]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def ours(folder, tmp_path, noise, *flags):
    np.save(tmp_path / "noise.npy", noise)
    code = run(
        "sample",
        f"--model={folder}",
        f"--prompt={PROMPT}",
        f"--noise={tmp_path / 'noise.npy'}",
        f"--height={HEIGHT}",
        f"--width={WIDTH}",
        f"--steps={STEPS}",
        f"--out={tmp_path / 'ours.png'}",
        f"--latents={tmp_path / 'latents.npy'}",
        *flags,
    )
    assert code == 0
    return np.load(tmp_path / "latents.npy"), np.asarray(Image.open(tmp_path / "ours.png"))


def compare(latent, picture, expected_latent, expected_picture):
    error = np.abs(latent - expected_latent).max() / np.abs(expected_latent).max()
    bytes_off = np.abs(picture.astype(int) - expected_picture.astype(int)).max()
    print(f"latents {error:.1e} relative, bytes off by {bytes_off}")
    assert expected_picture.std() > 20  # a grey picture would prove nothing
    assert error < 1e-3
    assert bytes_off <= 1


@pytest.mark.parametrize("mode", ["generate", "edit"])
def test_same_picture(saved, mode, tmp_path):
    """Guidance on for the base model, with scales that are not the defaults."""
    pipe, folder = saved
    scales, flags = {}, []
    if "Mobile" not in type(pipe).__name__:
        scales = {"guidance_scale": 3.0, "image_guidance_scale": 1.7}
        flags = ["--guidance=3.0", "--image_guidance=1.7"]
    if mode == "edit":
        photograph().save(tmp_path / "source.png")
        flags.append(f"--image={tmp_path / 'source.png'}")
        scales["image"] = photograph()
    noise, *expected = reference(pipe, prompt=PROMPT, **scales)
    compare(*ours(folder, tmp_path, noise, *flags), *expected)


def test_what_we_write_opens_in_diffusers(tiny_dir, processor, tmp_path):
    """Our own directory, in diffusers' pipeline. Only the processor is handed in: diffusers would
    construct its video part, for which there is no torchvision here."""
    pipe = KINDS["mobile"].from_pretrained(tiny_dir, processor=processor)
    pipe.set_progress_bar_config(disable=True)
    photograph().save(tmp_path / "source.png")
    noise, *expected = reference(pipe, prompt=PROMPT, image=photograph())
    got = ours(tiny_dir, tmp_path, noise, f"--image={tmp_path / 'source.png'}")
    compare(*got, *expected)


def test_our_processor_folder_is_the_processors_own(tiny_dir, processor):
    """What Qwen3VLProcessor would read there: image processor and tokenizer give what it gives."""
    folder = tiny_dir / "processor"
    images = transformers.AutoImageProcessor.from_pretrained(folder)
    assert images.to_dict() == processor.image_processor.to_dict()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_saving_what_was_loaded(saved, tmp_path):
    """load and save keep the model: the written directory opens in diffusers with equal tensors."""
    pipe, folder = saved
    system.save(system.load(folder), tmp_path / "copy")
    copy = type(pipe).from_pretrained(tmp_path / "copy", processor=pipe.processor)
    for name in ("unet", "vae", "text_encoder"):
        theirs, copied = getattr(pipe, name).state_dict(), getattr(copy, name).state_dict()
        assert theirs.keys() == copied.keys()
        assert all(torch.equal(theirs[key], copied[key]) for key in theirs)
    mine, theirs = copy.scheduler.config, pipe.scheduler.config
    assert {k: v for k, v in mine.items() if k[0] != "_"} == {
        k: v for k, v in theirs.items() if k[0] != "_"
    }
