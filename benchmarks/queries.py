"""What 1, 8 and 64 queries in one pass cost, exact and linearised, and how well the linearised scores agree.

    python -m benchmarks.queries --model=models/openmoji --workdir=runs/queries_study

Queries are generated from the captions of random training images. Costs are taken on a few random images, once
everything is compiled; the agreement of linearised with exact scores on more of them, for a few of the queries. Prints
two markdown tables and writes results.json; a run that was stopped goes on with the next measurement. About ten
minutes on two idle cores.
"""

import dataclasses
import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import scipy.stats
from absl import flags

from attrib_jax.attribution.scores import make_scores
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.curvature import fit_curvature
from attrib_jax.jobs.linear import linear_pass, weight_change
from attrib_jax.jobs.losses import base_losses, dataset_pass, loss_program, loss_weights
from attrib_jax.jobs.query import Query, prepare_query
from attrib_jax.jobs.settings import SCORES
from attrib_jax.methods import method_config
from attrib_jax.methods.base import QueryJob
from attrib_jax.methods.unlearn import unlearn_query
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.files import write_json
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common

_COUNTS = flags.DEFINE_list("counts", ["1", "8", "64"], "Queries in a pass.")
_ROWS = flags.DEFINE_integer("rows", 96, "Random training images that the cost is taken on.", lower_bound=1)
_AGREEMENT_ROWS = flags.DEFINE_integer("agreement_rows", 800, "Images that scores are compared on.", lower_bound=2)
_AGREEMENT_QUERIES = flags.DEFINE_integer("agreement_queries", 3, "Queries that are compared.", lower_bound=1)
_DRAWS = flags.DEFINE_integer("query_draws", 256, "Draws of each query's gradient.")
_FISHER_SAMPLES = flags.DEFINE_integer("fisher_samples", 16384, "Samples of the Fisher information.")
_STRIDE = flags.DEFINE_integer("stride", 100, "Distance of the timesteps of the scores.")
_SAMPLER_STEPS = flags.DEFINE_integer("sampler_steps", 20, "Sampling steps of the queries.")


def main():
    common.require(model=common.MODEL.value, workdir=common.workdir())
    pipeline, dataset = common.load_model(), common.load_dataset()
    exact = method_config(query_draws=_DRAWS.value, fisher_samples=_FISHER_SAMPLES.value, stride=_STRIDE.value)
    configs = {score: dataclasses.replace(exact, score=score) for score in SCORES}
    counts = sorted(map(int, _COUNTS.value))
    numbers = {"rows": _ROWS.value, "agreement_rows": _AGREEMENT_ROWS.value, "sampler_steps": _SAMPLER_STEPS.value}
    with lock(common.workdir()):
        root = StageRoot(common.workdir(), common.shipped_stages())
        run = Run(pipeline, dataset, root)
        with root.stage("queries-study", {**exact.describe(), **numbers}, run.inputs) as stage:
            moved = _unlearn(run, stage.path / "unlearned", exact, max(*counts, _AGREEMENT_QUERIES.value))
            order = np.random.default_rng(2024).permutation(len(run.data))
            rows = np.sort(order[: _ROWS.value])
            costs = _costs(run, stage.path, moved, configs, counts, rows)
            print(_cost_table(costs, counts), flush=True)
            rows = np.sort(order[-_AGREEMENT_ROWS.value :])
            agreement = _agreement(run, stage.path / "agreement", moved, configs, rows)
            write_json(stage.path / "results.json", {"costs": costs, "agreement": agreement})
    print(_agreement_table(agreement))


def _unlearn(run, folder: Path, config, count: int) -> list:
    """The moved weights of `count` queries, kept in `folder`."""
    dataset, moved = run.dataset, []
    curvature = fit_curvature(run, config)
    images = np.random.default_rng(7).permutation(len(dataset))
    for index in progress(list(range(count)), "queries", "query"):
        path = folder / str(index)
        path.mkdir(parents=True, exist_ok=True)
        prompt = dataset.captions(int(images[index % len(images)]))[0]
        query = Query(prompt, seed=index, guidance_scale=2.0, sampler_steps=_SAMPLER_STEPS.value)
        prepared = prepare_query(run.pipeline, run.predict, query)
        job = QueryJob(f"number {index}", {}, prepared, path)
        moved.append(unlearn_query(run, job, config, curvature)[0])
    return moved


