"""Stage 3: numbers of every training picture and its mirror image, such as strided losses, under given weights."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from attrib_jax.attribution.scores import EXAMPLES_PER_TILE, strided_losses
from attrib_jax.core.keys import loss_key
from attrib_jax.core.types import Batch
from attrib_jax.diffusion.losses import Predict
from attrib_jax.diffusion.schedule import NoiseSchedule, strided_timesteps
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.parallel.hosts import fetch, host0_first, is_host0, run_on_host0
from attrib_jax.parallel.mesh import data_mesh, host_share, padded_tiles, replicate, shard_batch, tile_map
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.chunks import ChunkStore

_log = logging.getLogger(__name__)

# Relative difference of losses between devices that are taken to be of one kind. A score is the difference of two
# losses, so losses before and after have to come from devices that agree far better than the scores are small.
LOSS_TOLERANCE = 1e-6
_ROWS_PER_CHUNK = 512
_TILES_PER_CHUNK = 8


class ExampleProgram:
    """A compiled function of training examples: made once for a model, run with any weights, on all devices.

    One compiled program in tiles of one fixed shape, whatever the weights, so that the difference of two runs is that
    of the weights alone: to the bit, whatever the batch size, the order or the subset.
    """

    def __init__(
        self,
        function: Callable[..., jax.Array],
        schedule: NoiseSchedule,
        loss_seed: int,
        stride: int,
        batch_size: int = 0,
        mesh: Mesh | None = None,
        result_shape: tuple[int, ...] = (),
        matmul_precision: str = "highest",
        timesteps: np.ndarray | None = None,
        tile: int = EXAMPLES_PER_TILE,
        static: tuple = (),
    ):
        """Compiles when first called, unless a program of the same function and `static` was compiled before.

        Args:
          function: `(*static, schedule, key, timesteps (S,), weights, batch of B) -> (B, *result_shape)`, pure.
          schedule: noise levels and prediction type.
          loss_seed: of the noise, see `loss_key`.
          stride: of the timesteps.
          batch_size: examples in flight, in whole tiles, 0 for automatic; changes no result.
          mesh: all devices if None.
          result_shape: of one example's result.
          matmul_precision: of float32 products, see `tile_map`.
          timesteps: (S,) int32 instead of the strided ones.
          tile: examples that a device takes at once; another number changes rounding.
          static: hashable first arguments of `function`, such as the model.
        """
        self.mesh = mesh or data_mesh()
        self.loss_seed, self.stride, self.result_shape = loss_seed, stride, tuple(result_shape)
        strided = strided_timesteps(stride, schedule.num_train_timesteps)
        self._timesteps, self.tile = strided if timesteps is None else timesteps, tile
        self._shared = replicate(self.mesh, (schedule, loss_key(loss_seed), self._timesteps))
        self._tiles_in_flight = max(2, -(-batch_size // (tile * self.mesh.size)))
        self._run = _compiled(function, static, self.mesh, matmul_precision)

    @property
    def num_timesteps(self) -> int:
        return len(self._timesteps)

    def place(self, weights: Any) -> Any:
        """Puts weights on all devices, once for many calls."""
        return replicate(self.mesh, weights)

    def __call__(
        self,
        weights: Any,
        data: EncodedDataset,
        rows: np.ndarray,
        flips: int,
        captions: str,
        advance: Callable[[int], Any],
    ) -> np.ndarray:
        """Results of the pictures at positions `rows`, the mean over captions -> (len(rows), flips, *result_shape).

        Float64. With several hosts each reads its share of every batch, and all return the whole.

        Args:
          weights: as `place` returned them.
          data: the encoded data set.
          rows: positions in it, in any order.
          flips: 1 for the pictures as they are, 2 to add their mirror images.
          captions: `first` or `all`.
          advance: called with the number of (picture, flip, caption) examples done since the last call.
        """
        counts = data.num_captions[rows] if captions == "all" else np.ones(len(rows), np.int64)
        picture = np.repeat(np.arange(len(rows)), counts)
        caption = np.arange(len(picture)) - np.repeat(np.cumsum(counts) - counts, counts)
        picture, caption = np.repeat(picture, flips), np.repeat(caption, flips)
        flip = np.tile(np.arange(flips), len(picture) // flips)

        values = np.empty((len(picture), *self.result_shape), np.float64)
        pending: list[tuple[np.ndarray, jax.Array]] = []

        def collect():
            members, result = pending.pop(0)
            values[members] = fetch(result)[: len(members)]
            advance(len(members))

        size = self.tile * self.mesh.size
        share = host_share(self.mesh, size)
        for members, mask in zip(*padded_tiles(len(picture), size)):
            mine = members[share]
            row = rows[picture[mine]]
            latents, text = data.inputs(row, flip[mine], caption[mine])
            batch = Batch(
                latents=latents,
                text=text,
                row_id=data.row_ids[row],
                flip=flip[mine].astype(np.int32),
                caption=caption[mine].astype(np.int32),
                mask=mask[share].astype(np.float32),
            )
            pending.append((members[mask], self._run((self._shared, weights), shard_batch(self.mesh, batch))))
            if len(pending) >= self._tiles_in_flight:
                collect()
        while pending:
            collect()
        sums = np.zeros((len(rows), flips, *self.result_shape))
        np.add.at(sums, (picture, flip), values)
        return sums / counts.reshape(-1, *(1,) * (sums.ndim - 1))


@functools.lru_cache(maxsize=8)
def _compiled(function: Callable[..., jax.Array], static: tuple, mesh: Mesh, matmul_precision: str):
    """Made once: another model of the same architecture, or another data set, compiles nothing."""

    def run(shared, batch):
        (schedule, key, timesteps), weights = shared
        return function(*static, schedule, key, timesteps, weights, batch)

    return tile_map(mesh, run, matmul_precision)


class LossProgram(ExampleProgram):
    """The compiled strided loss of one model, as a function of the UNet's parameters."""

    def __init__(
        self,
        predict: Predict,
        schedule: NoiseSchedule,
        loss_seed: int,
        stride: int,
        batch_size: int = 0,
        mesh: Mesh | None = None,
        matmul_precision: str = "highest",
    ):
        """`predict` is the model; the others are those of `ExampleProgram`."""
        super().__init__(
            _losses, schedule, loss_seed, stride, batch_size, mesh, (), matmul_precision, static=(predict,)
        )


