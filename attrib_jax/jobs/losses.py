"""Numbers of every training image and its mirror image, such as strided losses, under given weights.

`dataset_pass` runs a compiled program over the data set for one or many queries, keeps the results in chunks and
resumes from them; `base_losses` are the losses under the model's own weights, which all queries share.
"""

import collections
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from attrib_jax.attribution.scores import EXAMPLES_PER_TILE, strided_losses
from attrib_jax.core.keys import loss_key, shared_noise_key
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import Params, merge_weights, select_weights
from attrib_jax.diffusion.losses import Predict
from attrib_jax.diffusion.schedule import NoiseSchedule, strided_timesteps
from attrib_jax.jobs.context import Run, run_mesh
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.settings import ExampleSettings, LossSettings, PassSettings
from attrib_jax.models.predictor import cast_params, matmul_precision, predictor
from attrib_jax.parallel.hosts import fetch, host0_first, is_host0, on_host_memory, run_on_host0
from attrib_jax.parallel.mesh import (
    data_mesh,
    host_share,
    mesh_platform,
    num_parts,
    padded_tiles,
    place_parameters,
    replicate,
    shard_batch,
    tile_map,
)
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
    of the weights alone: bitwise, whatever the batch size, the order or the subset.
    """

    def __init__(
        self,
        function: Callable[..., jax.Array],
        schedule: NoiseSchedule,
        config: ExampleSettings,
        mesh: Mesh | None = None,
        result_shape: tuple[int, ...] = (),
        timesteps: np.ndarray | None = None,
        tile: int = EXAMPLES_PER_TILE,
        static: tuple = (),
        shared_noise: bool = False,
        takes_shards: bool = False,
    ):
        """Compiles when first called, unless a program of the same function and `static` was compiled before.

        Args:
          function: `(*static, (schedule, key, timesteps (S,), weights), batch of B) -> (B, *result_shape)`, pure.
          schedule: noise levels and prediction type.
          config: seed of the noise, flips, captions, precision and examples in flight.
          mesh: all devices if None.
          result_shape: shape of one example's result.
          timesteps: (S,) int32; those of the config's stride if None.
          tile: examples that a device takes at once; another number changes rounding.
          static: hashable first arguments of `function`, such as the predictor.
          shared_noise: whether `key` is that of the noise that all examples share, in place of each one's own.
          takes_shards: whether `function` takes divided weights as `Shard`s, see `tile_map`.
        """
        self.mesh, self.config = mesh or data_mesh(), config
        self.result_shape, self.tile = tuple(result_shape), tile
        if timesteps is None:
            timesteps = strided_timesteps(config.stride, schedule.num_train_timesteps)  # type: ignore[attr-defined]
        self._timesteps = timesteps
        key = shared_noise_key(config.image_seed) if shared_noise else loss_key(config.image_seed)
        self._shared = replicate(self.mesh, (schedule, key, self._timesteps))
        self._tiles_in_flight = max(2, -(-config.batch_size // (tile * self.mesh.size)))
        self._matmul_precision = matmul_precision(config.precision)
        self._run = _compiled(function, static, self.mesh, takes_shards)

    @property
    def num_timesteps(self) -> int:
        """Timesteps of each example, S."""
        return len(self._timesteps)

    def place(self, weights: Any) -> Any:
        """Puts weights on all devices, once for many calls; divided on a mesh with the axis `model`."""
        return place_parameters(self.mesh, weights)

    def __call__(
        self, weights: Any, data: EncodedDataset, rows: np.ndarray, advance: Callable[[int], Any] | None = None
    ) -> np.ndarray:
        """Results of the images at positions `rows`, the mean over captions -> (len(rows), flips, *result_shape).

        Float64. With several hosts each reads its share of every batch, and all return the whole.

        Args:
          weights: as `place` returned them.
          data: the encoded data set.
          rows: positions in it, in any order.
          advance: called with the number of forwards done since the last call.
        """
        # One example for each (image, flip, caption).
        flips, counts = self.config.num_flips, num_captions(data, rows, self.config)
        image = np.repeat(np.arange(len(rows)), counts)
        caption = np.arange(len(image)) - np.repeat(np.cumsum(counts) - counts, counts)
        image, caption = np.repeat(image, flips), np.repeat(caption, flips)
        flip = np.tile(np.arange(flips), len(image) // flips)
        values = self.examples(weights, data, rows[image], flip, caption, advance)
        sums = np.zeros((len(rows), flips, *values.shape[1:]))
        np.add.at(sums, (image, flip), values)
        return sums / counts.reshape(-1, *(1,) * (sums.ndim - 1))

    def examples(
        self,
        weights: Any,
        data: EncodedDataset,
        row: np.ndarray,
        flip: np.ndarray,
        caption: np.ndarray,
        advance: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """Results of n examples (image at position `row`, flip, caption), each (n,) -> (n, *result_shape) float64.

        Other arguments as in a call, which averages these over an image's captions.
        """
        values = np.empty((len(row), *self.result_shape), np.float64)
        pending: collections.deque[tuple[np.ndarray, jax.Array]] = collections.deque()

        def collect():
            members, result = pending.popleft()
            values[members] = fetch(result)[: len(members)]
            if advance is not None:
                advance(len(members) * self.num_timesteps)

        # Tiles are read and placed while earlier ones are computed; results are fetched late.
        size = self.tile * self.mesh.size
        share = host_share(self.mesh, size)
        for members, mask in zip(*padded_tiles(len(row), size)):
            mine = members[share]
            latents, text = data.inputs(row[mine], flip[mine], caption[mine])
            batch = Batch(
                latents=latents,
                text=text,
                row_id=data.row_ids[row[mine]],
                flip=flip[mine].astype(np.int32),
                caption=caption[mine].astype(np.int32),
                mask=mask[share].astype(np.float32),
            )
            # Here and not only in the commands: a loss must not depend on who calls. A GPU's or TPU's default would
            # round the factors of every product.
            with jax.default_matmul_precision(self._matmul_precision):
                result = self._run((*self._shared, weights), shard_batch(self.mesh, batch))
            pending.append((members[mask], result))
            if len(pending) >= self._tiles_in_flight:
                collect()
        while pending:
            collect()
        return values


@functools.lru_cache(maxsize=8)
def _compiled(function: Callable[..., jax.Array], static: tuple, mesh: Mesh, takes_shards: bool):
    """Made once: another model of the same architecture, or another data set, compiles nothing."""
    return tile_map(mesh, functools.partial(function, *static), matmul_precision=None, takes_shards=takes_shards)


def num_captions(data: EncodedDataset, rows: np.ndarray, config: ExampleSettings) -> np.ndarray:
    """(len(rows),) captions that count of the images at positions `rows`."""
    return data.num_captions[rows] if config.captions == "all" else np.ones(len(rows), np.int64)


def loss_program(run: Run, config: LossSettings) -> ExampleProgram:
    """The strided loss of the run's model; `loss_weights` makes the weights that it takes."""
    predict, common = predictor(run.pipeline.unet, config.precision), shares_noise(config)
    mesh = run_mesh(run.pipeline, config)
    static = (predict, mesh_platform(mesh), common)
    return ExampleProgram(
        tile_strided_losses, run.pipeline.schedule, config, mesh, static=static, shared_noise=common, takes_shards=True
    )


