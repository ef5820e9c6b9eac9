"""What 1, 8 and 64 queries in one pass cost, exact and linearised, and how well the linearised scores agree.

    python -m benchmarks.queries --model=models/openmoji --workdir=runs/queries_study

Queries are generated from the captions of random training pictures. Costs are taken on a few random pictures, once
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
from attrib_jax.jobs.queries import query_values
from attrib_jax.jobs.scoring import make_scores
from attrib_jax.methods.config import SCORES

from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query, prepare_query
from attrib_jax.parallel.progress import progress
from attrib_jax.storage.files import write_json
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common

_COUNTS = flags.DEFINE_list("counts", ["1", "8", "64"], "Queries in a pass.")
_ROWS = flags.DEFINE_integer("rows", 96, "Random training pictures that the cost is taken on.", lower_bound=1)
_AGREEMENT_ROWS = flags.DEFINE_integer("agreement_rows", 800, "Pictures that scores are compared on.", lower_bound=2)
_AGREEMENT_QUERIES = flags.DEFINE_integer("agreement_queries", 3, "Queries that are compared.", lower_bound=1)
_DRAWS = flags.DEFINE_integer("query_draws", 256, "Draws of each query's gradient.")
_FISHER_SAMPLES = flags.DEFINE_integer("fisher_samples", 16384, "Samples of the Fisher information.")
_STRIDE = flags.DEFINE_integer("stride", 100, "Timesteps of the scores.")
_SAMPLER_STEPS = flags.DEFINE_integer("sampler_steps", 20, "Sampling steps of the queries.")


def main():
    common.require(model=common.MODEL.value, workdir=common.WORKDIR.value)
    pipeline, dataset = common.load_model(), common.load_dataset()
    exact = method_config(query_draws=_DRAWS.value, fisher_samples=_FISHER_SAMPLES.value, stride=_STRIDE.value)
    configs = {score: dataclasses.replace(exact, score=score) for score in SCORES}
    counts = sorted(map(int, _COUNTS.value))
    numbers = {"rows": _ROWS.value, "agreement_rows": _AGREEMENT_ROWS.value, "sampler_steps": _SAMPLER_STEPS.value}
    with lock(common.WORKDIR.value):
        root = StageRoot(common.WORKDIR.value, common.shipped_stages())
        attributor = Run(pipeline, dataset, root)
        with root.stage("queries-study", {**exact.settings(), **numbers}, attributor.inputs) as stage:
            moved = _unlearn(attributor, stage.path / "unlearned", exact, max(*counts, _AGREEMENT_QUERIES.value))
            order = np.random.default_rng(2024).permutation(len(attributor.data))
            rows = np.sort(order[: _ROWS.value])
            costs = _costs(attributor, stage.path, moved, configs, counts, rows)
            print(_cost_table(costs, counts), flush=True)
            rows = np.sort(order[-_AGREEMENT_ROWS.value :])
            agreement = _agreement(attributor, stage.path / "agreement", moved, configs, rows)
            write_json(stage.path / "results.json", {"costs": costs, "agreement": agreement})
    print(_agreement_table(agreement))


def _unlearn(attributor, folder: Path, config, count: int) -> list:
    """The moved weights of `count` queries, kept in `folder`."""
    dataset, moved = attributor.dataset, []
    curvature = attributor.curvature(config)
    pictures = np.random.default_rng(7).permutation(len(dataset))
    for index in progress(list(range(count)), "queries", "query"):
        path = folder / str(index)
        path.mkdir(parents=True, exist_ok=True)
        prompt = dataset.captions(int(pictures[index % len(pictures)]))[0]
        query = Query(prompt, seed=index, guidance_scale=2.0, sampler_steps=_SAMPLER_STEPS.value)
        prepared = prepare_query(attributor.pipeline, attributor.predict, query)
        moved.append(attributor.unlearned(path, prepared, config, curvature)[0])
    return moved


def _costs(attributor, folder: Path, moved, configs, counts, rows) -> dict[str, dict[str, float]]:
    """Seconds of a pass, and how far the first query's result is from that of it alone, by score and queries."""
    file = folder / "costs.json"
    costs = json.loads(file.read_text()) if file.exists() else {}
    first = rows[: 8 * attributor.gradient_program.mesh.size]
    for (score, config), count in itertools.product(configs.items(), counts):
        name = f"{score} {count}"
        if name in costs:
            continue
        for part, positions in (("warm", first), (name, rows)):
            shutil.rmtree(folder / part, ignore_errors=True)
            paths = [folder / part / str(index) for index in range(count)]
            began = time.monotonic()
            values = query_values(
                paths, moved[:count], config, attributor.programs, attributor.data, f"{part}: {score}", positions
            )
            seconds = time.monotonic() - began
        shutil.rmtree(folder / "warm")
        (alone,) = query_values(
            [folder / f"{score} alone"], moved[:1], config, attributor.programs, attributor.data, "alone", rows
        )
        difference = float(np.abs(values[0] - alone).max() / np.abs(alone).max())
        costs[name] = {"seconds": seconds, "rows": len(rows), "difference": difference}
        write_json(file, costs)
    return costs


def _agreement(attributor, folder: Path, moved, configs, rows) -> list[dict[str, float]]:
    """Linearised against exact scores of a few queries."""
    scores = {}
    for score, config in configs.items():
        before = attributor.base_losses(config)[rows] if score == "exact" else None
        paths = [folder / score / str(index) for index in range(_AGREEMENT_QUERIES.value)]
        values = query_values(
            paths, moved[: len(paths)], config, attributor.programs, attributor.data, f"agreement: {score}", rows
        )
        scores[score] = [make_scores(rows, each, before, config).score for each in values]
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
        f"| queries | score | ms a picture | times {counts[0]} exact | ms a picture and query | largest difference |",
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
