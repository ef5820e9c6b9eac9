"""Stage 2: the diagonal Fisher information of the selected weights over the training set."""

import functools
import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attrib_jax.core.keys import purpose_key
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.curvature.fisher import FisherSum, sum_squares
from attrib_jax.diffusion.losses import Predict
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.jobs.draws import (
    Sample,
    fisher_draws,
    gradients_at_once,
    sample_gradients,
    samples_per_tile,
    sum_over_draws,
)
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.fisher_files import read_fisher_file
from attrib_jax.models.prepared import transform_kernels
from attrib_jax.models.projected_text import text_columns
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.parallel.mesh import data_mesh, replicate
from attrib_jax.parallel.sums import DeviceSums, Pair
from attrib_jax.storage.files import DamagedFileError, write_arrays
from attrib_jax.storage.state import StateStore

_log = logging.getLogger(__name__)

_FILE = "fisher.safetensors"
_PARTIAL = "partial"


def fit_fisher(
    path: Path,
    predict: Predict,
    schedule: NoiseSchedule,
    selected: Any,
    rest: Any,
    data: EncodedDataset,
    samples: int,
    seed: int,
    mesh: Mesh | None = None,
) -> Diagonal:
    """Sums squared per-sample gradients (METHOD.md section 3), resuming from the state in `path`, and stores F there.

    Kills change nothing, and another number of devices only the rounding within a tile, see `sum_over_draws`. With
    several hosts all return F.
    """
    file = path / _FILE
    if run_on_host0(lambda: _is_fitted(file, selected)):
        # What a kill right after storing the result left.
        run_on_host0(StateStore(path, _PARTIAL).remove)
    else:
        _fit(path, predict, schedule, selected, rest, data, samples, seed, mesh or data_mesh())
    return load_fisher(file, selected)


def _fit(path, predict, schedule, selected, rest, data, samples, seed, mesh) -> None:
    draws = fisher_draws(seed, samples, data.num_captions, schedule.num_train_timesteps)
    prepared = transform_kernels(predict, selected, rest, data.latent_shape, data.text_shape)
    shared = replicate(mesh, (selected, prepared, schedule, purpose_key(seed, "fisher")))
    program = _program(predict, mesh, gradients_at_once(selected, samples_per_tile(mesh), data.latent_shape))
    like = (sums_like(selected), np.zeros((), np.int32))
    total, state = sum_over_draws(path, _PARTIAL, program, shared, like, draws, data, "Fisher information")

    def store():
        write_arrays(path / _FILE, as_fisher_sum(total).mean().to_flat(), {"samples": samples})
        state.remove()

    run_on_host0(store)


def sums_like(selected: Any) -> Any:
    """Zeros in the layout of the selected weights, in the dtype that their squares are summed in."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), selected)


def as_pair(part: FisherSum) -> Pair:
    """A sum of squares and its count as devices add them."""
    return Pair((part.sum, part.count), (part.compensation, jnp.zeros_like(part.count)))


def as_fisher_sum(pair: Pair) -> FisherSum:
    """The inverse of `as_pair`."""
    (total, count), (compensation, _) = pair
    return FisherSum(total, count, compensation)


@functools.lru_cache(maxsize=4)
def _program(predict: Predict, mesh: Mesh, microbatch: int) -> DeviceSums:
    """The compiled sum over tiles, made once: fitting again with the same model compiles nothing."""
    return DeviceSums(mesh, functools.partial(_tile_sum, predict, microbatch))


def _tile_sum(predict: Predict, microbatch: int, shared: Any, batch: Sample) -> Pair:
    """The sum over one device's tile."""
    selected, rest, schedule, key = shared
    gradients = sample_gradients(predict, schedule, key)
    inputs = batch, text_columns(batch.text)
    return as_pair(sum_squares(gradients, selected, rest, inputs, mask=batch.mask, microbatch=microbatch))


def _is_fitted(file: Path, selected: Any) -> bool:
    try:
        load_fisher(file, selected)
    except FileNotFoundError:
        return False
    except DamagedFileError as error:
        _log.warning("%s: it will be computed again", error)
        return False
    return True


def fisher_file(path: str | os.PathLike) -> Path:
    """The file of an F given as a file or as the folder of its stage; FileNotFoundError if there is none."""
    path = Path(path)
    file = path / _FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"fisher {os.fspath(path)!r} is neither a Fisher file nor a folder with {_FILE}")
    return file


def load_fisher(file: Path, selected: Any) -> Diagonal:
    """Reads F for the selected weights, from a file of ours or one by PyTorch names (see `read_fisher_file`).

    Raises ValueError listing both sides where names or shapes differ, or naming a tensor with an impossible value.
    """
    flat = read_fisher_file(file, selected)
    try:
        return Diagonal.from_flat(flat, like=selected)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