def shares_noise(config: LossSettings) -> bool:
    """Whether the losses of all images are taken under one noise at a timestep."""
    return isinstance(config, PassSettings) and config.shared_noise


def tile_strided_losses(predict: Predict, platform: str, common: bool, shared: Any, batch: Batch) -> jax.Array:
    """The strided losses of a tile; `shared` is (schedule, noise key, timesteps (S,), parameters).

    `common`: whether all examples share their noise.
    """
    schedule, key, timesteps, params = shared
    return strided_losses(predict, schedule, params, key, batch, timesteps, platform=platform, shared=common)


def loss_weights(run: Run, program: ExampleProgram, moved: Sequence[Params], weights: str) -> list[Params]:
    """The denoiser's parameters, on all devices, for each of several trees of the weights of subset `weights`."""
    precision = program.config.precision
    if num_parts(program.mesh) > 1:
        # Rounded in the host's memory: no device has room for the whole.
        with on_host_memory():
            return _loss_weights(run, program, moved, weights, precision)
    return _loss_weights(run, program, moved, weights, precision)


def _loss_weights(run, program, moved, weights, precision) -> list[Params]:
    # The weights that no query moves lie on the devices once.
    rest = program.place(select_weights(cast_params(run.pipeline.params["unet"], precision), weights)[1])
    return [merge_weights(program.place(cast_params(tree, precision)), rest) for tree in moved]


