"""Method `unlearn`: unlearn each query, then see which training images the model represents worse.

Wang et al., "Data Attribution for Text-to-Image Models by Unlearning Synthesized Images", NeurIPS 2024; docs/METHOD.md
sections 3 to 5.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attrib_jax.attribution.scores import make_scores
from attrib_jax.attribution.unlearn import METHODS as UPDATES
from attrib_jax.attribution.unlearn import Unlearned, ascend, check_step
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
from attrib_jax.methods.base import MethodConfig, QueryJob, Scored
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.files import write_arrays
from attrib_jax.storage.score_files import read_unlearned
from attrib_jax.storage.state import StateStore

_FILE = "unlearned.safetensors"
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
    step_size: float = setting(0.01, "Size of an unlearning step.", above=0, symbol="alpha")
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
    for query in queries:
        with run.timed("unlearn"):
            weights, losses = unlearn_query(run, query, config, curvature)
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


def unlearn_query(
    run: Run, query: QueryJob, config: UnlearnConfig, curvature: Diagonal | EKFAC | None
) -> tuple[Params, tuple[float, ...]]:
    """The selected weights after unlearning a query, and its loss before each step; stored in the query's folder.

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

    selected, rest = run.select(config.weights)
    origin = selected if config.keep_ewc_gradient else None
    mask = query_mask(query.prepared, config)
    num_examples = config.num_examples or len(run.data)
    key = purpose_key(config.loss_seed, "query")
    gradients = GradientProgram(run.predict, run.pipeline.schedule)
    sum_draws = gradients.bind(rest, query.prepared.latents, query.prepared.text, config.query_draws, mask)

    state = _read_state(store, selected, config.steps)
    selected, losses, norms = state.selected, list(state.query_loss), list(state.update_norm)
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
                selected, loss, norm = ascend(
                    selected, total, curvature, origin, draws, config.step_size,
                    num_examples=num_examples, damping=config.damping,
                )  # fmt: skip
                check_step(step, config.steps, loss, norm, config.step_size)
            except ValueError as error:
                # These settings lead nowhere, from any step.
                run_on_host0(store.remove)
                raise ValueError(f"query {query.name!r}: {error}") from error
            losses.append(loss)
            norms.append(norm)
            # The state, now and then, as host 0's clock says; the last one is the result, which has its own file.
            if step + 1 < config.steps:
                state = Unlearned(selected, losses, norms)
                next_write = run_on_host0(functools.partial(_write_state, store, state, config.steps, next_write))
    arrays = {name: np.asarray(value) for name, value in flatten_names(selected).items()}
    query_loss = tuple(float(loss) for loss in losses)
    run_on_host0(lambda: write_arrays(file, arrays, list(query_loss)))
    run_on_host0(store.remove)
    return selected, query_loss


def _state_like(selected: Params, steps: int) -> Unlearned:
    # Of one length at every step, since the store compares shapes.
    dtype = np.result_type(np.float32, *(leaf.dtype for leaf in flatten_names(selected).values()))
    return Unlearned(selected, *(np.zeros(steps, dtype) for _ in range(2)))


def _write_state(store: StateStore, state: Unlearned, steps: int, next_write: float) -> float:
    """Stores a state if it is time, and returns when it is time again."""
    began = time.monotonic()
    if began < next_write:
        return next_write
    done = len(state.query_loss)
    histories = (np.pad(np.asarray(values), (0, steps - done)) for values in state[1:])
    store.write(Unlearned(state.selected, *histories), done)
    now = time.monotonic()
    return now + max(_SECONDS_BETWEEN_STATES, (now - began) / _STORING_SHARE)


def _read_state(store: StateStore, selected: Params, steps: int) -> Unlearned:
    """The newest stored state; that before the first step if there is none."""

    def read() -> dict[str, Any] | None:
        stored = store.read(_state_like(selected, steps))
        if stored is None:
            return None
        (weights, losses, norms), done = stored
        return {**flatten_names(weights), "losses": losses, "norms": norms, "done": np.asarray(done)}

    flat = run_on_host0(read)
    if flat is None:
        return Unlearned(selected, np.zeros(0), np.zeros(0))
    done = int(flat.pop("done"))
    losses, norms = (flat.pop(name)[:done] for name in ("losses", "norms"))
    return Unlearned(unflatten_names(flat), losses, norms)
