"""Training a model's UNet again from scratch on part of its training set, several models at once.

Autoencoder and text encoder stay as they are (METHOD.md section 8). Everything that is drawn is a pure function of
(seed, step, place in the batch): a model that lacks images sees, in every other place, the batches that the full one
saw, and in their places images drawn from the remaining ones. So two trainings differ by what was removed and by
nothing else, whatever was trained beside them.

The loop is not that of training/loop.py, which says why.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attrib_jax.convert.pipeline import Pipeline, initial_unet, unconditional
from attrib_jax.core.checks import check_positive, check_range
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import Settings, setting
from attrib_jax.diffusion.losses import Predict
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.diffusion.training import denoising_batch_loss, init_state, make_optimizer, train_step
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.models.predictor import predictor
from attrib_jax.parallel.mesh import data_mesh, replicate, shard_batch, tile_map
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.state import StateStore
from attrib_jax.training.draws import Draws, Training, check_removed, draw_batches

# Steps whose batches are drawn on the host and sent to the devices together.
_STEPS_PER_DRAW = 100
_STEPS_IN_FLIGHT = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """How a UNet is trained from scratch.

    Beside the settings, which have flags:

    Attributes:
      warmup_steps: steps of the linear rise of the learning rate; a tenth of all, and at most 50, if None.
      ema_decay: decay of the averaged weights, which are the model.
    """

    steps: int = setting(400, "Optimiser steps.", low=1, flag="train_steps")
    batch_size: int = setting(64, "Images a step.", low=1, flag="train_batch_size")
    learning_rate: float = setting(3e-3, "Peak learning rate of Adam, followed by a cosine decay to zero.", above=0)
    caption_dropout: float = setting(
        0.1, "Share of captions replaced by the empty one, for classifier-free guidance.", low=0, high=1
    )
    random_flips: bool = setting(False, "Mirror half of the images that are drawn.")

    warmup_steps: int | None = None
    ema_decay: float = 0.99

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(50, self.steps // 10))
        check_range("warmup_steps", self.warmup_steps, 0, self.steps - 1, integer=True)
        check_range("ema_decay", self.ema_decay, 0.0, 1.0)

    def settings(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values."""
        return dataclasses.asdict(self)


