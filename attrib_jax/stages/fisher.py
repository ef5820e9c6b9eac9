"""Stage 2: the diagonal Fisher information of the selected weights over the training set."""

import logging
import operator
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from attrib_jax.core.keys import purpose_key
from attrib_jax.core.weights import count_weights, merge_weights
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.curvature.fisher import FisherSum, fisher_diagonal
from attrib_jax.diffusion.losses import Predict, denoising_losses
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.runtime.files import DamagedFileError, write_arrays
from attrib_jax.runtime.mesh import data_mesh, replicate, shard_batch, tile_map
from attrib_jax.runtime.progress import progress
from attrib_jax.runtime.state import StateStore
from attrib_jax.stages.encoded import EncodedDataset
from attrib_jax.stages.fisher_files import read_fisher_file

_log = logging.getLogger(__name__)

# Samples that one device takes at once, and the memory that their gradients may fill there.
SAMPLES_PER_TILE = 16
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

    Tiles are added in the order of their draws: kills change nothing, and another number of devices only the rounding
    within a tile.
    """
    file = path / _FILE
    try:
        return load_fisher(file, selected)
    except FileNotFoundError:
        pass
    except DamagedFileError as error:
        _log.warning("%s: it will be computed again", error)
    mesh = mesh or data_mesh()
    draws = fisher_draws(seed, samples, data.num_captions, schedule.num_train_timesteps)
    shared = replicate(mesh, (selected, rest, schedule, purpose_key(seed, "fisher")))
    microbatch = SAMPLES_PER_TILE
    while microbatch > 1 and microbatch * 4 * count_weights(selected).values > _GRADIENT_BYTES:
        microbatch //= 2

    def tile_sum(shared, batch):
        selected, rest, schedule, key = shared

        def loss_fn(selected, rest, sample):
            noise = jax.random.normal(jax.random.fold_in(key, sample.index), (1, *sample.latents.shape))
            params = merge_weights(selected, rest)
            return denoising_losses(
                predict, params, schedule, sample.latents, sample.text, noise, sample.timestep[None]
            )[0]

        part = fisher_diagonal(loss_fn, selected, rest, batch, mask=batch.mask, microbatch=microbatch)
        # A leading axis of one, so that the devices' sums come back one after the other.
        return jax.tree.map(lambda leaf: leaf[None], part)

    run = tile_map(mesh, tile_sum)
    add = jax.jit(lambda total, parts: _add_in_order(total, parts, mesh.size))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), selected)
    total = FisherSum(zeros, np.zeros((), np.int32), zeros)
    state = StateStore(path, "partial")
    stored = state.read(total)
    start = 0
    if stored is not None:
        total, start = stored
    size = SAMPLES_PER_TILE * mesh.size
    # One device: a sum committed to another could not be added to.
    total = jax.device_put(total, mesh.local_devices[0])
    with progress(samples, "Fisher information", "sample", initial=start) as bar:
        since = 0
        while start < samples:
            taken = np.minimum(np.arange(start, start + size), samples - 1)
            mask = np.arange(start, start + size) < samples
            row, flip, caption = draws.row[taken], draws.flip[taken], draws.caption[taken]
            latents, text = data.inputs(row, flip, caption)
            batch = _Sample(
                latents=latents,
                text=text,
                index=draws.index[taken],
                timestep=draws.timestep[taken],
                mask=mask.astype(np.float32),
            )
            parts = jax.device_put(run(shared, shard_batch(mesh, batch)), mesh.local_devices[0])
            total = add(total, parts)
            done = int(mask.sum())
            start, since = start + done, since + 1
            if since == _TILES_PER_CHECKPOINT or start == samples:
                state.write(total, start)
                since = 0
            bar.update(done)
    fisher = total.mean()
    write_arrays(file, fisher.to_flat(), {"samples": samples})
    shutil.rmtree(state.path)
    return load_fisher(file, selected)


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


def _add_in_order(total: FisherSum, parts: FisherSum, count: int) -> FisherSum:
    for index in range(count):
        total = total + jax.tree.map(operator.itemgetter(index), parts)
    return total
