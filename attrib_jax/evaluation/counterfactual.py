"""Counterfactual models: what each query loses when the model is trained again without some images.

Every model is asked about every query, and what it showed is stored under a digest of what it went without: one model
serves all methods, protocols and later runs that remove the same images.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.pipeline import Pipeline, unconditional, with_size_ids
from attrib_jax.core.fingerprint import json_digest
from attrib_jax.core.keys import example_noise, loss_key
from attrib_jax.core.settings import Settings, setting
from attrib_jax.diffusion.losses import denoising_loss
from attrib_jax.diffusion.samplers import sample
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.evaluation.results import KeptModels, ResultTable
from attrib_jax.evaluation.retrain import Recipe, Retrainer, Training
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import PreparedQuery, Query, initial_noise, query_settings
from attrib_jax.models.predictor import predictor
from attrib_jax.parallel.mesh import replicate, shard_batch, tile_map
from attrib_jax.storage.state import StateStore

_TABLE = "models.safetensors"


@dataclasses.dataclass(frozen=True)
class MeasureConfig(Settings):
    """What is measured of a retrained model.

    The noise is one draw for each query and timestep, the same for every model. Where its seed is the scores' loss
    seed, query number q has the noise by which row q's first caption is scored: one row in N, for one query.

    Attributes:
      pictures: whether the latents of the regenerated queries are kept too.
    """

    stride: int = setting(
        5, "Distance of the timesteps that a query's loss is averaged over.", low=1, flag="measure_stride"
    )
    seed: int = setting(0, "Seed of the noise of these losses.", low=0, high=2**32 - 1, flag="measure_seed")
    keep_models: bool = setting(
        False,
        "Whether retrained models are kept, rounded to float16 before they are measured, so that further "
        "queries train nothing.",
    )
    pictures: bool = False

    def describe(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values."""
        # Settings that came later are left out where they are off: results from before stay valid.
        settings = super().describe()
        if not settings.pop("keep_models"):
            return settings | ({"pictures": True} if self.pictures else {})
        return settings | {"weights": "float16"} | ({"pictures": True} if self.pictures else {})


def training_key(training: Training) -> str:
    """The name of a training in a table: a digest of its seed and of what it goes without."""
    return json_digest([int(training.seed), np.sort(training.removed).tolist()])[:24]


