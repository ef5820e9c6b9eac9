"""Method `mirrored`: unlearn each query while the rest of the data is retained, then compare losses draw by draw.

Mirrored unlearning (arXiv 2605.17938); docs/METHOD.md, "Mirrored unlearning". No curvature. The losses before are a
stage that all queries share; every query has a copy of the weights that move, and several are unlearned together.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attrib_jax.attribution.mirrored import (
    Limits,
    LossBatch,
    MirroredState,
    mirrored_optimizer,
    mirrored_step,
    noisy_timesteps,
    shared_draw_losses,
    skew_scores,
)
from attrib_jax.attribution.scores import EXAMPLES_PER_TILE, make_scores
from attrib_jax.convert.pipeline import initial_unet
from attrib_jax.core.compensated import CompensatedSum
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import setting
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import WEIGHT_SUBSETS, Params, flatten_names, unflatten_names
from attrib_jax.diffusion.losses import Predict, batch_losses
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.draws import Sample, fisher_draws, sum_over_draws
from attrib_jax.jobs.encoded_dataset import CaptionRows, EncodedDataset, caption_rows
from attrib_jax.jobs.losses import ExampleProgram, dataset_pass, loss_weights, num_captions, pending_chunks
from attrib_jax.jobs.settings import ExampleSettings, QueriesSettings, WeightSettings
from attrib_jax.methods.base import MethodConfig, QueryJob, Scored
from attrib_jax.models.predictor import cast_params, predictor
from attrib_jax.models.projected_text import text_rows
from attrib_jax.ops.micro_batching import forward_pixels, group_size, map_groups, num_pixels
from attrib_jax.parallel.hosts import fetch, host0_first, run_on_host0
from attrib_jax.parallel.mesh import data_mesh, host_share, mesh_platform, replicate, shard_batch, tile_map
from attrib_jax.parallel.progress import progress
from attrib_jax.parallel.sums import DeviceSums
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.files import stored_arrays, write_arrays
from attrib_jax.storage.score_files import read_unlearned
from attrib_jax.storage.state import StateStore

_log = logging.getLogger(__name__)

_FILE = "unlearned.safetensors"
_STATE = "unlearning"
_NULL_FILE = "null_loss.safetensors"
# A state is stored this often, so that a killed run loses little.
_SECONDS_BETWEEN_STATES = 10.0
_MAX_ROWS_PER_CHUNK = 512
_CHUNK_BYTES = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirroredConfig(MethodConfig, WeightSettings, ExampleSettings, QueriesSettings):
    """Settings of mirrored unlearning."""

    method: str = setting("mirrored", "Attribution method.", choices=("mirrored",))
    weights: str = setting(
        "mlp",
        "Weights that move: the key and value projections of cross-attention, all weights of cross-attention, those of "
        "all attention layers, those of the feed-forward layers (mlp), or all weights.",
        choices=tuple(WEIGHT_SUBSETS),
    )
    query_strength: float = setting(
        0.2, "Weight of the query's loss, which rises, beside the retained images' loss of weight 1.", above=0,
        symbol="lambda",
    )  # fmt: skip
    unlearning_rate: float = setting(
        3e-4, "Learning rate of Adam in mirrored unlearning; about a tenth of the training's.", above=0
    )
    max_steps: int = setting(150, "Most steps of mirrored unlearning.", low=1)
    stop_share: float = setting(
        0.95,
        "Share of an untrained model's loss at which the query's loss stops mirrored unlearning.",
        above=0,
        high=1,
    )
    retain_batch: int = setting(64, "Training images a step whose loss is kept low.", low=1)
    query_batch: int = setting(64, "Draws of (timestep, noise) of the query a step.", low=1)
    score_draws: int = setting(100, "Draws of (timestep, noise) of a score, the same for all training images.", low=1)
    noisy_share: float = setting(
        0.7, "Share of the timesteps, the noisiest ones, that the draws of a score are spread over.", above=0, high=1
    )
    null_draws: int = setting(12800, "Draws of training images that an untrained model's loss is averaged over.", low=1)
    queries_per_device: int = setting(
        1, "Queries that each device unlearns at a time.", low=1,
        performance=True,
    )  # fmt: skip


class Prepared(NamedTuple):
    """What all queries share.

    Attributes:
      null: L_null, the loss of an untrained model.
      captions: the M captions that count.
      losses: (M, flips, S) float32, L_0 of every draw, on disk.
    """

    null: float
    captions: CaptionRows
    losses: Any


def prepare(run: Run, config: MirroredConfig) -> Prepared:
    """An untrained model's loss, and every training image's losses before: computed, resumed or reused."""
    null = _null_loss(run, config)
    captions = caption_rows(run.data, config.captions)
    stage = _stage(run, config)
    with run.timed("losses of shared draws", run.root.is_finished(*stage)), run.root.stage(*stage) as opened:
        losses = _losses_before(run, opened.path, config, captions)
    return Prepared(null, captions, losses)


def score(run: Run, queries: Sequence[QueryJob], config: MirroredConfig) -> list[Scored]:
    """Each query is unlearned, several at a time; one pass over the data set gives the scores of all."""
    shared = prepare(run, config)
    with run.timed("unlearn"):
        unlearned = unlearn_queries(run, queries, config, shared.null)
    with run.timed("losses after"):
        program = _SkewProgram(run, config, shared)
        key = program.place(_noise_key(config))
        trees = loss_weights(run, program, [weights for weights, _ in unlearned], config.weights)
        folders = [query.folder for query in queries]
        values = dataset_pass(run, folders, program, [(tree, key) for tree in trees], "losses after")
    scores = [make_scores(run.data.row_ids, each, None, config.flips) for each in values]
    return [Scored(*result) for result in zip(scores, (losses for _, losses in unlearned))]


# The loss of an untrained model.


def _null_loss(run: Run, config: MirroredConfig) -> float:
    """L_null, computed once for a model, a data set and a seed."""
    _ = run.data  # encoded before, so that each is timed by itself
    settings = {"loss_seed": config.loss_seed, "null_draws": config.null_draws}
    stage = f"null_loss/{config.null_draws}-seed{config.loss_seed}", settings, run.inputs
    with run.timed("loss of an untrained model", run.root.is_finished(*stage)), run.root.stage(*stage) as opened:
        file = opened.path / _NULL_FILE
        stored = run_on_host0(lambda: stored_arrays(file))
        if stored is None:
            mean, state = _mean_null_loss(run, opened.path, config)
            run_on_host0(lambda: write_arrays(file, {"loss": mean}, {}))
            run_on_host0(state.remove)
            stored = {"loss": mean}
    return float(stored["loss"])


def _mean_null_loss(run: Run, path: Path, config: MirroredConfig) -> tuple[np.ndarray, StateStore]:
    schedule, mesh = run.pipeline.schedule, data_mesh()
    draws = fisher_draws(config.loss_seed, config.null_draws, run.data.num_captions, schedule.num_train_timesteps)
    params = initial_unet(run.pipeline, purpose_key(config.loss_seed, "null model"))
    shared = replicate(mesh, (params, schedule, purpose_key(config.loss_seed, "null noise")))
    like = np.zeros((), np.float32)
    program = _null_program(run.predict, mesh)
    total, state = sum_over_draws(path, "partial", program, shared, like, draws, run.data, "loss of an untrained model")
    mean = run_on_host0(lambda: np.asarray(np.float64(total.high) + np.float64(total.low)) / config.null_draws)
    return mean, state


@functools.lru_cache(maxsize=4)
def _null_program(predict: Predict, mesh: Mesh) -> DeviceSums:
    return DeviceSums(mesh, functools.partial(_null_sum, predict, mesh_platform(mesh)))


def _null_sum(predict: Predict, platform: str, shared: Any, samples: Sample) -> CompensatedSum:
    params, schedule, key = shared

    def losses(part):
        noise = _noise(key, part.index, part.latents.shape[1:])
        return batch_losses(predict, params, schedule, part.latents, part.text, noise, part.timestep)

    size = group_size(len(samples.index), num_pixels(samples.latents.shape[1:]), forward_pixels(platform))
    return CompensatedSum.of(jnp.sum(map_groups(losses, size, samples) * samples.mask))


def _noise(key: jax.Array, index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise of draws number `index` (B,) -> (B, *shape)."""
    return jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), shape))(index)


