"""Self-attribution: does unlearning a training picture rank that picture itself at the top of all 3,953?

    python -m benchmarks.self_attribution --model=models/openmoji --workdir=runs/self_attribution

Queries are training pictures with their first caption. For each, one Newton step (and one SGD step) moves the weights.
The score, the difference of two strided losses, is computed for the first `--exact` and `--exact_sgd` queries: half a
minute a query on two cores. The linearised score, the derivative of the loss along the weight change, is computed for
all queries in one pass. Prints a markdown table and writes the ranks to the workdir; resumable query by query.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from absl import flags

from attrib_jax.attribution.scores import combine_flips, combine_scores
from attrib_jax.attribution.unlearn import newton_step, sgd_step
from attrib_jax.convert.pipeline import load_pipeline
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.weights import flatten_names, select_weights, unflatten_names
from attrib_jax.data.sources import open_dataset
from attrib_jax.runtime.files import read_arrays, write_arrays, write_json
from attrib_jax.runtime.progress import progress
from attrib_jax.runtime.stages import lock
from attrib_jax.stages.attribute import Attributor
from attrib_jax.stages.config import AttributeConfig
from attrib_jax.stages.queries import query_values
from attrib_jax.stages.root import StageRoot
from launch import common

_QUERIES = flags.DEFINE_integer("queries", 50, "Training pictures to query with.", lower_bound=1)
_EXACT = flags.DEFINE_integer("exact", 50, "Queries whose scores after the Newton step are computed.", lower_bound=0)
_EXACT_SGD = flags.DEFINE_integer(
    "exact_sgd", 10, "Queries whose scores after the SGD step are computed.", lower_bound=0
)
_STRIDE = flags.DEFINE_integer("stride", 200, "Timesteps of the scores.")
_FLIPS = flags.DEFINE_enum("flips", "none", ["none", "max"], "Mirror images in the scores.")
_SPLIT = flags.DEFINE_enum("split", "reported", ["reported", "tuning"], "Two disjoint sets of queries.")
_STEP_SIZE = flags.DEFINE_float("step_size", 0.01, "alpha of the Newton step.")
_SGD_STEP_SIZE = flags.DEFINE_float("sgd_step_size", 0.001, "alpha of the SGD step.")
_DRAWS = flags.DEFINE_integer("query_draws", 2048, "Draws of the query's gradient.")
_FISHER_SAMPLES = flags.DEFINE_integer("fisher_samples", 16384, "Samples of the Fisher information.")
_WEIGHTS = flags.DEFINE_string("weights", "cross-attn-kv", "Weights that move.")
_DAMPING = flags.DEFINE_float("damping", 0.0, "Added to the Fisher information.")


def main():
    common.require(model=common.MODEL.value, workdir=common.WORKDIR.value)
    pipeline = load_pipeline(common.MODEL.value)
    dataset = open_dataset(common.DATASET.value, common.DATA_DIR.value)
    shared = {
        "query_draws": _DRAWS.value,
        "fisher_samples": _FISHER_SAMPLES.value,
        "weights": _WEIGHTS.value,
        "stride": _STRIDE.value,
        "flips": _FLIPS.value,
    }
    configs = {
        "newton": AttributeConfig(step_size=_STEP_SIZE.value, damping=_DAMPING.value, **shared),
        "sgd": AttributeConfig(update="sgd", step_size=_SGD_STEP_SIZE.value, **shared),
    }
    order = np.random.default_rng(2024).permutation(len(dataset))
    rows = order[: _QUERIES.value] if _SPLIT.value == "reported" else order[-_QUERIES.value :]
    with lock(common.WORKDIR.value):
        root = StageRoot(common.WORKDIR.value, common.shipped_stages())
        attributor = Attributor(pipeline, dataset, root)
        settings = {name: config.settings() for name, config in configs.items()}
        settings |= {"queries": len(rows), "split": _SPLIT.value}
        folder = f"self-attribution-{_SPLIT.value}"
        with root.stage(folder, settings, attributor.inputs) as stage:
            moved = _unlearn_all(attributor, stage.path / "moved", rows, configs)
            linear = _linear_scores(attributor, stage.path / "linear-scores", rows, moved, configs["newton"])
        results = {f"{name}, linearised": _summary(dataset, rows, scores) for name, scores in linear.items()}
        random = np.random.default_rng(0).random((len(rows), len(dataset)))
        results["random"] = _summary(dataset, rows, random)
        write_json(stage.path / "results.json", results)
        for name, count in (("newton", _EXACT.value), ("sgd", _EXACT_SGD.value)):
            scores, before = [], attributor.base_losses(configs[name])
            for index, (row, selected) in enumerate(zip(rows[:count], moved[name])):
                path = stage.path / f"{name}-exact" / str(row)
                scores.append(_exact_scores(attributor, path, configs[name], selected, before))
                exact, done = np.stack(scores), index + 1
                results[f"{name}, {done} queries" if done < len(rows) else name] = _summary(dataset, rows[:done], exact)
                results.pop(f"{name}, {index} queries", None)
                write_json(stage.path / "results.json", results)
            if scores:
                overlap = [
                    len(set(np.argsort(-a)[:100]) & set(np.argsort(-b)[:100])) for a, b in zip(exact, linear[name])
                ]
                print(f"{name}: of the top 100, {np.mean(overlap):.1f} are in the linearised top 100 too")
    print(_table(results))


def _unlearn_all(attributor, folder: Path, rows, configs) -> dict[str, list]:
    """The selected weights after one step of each method for each of the pictures `rows`, kept in `folder`.

    The methods differ in what they make of the query's gradient, so it is taken once for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, newton = attributor.data, configs["newton"]
    selected, rest = select_weights(attributor.pipeline.params["unet"], newton.weights)
    fisher = attributor.fisher(newton.weights, newton.fisher_samples, newton.loss_seed)
    key = jax.random.fold_in(purpose_key(newton.loss_seed, "query"), 0)
    moved = {name: [] for name in configs}
    for row in progress([int(row) for row in rows], "unlearn queries", "query"):
        file = folder / f"{row}.safetensors"
        if not file.exists():
            (latents,), (text,) = data.inputs(row, 0, 0)
            sum_draws = attributor.gradient_program.bind(rest, latents, text, newton.query_draws)
            total = sum_draws(selected, key, lambda count: None)
            gradient = jax.tree.map(lambda leaf: leaf / newton.query_draws, total.gradient)
            fisher.check_solvable(gradient, newton.damping)
            steps = {
                "newton": newton_step(selected, gradient, fisher, newton.step_size, len(data), newton.damping),
                "sgd": sgd_step(selected, gradient, configs["sgd"].step_size),
            }
            arrays = {name: np.asarray(leaf) for name, leaf in flatten_names(steps).items()}
            write_arrays(file, arrays, {"query_loss": float(total.loss) / newton.query_draws})
        for name, tree in unflatten_names(read_arrays(file)[0]).items():
            moved[name].append(tree)
    return moved


