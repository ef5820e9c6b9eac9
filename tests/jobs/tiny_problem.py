"""A denoiser with one cross-attention layer and a data set for it, to fit curvature densely in float64."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.core.weights import select_weights
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.models.projected_text import ProjectedText
from attrib_jax.models.unet import Attention

COUNT, SIZE, CHANNELS, LENGTH, WIDTH = 11, 2, 3, 4, 6
SCHEDULE = NoiseSchedule.from_config({"num_train_timesteps": 100})


class Tiny(nn.Module):
    """A denoiser of (SIZE, SIZE, CHANNELS) with one cross-attention layer."""

    @nn.compact
    def __call__(self, latents, timestep, text):
        pixels = latents.reshape(1, -1, CHANNELS)
        time = jnp.broadcast_to(timestep / 100, (*pixels.shape[:2], 1)).astype(pixels.dtype)
        hidden = nn.Dense(WIDTH, name="conv_in")(jnp.concatenate([pixels, time], axis=-1))
        hidden = hidden + Attention(2, name="attn2")(hidden, ProjectedText(text[None], {}))
        return nn.Dense(CHANNELS, name="conv_out")(jnp.tanh(hidden)).reshape(latents.shape)


def predict(params, noisy_latents, timestep, text):
    return Tiny().apply({"params": params}, noisy_latents, timestep, text)


@contextlib.contextmanager
def tiny_problem():
    """A context with (selected weights, the others, an encoded data set), and float64 while it is in use."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        data = EncodedDataset(
            row_ids=np.arange(COUNT, dtype=np.int32),
            latents=rng.normal(size=(COUNT, 2, SIZE, SIZE, CHANNELS)).astype(np.float32),
            text=rng.normal(size=(COUNT, LENGTH, WIDTH)).astype(np.float32),
            first_caption=np.arange(COUNT + 1),
        )
        shapes = jax.eval_shape(Tiny().init, jax.random.key(0), data.latents[0, 0], 0, data.text[0])["params"]
        params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / 2, shapes)
        yield *select_weights(params, "cross-attn-kv"), data