class Retrainer:
    """Trains the UNet of one pipeline on subsets of one data set; its programs are compiled once.

    Models are spread over the devices, `per_device` on each at a time. With one each, a model's weights are to the bit
    those that it would have alone.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        data: EncodedDataset,
        recipe: Recipe,
        per_device: int = 1,
        mesh: Mesh | None = None,
    ):
        """`data` is the encoded training set; `per_device` changes the speed, and weights by rounding only."""
        check_positive("models_per_device", per_device, integer=True)
        self.pipeline, self.data, self.recipe, self.per_device = pipeline, data, recipe, per_device
        self.mesh = mesh or data_mesh()
        self._optimizer = make_optimizer(recipe.learning_rate, recipe.warmup_steps, recipe.steps)
        self._step = tile_map(self.mesh, functools.partial(_steps, pipeline.unet, self._optimizer, recipe.ema_decay))
        self._shared: Any = None

    @property
    def models_at_once(self) -> int:
        """How many models train together."""
        return self.mesh.size * self.per_device

    def train(
        self,
        trainings: Sequence[Training],
        states: StateStore | None = None,
        seconds_between_states: float = 60.0,
        description: str = "train",
    ) -> Any:
        """Trains up to `models_at_once` models -> their averaged weights, stacked along a first axis.

        Args:
          trainings: models to train, at least one; each keeps at least one image.
          states: store of the state of a long training, from which it resumes; None for none.
          seconds_between_states: least time between two stored states.
          description: text of the progress bar.

        Raises ValueError where nothing would be left to train on, or a loss is not finite.
        """
        count = len(trainings)
        if not 1 <= count <= self.models_at_once:
            raise ValueError(f"trainings has {count} entries; expected 1 to {self.models_at_once}")
        for training in trainings:
            check_removed(training.removed, len(self.data))
        # Places without a model train the last one again, so that the program keeps its shape.
        padded = [*trainings, *[trainings[-1]] * (self.models_at_once - count)]
        keys = np.stack([_key_data(training.seed) for training in padded])
        state = shard_batch(self.mesh, _stack([self._initial(training.seed) for training in padded]))
        label = [[training.seed, np.sort(training.removed).tolist()] for training in padded]
        start, steps = 0, self.recipe.steps
        stored = None if states is None else states.read(state)
        if stored is not None and stored[1]["trainings"] == label:
            state, start = shard_batch(self.mesh, stored[0]), stored[1]["step"]
        keys, shared = shard_batch(self.mesh, keys), self._on_devices()
        written = time.monotonic()
        with progress(steps, description, "step", initial=start) as bar:
            while start < steps:
                stop = min(start + _STEPS_PER_DRAW, steps)
                draws = _stack([draw_batches(self.data, each, self.recipe, start, stop) for each in padded])
                for step in range(stop - start):
                    batch = shard_batch(self.mesh, Draws(*(leaf[:, step] for leaf in draws)))
                    state, loss = self._step(shared, (state, batch, keys))
                    # Some steps may wait in the devices' queues, so that no device waits for the host, but not so many
                    # that stopping takes long.
                    if (step + 1) % _STEPS_IN_FLIGHT == 0:
                        jax.block_until_ready(loss)
                        bar.update(_STEPS_IN_FLIGHT)
                jax.block_until_ready(loss)
                bar.update((stop - start) % _STEPS_IN_FLIGHT)
                start = stop
                if not np.isfinite(np.asarray(loss)).all():
                    raise ValueError(
                        f"the loss is {np.asarray(loss).tolist()} at step {stop}; retrain with a lower learning_rate "
                        f"than {self.recipe.learning_rate}"
                    )
                if states is not None and start < steps and time.monotonic() > written + seconds_between_states:
                    states.write(state, {"trainings": label, "step": start})
                    written = time.monotonic()
        return jax.tree.map(lambda leaf: leaf[:count], state.ema)

    def seconds_per_step(self, steps: int = 5) -> float:
        """Measured seconds of a step of `models_at_once` models, without compiling."""
        trainings = [Training(np.zeros(0, np.int64))] * self.models_at_once
        state = shard_batch(self.mesh, _stack([self._initial(each.seed) for each in trainings]))
        keys = shard_batch(self.mesh, np.stack([_key_data(each.seed) for each in trainings]))
        draws = _stack([draw_batches(self.data, each, self.recipe, 0, steps + 1) for each in trainings])
        shared, began = self._on_devices(), 0.0
        for step in range(steps + 1):
            batch = shard_batch(self.mesh, Draws(*(leaf[:, step] for leaf in draws)))
            state, loss = self._step(shared, (state, batch, keys))
            if step == 0:
                jax.block_until_ready(loss)
                began = time.monotonic()
        jax.block_until_ready(loss)
        return (time.monotonic() - began) / steps

    def _initial(self, seed: int) -> Any:
        return jax.tree.map(np.asarray, init_state(initial_params(self.pipeline, seed), self._optimizer))

    def _on_devices(self) -> Any:
        if self._shared is None:
            data = self.data
            by_caption = {name: np.asarray(array) for name, array in data.by_caption.items()}
            text = {"text": np.asarray(data.text), **by_caption} if by_caption else np.asarray(data.text)
            by_image = {name: np.asarray(array) for name, array in data.by_image.items()}
            empty = jax.tree.map(np.asarray, unconditional(self.pipeline))
            self._shared = replicate(
                self.mesh, (np.asarray(data.latents), text, empty, by_image, self.pipeline.schedule)
            )
        return self._shared


def initial_params(pipeline: Pipeline, seed: int) -> Any:
    """The UNet's weights before training."""
    return initial_unet(pipeline, purpose_key(seed, "retrain weights"))


def _steps(unet, optimizer, ema_decay, shared, batch):
    """One optimiser step of every model on a device; leaves of `batch` have an axis of models."""
    step = functools.partial(_step, predictor(unet), optimizer, ema_decay, shared)
    if len(batch[2]) == 1:
        # Without the axis: a batch of convolutions with different kernels is slow on a CPU.
        result = step(*jax.tree.map(lambda leaf: leaf[0], batch))
        return jax.tree.map(lambda leaf: leaf[None], result)
    return jax.vmap(step)(*batch)


def _step(predict: Predict, optimizer, ema_decay: float, shared, state, draws: Draws, key_data):
    latents, text, empty, by_image, schedule = shared

    def choose(empty, states):
        is_empty = (draws.caption < 0).reshape(-1, *(1,) * empty.ndim)
        return jnp.where(is_empty, empty, states[jnp.maximum(draws.caption, 0)]).astype(jnp.float32)

    chosen = jax.tree.map(choose, empty, text)
    if by_image:
        chosen |= {name: array[draws.row] for name, array in by_image.items()}
    batch = (latents[draws.row, draws.flip].astype(jnp.float32), chosen)
    loss_fn = functools.partial(_loss, predict, schedule)
    key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
    state, metrics = train_step(loss_fn, optimizer, ema_decay, state, batch, key)
    return state, metrics["loss"]


def _loss(predict: Predict, schedule: NoiseSchedule, params, batch, key):
    return denoising_batch_loss(predict, schedule, params, *batch, *jax.random.split(key, 3)), {}


def _key_data(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(purpose_key(seed, "retrain")))


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
