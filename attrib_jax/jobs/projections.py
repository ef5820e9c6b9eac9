"""Projected per-example gradients of a data set: computed on all devices, kept on disk and resumed there."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attrib_jax.attribution.outputs import output_gradient
from attrib_jax.attribution.projection import project
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import merge_weights
from attrib_jax.diffusion.losses import Predict
from attrib_jax.diffusion.schedule import NoiseSchedule, strided_timesteps
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.losses import ExampleProgram, fill_chunks
from attrib_jax.models.precision import cast_params, matmul_precision
from attrib_jax.models.predictor import predictor
from attrib_jax.models.unet import UNet2DConditionModel
from attrib_jax.ops.micro_batching import GRADIENT_PIXELS, group_size, num_pixels
from attrib_jax.parallel.hosts import host0_first, run_on_host0
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.storage.chunks import ChunkStore

# UNet forwards whose activations a device holds at once: a core is as fast with few; an accelerator has to be filled.
_FORWARDS_PER_CPU, _FORWARDS_PER_ACCELERATOR = 40, 320
# Their latent pixels: a tile of a model with large latents is taken in parts.
_PIXELS_AT_ONCE = 4 * GRADIENT_PIXELS
# The memory that the gradients of a tile may fill.
_GRADIENT_BYTES = 2**30
_MAX_ROWS_PER_CHUNK = 256
_CHUNK_BYTES = 2**26
# Stores up to this size are checked whole whenever they are opened; chunks of larger ones when they are first used.
_CHECKED_BYTES = 2**31


class FeatureProgram(ExampleProgram):
    """The compiled projected gradients of one output of a model; its weights are `(selected, rest, projection key)`.

    Results are (rows, flips, k), and (rows, flips, k + 1) for the output `mean`, whose last number is the residual.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        schedule: NoiseSchedule,
        output: str,
        projection: str,
        projection_dim: int,
        num_weights: int,
        loss_seed: int,
        stride: int,
        batch_size: int = 0,
        mesh: Mesh | None = None,
        precision: str = "float32",
        timestep: int | None = None,
    ):
        """Compiles when first called.

        Args:
          unet: the model.
          output: see `output_gradient`.
          projection, projection_dim: see `project`.
          num_weights: numbers in a gradient; it decides how many examples a device takes at once.
          schedule, loss_seed, stride, batch_size, mesh: as in `ExampleProgram`.
          precision: of the forward pass, see `PRECISIONS`; gradients are taken by float32 weights.
          timestep: the only one, instead of the strided ones.
        """
        self.projection_dim, with_residual = projection_dim, output == "mean"
        mesh = mesh or data_mesh()
        if timestep is None:
            timesteps = strided_timesteps(stride, schedule.num_train_timesteps)
        else:
            timesteps = np.array([timestep], np.int32)
        # For `mean` every timestep has a gradient of its own.
        numbers = num_weights * (len(timesteps) if with_residual else 1)
        super().__init__(
            _features,
            schedule,
            loss_seed,
            stride,
            batch_size,
            mesh,
            (projection_dim + with_residual,),
            matmul_precision(precision),
            timesteps,
            _examples_per_tile(mesh, len(timesteps), numbers),
            static=(predictor(unet, precision), precision, output, projection, projection_dim),
        )


def _features(
    predict: Predict,
    precision: str,
    output: str,
    projection: str,
    projection_dim: int,
    schedule,
    key,
    timesteps,
    weights,
    batch: Batch,
) -> jax.Array:
    selected, rest, projection_key = weights

    def merge(selected):
        return cast_params(merge_weights(selected, rest), precision)

    def gradient(example):
        return output_gradient(output, predict, schedule, merge, selected, key, example, timesteps)

    pixels = len(timesteps) * num_pixels(batch.latents.shape[1:])
    count = len(batch.row_id)
    at_once = group_size(count, pixels, _PIXELS_AT_ONCE)
    gradients, residuals = jax.lax.map(gradient, batch, batch_size=at_once % count)  # 0 is a plain vmap
    projected = project(gradients, projection_key, projection, projection_dim)
    if output != "mean":
        return projected
    return jnp.concatenate([projected, residuals[:, None].astype(projected.dtype)], axis=1)


def _examples_per_tile(mesh: Mesh, num_timesteps: int, numbers: int) -> int:
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    forwards = _FORWARDS_PER_CPU if on_cpu else _FORWARDS_PER_ACCELERATOR
    return max(1, min(forwards // num_timesteps, _GRADIENT_BYTES // (4 * numbers)))


def dataset_features(
    path: Path, program: FeatureProgram, weights: Any, data: EncodedDataset, flips: int, captions: str, description: str
) -> tuple[Any, np.ndarray | None]:
    """A program's results on a data set, kept in chunks under `path` and resumed there.

    Returns features (N, flips, k) float32, an array on disk that takes slices, and the residuals (N, flips) float32 in
    memory, None for outputs without. With several hosts, host 0 decides what is missing and writes.

    Raises ValueError where a feature is NaN or infinite.
    """
    dim = program.projection_dim
    fields = {"features": ((flips, dim), np.float32)}
    with_residual = program.result_shape[0] > dim
    if with_residual:
        fields["residual"] = ((flips,), np.float32)
    rows_per_chunk = max(1, min(_MAX_ROWS_PER_CHUNK, _CHUNK_BYTES // (4 * flips * dim)))
    store = host0_first(lambda: ChunkStore(path, fields, len(data), rows_per_chunk, name="features"))
    small = 4 * len(data) * flips * dim <= _CHECKED_BYTES
    missing = run_on_host0(lambda: list(store.missing()) if small else store.absent())
    pack = functools.partial(_pack, dim, with_residual)
    fill_chunks(store, missing, program, weights, data, flips, captions, description, pack, np.arange(len(data)))
    return store.array("features"), np.asarray(store.array("residual")) if with_residual else None


def _pack(dim: int, with_residual: bool, values: np.ndarray) -> dict[str, np.ndarray]:
    if not np.isfinite(values).all():
        raise ValueError(
            "projected gradients are NaN or infinite: look for a damaged model, or keep precision='float32'"
        )
    values = values.astype(np.float32)
    return {"features": values[..., :dim]} | ({"residual": values[..., dim]} if with_residual else {})
