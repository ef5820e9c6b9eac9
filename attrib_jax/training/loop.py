"""The resumable training loop: batches in, orbax checkpoints and a metrics log out, the same bits if it is resumed.

Studies that retrain many small models have a loop of their own (evaluation/retrain.py): hundreds of trainings of a
minute each, several in one program, for which a folder of orbax checkpoints each would cost more than it saves.
"""

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import Settings, setting
from attrib_jax.diffusion.training import LossFn, TrainState, init_state, make_optimizer, train_step
from attrib_jax.parallel.mesh import data_mesh, replicate, shard_batch
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.checkpoints import TrainingCheckpoints, preemption_requested, stopped_by_sigterm
from attrib_jax.storage.files import storage_errors, write_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig(Settings):
    """Length and speed of a training run."""

    steps: int = setting(1000, "Optimiser steps.", low=1)
    batch_size: int = setting(64, "Examples a step, over all devices.", low=1)
    learning_rate: float = setting(1e-3, "Peak learning rate, followed by a cosine decay to zero at `steps`.", above=0)
    warmup_steps: int = setting(0, "Steps of the linear rise to the peak learning rate, below `steps`.", low=0)
    ema_decay: float = setting(0.999, "Decay of the averaged weights, which are the result.", low=0, high=1)
    weight_decay: float = setting(0.0, "Decoupled weight decay of AdamW.", low=0)
    seed: int = setting(
        0, "Seed of the initial weights, the batch order and every draw of the loss.", low=0, high=2**32 - 1
    )
    checkpoint_every: int = setting(500, "Steps between checkpoints.", low=1, performance=True)
    log_every: int = setting(50, "Steps between lines of metrics.jsonl.", low=1, performance=True)

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}: expected fewer than the {self.steps} steps. Change warmup_steps."
            )


def fit(path: str | os.PathLike, loss_fn: LossFn, params: Any, source: Any, config: FitConfig, description: str) -> Any:
    """Trains `params`, resuming from the newest checkpoint in `path` -> the averaged parameters.

    Args:
      path: folder of checkpoints and `metrics.jsonl`.
      loss_fn: `loss(params, batch, key) -> (loss, metrics)`.
      params: initial values; a run that resumes takes only their shapes.
      source: random access to examples, `source[i]` -> a pytree of numpy arrays.
      config: length and speed of the run.
      description: name of the random stream ("train autoencoder"), shown by the progress bar.

    Raises:
      InterruptedError: SIGTERM came; the step that was under way is stored.
      StorageError: a checkpoint or the log cannot be written.
      ValueError: the loss is not finite.
    """
    mesh = data_mesh(jax.local_devices()[: usable_devices(config.batch_size, jax.local_device_count())])
    optimizer = make_optimizer(config.learning_rate, config.warmup_steps, config.steps, config.weight_decay)
    state = replicate(mesh, init_state(params, optimizer))
    key = purpose_key(config.seed, description)
    step_fn = jax.jit(functools.partial(train_step, loss_fn, optimizer, config.ema_decay), donate_argnums=0)
    # Batch s is a function of s alone: a resumed run continues with the batches that it would have seen.
    batches = grain.MapDataset.source(source).seed(config.seed).shuffle().repeat().batch(config.batch_size)

    def placed(start: int) -> Iterator[Any]:
        reader = batches[start : config.steps].to_iter_dataset(grain.ReadOptions(num_threads=2))
        return (shard_batch(mesh, batch) for batch in reader)

    state = run_steps(path, lambda state, batch: step_fn(state, batch, key), state, placed, config, description)
    return jax.tree.map(np.asarray, state.ema)


def run_steps(
    path: str | os.PathLike,
    step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    batches: Callable[[int], Iterator[Any]],
    config: FitConfig,
    description: str,
) -> TrainState:
    """Runs the steps that are left, from the newest checkpoint in `path` -> the state after the last one.

    Args:
      path: folder of checkpoints and `metrics.jsonl`.
      step_fn: `(state, batch) -> (state, metrics)`; it may donate the state. The metrics hold `loss`.
      state: initial state, placed on the devices; a run that resumes takes its shapes and placement.
      batches: `batches(start)` yields the batches of steps `start + 1`, `start + 2`, ...
      config: steps, how often to log and to store, and what to name in messages.
      description: text of the progress bar.

    Raises as `fit`.
    """
    metrics_file = Path(path) / "metrics.jsonl"
    with TrainingCheckpoints(path) as checkpoints, contextlib.ExitStack() as stack:
        start, stored = 0, checkpoints.restore_latest(state)
        if stored is not None:
            start, state = stored
        with storage_errors(metrics_file):
            _drop_lines_after(metrics_file, start)
            log = stack.enter_context(open(metrics_file, "a", encoding="utf-8"))
        stopping = stack.enter_context(preemption_requested())
        bar = stack.enter_context(progress(config.steps, description, "step", initial=start))
        reader, began, logged = batches(start), time.monotonic(), start
        for step in range(start + 1, config.steps + 1):
            state, metrics = step_fn(state, next(reader))

            # Metrics are fetched here alone, so that steps queue up on the devices in between.
            if step % config.log_every == 0 or step == config.steps:
                values = {name: float(value) for name, value in metrics.items()}
                rate = (step - logged) * config.batch_size / (time.monotonic() - began)
                began, logged = time.monotonic(), step
                with storage_errors(metrics_file):
                    log.write(json.dumps({"step": step, "examples_per_second": round(rate, 1), **values}) + "\n")
                    log.flush()
                bar.set_postfix_str(f"loss {values['loss']:.4f}", refresh=False)

            stop = stopping()
            if step % config.checkpoint_every == 0 or step == config.steps or stop:
                # Checked before the last good checkpoint makes room for a spoilt one.
                if not np.isfinite(loss := float(metrics["loss"])):
                    raise ValueError(
                        f"the loss is {loss} at step {step} of {description!r} with learning_rate="
                        f"{config.learning_rate}; train with a lower one in another workdir"
                    )
                checkpoints.save(step, state)
            bar.update()
            if stop:
                raise stopped_by_sigterm(step, path)
    return state


def usable_devices(batch_size: int, available: int) -> int:
    """The largest number of devices that share a batch evenly."""
    return max(count for count in range(1, available + 1) if batch_size % count == 0)


def _drop_lines_after(path: Path, step: int) -> None:
    """Removes what a run that resumes from `step` had logged beyond it, and what a power loss left of a line."""
    if not path.exists():
        return

    def logged_step(line: bytes) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            return 0  # a damaged line

    lines = path.read_bytes().splitlines(keepends=True)
    write_bytes(path, b"".join(line for line in lines if line.endswith(b"\n") and 0 < logged_step(line) <= step))