# Unlearning.


def unlearn_queries(
    run: Run, queries: Sequence[QueryJob], config: MirroredConfig, null: float
) -> list[tuple[Params, tuple[float, ...]]]:
    """The selected weights after unlearning each query, and its losses before each step; kept in the queries' folders.

    Queries are spread over the devices; a killed run goes on from its last stored step. A query's result does not
    depend on the others: bitwise with one query a device, and up to rounding on another number of devices. Where a
    query's loss is at the stop before any step, one step is taken without the clamp, and a warning says so.

    Raises ValueError, naming the query, where a loss is not finite.
    """
    mesh = data_mesh()
    slots = mesh.size * config.queries_per_device
    results = [run_on_host0(functools.partial(read_unlearned, query.folder / _FILE)) for query in queries]
    # Queries of one program have text states of one length.
    pending = sorted(
        (place for place, result in enumerate(results) if result is None),
        key=lambda place: len(text_rows(queries[place].prepared.text)),
    )
    program = _StepProgram(run, config, mesh)
    while pending:
        length = len(text_rows(queries[pending[0]].prepared.text))
        together = [place for place in pending[:slots] if len(text_rows(queries[place].prepared.text)) == length]
        pending = pending[len(together) :]
        _unlearn_together(run, program, [queries[place] for place in together], config, null)
        for place in together:
            results[place] = run_on_host0(functools.partial(read_unlearned, queries[place].folder / _FILE))
    unlearned = []
    for query, stored in zip(queries, results):
        # What a run that was killed between writing a result and this left.
        run_on_host0(StateStore(query.folder, _STATE).remove)
        losses = stored.pop("query_loss").tolist()
        unlearned.append((unflatten_names(stored), tuple(losses)))
    return unlearned