def _losses(predict: Predict, schedule, key, timesteps, params, batch: Batch) -> jax.Array:
    return strided_losses(predict, schedule, params, key, batch, timesteps)


def value_store(path: Path, rows: int, shape: tuple[int, ...], mesh: Mesh) -> ChunkStore:
    """Opens or makes the chunks of one float64 array of `shape` for each of `rows` pictures, on all hosts."""
    # Many devices take many rows at once: a chunk should fill them several times.
    rows_per_chunk = max(_ROWS_PER_CHUNK, _TILES_PER_CHUNK * EXAMPLES_PER_TILE * mesh.size // shape[0])
    fields = {"loss": (shape, np.float64)}
    return host0_first(lambda: ChunkStore(path, fields, rows, rows_per_chunk, name="losses"))


def dataset_values(
    path: Path,
    program: ExampleProgram,
    weights: Any,
    data: EncodedDataset,
    flips: int,
    captions: str,
    description: str,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """A program's results on a data set, kept in chunks under `path` and resumed there.

    Returns (N, flips, *result_shape) float64, N the pictures at the positions `rows`, all of them if None; the caller
    keeps to one set of rows for one `path`. Weights need no `place`. With several hosts, host 0 decides what is missing
    and writes.
    """
    rows = np.arange(len(data)) if rows is None else np.asarray(rows)
    store = value_store(path, len(rows), (flips, *program.result_shape), program.mesh)

    def compute(some: np.ndarray) -> np.ndarray:
        return program(program.place(weights), data, some, flips, captions, lambda count: None)

    missing = pending_chunks(store, rows, compute if isinstance(program, LossProgram) else None)
    fill_chunks(store, missing, program, weights, data, flips, captions, description, lambda x: {"loss": x}, rows)
    return store.read_all()["loss"]


def pending_chunks(store: ChunkStore, rows: np.ndarray, losses: Callable[[np.ndarray], np.ndarray] | None) -> list[int]:
    """The chunks that a pass over the data set has still to compute, known to all hosts.

    All of them, and those that were there are removed, where a pass ran on another kind of device, to its end too: what
    its losses are subtracted from may since have been computed on this one.

    Args:
      store: of `rows` (N,), positions in the data set.
      losses: `(positions) -> (len, flips)` on this device; None for values that are not subtracted from others.
    """
    missing = run_on_host0(lambda: list(store.missing()))
    if losses is None or len(missing) == store.num_chunks:
        return missing
    stored = next(index for index in range(store.num_chunks) if index not in missing)
    again = losses(rows[store.rows(stored)][:EXAMPLES_PER_TILE])
    if run_on_host0(lambda: _same_device(again, store.read(stored)["loss"][: len(again)])):
        return missing
    if is_host0():
        _log.warning("%s was computed on another kind of device: computing it anew", store.path)
    run_on_host0(store.clear)
    return list(range(store.num_chunks))


def _same_device(losses: np.ndarray, stored: np.ndarray) -> bool:
    """Whether losses agree as far as those of one kind of device do."""
    return bool(np.allclose(losses, stored, rtol=LOSS_TOLERANCE, atol=0))


def fill_chunks(
    store: ChunkStore,
    missing: list[int],
    program: ExampleProgram,
    weights: Any,
    data: EncodedDataset,
    flips: int,
    captions: str,
    description: str,
    pack: Callable[[np.ndarray], dict[str, np.ndarray]],
    rows: np.ndarray,
) -> None:
    """Computes the `missing` chunks of a program's results on a data set.

    `pack` makes the store's fields of the results (rows, flips, *result_shape) of a chunk. `rows` are the positions in
    the data set of the store's rows. Weights need no `place`; of several hosts, host 0 writes.
    """
    if not missing:
        return
    counts = data.num_captions[rows] if captions == "all" else np.ones(len(rows), np.int64)
    forwards = flips * program.num_timesteps
    left = sum(int(counts[store.rows(index)].sum()) for index in missing)
    total = int(counts.sum())
    weights = program.place(weights)
    with progress(total * forwards, description, "forward", initial=(total - left) * forwards) as bar:
        for index in missing:
            part = rows[store.rows(index)]
            values = program(weights, data, part, flips, captions, lambda n: bar.update(n * program.num_timesteps))
            run_on_host0(functools.partial(store.write, index, pack(values)))
