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
from attrib_jax.jobs.draws import FisherDraws, Sample, fisher_draws, sum_over_draws
from attrib_jax.jobs.encoded_dataset import CaptionRows, EncodedDataset, caption_rows
from attrib_jax.jobs.losses import ExampleProgram, dataset_pass, loss_weights, num_captions, pending_chunks
from attrib_jax.jobs.query import PreparedQuery
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

_STATE = "unlearning"
_NULL_FILE = "null_loss.safetensors"
# A state is stored this often, so that a killed run loses little.
_SECONDS_BETWEEN_STATES = 10.0
_MAX_ROWS_PER_CHUNK = 512
_CHUNK_BYTES = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True)
class AscentSettings(WeightSettings):
    """Unlearning by ascent, while training images are retained."""

    weights: str = setting(
        "mlp",
        "Weights that move: the key and value projections of cross-attention, all weights of cross-attention, those of "
        "all attention layers, those of the feed-forward layers (mlp), or all weights.",
        choices=tuple(WEIGHT_SUBSETS),
    )
    query_strength: float = setting(
        0.2,
        "Weight of the loss of the query, or of the group, which rises, beside the retained images' loss of weight 1.",
        above=0,
        symbol="lambda",
    )
    unlearning_rate: float = setting(
        3e-4, "Learning rate of Adam in mirrored unlearning; about a tenth of the training's.", above=0
    )
    max_steps: int = setting(150, "Most steps of mirrored unlearning.", low=1)
    stop_share: float = setting(
        0.95,
        "Share of an untrained model's loss at which the loss of the query, or of the group, stops mirrored "
        "unlearning.",
        above=0,
        high=1,
    )
    retain_batch: int = setting(64, "Training images a step whose loss is kept low.", low=1)
    query_batch: int = setting(64, "Draws of (timestep, noise) of the query, or of the group's images, a step.", low=1)
    null_draws: int = setting(12800, "Draws of training images that an untrained model's loss is averaged over.", low=1)
    queries_per_device: int = setting(
        1, "Queries, or groups, that each device unlearns at a time.", low=1,
        performance=True,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirroredConfig(MethodConfig, AscentSettings, ExampleSettings, QueriesSettings):
    """Settings of mirrored unlearning."""

    method: str = setting("mirrored", "Attribution method.", choices=("mirrored",))
    score_draws: int = setting(100, "Draws of (timestep, noise) of a score, the same for all training images.", low=1)
    noisy_share: float = setting(
        0.7, "Share of the timesteps, the noisiest ones, that the draws of a score are spread over.", above=0, high=1
    )


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
    null = null_loss(run, config)
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


def null_loss(run: Run, config: Any) -> float:
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


def _mean_null_loss(run: Run, path: Path, config: Any) -> tuple[np.ndarray, StateStore]:
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


class Target(NamedTuple):
    """A query, or a group of training images, that is unlearned while other images are retained.

    Attributes:
      name: what messages call it, such as "query 'hat'".
      folder: where its weights and its state are kept.
      stem: what their names begin with.
      query: the query, while all images are retained; None for a group.
      group: positions of the group's images in the encoded data set, while the others are retained; None for a query.
    """

    name: str
    folder: Path
    stem: str = "unlearned"
    query: PreparedQuery | None = None
    group: np.ndarray | None = None

    @property
    def file(self) -> Path:
        """File of the weights after unlearning, see `read_unlearned`."""
        return self.folder / f"{self.stem}.safetensors"

    @property
    def store(self) -> StateStore:
        """The state that a killed run goes on from."""
        return StateStore(self.folder, _STATE if self.query is not None else f"{self.stem}-{_STATE}")


def unlearn_queries(
    run: Run, queries: Sequence[QueryJob], config: MirroredConfig, null: float
) -> list[tuple[Params, tuple[float, ...]]]:
    """The selected weights after unlearning each query, and its losses before each step; kept in the queries' folders.

    As `unlearn_targets`. Raises ValueError, naming the query, where a loss is not finite.
    """
    targets = [Target(f"query {query.name!r}", query.folder, query=query.prepared) for query in queries]
    unlearn_targets(run, targets, config, null)
    unlearned = []
    for target in targets:
        stored: Any = run_on_host0(functools.partial(read_unlearned, target.file))
        losses = stored.pop("query_loss").tolist()
        unlearned.append((unflatten_names(stored), tuple(losses)))
    return unlearned


def unlearn_targets(run: Run, targets: Sequence[Target], config: Any, null: float) -> None:
    """Unlearns queries or groups, each from the model's own weights, and stores each one's selected weights.

    Targets are spread over the devices; a killed run goes on from the last stored step. A target's result does not
    depend on the others: bitwise with one a device, and up to rounding on another number of devices. Where its loss
    is at the stop before any step, one step is taken without the clamp, and a warning says so.

    Args:
      run: model and data set.
      targets: what is stored already is kept.
      config: `AscentSettings`, with a seed, flips and captions.
      null: L_null, see `null_loss`.

    Raises ValueError, naming the target, where a loss is not finite.
    """
    mesh = data_mesh()
    slots = mesh.size * config.queries_per_device

    def tokens(target: Target) -> int:
        return run.data.text_shape[0] if target.query is None else len(text_rows(target.query.text))

    stored = run_on_host0(lambda: [read_unlearned(target.file) is not None for target in targets])
    # What a run that was killed between writing a result and this left.
    for target, done in zip(targets, stored):
        if done:
            run_on_host0(target.store.remove)
    # Targets of one program have text states of one length.
    pending = sorted((target for target, done in zip(targets, stored) if not done), key=tokens)
    program, total = _StepProgram(run, config, mesh, run.data), len(pending)
    while pending:
        together = [target for target in pending[:slots] if tokens(target) == tokens(pending[0])]
        if together[0].query is None:
            done = total - len(pending)
            label = f"unlearn groups {done + 1} to {done + len(together)} of {total}"
        else:
            label = "unlearn the query" if len(together) == 1 else f"unlearn {len(together)} queries"
        pending = pending[len(together) :]
        _unlearn_together(program, together, config, null, label)


def step_seconds(run: Run, config: Any, example: tuple[np.ndarray, Any]) -> float:
    """Seconds of a step of `unlearn_targets`, measured once it is compiled; without reading the data set.

    `example` is the latents (h, w, c) and the conditioning of an image.
    """
    mesh = data_mesh()
    slots = mesh.size * config.queries_per_device
    program = _StepProgram(run, config, mesh, data=None)

    def part(count: int) -> tuple[Any, ...]:
        repeated = jax.tree.map(lambda array: np.repeat(array[None], count, axis=0), example)
        return (*repeated, np.zeros(count, np.int32))

    keys = np.stack([np.asarray(jax.random.key_data(purpose_key(0, "time")))] * 2)
    inputs = [(part(config.retain_batch), part(config.query_batch), keys)] * slots
    state = jax.tree.map(lambda leaf: np.stack([leaf] * slots)[host_share(mesh, slots)], program.initial())
    state, limits = shard_batch(mesh, state), Limits(np.full(slots, np.inf), np.full(slots, np.inf))
    seconds = 0.0
    for _ in range(2):
        began = time.monotonic()
        jax.block_until_ready(program(state, limits, inputs))
        seconds = time.monotonic() - began
    return seconds


class _Source(NamedTuple):
    """Where the batches of a target come from.

    Attributes:
      retain: which image, flip and caption stands in each place of all steps' batches of retained images.
      forget: the same of the images of a group; None for a query.
      query: the query; None for a group.
    """

    retain: FisherDraws
    forget: FisherDraws | None
    query: PreparedQuery | None


class _StepProgram:
    """The compiled step of several targets, one slot each; and what it reads from the data set."""

    def __init__(self, run: Run, config: Any, mesh: Mesh, data: EncodedDataset | None):
        self.mesh, self.config, self.data = mesh, config, data
        self.selected, rest = run.select(config.weights)
        self._num_timesteps = run.pipeline.schedule.num_train_timesteps
        rate, strength = np.float32(config.unlearning_rate), np.float32(config.query_strength)
        self._shared = replicate(mesh, (run.pipeline.schedule, rest, rate, strength))
        self._run = _compiled_step(run.predict, mesh)
        self._everyone: FisherDraws | None = None

    def initial(self) -> MirroredState:
        """The state before the first step; leaves in host memory."""
        optimizer = mirrored_optimizer(self.config.unlearning_rate)
        return jax.tree.map(np.asarray, MirroredState(self.selected, optimizer.init(self.selected)))

    def source(self, target: Target) -> _Source:
        """Where the batches of a target come from."""
        config, everyone = self.config, np.arange(len(self.data))
        if target.group is not None:
            others = np.setdiff1d(everyone, target.group)
            return _Source(
                self._draws(others, config.retain_batch), self._draws(target.group, config.query_batch), None
            )
        if self._everyone is None:
            self._everyone = self._draws(everyone, config.retain_batch)
        return _Source(self._everyone, None, target.query)

    def _draws(self, rows: np.ndarray, size: int) -> FisherDraws:
        counts = num_captions(self.data, rows, self.config)
        draws = fisher_draws(self.config.loss_seed, self.config.max_steps * size, counts, self._num_timesteps)
        return draws._replace(row=rows[draws.row])

    def inputs(self, source: _Source, step: int) -> tuple[Any, ...]:
        """What step number `step` of a target takes: both batches without noise, and the noise's keys."""
        size, count = self.config.retain_batch, self.config.query_batch
        retain = self._examples(source.retain, step, size)
        if source.forget is not None:
            forget = self._examples(source.forget, step, count)
        else:
            assert source.query is not None
            prepared = source.query.latents, source.query.text
            forget = jax.tree.map(lambda array: np.repeat(array[None], count, axis=0), prepared)
        keys, parts = [], []
        for name, number, batch in (("retain", size, retain), ("forget", count, forget)):
            key = jax.random.fold_in(purpose_key(self.config.loss_seed, f"mirrored {name}"), step)
            keys.append(np.asarray(jax.random.key_data(key)))
            timestep = stratified_timesteps(self.config.loss_seed, name, step, number, self._num_timesteps)
            parts.append((*jax.tree.map(lambda array: np.asarray(array, np.float32), batch), timestep))
        return (*parts, np.stack(keys))

    def _examples(self, draws: FisherDraws, step: int, size: int) -> tuple[np.ndarray, Any]:
        places = slice(step * size, (step + 1) * size)
        flip = draws.flip[places] * (self.config.num_flips - 1)
        return self.data.inputs(draws.row[places], flip, draws.caption[places])

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


def _unlearn_together(program: _StepProgram, targets: Sequence[Target], config: Any, null: float, label: str) -> None:
    """Unlearns at most as many targets as there are slots, resuming from their states, and stores the results."""
    mesh, slots = program.mesh, program.mesh.size * config.queries_per_device
    stores, sources = [target.store for target in targets], [program.source(target) for target in targets]
    initial = program.initial()
    states, losses = zip(*(_read_state(store, initial, config.max_steps) for store in stores))
    # Slots without a target repeat the last one's first step and take none.
    padded = [*states, *[states[-1]] * (slots - len(states))]
    state = jax.tree.map(lambda *leaves: np.stack(leaves), *padded[host_share(mesh, slots)])
    state = shard_batch(mesh, state)
    losses = [list(each) for each in losses]
    clamp = np.full(slots, null)
    stop = np.where(np.arange(slots) < len(targets), config.stop_share * null, -np.inf)
    active = list(range(len(targets)))
    written = time.monotonic()
    with progress(config.max_steps, label, "step", initial=min(map(len, losses))) as bar:
        while active:
            steps = [min(len(each), config.max_steps - 1) for each in losses]
            inputs = [program.inputs(source, step) for source, step in zip(sources, steps)]
            inputs += [inputs[-1]] * (slots - len(inputs))
            state, taken, (_, forget) = program(state, Limits(clamp, stop), inputs)
            taken, forget = fetch(taken), fetch(forget)
            bar.update(1)
            finished = []
            for place in active:
                name, loss = targets[place].name, float(forget[place])
                if not np.isfinite(loss):
                    run_on_host0(stores[place].remove)
                    raise ValueError(
                        f"{name}: its loss is {loss} at step {steps[place] + 1} of mirrored unlearning. Check "
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
                        "%s: the model's loss of it, %.4g, is at the stop, stop_share=%g times the %.4g of an "
                        "untrained model, before any step; one step is taken without the clamp",
                        name, loss, config.stop_share, null,
                    )  # fmt: skip
                    clamp[place] = stop[place] = np.inf
            for place in finished:
                active.remove(place)
                stop[place] = -np.inf
                weights = flatten_names(_slot(jax.tree.map(fetch, state.selected), place))
                run_on_host0(functools.partial(write_arrays, targets[place].file, weights, losses[place]))
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