def _pass(run: Run, paths: list[Path], moved: list, config, label: str, rows: np.ndarray) -> list[np.ndarray]:
    """Losses under each query's moved weights, or linearised scores, of the images at `rows` (N, flips)."""
    if config.score == "linear":
        selected, _ = run.select(config.weights)
        changes = [weight_change(tree, selected) for tree in moved]
        return linear_pass(run, paths, changes, config.weights, config, label, rows)
    program = loss_program(run, config)
    return dataset_pass(run, paths, program, loss_weights(run, program, moved, config.weights), label, rows)


def _costs(run, folder: Path, moved, configs, counts, rows) -> dict[str, dict[str, float]]:
    """Seconds of a pass, and how far the first query's result is from that of it alone, by score and queries."""
    file = folder / "costs.json"
    costs = json.loads(file.read_text()) if file.exists() else {}
    first = rows[: 8 * data_mesh().size]
    for (score, config), count in itertools.product(configs.items(), counts):
        name = f"{score} {count}"
        if name in costs:
            continue
        for part, positions in (("warm", first), (name, rows)):
            shutil.rmtree(folder / part, ignore_errors=True)
            paths = [folder / part / str(index) for index in range(count)]
            began = time.monotonic()
            values = _pass(run, paths, moved[:count], config, f"{part}: {score}", positions)
            seconds = time.monotonic() - began
        shutil.rmtree(folder / "warm")
        (alone,) = _pass(run, [folder / f"{score} alone"], moved[:1], config, "alone", rows)
        difference = float(np.abs(values[0] - alone).max() / np.abs(alone).max())
        costs[name] = {"seconds": seconds, "rows": len(rows), "difference": difference}
        write_json(file, costs)
    return costs


def _agreement(run, folder: Path, moved, configs, rows) -> list[dict[str, float]]:
    """Linearised against exact scores of a few queries."""
    scores = {}
    for score, config in configs.items():
        before = base_losses(run, config)[rows] if score == "exact" else None
        paths = [folder / score / str(index) for index in range(_AGREEMENT_QUERIES.value)]
        values = _pass(run, paths, moved[: len(paths)], config, f"agreement: {score}", rows)
        scores[score] = [make_scores(rows, each, before, config.flips).score for each in values]
    top = min(100, len(rows) // 2)
    return [
        {
            "spearman": float(scipy.stats.spearmanr(exact, linear).statistic),
            "top": top,
            "overlap": len(set(np.argsort(-exact)[:top]) & set(np.argsort(-linear)[:top])) / top,
        }
        for exact, linear in zip(*scores.values())
    ]


def _cost_table(costs, counts) -> str:
    one = costs[f"exact {counts[0]}"]
    lines = [
        f"| queries | score | ms an image | times {counts[0]} exact | ms an image and query | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for score, count in itertools.product(SCORES, counts):
        cost = costs[f"{score} {count}"]
        milliseconds = 1000 * cost["seconds"] / cost["rows"]
        cells = [f"{milliseconds:.1f}", f"{cost['seconds'] / one['seconds']:.2f}", f"{milliseconds / count:.2f}"]
        lines.append(f"| {count} | {score} | {' | '.join(cells)} | {cost['difference']:.1e} |")
    return "\n".join(lines)


def _agreement_table(agreement) -> str:
    top = agreement[0]["top"]
    lines = [f"| query | Spearman | top-{top} overlap |", "|---|---|---|"]
    lines += [f"| {i} | {row['spearman']:.4f} | {row['overlap']:.2f} |" for i, row in enumerate(agreement, start=1)]
    return "\n".join(lines)


if __name__ == "__main__":
    common.run(main)
