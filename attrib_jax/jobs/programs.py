"""The compiled programs that score with one model, each made once."""

from typing import Any

from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.core.weights import count_weights, merge_weights, select_weights
from attrib_jax.jobs.linear import LinearProgram
from attrib_jax.jobs.losses import LossProgram
from attrib_jax.jobs.projections import FeatureProgram
from attrib_jax.methods.config import AttributeConfig
from attrib_jax.models.precision import cast_params, matmul_precision
from attrib_jax.models.predictor import predictor


class ScorePrograms:
    """Losses and linearised scores of one model, by settings; and the weights that they take."""

    def __init__(self, pipeline: Pipeline):
        self._unet, self._schedule = pipeline.unet, pipeline.schedule
        self._params = pipeline.params["unet"]
        self._made: dict[tuple, Any] = {}

    def losses(self, config: AttributeConfig) -> LossProgram:
        """The strided loss; see `params` for its weights."""
        seed, stride, batch_size, precision = key = _key(config)
        if key not in self._made:
            predict, products = predictor(self._unet, precision), matmul_precision(precision)
            self._made[key] = LossProgram(predict, self._schedule, seed, stride, batch_size, matmul_precision=products)
        return self._made[key]

    def linear(self, config: AttributeConfig, num_queries: int | None = None) -> LinearProgram:
        """The linearised score of one query, or of several at once; see `linear_weights` for its weights."""
        seed, stride, batch_size, precision = settings = _key(config)
        key = (*settings, num_queries)
        if key not in self._made:
            self._made[key] = LinearProgram(
                self._unet, self._schedule, seed, stride, batch_size, precision=precision, num_queries=num_queries
            )
        return self._made[key]

    def features(self, config: AttributeConfig, timestep: int | None = None) -> FeatureProgram:
        """The projected gradients of `config.method`'s output, at one timestep alone if it is given."""
        gradients = config.gradients
        shape = gradients.projection, gradients.projection_dim
        key = (*_key(config), config.weights, gradients.output(config.method), *shape, timestep)
        if key not in self._made:
            self._made[key] = FeatureProgram(
                self._unet,
                self._schedule,
                gradients.output(config.method),
                *shape,
                count_weights(self.selected(config)).values,
                config.loss_seed,
                config.stride,
                config.batch_size,
                precision=config.precision,
                timestep=timestep,
            )
        return self._made[key]

    def params(self, config: AttributeConfig, selected: Any) -> Any:
        """The UNet's parameters in the precision of the scores, given the weights that move."""
        return merge_weights(cast_params(selected, config.precision), self.rest(config))

    def linear_weights(self, config: AttributeConfig, change: Any) -> tuple[Any, Any, Any]:
        """The weights of `linear` for the weight change of one query, or for those of several along a leading axis."""
        return self.selected(config), self.rest(config), change

    def selected(self, config: AttributeConfig) -> Any:
        """The weights that move, as the model has them."""
        return select_weights(self._params, config.weights)[0]

    def rest(self, config: AttributeConfig) -> Any:
        """The weights that do not move, in the precision of the scores."""
        return select_weights(cast_params(self._params, config.precision), config.weights)[1]


def _key(config: AttributeConfig) -> tuple:
    return config.loss_seed, config.stride, config.batch_size, config.precision
