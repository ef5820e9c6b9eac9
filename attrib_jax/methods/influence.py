"""Method `influence`: grad L(z) . F^-1 . grad L(z_hat), the influence function (METHOD.md section 7).

The score is the derivative of a training picture's loss along F^-1 grad L(z_hat), the direction of a Newton step.
Positive says that its loss rises as the query is unlearned, and so it does for the query itself. Times step_size /
num_examples it is the limit of the unlearning score for a small step. One gradient of the query and one pass give it,
with the machinery of linearised scores.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from attrib_jax.core.keys import purpose_key
from attrib_jax.core.types import Scores
from attrib_jax.core.weights import flatten_names, select_weights, unflatten_names
from attrib_jax.jobs.query import PreparedQuery
from attrib_jax.jobs.regions import query_mask
from attrib_jax.methods.config import AttributeConfig
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.files import stored_arrays, write_arrays

if TYPE_CHECKING:
    from attrib_jax.attribute import Attributor
    from attrib_jax.methods.registry import Job

_FILE = "gradient.safetensors"


def influence_scores(
    attributor: "Attributor", jobs: Sequence["Job"], config: AttributeConfig
) -> list[tuple[Scores, tuple[float, ...]]]:
    """The influence of every training picture on each query, by linearised scores along F^-1 grad L(z_hat)."""
    _ = attributor.data  # encoded before F is fitted, so that each is timed by itself
    curvature = attributor.curvature(config)
    directions = []
    for job in jobs:
        with attributor.timed("query gradient"):
            gradient = query_gradient(attributor, job.folder, job.prepared, config)
        try:
            curvature.check_solvable(gradient, config.damping)
        except ValueError as error:
            raise ValueError(f"query {job.name!r}: {error}") from error
        directions.append(_solve(curvature, gradient, config.damping))
    config = dataclasses.replace(config, score="linear")
    scores = attributor.scorer().linear_scores([job.folder for job in jobs], directions, config)
    return [(each, ()) for each in scores]


def query_gradient(attributor: "Attributor", path: Path, query: PreparedQuery, config: AttributeConfig) -> Any:
    """The gradient of the query's loss by the selected weights, kept in its folder `path`.

    It is the mean over the draws of the first unlearning step, and of the region alone where `config` has one.
    """
    file = path / _FILE
    stored = run_on_host0(lambda: stored_arrays(file))
    if stored is None:
        selected, rest = select_weights(attributor.pipeline.params["unet"], config.weights)
        key = jax.random.fold_in(purpose_key(config.loss_seed, "query"), 0)
        sum_draws = attributor.gradient_program.bind(
            rest, query.latents, query.text, config.query_draws, query_mask(query, config)
        )
        with progress(config.query_draws, "gradient of the query", "draw") as bar:
            total = sum_draws(selected, key, lambda done: bar.update(done - bar.n))
        stored = {name: np.asarray(leaf) / config.query_draws for name, leaf in flatten_names(total.gradient).items()}
        run_on_host0(lambda: write_arrays(file, stored, {"draws": config.query_draws}))
    return unflatten_names(stored)


@jax.jit
def _solve(curvature, gradient, damping):
    return curvature.solve(gradient, damping)
