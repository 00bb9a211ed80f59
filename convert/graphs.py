"""The networks as the phone runs them: one picture at a time, fixed sizes, the authors' layout.

The network code is the library's, with the phone's forms of the primitives (`convert.forms`).
Inputs and outputs have the names and the layout (NCHW) of the authors' own export. One thing
differs: sinusoids of the timestep and of the picture's size are inputs. In half precision, which
is what phones' GPUs compute in, 999 and 999.2 are one number, and the sinusoids of a timestep would
be wrong by up to 0.3; the host computes them in float32 (`convert.phone.sinusoids`).
`time="graph"` leaves them in the graph, with the authors' inputs `timestep` and `time_ids`: for the
CPU.

Shapes: H and W pixels of the picture, h = H / 8 and w = W / 8, L context tokens, F text feature
width.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from convert.forms import PHONE
from convert.lowering import Graph, Tensor
from dreamlite_jax.models.autoencoder import Autoencoder
from dreamlite_jax.models.layers import RMSNorm
from dreamlite_jax.models.primitives import Primitives
from dreamlite_jax.models.qwen3_vl.config import TextConfig
from dreamlite_jax.models.qwen3_vl.text import DecoderLayer, mrope_angles
from dreamlite_jax.models.unet import MASKED, UNet
from dreamlite_jax.pretrained import Params
from dreamlite_jax.system import Config

TIMES = ("host", "graph")


def unet(
    config: Config, params: Params, height: int, width: int, length: int, time: str = "host"
) -> Graph:
    """The velocity of `[xt | source]` latents, signature `denoise`; params of the U-Net."""
    network, factor = UNet(config.unet, ops=PHONE), config.vae.factor
    latents = (1, config.unet.in_channels, height // factor, 2 * width // factor)

    def denoise(sample, time, context, mask, sizes=None):
        def from_sinusoids(network):
            temb = network.embed_sinusoids(time, sizes)
            return network.denoise(_nhwc(sample), temb, context, mask)

        return _nchw(nn.apply(from_sinusoids, network)({"params": params}))

    def denoise_at(sample, timestep, context, mask, time_ids=None):
        at = (_nhwc(sample), timestep, context, mask, time_ids)
        return _nchw(network.apply({"params": params}, *at))

    inputs = [
        Tensor("sample", latents, "NCHW", meaning="noisy latent, then source latent or zeros"),
        Tensor("timestep", (1,), "N", (0, 1000), "1000 sigma"),
        Tensor("encoder_hidden_states", (1, length, config.unet.context_dim), "NLF"),
        Tensor("encoder_attention_mask", (1, length), "NL", (0, 1), "1 at tokens, 0 at padding"),
    ]
    if config.unet.addition_embed_type == "time":
        inputs.append(Tensor("time_ids", (1, 2), "NC", (0, None), "width and height in pixels"))
    if time == "host":
        channels = config.unet.block_out_channels[0]
        inputs[1] = Tensor(
            "timestep_sinusoids", (1, channels), "NC", (-1, 1), "sinusoids of 1000 sigma"
        )
        if config.unet.addition_embed_type == "time":
            shape = (1, 2 * config.unet.addition_time_embed_dim)
            meaning = "sinusoids of width, then of height, in pixels"
            inputs[4] = Tensor("time_ids_sinusoids", shape, "NC", (-1, 1), meaning)
    channels = config.unet.out_channels
    output = Tensor(
        "noise_pred", (1, channels, *latents[2:]), "NCHW", meaning="velocity; its left half counts"
    )
    function = denoise if time == "host" else denoise_at
    return Graph("denoise", function, tuple(inputs), output)


def vae_decoder(config: Config, params: Params, height: int, width: int) -> Graph:
    """Latent to picture, signature `decode`; params of the autoencoder."""
    latent, picture = _autoencoder_tensors(config, height, width)
    return Graph("decode", _autoencoder(config, params, "decode"), (latent,), picture)


def vae_encoder(config: Config, params: Params, height: int, width: int) -> Graph:
    """Picture to latent, signature `encode`; params of the autoencoder."""
    latent, picture = _autoencoder_tensors(config, height, width)
    return Graph("encode", _autoencoder(config, params, "encode"), (picture,), latent)


def _autoencoder(config: Config, params: Params, method: str):
    network = Autoencoder(config.vae, ops=PHONE)
    return lambda x: _nchw(network.apply({"params": params}, _nhwc(x), method=method))


def _autoencoder_tensors(config: Config, height: int, width: int) -> tuple[Tensor, Tensor]:
    factor = config.vae.factor
    small = (1, config.vae.latent_channels, height // factor, width // factor)
    latent = Tensor("latent", small, "NCHW")
    picture = Tensor("image", (1, config.vae.in_channels, height, width), "NCHW", (-1, 1), "RGB")
    return latent, picture


class Layers(nn.Module):
    """Some consecutive layers of the text tower, and its norm behind the last of all."""

    config: TextConfig
    layers: range
    ops: Primitives = PHONE

    @nn.compact
    def __call__(self, x: Array, angles: tuple[Array, Array], bias: Array) -> Array:
        """x [1, L, C] -> the same; angles and bias as in `text.DecoderLayer`."""
        c = self.config
        for i in self.layers:
            x = DecoderLayer(c, ops=self.ops, name=f"layers_{i}")(x, angles, bias)
        if self.layers.stop < c.num_hidden_layers:
            return x
        return RMSNorm(c.rms_norm_eps, self.ops, name="norm")(x)


def text_encoder(config: Config, params: Params, length: int, layers: range | None = None) -> Graph:
    """Embedded tokens of a prompt in generate mode to `length` context tokens, signature `encode`.

    The host looks the embeddings up. Positions of text are 0, 1, ...; padding stands behind, where
    a causal tower never looks, so no mask is needed: what comes out at padding has no meaning.
    Without an image M-RoPE is ordinary RoPE. `layers` cuts the tower into parts that are run one
    after another; only the last one drops the template's prefix.

    Args:
      params: of the text encoder; those of `layers` suffice.
      length: context tokens behind the prefix.
      layers: consecutive ones; None: all.
    """
    tower, drop = config.text_encoder.text, config.drop.generate
    layers = layers or range(tower.num_hidden_layers)
    whole, cut = drop + length, layers.stop == tower.num_hidden_layers
    positions = jnp.broadcast_to(jnp.arange(whole), (1, 3, whole))
    angles = tuple(np.asarray(angle) for angle in mrope_angles(positions, tower))
    # Nothing behind a token is seen. The tower's own -1e9 is infinite in half precision.
    bias = np.triu(np.full((1, 1, whole, whole), MASKED, np.float32), 1)
    weights = params["model"]["language_model"]

    def encode(embeddings):
        hidden = Layers(tower, layers).apply({"params": weights}, embeddings, angles, bias)
        return hidden[:, drop:] if cut else hidden

    entry = Tensor("inputs_embeds", (1, whole, tower.hidden_size), "NLF")
    name = "encoder_hidden_states" if cut else "hidden_states"
    shape = (1, length if cut else whole, tower.hidden_size)
    return Graph("encode", encode, (entry,), Tensor(name, shape, "NLF"))


def text_modules(config: Config, layers: range) -> set[str]:
    """What a part of the text tower needs of `model/language_model`: the table of embeddings counts
    as the first layer's."""
    modules = {f"layers_{i}" for i in layers}
    if layers.start == 0:
        modules.add("embed_tokens")
    if layers.stop == config.text_encoder.text.num_hidden_layers:
        modules.add("norm")
    return modules


def _nhwc(x: Array) -> Array:
    return x.transpose(0, 2, 3, 1)


def _nchw(x: Array) -> Array:
    return x.transpose(0, 3, 1, 2)
