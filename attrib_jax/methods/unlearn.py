"""Method `unlearn`: unlearn each query, then see which training images the model represents worse.

Wang et al., "Data Attribution for Text-to-Image Models by Unlearning Synthesized Images", NeurIPS 2024; docs/METHOD.md
sections 3 to 5.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from attrib_jax.attribution.scores import make_scores
from attrib_jax.attribution.unlearn import METHODS as UPDATES
from attrib_jax.attribution.unlearn import ascend, check_step
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import setting
from attrib_jax.core.weights import Params, flatten_names, unflatten_names
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.curvature.ekfac import EKFAC
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.curvature import fit_curvature
from attrib_jax.jobs.linear import linear_pass, weight_change
from attrib_jax.jobs.losses import base_losses, dataset_pass, loss_program, loss_weights
from attrib_jax.jobs.query import query_mask
from attrib_jax.jobs.query_gradient import GradientProgram
from attrib_jax.jobs.settings import SCORES, CurvatureSettings, PassSettings, QueryDrawSettings, RegionSettings
from attrib_jax.jobs.step_size import FIRST_STEP, LossProbe, MeanLosses
from attrib_jax.methods.base import MethodConfig, QueryJob, Scored
from attrib_jax.parallel.hosts import fetch, run_on_host0
from attrib_jax.parallel.mesh import num_parts, place_parameters
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.files import write_arrays, write_json
from attrib_jax.storage.score_files import read_unlearned
from attrib_jax.storage.state import StateStore

_FILE = "unlearned.safetensors"
_RECORD = "unlearning.json"
_STATE = "unlearning"
# A state is stored after a step once this many seconds have passed since the last one, and not so often that storing
# takes more than a twentieth of the time.
_SECONDS_BETWEEN_STATES = 2.0
_STORING_SHARE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearnConfig(MethodConfig, CurvatureSettings, QueryDrawSettings, RegionSettings, PassSettings):
    """Settings of attribution by unlearning."""

    update: str = setting(
        "newton", "Unlearning rule: Newton steps (eq. 5), or plain gradient ascent without F.", choices=UPDATES
    )
    step_size: float = setting(
        0.0,
        "Size of an unlearning step; 0 takes the one at which random training images suffer as --loss_rise says.",
        low=0,
        symbol="alpha",
    )
    loss_rise: float = setting(
        0.005,
        "Rise of the mean loss of random training images, relative to it, that all unlearning steps make together.",
        above=0,
        only_if=("step_size", 0.0),
    )
    rise_images: int = setting(
        64, "Number of random training images whose loss tells how far unlearning went.", low=1, omit_default=True
    )
    steps: int = setting(1, "Number of unlearning steps.", low=1)
    keep_ewc_gradient: bool = setting(
        False,
        "Whether later steps keep the pull towards the first weights (appendix A.2).",
        only_if=("update", "newton"),
    )
    num_examples: int | None = setting(
        None, "Number of training images in a Newton step; the data set's size if not given.", low=1, symbol="N"
    )
    score: str = setting(
        "exact",
        "Score: the difference of an image's losses after and before unlearning, or the derivative of its loss along "
        "the weight change, which is cheap for many queries.",
        choices=SCORES,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.update == "sgd":
            for name in ("damping", "curvature", "fisher"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but update is 'sgd', which has no F: {name} belongs to "
                        f"update='newton'. Leave out {name}, or change update."
                    )


def prepare(run: Run, config: UnlearnConfig) -> Diagonal | EKFAC | None:
    """F of the Newton step, fitted, reused or from elsewhere; None for plain ascent."""
    _ = run.data  # encoded before F is fitted, so that each is timed by itself
    return fit_curvature(run, config) if config.update == "newton" else None


def score(run: Run, queries: Sequence[QueryJob], config: UnlearnConfig) -> list[Scored]:
    """Each query is unlearned, then one pass over the data set gives the scores of all."""
    moved, query_losses = _unlearned(run, queries, config)

    # The scores, from losses under both weights and the same noise, or along the weight change.
    folders = [query.folder for query in queries]
    if config.cascade:
        scores = _cascade(run, folders, moved, config)
    elif config.score == "linear":
        selected, _ = run.select(config.weights)
        changes = [weight_change(tree, selected) for tree in moved]
        with run.timed("linearised scores"):
            values = linear_pass(run, folders, changes, config.weights, config, "linearised scores")
        scores = [make_scores(run.data.row_ids, each, None, config.flips) for each in values]
    else:
        before = base_losses(run, config)
        with run.timed("losses after"):
            program = loss_program(run, config)
            after = dataset_pass(
                run, folders, program, loss_weights(run, program, moved, config.weights), "losses after"
            )
        scores = [make_scores(run.data.row_ids, each, before, config.flips) for each in after]
    return [Scored(*result) for result in zip(scores, query_losses)]


def score_rows(
    run: Run, queries: Sequence[QueryJob], config: UnlearnConfig, rows: Sequence[np.ndarray]
) -> list[Scored]:
    """As `score`, of the images at the rising positions `rows` of the encoded data set alone, each query its own."""
    from attrib_jax.jobs.cascade import finalist_scores

    moved, query_losses = _unlearned(run, queries, config)
    scores = finalist_scores(run, [query.folder for query in queries], config, rows, *_passes(run, moved, config))
    return [Scored(*result) for result in zip(scores, query_losses)]


def _unlearned(
    run: Run, queries: Sequence[QueryJob], config: UnlearnConfig
) -> tuple[list[Params], list[tuple[float, ...]]]:
    """The weights after unlearning each query, and its losses before each step."""
    # F of the weights that move, over the training set.
    curvature = prepare(run, config)

    # Gradient ascent on each query's loss, held near the old weights by F.
    moved, query_losses = [], []
    probe = _Probe(run, config)
    for query in queries:
        with run.timed("unlearn"):
            weights, losses = unlearn_query(run, query, config, curvature, probe)
        moved.append(weights)
        query_losses.append(losses)
    return moved, query_losses


def _cascade(run: Run, folders: Sequence[Path], moved: Sequence[Params], config: UnlearnConfig) -> list:
    """All images by coarse scores, then the best at the full setting."""
    from attrib_jax.jobs.cascade import cascade_scores

    return cascade_scores(run, folders, config, *_passes(run, moved, config))


def _passes(run: Run, moved: Sequence[Params], config: UnlearnConfig) -> tuple[Any, Any]:
    """What `cascade_scores` calls: losses after unlearning and before, or linearised scores and None."""
    selected, _ = run.select(config.weights)
    linear = config.score == "linear"

    def values(paths, config, rows, members, label):
        label += "linearised scores" if linear else "losses after"
        trees = [moved[query] for query in members]
        with run.timed(label):
            if linear:
                changes = [weight_change(tree, selected) for tree in trees]
                return linear_pass(run, paths, changes, config.weights, config, label, rows)
            program = loss_program(run, config)
            return dataset_pass(run, paths, program, loss_weights(run, program, trees, config.weights), label, rows)

    def base(config, rows=None, path=None, passes=1):
        return base_losses(run, config, rows, path, passes)

    return values, None if linear else base


class _Probe:
    """The `LossProbe` of a run, made when it is first asked for; None where the scores do not depend on the step."""

    def __init__(self, run: Run, config: UnlearnConfig):
        self._run, self._config = run, config

    @functools.cached_property
    def value(self) -> LossProbe | None:
        config = self._config
        # Linearised scores of one step are proportional to it.
        if config.score == "linear" and config.steps == 1:
            return None
        return LossProbe(self._run, config, config.weights, config.rise_images)


def unlearn_query(
    run: Run, query: QueryJob, config: UnlearnConfig, curvature: Diagonal | EKFAC | None, probe: "_Probe | None" = None
) -> tuple[Params, tuple[float, ...]]:
    """The selected weights after unlearning a query, and its loss before each step; stored in the query's folder.

    Beside them lies `unlearning.json`, which says how far the steps went. `probe` is what several queries share.

    `attrib_jax.attribution.unlearn.unlearn` on all devices: a killed run goes on from its last stored step to the same
    bits. With several hosts, host 0 reads and writes.

    Raises ValueError, naming the query, where F is 0 and the gradient is not, or a step is not finite.
    """
    file, store = query.folder / _FILE, StateStore(query.folder, _STATE)
    stored = run_on_host0(lambda: read_unlearned(file))
    if stored is not None:
        # What a run that was killed between writing its result and this left.
        run_on_host0(store.remove)
        stored_losses = stored.pop("query_loss").tolist()
        return unflatten_names(stored), tuple(stored_losses)

    mesh = run.mesh(config)
    divided = num_parts(mesh) > 1
    selected, rest = run.select(config.weights)
    origin = None
    if config.keep_ewc_gradient:
        origin = place_parameters(mesh, selected) if divided else selected
    mask = query_mask(query.prepared, config)
    num_examples = config.num_examples or len(run.data)
    key = purpose_key(config.loss_seed, "query")
    gradients = GradientProgram(run.predict, run.pipeline.schedule, mesh)
    sum_draws = gradients.bind(rest, query.prepared.latents, query.prepared.text, config.query_draws, mask)

    meter = (probe or _Probe(run, config)).value
    state = _read_state(store, selected, config.steps)
    selected, losses, norms, sizes = state.selected, *map(list, state[1:])
    if divided:
        selected = place_parameters(mesh, selected)
    draws = config.query_draws

    def shown(step: int, done: int) -> None:
        bar.update(step * draws + done - bar.n)

    next_write = time.monotonic() + _SECONDS_BETWEEN_STATES
    with progress(config.steps * draws, "unlearn the query", "draw", initial=len(losses) * draws) as bar:
        for step in range(len(losses), config.steps):
            # The gradient of the query's loss at the current weights, from fresh draws.
            step_key = jax.random.fold_in(key, step)
            total = sum_draws(selected, step_key, functools.partial(shown, step))
            # The step: checked on the host, where values can be seen.
            try:
                if curvature is not None:
                    curvature.check_solvable(total.gradient, config.damping)
                take = functools.partial(
                    ascend, selected, total, curvature, origin, draws, num_examples=num_examples, damping=config.damping
                )
                size = config.step_size or _automatic_step(take, config, step, meter)
                selected, loss, norm = take(size)
                check_step(step, config.steps, loss, norm, size)
            except ValueError as error:
                # These settings lead nowhere, from any step.
                run_on_host0(store.remove)
                raise ValueError(f"query {query.name!r}: {error}") from error
            losses.append(loss)
            norms.append(norm)
            sizes.append(size)
            # The state, now and then, as host 0's clock says; the last one is the result, which has its own file.
            if step + 1 < config.steps and run_on_host0(functools.partial(_is_past, next_write)):
                state = _State(jax.tree.map(fetch, selected), losses, norms, sizes)
                next_write = run_on_host0(functools.partial(_write_state, store, state, config.steps))
    arrays = {name: fetch(value) for name, value in flatten_names(selected).items()}
    query_loss = tuple(float(loss) for loss in losses)
    record = UnlearningRecord(tuple(map(float, sizes)))
    if meter is not None:
        means = meter.before(query.prepared), meter.losses(selected, query.prepared)
        record = UnlearningRecord(record.step_size, len(meter.rows), *means)
    run_on_host0(lambda: write_json(query.folder / _RECORD, record.as_json()))
    run_on_host0(lambda: write_arrays(file, arrays, list(query_loss)))
    run_on_host0(store.remove)
    # Those that were divided wait in the host's memory for the pass over the data set.
    return unflatten_names(arrays) if divided else selected, query_loss


class UnlearningRecord(NamedTuple):
    """How far unlearning went, `unlearning.json` in a query's folder.

    Attributes:
      step_size: alpha of each step.
      num_images: random training images whose mean loss was taken; 0 where no losses were.
      before, after: mean losses of these images and of the query under the model's weights and the unlearned ones.
    """

    step_size: tuple[float, ...]
    num_images: int = 0
    before: MeanLosses | None = None
    after: MeanLosses | None = None

    @property
    def went_too_far(self) -> bool:
        """Whether the query's loss did not rise, or that of random images by more than half as much."""
        if self.before is None or self.after is None:
            return False
        images, query = (new - old for old, new in zip(self.before, self.after))
        return not (query > 0 and images <= query / 2)

    def as_json(self) -> dict[str, Any]:
        """The record as JSON values, losses that are not finite as text."""
        values: dict[str, Any] = {"step_size": list(self.step_size)}
        if self.before is not None and self.after is not None:
            values["num_images"] = self.num_images
            values |= {name: _finite(getattr(self, name)._asdict()) for name in ("before", "after")}
        return values