class _StepProgram:
    """The compiled step of several queries, one slot each; and what it reads from the data set."""

    def __init__(self, run: Run, config: MirroredConfig, mesh: Mesh):
        self.mesh, self.config, self.data = mesh, config, run.data
        self.selected, rest = run.select(config.weights)
        self._num_timesteps = run.pipeline.schedule.num_train_timesteps
        rate, strength = np.float32(config.unlearning_rate), np.float32(config.query_strength)
        self._shared = replicate(mesh, (run.pipeline.schedule, rest, rate, strength))
        self._run = _compiled_step(run.predict, mesh)
        counts = num_captions(run.data, np.arange(len(run.data)), config)
        # Which image, flip and caption stands in each place of all steps' batches.
        self._retain = fisher_draws(
            config.loss_seed, config.max_steps * config.retain_batch, counts, self._num_timesteps
        )

    def initial(self) -> MirroredState:
        """The state before the first step; leaves in host memory."""
        optimizer = mirrored_optimizer(self.config.unlearning_rate)
        return jax.tree.map(np.asarray, MirroredState(self.selected, optimizer.init(self.selected)))

    def inputs(self, query: QueryJob, step: int) -> tuple[Any, ...]:
        """What step number `step` of a query takes: both batches without noise, and the noise's keys."""
        size, draws = self.config.retain_batch, self._retain
        places = slice(step * size, (step + 1) * size)
        flip = draws.flip[places] * (self.config.num_flips - 1)
        latents, text = self.data.inputs(draws.row[places], flip, draws.caption[places])
        keys, parts = [], []
        count = self.config.query_batch
        prepared = query.prepared.latents, query.prepared.text
        own = jax.tree.map(lambda array: np.repeat(array[None], count, axis=0), prepared)
        for name, number, batch in (("retain", size, (latents, text)), ("forget", count, own)):
            key = jax.random.fold_in(purpose_key(self.config.loss_seed, f"mirrored {name}"), step)
            keys.append(np.asarray(jax.random.key_data(key)))
            timestep = stratified_timesteps(self.config.loss_seed, name, step, number, self._num_timesteps)
            parts.append((*jax.tree.map(lambda array: np.asarray(array, np.float32), batch), timestep))
        return (*parts, np.stack(keys))

    def __call__(self, state: MirroredState, limits: Limits, inputs: Sequence[Any]) -> Any:
        """One step of every slot; `state` is on the devices, the others are lists of what the slots take."""
        share = host_share(self.mesh, len(inputs))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *inputs[share])
        limits = Limits(*(np.asarray(values, np.float32)[share] for values in limits))
        return self._run(self._shared, (state, *shard_batch(self.mesh, (limits, stacked))))


