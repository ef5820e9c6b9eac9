"""Throughput of the stages on the shipped model, and of the convolution's two forms: the numbers in BUILD_NOTES.md.

python -m benchmarks.speed --model=models/openmoji                    # one device a core
python -m benchmarks.speed --model=models/openmoji --cpu_devices=1    # one device, threads share each operation
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.pipeline import load_pipeline
from attrib_jax.core.weights import select_weights
from attrib_jax.models.unet import predictor
from attrib_jax.stages.encoded import EncodedDataset
from attrib_jax.stages.gradient import GradientProgram
from attrib_jax.stages.losses import LossProgram
from launch import common


def main():
    common.require(model=common.MODEL.value)
    pipeline = load_pipeline(common.MODEL.value)
    predict, unet = predictor(pipeline.unet), pipeline.params["unet"]
    print(f"devices: {len(jax.devices())} x {jax.devices()[0].device_kind}")

    count, config = 128, pipeline.unet.config
    rng = np.random.default_rng(0)
    size, length = config.sample_size, pipeline.tokenizer.model_max_length
    latents = rng.normal(size=(count, 2, size, size, config.in_channels)).astype(np.float32)
    text = rng.normal(size=(count, length, config.cross_attention_dim)).astype(np.float32)
    data = EncodedDataset(np.arange(count, dtype=np.int32), latents, text, np.arange(count + 1))
    program = LossProgram(predict, pipeline.schedule, 0, 100)
    params = program.place(unet)
    seconds = _best(lambda: program(params, data, np.arange(count), 2, "first", lambda done: None))
    print(f"strided losses: {2 * count * program.num_timesteps / seconds:.0f} forwards/s")

    selected, rest = select_weights(unet, "cross-attn-kv")
    sum_draws = GradientProgram(predict, pipeline.schedule).bind(rest, latents[0, 0], text[0], 512)
    seconds = _best(lambda: jax.block_until_ready(sum_draws(selected, jax.random.key(0), lambda done: None)))
    print(f"unlearning gradient: {512 / seconds:.0f} draws/s")

    for side, channels in ((2, 128), (4, 128), (8, 64)):
        x = jnp.asarray(rng.normal(size=(128, side, side, channels)), jnp.float32)
        kernel = jnp.asarray(rng.normal(size=(3, 3, channels, channels)), jnp.float32)
        flops = 2 * x.size * 9 * channels
        rates = []
        for form in (_convolution, _patches):
            run = jax.jit(form)
            rates.append(flops / _best(lambda run=run, x=x, kernel=kernel: jax.block_until_ready(run(x, kernel))) / 1e9)
        print(f"3x3 convolution, {side} x {side} x {channels}: {rates[0]:.0f} GFLOP/s, as patches {rates[1]:.0f}")


def _convolution(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _patches(x, kernel):
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(parts, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _best(run, repeats: int = 5) -> float:
    """Seconds of the fastest of `repeats` runs, after one that compiles."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    common.run(main)
