"""What benchmarks/formats.py runs in a process of its own: loading and converting with time and memory, comparing."""

import functools
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # noqa: F401 readers of .bin files import it
import transformers

from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.load import ModelSource, load_model, load_unet
from attrib_jax.convert.pipeline import Pipeline, encode_text, tokenize
from attrib_jax.convert.single_file import save_single_file

_INTERVAL = 0.01  # seconds between two looks at the memory


class PeakMemory:
    """The most anonymous memory (RssAnon of /proc/self/status) that the process held inside `with`, over that before.

    Pages of memory-mapped files are not in it: the system can drop those at any time.
    """

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = _anonymous_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.seconds = time.perf_counter() - self._began
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, _anonymous_memory())

    def result(self, params: Any) -> dict[str, Any]:
        """The time, the peak over the memory before, and the bytes of `params` in float32."""
        weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
        return {"seconds": self.seconds, "peak": self.peak - self.before, "weights": weights}

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            self.peak = max(self.peak, _anonymous_memory())


def _anonymous_memory() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def start() -> None:
    """Starts JAX and imports what loading imports, so that neither counts as memory of the weights."""
    jnp.zeros(1).block_until_ready()
    _ = transformers.CLIPTokenizer  # transformers imports its parts when they are asked for


def measure_loading(source: ModelSource | tuple[str, str], reference: Path) -> dict[str, Any]:
    """Loads a model and compares what it computes with PyTorch's outputs.

    Args:
      source: a pipeline's, or the weights and the config of a bare UNet.
      reference: an npz of `benchmarks.torch_models.save_reference`.

    Returns:
      `seconds`, `peak` (bytes), `weights` (bytes of the parameters in float32), `errors` (part -> the largest
      difference over the largest absolute value of an output, the worst of the part's outputs) and `differing`, which
      names what should be equal and is not: "tokens" (of the prompts), "schedule" (noise levels, prediction type).

    Raises ValueError where an output is not finite.
    """
    start()
    with PeakMemory() as memory:
        if isinstance(source, tuple):
            pipeline = None
            unet, params = load_unet(source[0], config=source[1])
            params = {"unet": params}
        else:
            pipeline = load_model(source)
            unet, params = pipeline.unet, pipeline.params
        jax.block_until_ready(params)
    wanted = np.load(reference)
    found = memory.result(params) | {"errors": {"unet": _unet_error(unet, params["unet"], wanted)}, "differing": []}
    if pipeline is not None:
        found["errors"] |= {"vae": _vae_error(pipeline, wanted), "text_encoder": _text_error(pipeline, wanted)}
        found["differing"] += [] if _has_tokens(pipeline, wanted) else ["tokens"]
        found["differing"] += [] if _has_schedule(pipeline, wanted) else ["schedule"]
    return found


def measure_conversion(source: ModelSource, target: Path) -> dict[str, Any]:
    """Loads a model and writes it to `target`, a folder or a single safetensors file by its name.

    Returns `seconds`, `peak` and `weights` as `measure_loading`, of loading and writing together.
    """
    start()
    with PeakMemory() as memory:
        pipeline = load_model(source)
        save = save_single_file if target.suffix == ".safetensors" else save_pipeline
        save(pipeline, str(target))
    return memory.result(pipeline.params)


@functools.partial(jax.jit, static_argnums=0)
def _run_unet(unet, params, latents, timesteps, text):
    return unet.apply({"params": params}, latents, timesteps, text)


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae, params, images):
    return vae.apply({"params": params}, images, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def _decode(vae, params, latents):
    return vae.apply({"params": params}, latents, method="decode")


_encode_text = jax.jit(encode_text, static_argnums=0)


def _unet_error(unet, params, wanted) -> float:
    inputs = (wanted[f"unet.{name}"] for name in ("latents", "timesteps", "text"))
    return _error(_run_unet(unet, params, *inputs), wanted["unet.prediction"])


def _vae_error(pipeline: Pipeline, wanted) -> float:
    vae, params = pipeline.vae, pipeline.params["vae"]
    encoded = _encode(vae, params, wanted["vae.images"])
    decoded = _decode(vae, params, wanted["vae.latents"])
    pairs = {"mean": encoded.mean, "logvar": encoded.logvar, "decoded": decoded}
    return max(_error(actual, wanted[f"vae.{name}"]) for name, actual in pairs.items())


def _text_error(pipeline: Pipeline, wanted) -> float:
    states = _encode_text(pipeline.text_encoder, pipeline.params["text_encoder"], wanted["text_encoder.ids"])
    return _error(states, wanted["text_encoder.states"])


def _error(actual, expected: np.ndarray) -> float:
    actual = np.asarray(actual, np.float64)
    if actual.shape != expected.shape:
        raise ValueError(f"an output has shape {actual.shape}, PyTorch's {expected.shape}")
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        raise ValueError("an output holds a NaN or an infinity")
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def _has_tokens(pipeline: Pipeline, wanted) -> bool:
    prompts = wanted["text_encoder.prompts"].tolist()
    return np.array_equal(tokenize(pipeline, prompts), wanted["text_encoder.prompt_ids"])


def _has_schedule(pipeline: Pipeline, wanted) -> bool:
    schedule = pipeline.schedule
    levels = np.array_equal(schedule.alphas_cumprod, wanted["scheduler.alphas_cumprod"])
    return levels and schedule.prediction_type == str(wanted["scheduler.prediction_type"])