@functools.lru_cache(maxsize=4)
def _compiled_step(predict: Predict, mesh: Mesh) -> Callable[[Any, Any], Any]:
    """Made once: further queries, and other rates, compile nothing."""
    return tile_map(mesh, functools.partial(_steps, predict, mesh_platform(mesh)))


def _steps(predict: Predict, platform: str, shared: Any, slots: Any) -> Any:
    """One step of every query on a device; leaves of `slots` have an axis of queries."""
    schedule, rest, rate, strength = shared
    optimizer = mirrored_optimizer(rate)

    def step(state, limits, inputs):
        *parts, keys = inputs
        batches = []
        for (latents, text, timestep), key_data in zip(parts, keys):
            key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
            noise = _noise(key, jnp.arange(len(timestep)), latents.shape[1:])
            batches.append(LossBatch(latents, text, timestep, noise))
        return mirrored_step(predict, schedule, optimizer, rest, *batches, state, limits, strength, platform)

    if len(jax.tree.leaves(slots)[0]) == 1:
        # Without the axis: a batch of convolutions with different kernels is slow on a CPU.
        result = step(*jax.tree.map(lambda leaf: leaf[0], slots))
        return jax.tree.map(lambda leaf: leaf[None], result)
    return jax.vmap(step)(*slots)


def stratified_timesteps(seed: int, name: str, step: int, count: int, num_train_timesteps: int) -> np.ndarray:
    """One timestep from each of `count` equal parts of the schedule, in random order, as in training -> (count,)."""
    rng = np.random.default_rng([seed, step, *name.encode()])
    strata = (rng.permutation(count) + rng.random(count)) / count
    return np.minimum((strata * num_train_timesteps).astype(np.int32), num_train_timesteps - 1)


