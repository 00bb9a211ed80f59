"""The DreamLite U-Net: predicts the flow velocity of `[target | condition]` latents side by side.

Shapes: B batch, H height and W width of the latent (W counts both halves), C channels, E width of
the time embedding, L text length, F text feature width.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from dreamlite_jax.models.blocks import (
    DownBlock,
    Dtype,
    Level,
    MidBlock,
    TimestepEmbedding,
    UpBlock,
    sinusoids,
    split_remat,
)
from dreamlite_jax.models.layers import Conv, GroupNorm, Linear, RMSNorm
from dreamlite_jax.models.primitives import PLAIN, Primitives
from dreamlite_jax.models.unet_config import DOWN_BLOCKS, MID_BLOCKS, UP_BLOCKS, UNetConfig

MASKED = -10000.0  # added to the score of a masked token, as diffusers does (not -inf: fp16-safe)
TEXT_NORM_EPS = 1e-5


class UNet(nn.Module):
    """Velocity of the flow at `[target | condition]` latents.

    dtype is the compute dtype (bfloat16 on TPU); parameters, the statistics of the norms and the
    softmax stay float32. remat: see `blocks.rematerialised`. ops: see `primitives`.
    """

    config: UNetConfig
    dtype: Dtype = jnp.float32
    remat: str = "none"
    ops: Primitives = PLAIN

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        context: Array,
        mask: Array | None = None,
        time_ids: Array | None = None,
    ) -> Array:
        """Predicts v = noise - x0, float32 [B, H, W, out_channels].

        Args:
          latents: [B, H, W, in_channels], `[noisy target | condition]` joined along W. H and W are
            divisible by 2 ** (levels - 1).
          timesteps: [B], 1000 * sigma, in [0, 1000].
          context: text features [B, L, F] (F = config.context_dim).
          mask: [B, L], 1 for a token to attend to, 0 for padding; None: attend to all.
          time_ids: [B, 2], width and height of the picture in pixels; only where the config has
            addition_embed_type "time".

        Raises:
          ValueError: an argument of another shape, or time_ids missing.
        """
        self._check(latents, timesteps, context, mask, time_ids)
        return self.denoise(latents, self.embed_time(timesteps, time_ids), context, mask)

    def setup(self):
        config = self.config
        self._check_remat()
        embed = config.time_embed_dim
        kw = {"dtype": self.dtype, "ops": self.ops}
        self.time_embedding = TimestepEmbedding(embed, **kw)
        if config.addition_embed_type == "time":
            self.add_embedding = TimestepEmbedding(embed, **kw)
        if config.encoder_hid_dim_type == "text_proj_rms":
            self.encoder_hid_proj_0 = Linear(config.cross_attention_dim, True, **kw)
            self.encoder_hid_proj_1 = RMSNorm(TEXT_NORM_EPS, self.ops)
        elif config.encoder_hid_dim_type == "text_proj":
            self.encoder_hid_proj = Linear(config.cross_attention_dim, True, **kw)
        self.conv_in = Conv(config.block_out_channels[0], 3, **kw)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, config.norm_eps, self.ops)
        self.conv_out = Conv(config.out_channels, 3, **kw)

        last = config.levels - 1
        layers = config.per_level("layers_per_block")
        self.down_blocks = [
            self._level(DownBlock, i, DOWN_BLOCKS[name], layers[i], i < last)
            for i, name in enumerate(config.down_block_types)
        ]
        mid = MID_BLOCKS[config.mid_block_type]
        self.mid_block = self._level(MidBlock, last, mid, config.num_mid_layers, False)
        self.up_blocks = [
            self._level(UpBlock, last - i, UP_BLOCKS[name], layers[last - i] + 1, i < last)
            for i, name in enumerate(config.up_block_types)
        ]

    def embed_time(self, timesteps: Array, time_ids: Array | None = None) -> Array:
        """timesteps [B] and time_ids [B, 2] -> time embedding [B, E]. The sinusoids are float32."""
        config = self.config
        kind = {"cos_first": config.flip_sin_to_cos, "shift": config.freq_shift}
        time, sizes = sinusoids(timesteps, config.block_out_channels[0], **kind), None
        if config.addition_embed_type == "time":
            sizes = sinusoids(time_ids, config.addition_time_embed_dim, **kind)
            sizes = sizes.reshape(sizes.shape[0], -1)
        return self.embed_sinusoids(time, sizes)

    def embed_sinusoids(self, time: Array, sizes: Array | None = None) -> Array:
        """The sinusoids of the timestep [B, block_out_channels[0]] and of width and height [B, 2
        addition_time_embed_dim] -> time embedding [B, E]."""
        embedding = self.time_embedding(time)
        return embedding if sizes is None else embedding + self.add_embedding(sizes)

    def embed_context(self, context: Array) -> Array:
        """Text features [B, L, F] -> [B, L, cross_attention_dim], what the cross-attentions
        read."""
        if self.config.encoder_hid_dim_type == "text_proj_rms":
            return self.encoder_hid_proj_1(self.encoder_hid_proj_0(context))
        if self.config.encoder_hid_dim_type == "text_proj":
            return self.encoder_hid_proj(context)
        return context.astype(self.dtype)

    def denoise(self, latents: Array, temb: Array, context: Array, mask: Array | None) -> Array:
        """The network behind the time embedding temb [B, E]; otherwise as `__call__`, unchecked.

        A target whose half precision would ruin the sinusoids computes them elsewhere and starts
        here, behind `embed_sinusoids`.
        """
        context = self.embed_context(context)
        bias = None
        if mask is not None:
            bias = (1.0 - mask.astype(jnp.float32)[:, None, None, :]) * MASKED

        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            x, states = block(x, temb, context, bias)
            skips += states
        x = self.mid_block(x, temb, context, bias)
        for block in self.up_blocks:
            taken = [skips.pop() for _ in range(block.layers)]
            x = block(x, taken, temb, context, bias)
        return self.conv_out(self.ops.silu(self.conv_norm_out(x))).astype(jnp.float32)

    def _level(
        self, block: type[Level], level: int, kind: tuple[bool, bool], layers: int, resample: bool
    ) -> Level:
        config = self.config
        has_transformers, self_attention = kind
        heads = config.per_level("attention_head_dim")[level]
        depth = config.per_level("transformer_layers_per_block")[level]
        return block(
            features=config.block_out_channels[level],
            layers=layers,
            transformer_layers=depth if has_transformers else 0,
            heads=heads,
            kv_heads=config.num_kv_heads or heads,
            qk_norm=config.qk_norm == "rms_norm",
            ff_mult=config.ff_mult,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            separable=config.use_sep_conv,
            self_attention=self_attention,
            linear_projection=config.use_linear_projection,
            resample=resample,
            dtype=self.dtype,
            ops=self.ops,
            remat=self.remat,
        )

    def _check_remat(self):
        """A misspelt place would not be noticed before a pod runs out of memory."""
        _, where = split_remat(self.remat)
        levels = range(self.config.levels)
        blocks = ["mid_block", *(f"{side}_blocks_{i}" for side in ("down", "up") for i in levels)]
        parts = ("resnets_0", "attentions_0/transformer_blocks_0")
        if not any(where.search("/".join((*self.path, b, part))) for b in blocks for part in parts):
            raise ValueError(f'remat: "{self.remat}" matches no block, e.g. {blocks[1]}/{parts[0]}')

    def _check(self, latents, timesteps, context, mask, time_ids):
        config = self.config
        factor = 2 ** (config.levels - 1)
        b, h, w, c = latents.shape if latents.ndim == 4 else (0, 0, 0, 0)
        problems = []
        if latents.ndim != 4 or c != config.in_channels:
            raise ValueError(
                f"U-Net input: latents {latents.shape} should be [B, H, W, {config.in_channels}]"
            )
        if h % factor or w % factor:
            problems.append(
                f"latent height {h} and width {w} should be divisible by {factor} "
                f"({config.levels} levels)"
            )
        expected = {
            "timesteps": (timesteps, (b,)),
            "context": (context, (b, None, config.context_dim)),
        }
        if mask is not None:
            expected["mask"] = (mask, context.shape[:2])
        if config.addition_embed_type == "time":
            if time_ids is None:
                problems.append("time_ids (width and height in pixels) are missing")
            else:
                expected["time_ids"] = (time_ids, (b, 2))
        for name, (value, shape) in expected.items():
            fits = len(value.shape) == len(shape) and all(
                want in (None, got) for got, want in zip(value.shape, shape, strict=True)
            )
            if not fits:
                wanted = ", ".join("L" if want is None else str(want) for want in shape)
                problems.append(f"{name} {tuple(value.shape)} should be [{wanted}]")
        if problems:
            raise ValueError("U-Net input: " + "; ".join(problems))
