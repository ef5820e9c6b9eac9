"""Method `influence`: grad L(z) . F^-1 . grad L(z_hat), the influence function (docs/METHOD.md section 7).

The score is the derivative of a training image's loss along F^-1 grad L(z_hat), the direction of a Newton step.
Positive says that its loss rises as the query is unlearned, and so it does for the query itself. Times step_size /
num_examples it is the limit of the unlearning score for a small step. One gradient of the query and one pass give it,
with the program of linearised scores.
"""

import dataclasses
from collections.abc import Sequence

import jax

from attrib_jax.attribution.scores import make_scores
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import setting
from attrib_jax.core.weights import Params, flatten_names, unflatten_names
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.curvature.ekfac import EKFAC
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.curvature import fit_curvature
from attrib_jax.jobs.linear import linear_pass
from attrib_jax.jobs.query import query_mask
from attrib_jax.jobs.query_gradient import GradientProgram
from attrib_jax.jobs.settings import CurvatureSettings, PassSettings, QueryDrawSettings, RegionSettings
from attrib_jax.methods.base import MethodConfig, QueryJob, Scored
from attrib_jax.parallel.hosts import fetch, run_on_host0
from attrib_jax.parallel.mesh import num_parts
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.files import stored_arrays, write_arrays

_FILE = "gradient.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfluenceConfig(MethodConfig, CurvatureSettings, QueryDrawSettings, RegionSettings, PassSettings):
    """Settings of the influence function."""

    method: str = setting("influence", "Attribution method.", choices=("influence",))


def prepare(run: Run, config: InfluenceConfig) -> Diagonal | EKFAC:
    """F, fitted, reused or from elsewhere."""
    _ = run.data  # encoded before F is fitted, so that each is timed by itself
    return fit_curvature(run, config)


def score(run: Run, queries: Sequence[QueryJob], config: InfluenceConfig) -> list[Scored]:
    """The influence of every training image on each query: the derivative of its loss along F^-1 grad L(z_hat)."""
    curvature = prepare(run, config)
    directions = []
    for query in queries:
        with run.timed("query gradient"):
            gradient = _query_gradient(run, query, config)
        try:
            curvature.check_solvable(gradient, config.damping)
        except ValueError as error:
            raise ValueError(f"query {query.name!r}: {error}") from error
        direction = _solve(curvature, gradient, config.damping)
        # What is divided waits in the host's memory for the pass over the data set.
        directions.append(jax.tree.map(fetch, direction) if num_parts(run.mesh(config)) > 1 else direction)

    def values(paths, config, rows, members, label):
        label += "linearised scores"
        with run.timed(label):
            taken = [directions[query] for query in members]
            return linear_pass(run, paths, taken, config.weights, config, label, rows)

    folders = [query.folder for query in queries]
    if config.cascade:
        from attrib_jax.jobs.cascade import cascade_scores

        return [Scored(scores) for scores in cascade_scores(run, folders, config, values, None)]
    found = values(folders, config, None, range(len(queries)), "")
    return [Scored(make_scores(run.data.row_ids, each, None, config.flips)) for each in found]


def _query_gradient(run: Run, query: QueryJob, config: InfluenceConfig) -> Params:
    """The gradient of the query's loss by the selected weights, kept in its folder.

    It is the mean over the draws of the first unlearning step, and of the region alone where `config` has one.
    """
    file = query.folder / _FILE
    stored = run_on_host0(lambda: stored_arrays(file))
    if stored is None:
        selected, rest = run.select(config.weights)
        key = jax.random.fold_in(purpose_key(config.loss_seed, "query"), 0)
        prepared, mask = query.prepared, query_mask(query.prepared, config)
        gradients = GradientProgram(run.predict, run.pipeline.schedule, run.mesh(config))
        sum_draws = gradients.bind(rest, prepared.latents, prepared.text, config.query_draws, mask)
        with progress(config.query_draws, "gradient of the query", "draw") as bar:
            total = sum_draws(selected, key, lambda done: bar.update(done - bar.n))
        stored = {name: fetch(leaf) / config.query_draws for name, leaf in flatten_names(total.gradient).items()}
        run_on_host0(lambda: write_arrays(file, stored, {"draws": config.query_draws}))
    return unflatten_names(stored)


@jax.jit
def _solve(curvature, gradient, damping):
    return curvature.solve(gradient, damping)
