"""Stage 4: unlearning one query, kept in its folder and resumed there step by step."""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.attribution.unlearn import Unlearned, unlearn
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.weights import flatten_names, unflatten_names
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.curvature.ekfac import EKFAC
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.jobs.query import PreparedQuery
from attrib_jax.jobs.query_gradient import GradientProgram
from attrib_jax.methods.config import AttributeConfig
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.files import DamagedFileError, read_arrays, write_arrays
from attrib_jax.storage.state import StateStore

_log = logging.getLogger(__name__)

_FILE = "unlearned.safetensors"
_LOSSES = "query_loss"
_STATE = "unlearning"
# A state is stored after a step once this many seconds have passed since the last one, and not so often that storing
# takes more than a twentieth of the time.
_SECONDS_BETWEEN_STATES = 2.0
_STORING_SHARE = 0.05


def unlearn_query(
    path: Path,
    gradient_program: GradientProgram,
    schedule: NoiseSchedule,
    selected: Any,
    rest: Any,
    query: PreparedQuery,
    config: AttributeConfig,
    curvature: Diagonal | EKFAC | None,
    num_examples: int | None,
    mask: np.ndarray | None,
) -> tuple[Any, tuple[float, ...]]:
    """The selected weights after unlearning a query, and the query's loss before each step; stored in `path`.

    A killed run goes on from its last stored step to the same bits. With several hosts, host 0 reads and writes.

    Args:
      path: the query's folder; what it holds is returned.
      gradient_program: of the model.
      schedule: noise levels and prediction type.
      selected, rest: the two halves of the UNet's parameters.
      query: its latents and text states.
      config: step size, steps, draws and rule.
      curvature: F, for Newton steps.
      num_examples: N of the Newton step.
      mask: (h, w) weights of the query's latent pixels; None for all.
    """
    file, states = path / _FILE, _States(path, selected, config.steps)
    stored = run_on_host0(lambda: _read(file))
    if stored is not None:
        # What a run that was killed between writing its result and this left.
        run_on_host0(states.store.remove)
        losses = tuple(stored.pop(_LOSSES).tolist())
        return unflatten_names(stored), losses
    start = states.read()
    done = 0 if start is None else len(start.query_loss)
    total, initial = config.steps * config.query_draws, done * config.query_draws
    with progress(total, "unlearn the query", "draw", initial=initial) as bar:
        try:
            result = unlearn(
                gradient_program.predict,
                schedule,
                selected,
                rest,
                query.latents,
                query.text,
                purpose_key(config.loss_seed, "query"),
                draws=config.query_draws,
                step_size=config.step_size,
                method=config.update,
                curvature=curvature,
                num_examples=num_examples,
                steps=config.steps,
                damping=config.damping,
                keep_ewc_gradient=config.keep_ewc_gradient,
                mask=mask,
                progress=lambda done: bar.update(done - bar.n),
                sum_draws=gradient_program.bind(rest, query.latents, query.text, config.query_draws, mask),
                start=start,
                on_step=states.write,
            )
        except ValueError:
            # These settings lead nowhere, from any step.
            run_on_host0(states.store.remove)
            raise
    arrays = {name: np.asarray(value) for name, value in flatten_names(result.selected).items()}
    losses = tuple(float(loss) for loss in result.query_loss)
    run_on_host0(lambda: write_arrays(file, arrays, list(losses)))
    run_on_host0(states.store.remove)
    return result.selected, losses


class _States:
    """The steps done so far, on disk: written by host 0 every few seconds, read by all hosts."""

    def __init__(self, path: Path, selected: Any, steps: int):
        self.store = StateStore(path, _STATE)
        self._steps = steps
        dtype = np.result_type(np.float32, *(leaf.dtype for leaf in flatten_names(selected).values()))
        self._like = Unlearned(selected, *(np.zeros(steps, dtype) for _ in range(2)))
        self._next_write = time.monotonic() + _SECONDS_BETWEEN_STATES

    def write(self, state: Unlearned) -> None:
        """Stores a state if it is time; the last one is the result, which has a file of its own."""
        if len(state.query_loss) < self._steps:
            run_on_host0(lambda: self._write(state))

    def _write(self, state: Unlearned) -> None:
        began = time.monotonic()
        if began < self._next_write:
            return
        done = len(state.query_loss)
        # Of one length at every step, since the store compares shapes.
        losses, norms = (np.pad(np.asarray(x), (0, self._steps - done)) for x in state[1:])
        self.store.write(Unlearned(state.selected, losses, norms), done)
        now = time.monotonic()
        self._next_write = now + max(_SECONDS_BETWEEN_STATES, (now - began) / _STORING_SHARE)

    def read(self) -> Unlearned | None:
        """The newest stored state; None to begin with the first step."""
        flat = run_on_host0(self._read)
        if flat is None:
            return None
        done = int(flat.pop("done"))
        losses, norms = (flat.pop(name)[:done] for name in ("losses", "norms"))
        return Unlearned(unflatten_names(flat), losses, norms)

    def _read(self) -> dict[str, np.ndarray] | None:
        stored = self.store.read(self._like)
        if stored is None:
            return None
        (selected, losses, norms), done = stored
        return {**flatten_names(selected), "losses": losses, "norms": norms, "done": np.asarray(done)}


def _read(file: Path) -> dict[str, np.ndarray] | None:
    """The stored result, its losses among the weights; None where it has to be computed."""
    try:
        arrays, losses = read_arrays(file)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        _log.warning("%s: it will be computed again", error)
        return None
    return {**arrays, _LOSSES: np.asarray(losses, np.float64)}
