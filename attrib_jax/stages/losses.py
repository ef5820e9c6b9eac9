"""Stage 3: the strided losses of every training picture and its mirror image under one set of weights."""

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
from attrib_jax.runtime.chunks import ChunkStore
from attrib_jax.runtime.mesh import data_mesh, padded_tiles, replicate, shard_batch, tile_map
from attrib_jax.runtime.progress import progress
from attrib_jax.stages.encoded import EncodedDataset

_ROWS_PER_CHUNK = 512


class LossProgram:
    """The compiled strided loss of one model: made once, run with any weights, on all devices.

    One compiled program for the losses before and after unlearning, in tiles of one fixed shape, so that their
    difference is that of the weights alone: to the bit, whatever the batch size, the order or the subset.
    """

    def __init__(
        self,
        predict: Predict,
        schedule: NoiseSchedule,
        loss_seed: int,
        stride: int,
        batch_size: int = 0,
        mesh: Mesh | None = None,
    ):
        """`batch_size`: examples in flight, in whole tiles, 0 for automatic; `mesh`: all devices if None."""
        self.mesh = mesh or data_mesh()
        self.loss_seed, self.stride = loss_seed, stride
        self._timesteps = strided_timesteps(stride, schedule.num_train_timesteps)
        self._shared = replicate(self.mesh, (schedule, loss_key(loss_seed), self._timesteps))
        self._tiles_in_flight = max(2, -(-batch_size // (EXAMPLES_PER_TILE * self.mesh.size)))

        def losses(shared, batch):
            (schedule, key, timesteps), params = shared
            return strided_losses(predict, schedule, params, key, batch, timesteps)

        self._run = tile_map(self.mesh, losses)

    @property
    def num_timesteps(self) -> int:
        return len(self._timesteps)

    def place(self, params: Any) -> Any:
        """Puts weights on all devices, once for many calls."""
        return replicate(self.mesh, params)

    def __call__(
        self,
        params: Any,
        data: EncodedDataset,
        rows: np.ndarray,
        flips: int,
        captions: str,
        advance: Callable[[int], Any],
    ) -> np.ndarray:
        """Losses of the pictures at positions `rows`, the mean over captions -> (len(rows), flips) float64.

        Args:
          params: the UNet's, as `place` returned them.
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

        values = np.empty(len(picture), np.float64)
        pending: list[tuple[np.ndarray, jax.Array]] = []

        def fetch():
            members, result = pending.pop(0)
            values[members] = np.asarray(result)[: len(members)]
            advance(len(members))

        for members, mask in zip(*padded_tiles(len(picture), EXAMPLES_PER_TILE * self.mesh.size)):
            row = rows[picture[members]]
            latents, text = data.inputs(row, flip[members], caption[members])
            batch = Batch(
                latents=latents,
                text=text,
                row_id=data.row_ids[row],
                flip=flip[members].astype(np.int32),
                caption=caption[members].astype(np.int32),
                mask=mask.astype(np.float32),
            )
            pending.append((members[mask], self._run((self._shared, params), shard_batch(self.mesh, batch))))
            if len(pending) >= self._tiles_in_flight:
                fetch()
        while pending:
            fetch()
        sums = np.zeros((len(rows), flips))
        np.add.at(sums, (picture, flip), values)
        return sums / counts[:, None]


def dataset_losses(
    path: Path, program: LossProgram, params: Any, data: EncodedDataset, flips: int, captions: str, description: str
) -> np.ndarray:
    """Losses of a whole data set, kept in chunks under `path` and resumed there -> (N, flips) float64."""
    fields = {"loss": ((flips,), np.float64)}
    store = ChunkStore(path, fields, len(data), _ROWS_PER_CHUNK, name="losses")
    missing = list(store.missing())
    if missing:
        counts = data.num_captions if captions == "all" else np.ones(len(data), np.int64)
        forwards = flips * program.num_timesteps
        left = sum(int(counts[store.rows(index)].sum()) for index in missing)
        total = int(counts.sum())
        params = program.place(params)
        with progress(total * forwards, description, "forward", initial=(total - left) * forwards) as bar:
            for index in missing:
                rows = np.arange(len(data))[store.rows(index)]
                loss = program(params, data, rows, flips, captions, lambda n: bar.update(n * program.num_timesteps))
                store.write(index, {"loss": loss})
    return store.read_all()["loss"]