def _unlearn_together(
    run: Run, program: _StepProgram, queries: Sequence[QueryJob], config: MirroredConfig, null: float
) -> None:
    """Unlearns at most as many queries as there are slots, resuming from their states, and stores the results."""
    mesh, slots = program.mesh, program.mesh.size * config.queries_per_device
    stores = [StateStore(query.folder, _STATE) for query in queries]
    initial = program.initial()
    states, losses = zip(*(_read_state(store, initial, config.max_steps) for store in stores))
    # Slots without a query repeat the last one's first step and take none.
    padded = [*states, *[states[-1]] * (slots - len(states))]
    state = jax.tree.map(lambda *leaves: np.stack(leaves), *padded[host_share(mesh, slots)])
    state = shard_batch(mesh, state)
    losses = [list(each) for each in losses]
    clamp = np.full(slots, null)
    stop = np.where(np.arange(slots) < len(queries), config.stop_share * null, -np.inf)
    active = list(range(len(queries)))
    label = "unlearn the query" if len(queries) == 1 else f"unlearn {len(queries)} queries"
    written = time.monotonic()
    with progress(config.max_steps, label, "step", initial=min(map(len, losses))) as bar:
        while active:
            steps = [min(len(each), config.max_steps - 1) for each in losses]
            inputs = [program.inputs(query, step) for query, step in zip(queries, steps)]
            inputs += [inputs[-1]] * (slots - len(inputs))
            state, taken, (_, forget) = program(state, Limits(clamp, stop), inputs)
            taken, forget = fetch(taken), fetch(forget)
            bar.update(1)
            finished = []
            for place in active:
                name, loss = queries[place].name, float(forget[place])
                if not np.isfinite(loss):
                    run_on_host0(stores[place].remove)
                    raise ValueError(
                        f"query {name!r}: its loss is {loss} at step {steps[place] + 1} of mirrored unlearning. Check "
                        f"the weights for NaN, or take a smaller unlearning_rate than {config.unlearning_rate}."
                    )
                if taken[place]:
                    losses[place].append(loss)
                    if np.isinf(clamp[place]) or len(losses[place]) == config.max_steps:
                        finished.append(place)
                        if not np.isinf(clamp[place]):
                            _log.warning(
                                "%s: the loss was %.4g before the last of max_steps=%d steps, below the stop at %.4g; "
                                "scores are taken from there", name, loss, config.max_steps, config.stop_share * null,
                            )  # fmt: skip
                elif losses[place]:
                    finished.append(place)
                else:
                    _log.warning(
                        "%s: the model's loss of the query, %.4g, is at the stop, stop_share=%g times the %.4g of an "
                        "untrained model, before any step; one step is taken without the clamp",
                        name, loss, config.stop_share, null,
                    )  # fmt: skip
                    clamp[place] = stop[place] = np.inf
            for place in finished:
                active.remove(place)
                stop[place] = -np.inf
                weights = flatten_names(_slot(jax.tree.map(fetch, state.selected), place))
                run_on_host0(functools.partial(write_arrays, queries[place].folder / _FILE, weights, losses[place]))
                run_on_host0(stores[place].remove)
            if bool(active) and run_on_host0(functools.partial(_is_due, written)):
                stored = jax.tree.map(fetch, state)
                for place in active:
                    write = functools.partial(_write_state, stores[place], _slot(stored, place))
                    run_on_host0(functools.partial(write, losses[place], config.max_steps))
                written = time.monotonic()


def _is_due(written: float) -> bool:
    return time.monotonic() > written + _SECONDS_BETWEEN_STATES


def _slot(tree: Any, place: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[place], tree)


def _write_state(store: StateStore, state: MirroredState, losses: list[float], max_steps: int) -> None:
    # Losses of one length at every step, since the store compares shapes.
    store.write((state, np.pad(np.asarray(losses, np.float64), (0, max_steps - len(losses)))), len(losses))


def _read_state(store: StateStore, initial: MirroredState, max_steps: int) -> tuple[MirroredState, np.ndarray]:
    """The newest stored state with its losses; `initial` with none where there is none."""
    layout = jax.tree.structure(initial)

    def read() -> dict[str, Any]:
        stored = store.read((initial, np.zeros(max_steps)))
        if stored is None:
            return {"losses": np.zeros(0)}
        (state, losses), done = stored
        return {"losses": losses[:done]} | {str(place): leaf for place, leaf in enumerate(jax.tree.leaves(state))}

    flat = run_on_host0(read)
    losses = flat.pop("losses")
    return (jax.tree.unflatten(layout, [flat[str(place)] for place in range(len(flat))]) if flat else initial), losses


# Losses of shared draws, and scores.


def _noise_key(config: MirroredConfig) -> jax.Array:
    return purpose_key(config.loss_seed, "shared draws")


