"""Stage 2: the diagonal Fisher information of the selected weights over the training set."""

import functools
import logging
import operator
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attrib_jax.core.keys import purpose_key
from attrib_jax.core.weights import count_weights, merge_weights
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.curvature.fisher import FisherSum, fisher_diagonal
from attrib_jax.diffusion.losses import Predict, denoising_losses
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.runtime.files import DamagedFileError, write_arrays
from attrib_jax.runtime.hosts import from_first_host, is_first_host
from attrib_jax.runtime.mesh import data_mesh, host_share, replicate, shard_batch
from attrib_jax.runtime.progress import progress
from attrib_jax.runtime.state import StateStore
from attrib_jax.runtime.sums import DeviceSums, Pair
from attrib_jax.stages.encoded import EncodedDataset
from attrib_jax.stages.fisher_files import read_fisher_file

_log = logging.getLogger(__name__)

# Samples that one device takes at once: a core is as fast with few, in less memory; an accelerator has to be filled.
_SAMPLES_PER_CPU, _SAMPLES_PER_ACCELERATOR = 8, 64
# The memory that the gradients of a tile may fill.
_GRADIENT_BYTES = 2**30
_TILES_PER_CHECKPOINT = 64
_FILE = "fisher.safetensors"


class FisherDraws(NamedTuple):
    """One (picture, flip, caption, timestep, noise) draw for each sample; arrays (S,), the noise by its index."""

    index: np.ndarray
    row: np.ndarray
    flip: np.ndarray
    caption: np.ndarray
    timestep: np.ndarray


class _Sample(NamedTuple):
    latents: Any
    text: Any
    index: Any
    timestep: Any
    mask: Any


def fisher_draws(seed: int, samples: int, num_captions: np.ndarray, num_train_timesteps: int) -> FisherDraws:
    """The first `samples` draws: every picture once, in random order, before any comes twice.

    Draws are a function of the seed and their index, so more samples extend fewer.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, 0xF15]))
    rows, flips, captions, timesteps = [], [], [], []
    for _ in range(-(-samples // len(num_captions))):
        order = generator.permutation(len(num_captions))
        rows.append(order)
        flips.append(generator.integers(0, 2, len(order)))
        captions.append(generator.integers(0, num_captions[order]))
        timesteps.append(generator.integers(0, num_train_timesteps, len(order)))
    cut = (np.concatenate(parts)[:samples].astype(np.int32) for parts in (rows, flips, captions, timesteps))
    return FisherDraws(np.arange(samples, dtype=np.int32), *cut)


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

    Every device keeps the compensated sum of its tiles; at a checkpoint these are added in device order. So kills
    change nothing, and another number of devices only the rounding within a tile. With several hosts each reads its
    share of every tile, host 0 keeps the total and writes, and all return F.
    """
    file = path / _FILE
    if not from_first_host(lambda: _is_fitted(file, selected)):
        _fit(path, predict, schedule, selected, rest, data, samples, seed, mesh or data_mesh())
    return load_fisher(file, selected)


def _fit(path, predict, schedule, selected, rest, data, samples, seed, mesh) -> None:
    draws = fisher_draws(seed, samples, data.num_captions, schedule.num_train_timesteps)
    shared = replicate(mesh, (selected, rest, schedule, purpose_key(seed, "fisher")))
    total = _Total(path, selected)
    start = from_first_host(total.read)
    sums = _program(predict, mesh, _microbatch(selected, samples_per_tile(mesh)))
    size = samples_per_tile(mesh) * mesh.size
    share = host_share(mesh, size)
    running = sums.zero(_pair(total.sum).high)
    with progress(samples, "Fisher information", "sample", initial=start) as bar:
        since = 0
        while start < samples:
            places = np.arange(start, start + size)[share]
            taken = np.minimum(places, samples - 1)
            row, flip, caption = draws.row[taken], draws.flip[taken], draws.caption[taken]
            latents, text = data.inputs(row, flip, caption)
            batch = _Sample(
                latents=latents,
                text=text,
                index=draws.index[taken],
                timestep=draws.timestep[taken],
                mask=(places < samples).astype(np.float32),
            )
            running = sums.add(running, shared, shard_batch(mesh, batch))
            done = min(size, samples - start)
            start, since = start + done, since + 1
            if since == _TILES_PER_CHECKPOINT or start == samples:
                total.add(sums.total(running))
                from_first_host(functools.partial(total.write, start))
                running, since = sums.zero(_pair(total.sum).high), 0
            bar.update(done)

    def store():
        write_arrays(path / _FILE, total.sum.mean().to_flat(), {"samples": samples})
        total.state.remove()

    from_first_host(store)


class _Total:
    """The sum up to the last checkpoint, kept by host 0 in memory and on disk."""

    def __init__(self, path: Path, selected: Any):
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), selected)
        self.sum = FisherSum(zeros, np.zeros((), np.int32), zeros)
        self.state = StateStore(path, "partial")

    def read(self) -> int:
        """Takes up the stored sum -> the number of samples in it."""
        stored = self.state.read(self.sum)
        if stored is None:
            return 0
        self.sum, samples = stored
        return samples

    def add(self, part: Pair) -> None:
        """Adds what all devices have summed since the last checkpoint."""
        if is_first_host():
            (total, count), (compensation, _) = part
            self.sum = jax.tree.map(np.asarray, _add(self.sum, FisherSum(total, count, compensation)))

    def write(self, samples: int) -> None:
        """Stores the sum of the first `samples` samples."""
        self.state.write(self.sum, samples)


_add = jax.jit(operator.add)


@functools.lru_cache(maxsize=4)
def _program(predict: Predict, mesh: Mesh, microbatch: int) -> DeviceSums:
    """The compiled sum over tiles, made once: fitting again with the same model compiles nothing."""
    return DeviceSums(mesh, functools.partial(_tile_sum, predict, microbatch))


def _tile_sum(predict: Predict, microbatch: int, shared: Any, batch: _Sample) -> Pair:
    """The sum over one device's tile."""
    selected, rest, schedule, key = shared

    def loss_fn(selected, rest, sample):
        noise = jax.random.normal(jax.random.fold_in(key, sample.index), (1, *sample.latents.shape))
        params = merge_weights(selected, rest)
        return denoising_losses(predict, params, schedule, sample.latents, sample.text, noise, sample.timestep[None])[0]

    return _pair(fisher_diagonal(loss_fn, selected, rest, batch, mask=batch.mask, microbatch=microbatch))


def _pair(part: FisherSum) -> Pair:
    return Pair((part.sum, part.count), (part.compensation, jnp.zeros_like(part.count)))


def samples_per_tile(mesh: Mesh) -> int:
    """Samples that each device of `mesh` takes at once."""
    return _SAMPLES_PER_CPU if mesh.devices.flat[0].platform == "cpu" else _SAMPLES_PER_ACCELERATOR


def _microbatch(selected: Any, tile: int) -> int:
    """Per-sample gradients that one device holds at once."""
    microbatch = tile
    while microbatch > 1 and microbatch * 4 * count_weights(selected).values > _GRADIENT_BYTES:
        microbatch //= 2
    return microbatch


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
