"""A denoiser of a few hundred weights, with diffusers' parameter names, to train and differentiate densely."""

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.diffusion.schedule import NoiseSchedule

SIZE, CHANNELS, LENGTH, TEXT_WIDTH, WIDTH = 4, 2, 5, 6, 16
SCHEDULE = NoiseSchedule.from_config({"num_train_timesteps": 100})


def init_params(seed: int = 0, dtype=np.float32):
    """Random parameters; every leaf has another name and shape, biases are not zero."""
    rng = np.random.default_rng(seed)

    def dense(rows, columns, bias=True):
        leaf = {"kernel": rng.normal(size=(rows, columns)) / rows**0.5}
        return leaf | {"bias": 0.1 * rng.normal(size=columns)} if bias else leaf

    def attention(context):
        names = {"to_q": WIDTH, "to_k": context, "to_v": context}
        layer = {name: dense(rows, WIDTH, bias=False) for name, rows in names.items()}
        return layer | {"to_out_0": dense(WIDTH, WIDTH)}

    block = {
        "attn1": attention(WIDTH),
        "attn2": attention(TEXT_WIDTH),
        "norm2": {"scale": 1 + 0.1 * rng.normal(size=WIDTH)},
        "ff": {"net_2": dense(WIDTH, WIDTH)},
    }
    params = {
        "conv_in": dense(CHANNELS + 8, WIDTH),
        "mid_block": {"attentions_0": {"proj_in": dense(WIDTH, WIDTH), "transformer_blocks_0": block}},
        "conv_out": dense(WIDTH, CHANNELS),
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def predict(params, noisy_latents, timestep, text):
    """(h, w, c), (), (L, d) -> (h, w, c)."""
    pixels = noisy_latents.reshape(-1, CHANNELS)
    angles = timestep * 10.0 ** -jnp.arange(4, dtype=pixels.dtype)
    time = jnp.broadcast_to(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)]), (len(pixels), 8))
    hidden = _dense(params["conv_in"], jnp.concatenate([pixels, time], axis=-1))
    transformer = params["mid_block"]["attentions_0"]
    hidden = _dense(transformer["proj_in"], jnp.tanh(hidden))
    block = transformer["transformer_blocks_0"]
    hidden = hidden + _attend(block["attn1"], hidden, hidden)
    hidden = hidden + _attend(block["attn2"], hidden * block["norm2"]["scale"], text)
    hidden = hidden + _dense(block["ff"]["net_2"], jnp.tanh(hidden))
    return _dense(params["conv_out"], hidden).reshape(noisy_latents.shape)


def make_data(count: int, seed: int = 0, flips: int = 1, captions: int = 1, dtype=np.float32):
    """(row_id (N,), latents (N, flips, h, w, c), text (N, captions, L, d))."""
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(count, 1, SIZE, SIZE, CHANNELS)).astype(dtype)
    latents = np.concatenate([latents, latents[:, :, :, ::-1]], axis=1)[:, :flips]
    text = rng.normal(size=(count, captions, LENGTH, TEXT_WIDTH)).astype(dtype)
    return np.arange(count, dtype=np.int32), latents, text


def _dense(layer, x):
    return x @ layer["kernel"] + layer.get("bias", 0)


def _attend(layer, x, context):
    query, key, value = _dense(layer["to_q"], x), _dense(layer["to_k"], context), _dense(layer["to_v"], context)
    return _dense(layer["to_out_0"], jax.nn.softmax(query @ key.T / WIDTH**0.5) @ value)