class _DrawProgram(ExampleProgram):
    """The compiled losses (S,) of every example under the shared draws; its weights are `(parameters, noise key)`."""

    def __init__(self, run: Run, config: MirroredConfig):
        schedule = run.pipeline.schedule
        timesteps = noisy_timesteps(config.noisy_share, config.score_draws, schedule.num_train_timesteps)
        static = (predictor(run.pipeline.unet, config.precision),)
        shape = (config.score_draws,)
        super().__init__(_draw_losses, schedule, config, result_shape=shape, timesteps=timesteps, static=static)


def _draw_losses(predict, shared, batch: Batch) -> jax.Array:
    schedule, _, timesteps, (params, key) = shared
    return shared_draw_losses(predict, schedule, params, key, batch, timesteps)


class _SkewProgram(_DrawProgram):
    """As `_DrawProgram`, whose losses become each example's score beside the stored losses before."""

    def __init__(self, run: Run, config: MirroredConfig, shared: Prepared):
        super().__init__(run, config)
        self._before = shared.losses
        self._first = np.searchsorted(shared.captions.image, np.arange(len(run.data)))

    def examples(
        self,
        weights: Any,
        data: EncodedDataset,
        row: np.ndarray,
        flip: np.ndarray,
        caption: np.ndarray,
        advance: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """Scores of n examples (n,) float64; arguments as those of `ExampleProgram.examples`."""
        after = super().examples(weights, data, row, flip, caption, advance)
        return skew_scores(self._before[self._first[row] + caption, flip], after)


def _losses_before(run: Run, path: Path, config: MirroredConfig, captions: CaptionRows) -> Any:
    """L_0 of every caption's image and mirror image -> (M, flips, S) float32, kept in chunks and resumed.

    Raises ValueError where one is not finite.
    """
    program, flips, count = _DrawProgram(run, config), config.num_flips, len(captions.image)
    row_bytes = 4 * flips * config.score_draws
    rows_per_chunk = max(EXAMPLES_PER_TILE, min(_MAX_ROWS_PER_CHUNK, _CHUNK_BYTES // row_bytes))
    fields = {"loss": ((flips, config.score_draws), np.float32)}
    store = host0_first(lambda: ChunkStore(path, fields, count, rows_per_chunk, name="losses"))
    weights = program.place((cast_params(run.pipeline.params["unet"], config.precision), _noise_key(config)))

    def losses(rows: np.ndarray, advance: Callable[[int], Any] | None = None) -> np.ndarray:
        examples, flip = np.repeat(rows, flips), np.tile(np.arange(flips), len(rows))
        image, caption = captions.image[examples], captions.caption[examples]
        values = program.examples(weights, run.data, image, flip, caption, advance)
        broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(broken):
            row_id = int(run.data.row_ids[image[broken[0]]])
            raise ValueError(
                f"the loss of row {row_id} is NaN or infinite: look for a damaged model, or keep precision='float32'"
            )
        return values.reshape(len(rows), flips, -1)

    missing = pending_chunks(store, np.arange(count), losses)
    each = flips * config.score_draws
    left = sum(store.rows(index).stop - store.rows(index).start for index in missing)
    with progress(count * each, "losses before", "forward", initial=(count - left) * each) as bar:
        for index in missing:
            span = store.rows(index)
            values = losses(np.arange(span.start, span.stop), bar.update).astype(np.float32)
            run_on_host0(functools.partial(store.write, index, {"loss": values}))
    return store.array("loss")


def _stage(run: Run, config: MirroredConfig) -> tuple[str, dict[str, Any], Mapping[str, str]]:
    """Name, settings and inputs of the training images' losses before."""
    names = ("loss_seed", "score_draws", "noisy_share", "captions", "num_flips")
    settings = {name: getattr(config, name) for name in names}
    name = (
        f"draw_losses/{config.score_draws}-share{config.noisy_share:g}-{config.captions}-flips{config.num_flips}"
        f"-seed{config.loss_seed}"
    )
    if config.precision != "float32":
        name, settings = f"{name}-{config.precision}", {**settings, "precision": config.precision}
    return name, settings, run.inputs