def _finite(values: Mapping[str, float]) -> dict[str, float | str]:
    return {name: value if np.isfinite(value) else str(value) for name, value in values.items()}


def read_unlearning(folder: Path) -> UnlearningRecord | None:
    """The record of a query that was unlearned; None where there is none, or an unreadable one."""
    try:
        values = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        losses = [
            MeanLosses(**{key: float(each) for key, each in values[name].items()}) for name in ("before", "after")
        ]
        return UnlearningRecord(tuple(values["step_size"]), values["num_images"], *losses)
    except KeyError:
        return UnlearningRecord(tuple(values["step_size"]))
    except (OSError, ValueError, TypeError):
        return None


class _State(NamedTuple):
    """What a killed run goes on from: `Unlearned`, and the size of each step."""

    selected: Any
    query_loss: Any
    update_norm: Any
    step_size: Any


def _automatic_step(take: Callable[..., Any], config: UnlearnConfig, step: int, probe: LossProbe | None) -> float:
    """The size of step number `step`; the steps share the rise out evenly."""
    if probe is None:
        return FIRST_STEP
    share = config.loss_rise * (step + 1) / config.steps
    return probe.step_size(lambda size: take(size)[0], share)


def _state_like(selected: Params, steps: int) -> _State:
    # Of one length at every step, since the store compares shapes.
    dtype = np.result_type(np.float32, *(leaf.dtype for leaf in flatten_names(selected).values()))
    return _State(selected, np.zeros(steps, dtype), np.zeros(steps, dtype), np.zeros(steps))


def _is_past(moment: float) -> bool:
    return time.monotonic() >= moment


def _write_state(store: StateStore, state: _State, steps: int) -> float:
    """Stores a state, and returns when it is time again."""
    began = time.monotonic()
    done = len(state.query_loss)
    histories = (np.pad(np.asarray(values), (0, steps - done)) for values in state[1:])
    store.write(_State(state.selected, *histories), done)
    now = time.monotonic()
    return now + max(_SECONDS_BETWEEN_STATES, (now - began) / _STORING_SHARE)


def _read_state(store: StateStore, selected: Params, steps: int) -> _State:
    """The newest stored state; that before the first step if there is none."""

    def read() -> dict[str, Any] | None:
        stored = store.read(_state_like(selected, steps))
        if stored is None:
            return None
        (weights, *histories), done = stored
        return {**flatten_names(weights), **dict(zip(_State._fields[1:], histories)), "done": np.asarray(done)}

    flat = run_on_host0(read)
    if flat is None:
        return _State(selected, np.zeros(0), np.zeros(0), np.zeros(0))
    done = int(flat.pop("done"))
    histories = [flat.pop(name)[:done] for name in _State._fields[1:]]
    return _State(unflatten_names(flat), *histories)
