"""Attribution by unlearning, METHOD.md sections 3 to 5: one file a step, all pure functions."""

from attrib_jax.attribution.influence import influence_matrix, influence_scores
from attrib_jax.attribution.regions import region_mask, shape_mask
from attrib_jax.attribution.scores import combine_flips, combine_scores, example_loss, score_dataset, strided_losses
from attrib_jax.attribution.unlearn import newton_step, query_gradient, scale_by_newton, sgd_step, unlearn

__all__ = [
    "combine_flips",
    "combine_scores",
    "example_loss",
    "influence_matrix",
    "influence_scores",
    "newton_step",
    "query_gradient",
    "region_mask",
    "scale_by_newton",
    "score_dataset",
    "sgd_step",
    "shape_mask",
    "strided_losses",
    "unlearn",
]