class Counterfactuals:
    """Retrained models of one recipe and what they do to a fixed list of queries, computed once and kept.

    Queries all are generated ones: a model regenerates each from its own initial noise.
    """

    def __init__(
        self,
        run: Run,
        queries: Sequence[Query],
        prepared: Sequence[PreparedQuery],
        recipe: Recipe,
        measure: MeasureConfig = MeasureConfig(),
        per_device: int = 1,
    ):
        """`prepared` are the queries' images, from `prepare_query`; `per_device` models train on a device at once."""
        for query in queries:
            if query.image is not None or query.latents is not None:
                raise ValueError(f"query {query.prompt!r} is a given image; expected one that the model generates")
            if query.sampler != "ddim":
                raise ValueError(f"query {query.prompt!r} has sampler {query.sampler!r}; expected 'ddim'")
        if len({(q.guidance_scale, q.sampler_steps) for q in queries}) != 1:
            raise ValueError("queries differ in guidance_scale or sampler_steps; expected one for all")
        # Now, and not after the first models are trained.
        self._timesteps = strided_timesteps(measure.stride, run.pipeline.schedule.num_train_timesteps)
        self.run, self.queries, self.recipe, self.measure = run, list(queries), recipe, measure
        self.prepared = list(prepared)
        with_pictures = dataclasses.replace(measure, pictures=True)
        if self._is_begun(with_pictures) and not self._is_begun(measure):
            # Models that were asked for more serve as well.
            self.measure = with_pictures
        self._retrainer = Retrainer(run.pipeline, run.data, recipe, per_device)
        self._program: Any = None

    def results(
        self, trainings: Sequence[Training], description: str = "retrain", ahead: Sequence[Training] = ()
    ) -> dict[str, np.ndarray]:
        """What the retrained models showed, in order, trained where they are not stored.

        Args:
          trainings: M of them.
          description: of the progress.
          ahead: trainings that will be asked for later. Devices that the last of `trainings` leave idle take these.

        Raises ValueError where a training diverges.

        Returns:
          loss: (M, Q) strided loss of each query.
          mse: (M, Q) mean squared difference, over latent values, between a query's latents and those that the model
            draws from the same noise.
          latents: (M, Q, h, w, c) of these regenerations, where `measure.pictures`.
        """
        with self.run.root.stage(self.name, self._settings(self.measure), self.run.inputs) as stage:
            table = ResultTable(stage.path / _TABLE, self._fields)
            # A state is of as many models as train together, and a run may go on with other devices.
            states = StateStore(stage.path, f"training{self._retrainer.models_at_once}")
            todo = {training_key(training): training for training in trainings}
            todo = {key: training for key, training in todo.items() if key not in table}
            size = self._retrainer.models_at_once
            later = {training_key(training): training for training in ahead}
            later = {key: training for key, training in later.items() if key not in table and key not in todo}
            todo |= itertools.islice(later.items(), -len(todo) % size)
            with self._kept_models() as kept:
                # Kept models first: they cost no training.
                keys = sorted(todo, key=lambda key: kept is None or key not in kept)
                for first in range(0, len(keys), size):
                    group = {key: todo[key] for key in keys[first : first + size]}
                    done = first + len(group)
                    params = self._weights(group, kept, states, f"{description}: {done} of {len(keys)} models")
                    measured = self._measured(params, len(group))
                    self._check_finite(measured, list(group.values()))
                    table.add({key: {n: measured[n][place] for n in self._fields} for place, key in enumerate(group)})
                    states.remove()
            wanted = [training_key(training) for training in trainings]
            return {name: table.get(name, wanted) for name in self._fields}

    def _weights(
        self, group: Mapping[str, Training], kept: KeptModels | None, states: StateStore, description: str
    ) -> Any:
        """Weights of models that train together, stacked; kept ones are read if all of them are there."""
        if kept is not None and all(key in kept for key in group):
            params = kept.read(list(group))
            if params is not None:
                return params
        params = self._retrainer.train(list(group.values()), states, description=description)
        return params if kept is None else kept.write(list(group), params)

    @contextlib.contextmanager
    def _kept_models(self) -> Iterator[KeptModels | None]:
        """Weights of the recipe's models, whatever they are asked; None where they are not kept."""
        if not self.measure.keep_models:
            yield None
            return
        settings = {"recipe": self.recipe.settings()}
        with self.run.root.stage(f"evaluation/models-{json_digest(settings)[:8]}", settings, self.run.inputs) as stage:
            yield KeptModels(stage.path)

    @property
    def name(self) -> str:
        """Of the stage that keeps the results."""
        return self._name(self._settings(self.measure))

    def _settings(self, measure: MeasureConfig) -> dict[str, Any]:
        return {
            "recipe": self.recipe.settings(),
            "measure": measure.describe(),
            "queries": [query_settings(query) for query in self.queries],
        }

    def _name(self, settings: dict[str, Any]) -> str:
        return f"evaluation/retrained-{json_digest(settings)[:8]}"

    def _is_begun(self, measure: MeasureConfig) -> bool:
        settings = self._settings(measure)
        return self.run.root.holds(self._name(settings), settings, self.run.inputs)

    @property
    def _fields(self) -> dict[str, tuple[int, ...]]:
        count = len(self.queries)
        fields = {"loss": (count,), "mse": (count,)}
        return fields | ({"latents": (count, *self.prepared[0].latents.shape)} if self.measure.pictures else {})

    def _measured(self, params: Any, count: int) -> dict[str, np.ndarray]:
        mesh, pipeline = self._retrainer.mesh, self.run.pipeline
        if self._program is None:
            query = self.queries[0]
            fn = functools.partial(_measure, pipeline.unet, query.sampler_steps, query.guidance_scale)
            self._program = tile_map(mesh, fn), replicate(mesh, self._inputs(pipeline))
        program, shared = self._program
        places = np.minimum(np.arange(self._retrainer.models_at_once), count - 1)
        padded = shard_batch(mesh, jax.tree.map(lambda leaf: np.asarray(leaf)[places], params))
        loss, mse, latents = program(shared, padded)
        results = {"loss": loss, "mse": mse, "latents": latents}
        return {name: np.asarray(array)[:count] for name, array in results.items()}

    def _check_finite(self, measured: dict[str, np.ndarray], trainings: Sequence[Training]) -> None:
        # Kept, it would be a NaN in every table from now on.
        for name, values in measured.items():
            for training, each in zip(trainings, values):
                if not np.isfinite(each).all():
                    raise ValueError(
                        f"the model without {len(training.removed)} images, seed {training.seed}, gives {name} that "
                        f"is NaN or infinite; retrain with a lower learning_rate than {self.recipe.learning_rate}"
                    )

    def _inputs(self, pipeline: Pipeline) -> tuple:
        empty = with_size_ids(pipeline, unconditional(pipeline))
        return (
            np.stack([query.latents for query in self.prepared]),
            jax.tree.map(lambda *leaves: np.stack(leaves), *(query.text for query in self.prepared)),
            jax.tree.map(np.asarray, empty),
            np.stack([initial_noise(pipeline, query.seed) for query in self.queries]),
            jax.random.key_data(loss_key(self.measure.seed)),
            self._timesteps,
            pipeline.schedule,
        )


def _measure(unet, sampler_steps: int, guidance_scale: float, shared, params):
    """For each model: the queries' losses (Q,), and squared errors (Q,) and latents of their regeneration."""
    latents, text, empty, initial, key_data, timesteps, schedule = shared
    key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
    predict = predictor(unet)

    def of_model(params):
        def of_query(query):
            index, latent, states = query
            noise = example_noise(key, index, 0, 0, timesteps, latent.shape)
            return denoising_loss(predict, params, schedule, latent, states, noise, timesteps)

        losses = jax.lax.map(of_query, (jnp.arange(len(latents)), latents, text))
        drawn = sample(predict, params, schedule, text, empty, initial, sampler_steps, guidance_scale)
        return losses, jnp.mean(jnp.square(drawn - latents), axis=(1, 2, 3)), drawn

    # One model after the other: several at once would be a batch of convolutions with different kernels.
    return jax.lax.map(of_model, params)
