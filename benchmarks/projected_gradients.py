"""TRAK, D-TRAK and DAS on the shipped model: where the time goes, and whether a training image finds itself.

    python -m benchmarks.projected_gradients --model=models/openmoji --workdir=runs/projected --split=tuning
    python -m benchmarks.projected_gradients --model=models/openmoji --workdir=runs/projected --timing

Queries are training images with their first caption. Prints, for each method and regularisation, the median rank of
the image itself and how often it is among the first ten; choose the regularisation with `--split=tuning`, whose
queries are others than the reported ones. With `--timing` it prints examples a second instead, and what a projection
takes of that. Features are stored in the workdir and resumed there.
"""

import dataclasses
import time

import jax
import numpy as np
from absl import flags

from attrib_jax.attribution.projection import PROJECTIONS, project
from attrib_jax.attribution.scores import FLIP_RULES
from attrib_jax.convert.load import load_pipeline
from attrib_jax.data.sources import open_dataset
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import PreparedQuery
from attrib_jax.methods import method_config
from attrib_jax.methods.projected import (
    OUTPUTS,
    ProjectedConfig,
    feature_program,
    feature_weights,
    scores_by_regularisation,
)
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common

_METHODS = flags.DEFINE_list("methods", list(OUTPUTS), "Methods to run.")
_QUERIES = flags.DEFINE_integer("queries", 20, "Training images to query with.", lower_bound=1)
_SPLIT = flags.DEFINE_enum("split", "reported", ["reported", "tuning"], "Two disjoint sets of queries.")
_REGULARISATIONS = flags.DEFINE_list(
    "regularisations",
    ["0.001", "0.01", "0.1", "1", "10"],
    "Regularisations of the kernel, in units of its mean eigenvalue.",
)
_PROJECTION = flags.DEFINE_enum("projection", "sparse", PROJECTIONS, "Random projection of the gradients.")
_DIM = flags.DEFINE_integer("projection_dim", 2048, "Projection dimension of the gradients.")
_STRIDE = flags.DEFINE_integer("stride", 200, "Distance of the timesteps of the features.")
_FLIPS = flags.DEFINE_enum("flips", "none", FLIP_RULES, "How mirror images count in the scores.")
_DRAWS = flags.DEFINE_integer("query_draws", 200, "Draws of a query's gradient.")
_TIMING = flags.DEFINE_boolean("timing", False, "Whether examples and projections are timed instead.")


def main():
    common.require(model=common.MODEL.value, workdir=common.workdir())
    pipeline = load_pipeline(common.MODEL.value)
    dataset = open_dataset(common.DATASET.value, common.DATA_DIR.value)
    with lock(common.workdir()):
        run = Run(pipeline, dataset, StageRoot(common.workdir(), common.shipped_stages()))
        for method in _METHODS.value:
            config = method_config(
                method=method,
                query_draws=_DRAWS.value,
                stride=_STRIDE.value,
                flips=_FLIPS.value,
                projection=_PROJECTION.value,
                projection_dim=_DIM.value,
            )
            if _TIMING.value:
                _time(run, config)
            else:
                _ranks(run, config)


def _ranks(run: Run, config: ProjectedConfig) -> None:
    data, groups = run.data, run.dataset.groups
    order = np.random.default_rng(2024).permutation(len(data))
    rows = order[: _QUERIES.value] if _SPLIT.value == "reported" else order[-_QUERIES.value :]
    queries = [PreparedQuery(None, *(part[0] for part in data.inputs(row, 0, 0)), ()) for row in rows]
    values = [float(value) for value in _REGULARISATIONS.value]
    for value, scores in zip(values, scores_by_regularisation(run, queries, config, values)):
        own, group = [], []
        for row, each in zip(rows, scores):
            ranks = np.empty(len(data), np.int64)
            ranks[np.argsort(-each.score, kind="stable")] = np.arange(1, len(data) + 1)
            own.append(ranks[row])
            group.append(ranks[groups == groups[row]].min())
        cells = [f"{function(ranks):g}" for ranks in (group, own) for function in (np.median, _recall_at_10)]
        print(f"| {config.method} | {value:g} | {' | '.join(cells)} |", flush=True)
    print({name: seconds for name, (seconds, reused) in run.timings.items() if not reused}, flush=True)


def _recall_at_10(ranks: list[int]) -> float:
    return float(np.mean(np.asarray(ranks) <= 10))


def _time(run: Run, config: ProjectedConfig, tiles: int = 4) -> None:
    program = feature_program(run, dataclasses.replace(config, flips="none", captions="first"))
    selected, _, key = weights = feature_weights(run.pipeline.params["unet"], config, 0)
    weights = program.place(weights)
    rows = np.arange(tiles * program.tile * program.mesh.size)

    def features():
        program(weights, run.data, rows)

    batch = jax.tree.map(lambda leaf: jax.numpy.broadcast_to(leaf, (program.tile, *leaf.shape)), selected)
    projected = jax.jit(project, static_argnums=(2, 3))

    def projection():
        jax.block_until_ready(projected(batch, key, config.projection, config.projection_dim))

    whole = _median_seconds(features) / len(rows)
    # The factored projection is of factors, which this benchmark does not make by themselves.
    factored = config.projection == "factored"
    alone = float("nan") if factored else _median_seconds(projection) / program.tile / program.mesh.size
    print(
        f"{config.method}, {config.projection} to {config.projection_dim}, {program.num_timesteps} timesteps: "
        f"{1 / whole:.1f} examples/s, {1e3 * whole:.1f} ms each, of which the projection {1e3 * alone:.2f} ms"
    )


def _median_seconds(function, repeats: int = 3) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


if __name__ == "__main__":
    common.run(main)
