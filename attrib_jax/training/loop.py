"""The resumable training loop: batches in, orbax checkpoints, a metrics log and averaged weights out."""

import contextlib
import dataclasses
import functools
import json
import os
import time
from typing import Any

import grain
import jax
import numpy as np

from attrib_jax.core.checks import check_positive, check_range
from attrib_jax.core.keys import purpose_key
from attrib_jax.diffusion.training import LossFn, init_state, make_optimizer, train_step
from attrib_jax.parallel.mesh import data_mesh, replicate, shard_batch
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.checkpoints import TrainingCheckpoints, preemption_requested, stopped_by_sigterm
from attrib_jax.storage.files import storage_errors, write_bytes


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long and how fast to train.

    Attributes:
      steps: optimiser steps in all.
      batch_size: examples a step, over all devices.
      learning_rate: peak, reached after `warmup_steps`, then a cosine down to zero at `steps`.
      warmup_steps: of the linear rise.
      ema_decay: of the averaged weights that are kept.
      weight_decay: decoupled, AdamW's.
      seed: of the initial weights, the batch order and every draw of the loss.
      checkpoint_every: steps between two checkpoints.
      log_every: steps between two lines of metrics.jsonl.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 200
    ema_decay: float = 0.999
    weight_decay: float = 0.0
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 50

    def __post_init__(self):
        for name in ("steps", "batch_size", "checkpoint_every", "log_every"):
            check_positive(name, getattr(self, name), integer=True)
        check_positive("learning_rate", self.learning_rate)
        check_range("warmup_steps", self.warmup_steps, 0, self.steps - 1, integer=True)
        check_range("ema_decay", self.ema_decay, 0.0, 1.0)


def fit(path: str | os.PathLike, loss_fn: LossFn, params: Any, source: Any, config: FitConfig, description: str) -> Any:
    """Trains `params`, resuming from the newest checkpoint in `path` -> the averaged parameters.

    Args:
      path: folder of checkpoints and `metrics.jsonl`.
      loss_fn: `loss(params, batch, key) -> (loss, metrics)`.
      params: initial values; a run that resumes takes only their shapes.
      source: random access to examples, `source[i]` -> a pytree of numpy arrays.
      config: see `FitConfig`.
      description: names the random stream ("train autoencoder") and the progress bar.

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
    metrics_file = os.path.join(path, "metrics.jsonl")
    with TrainingCheckpoints(path) as checkpoints, contextlib.ExitStack() as stack:
        stored = checkpoints.restore_latest(state)
        start = 0
        if stored is not None:
            start, state, _ = stored
        with storage_errors(metrics_file):
            _drop_lines_after(metrics_file, start)
            log = stack.enter_context(open(metrics_file, "a", encoding="utf-8"))
        stopping = stack.enter_context(preemption_requested())
        began, logged = time.monotonic(), start
        reader = iter(batches[start : config.steps].to_iter_dataset(grain.ReadOptions(num_threads=2)))
        with progress(config.steps, description, "step", initial=start) as bar:
            for step in range(start + 1, config.steps + 1):
                state, metrics = step_fn(state, shard_batch(mesh, next(reader)), key)
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
                    # Before the last good checkpoint makes room for a spoilt one.
                    if not np.isfinite(loss := float(metrics["loss"])):
                        raise ValueError(
                            f"the loss is {loss} at step {step} of {description!r} with learning_rate="
                            f"{config.learning_rate}; train with a lower one in another workdir"
                        )
                    checkpoints.save(step, state)
                bar.update()
                if stop:
                    raise stopped_by_sigterm(step, path)
        return jax.tree.map(np.asarray, state.ema)


def usable_devices(batch_size: int, available: int) -> int:
    """The most devices that share a batch evenly."""
    return max(count for count in range(1, available + 1) if batch_size % count == 0)


def _drop_lines_after(path: str, step: int) -> None:
    """Removes what a run that is resumed from `step` had logged beyond it, and what a power loss left of a line."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        lines = [line for line in file if line.endswith(b"\n") and 0 < _logged_step(line) <= step]
    write_bytes(path, b"".join(lines))


def _logged_step(line: bytes) -> int:
    """The step of a line of metrics; 0 for a damaged one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