def _linear_scores(attributor, path: Path, rows, moved, config) -> dict[str, np.ndarray]:
    """The linearised scores (queries, N) of every method's weight changes, in one pass over the data set."""
    paths = [path / name / str(row) for name in moved for row in rows]
    trees = [tree for queries in moved.values() for tree in queries]
    linear = dataclasses.replace(config, score="linear")
    values = query_values(paths, trees, linear, attributor.programs, attributor.data, "linearised scores")
    scores = np.stack([combine_flips(each, config.flips)[0] for each in values])
    return dict(zip(moved, np.split(scores, len(moved))))


def _exact_scores(attributor, path: Path, config, selected, before: np.ndarray) -> np.ndarray:
    """The scores (N,) of all training pictures under unlearned weights, their losses kept in `path`."""
    description = f"scores of row {path.name}"
    (after,) = query_values([path], [selected], config, attributor.programs, attributor.data, description)
    return combine_scores(before, after, config.flips)[0]


def _summary(dataset, rows, scores) -> dict:
    """Ranks of each query's own row, and of the best row of its near-duplicate group."""
    ranks = np.empty(scores.shape, np.int64)
    np.put_along_axis(ranks, np.argsort(-scores, axis=1, kind="stable"), np.arange(1, scores.shape[1] + 1), axis=1)
    own = ranks[np.arange(len(rows)), rows]
    group = np.array([rank[dataset.groups == dataset.groups[row]].min() for rank, row in zip(ranks, rows)])
    return {
        kind: {
            "median_rank": float(np.median(values)),
            "recall_at_1": float(np.mean(values == 1)),
            "recall_at_10": float(np.mean(values <= 10)),
            "ranks": values.tolist(),
        }
        for kind, values in (("own", own), ("group", group))
    }


def _table(results: dict) -> str:
    lines = [
        "| method | median rank (group) | recall@10 (group) | median rank (own) | recall@10 (own) |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        cells = [f"{result[kind][key]:g}" for kind in ("group", "own") for key in ("median_rank", "recall_at_10")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return json.dumps({"split": _SPLIT.value, "queries": _QUERIES.value}) + "\n" + "\n".join(lines)


if __name__ == "__main__":
    common.run(main)