def dataset_pass(
    run: Run,
    paths: Sequence[Path],
    program: ExampleProgram,
    weights: Sequence[Any],
    description: str,
    rows: np.ndarray | None = None,
    check_device: bool = True,
) -> list[np.ndarray]:
    """A program's results on the data set for each query, in one pass; kept in chunks and resumed.

    A query's chunks are the same whichever others come with it. With several hosts, host 0 decides what is missing and
    writes.

    Args:
      run: the data set.
      paths: a folder for each query.
      program: see `ExampleProgram`.
      weights: the weights of each query, as `program.place` returned them; or one entry for all queries, where the
        program's result has a last axis over them.
      description: what the progress bar says.
      rows: positions in the data set, all of them if None; the caller keeps to one set of rows for one path.
      check_device: whether stored results have to come from this kind of device, because they are subtracted from
        others; see `pending_chunks`.

    Returns:
      (N, flips) float64 for each query.
    """
    data, flips = run.data, program.config.num_flips
    rows = np.arange(len(data)) if rows is None else np.asarray(rows)
    joint = len(weights) < len(paths)
    stores = [_value_store(path, len(rows), (flips,), program.mesh) for path in paths]
    # Row range -> the (query, chunk) that lack it: queries may come from earlier runs, and with chunks of other sizes.
    lacking: dict[tuple[int, int], list[tuple[int, int]]] = collections.defaultdict(list)
    for query, store in enumerate(stores):
        check = functools.partial(program, weights[query], data) if check_device else None
        for chunk in pending_chunks(store, rows, check):
            span = store.rows(chunk)
            lacking[span.start, span.stop].append((query, chunk))
    counts = num_captions(data, rows, program.config)
    forwards = flips * program.num_timesteps

    def work(queries: int, span: slice = slice(None)) -> int:
        return int(counts[span].sum()) * forwards * (1 if joint else queries)

    left = sum(work(len(members), slice(*span)) for span, members in lacking.items())
    total = work(len(paths))
    label = description if len(paths) == 1 else f"{description} of {len(paths)} queries"
    with progress(total, label, "forward", initial=max(total - left, 0)) as bar:
        for (start, stop), members in sorted(lacking.items()):
            if joint:
                together = program(weights[0], data, rows[start:stop], bar.update)
            for query, chunk in members:
                if joint:
                    values = np.ascontiguousarray(together[..., query])
                else:
                    values = program(weights[query], data, rows[start:stop], bar.update)
                run_on_host0(functools.partial(stores[query].write, chunk, {"loss": values}))
    return [store.read_all()["loss"] for store in stores]


def base_losses(
    run: Run, config: LossSettings, rows: np.ndarray | None = None, path: Path | None = None, passes: int = 1
) -> np.ndarray:
    """Losses under the model's own weights (N, flips) float64, computed or reused.

    Args:
      run: model, data set and storage.
      config: how losses are taken.
      rows: positions in the data set; all if None. Their losses come from the stage of all images where it is finished,
        or where `passes` calls such as this would cost as much as making it; else they are computed for these alone.
      path: where the losses of `rows` alone are kept.
      passes: how often the caller asks for other rows of the same number.
    """
    both = dataclasses.replace(config, flips="max")
    if rows is not None:
        finished = any(run.root.is_finished(*_base_stage(run, stored)) for stored in (config, both))
        if not finished and passes * len(rows) < len(run.data):
            if path is None:
                raise ValueError("path is None: expected a folder for the losses of some rows")
            with run.timed("base losses"):
                return _losses_of_model(run, path, config, rows)
        return base_losses(run, config)[rows]
    if config.flips == "none" and run.root.is_finished(*_base_stage(run, both)):
        # The losses of the images as they are, bitwise.
        return base_losses(run, both)[:, :1]
    stage = _base_stage(run, config)
    with run.timed("base losses", run.root.is_finished(*stage)), run.root.stage(*stage) as opened:
        return _losses_of_model(run, opened.path, config, None)


def _losses_of_model(run: Run, path: Path, config: LossSettings, rows: np.ndarray | None) -> np.ndarray:
    program = loss_program(run, config)
    weights = program.place(cast_params(run.pipeline.params["unet"], config.precision))
    return dataset_pass(run, [path], program, [weights], "losses before", rows)[0]


def _base_stage(run: Run, config: LossSettings) -> tuple[str, dict[str, Any], Mapping[str, str]]:
    settings = {name: getattr(config, name) for name in ("stride", "captions", "num_flips")}
    # The only seed that these losses depend on, under the name that stored ones have.
    settings["loss_seed"] = config.image_seed
    name = f"losses/stride{config.stride}-{config.captions}-flips{config.num_flips}-seed{config.image_seed}"
    # Losses in float32, under noise of each image's own, need no word about it.
    if shares_noise(config):
        name, settings = f"{name}-shared-noise", {**settings, "shared_noise": True}
    if config.precision != "float32":
        name, settings = f"{name}-{config.precision}", {**settings, "precision": config.precision}
    return name, settings, run.inputs


def _value_store(path: Path, rows: int, shape: tuple[int, ...], mesh: Mesh) -> ChunkStore:
    """Opens or makes the chunks of one float64 array of `shape` for each of `rows` images, on all hosts."""
    # Many devices take many rows at once: a chunk should fill them several times.
    rows_per_chunk = max(_ROWS_PER_CHUNK, _TILES_PER_CHUNK * EXAMPLES_PER_TILE * mesh.size // shape[0])
    fields = {"loss": (shape, np.float64)}
    return host0_first(lambda: ChunkStore(path, fields, rows, rows_per_chunk, name="losses"))


def pending_chunks(store: ChunkStore, rows: np.ndarray, losses: Callable[[np.ndarray], np.ndarray] | None) -> list[int]:
    """The chunks that a pass over the data set has still to compute, known to all hosts.

    All of them, and those that were there are removed, where a pass ran on another kind of device, to its end too: what
    its losses are subtracted from may since have been computed on this one.

    Args:
      store: results of `rows` (N,), positions in the data set.
      losses: `(positions) -> (len, flips)` on this device; None for values that are not subtracted from others.
    """
    missing = store.pending_chunks()
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
