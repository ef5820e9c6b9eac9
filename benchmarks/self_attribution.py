"""Self-attribution: does unlearning a training picture rank that picture itself at the top of all 3,953?

    python -m benchmarks.self_attribution --model=models/openmoji --workdir=runs/self_attribution

Queries are training pictures with their first caption. For each, one Newton step (and one SGD step) moves the weights.
The linearised score of every training picture and its mirror image, the derivative of the strided loss along the weight
change, is computed for all queries in one pass; for the first `--exact` queries the exact score, the difference of two
losses, is computed too and compared. Prints a markdown table and writes it with the ranks to the workdir; resumable.
"""

import json
from pathlib import Path

import jax
import numpy as np
from absl import flags

from attrib_jax.attribution.influence import influence_matrix
from attrib_jax.attribution.scores import example_loss
from attrib_jax.convert.pipeline import load_pipeline
from attrib_jax.core.keys import loss_key
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import flatten_names, merge_weights, select_weights, unflatten_names
from attrib_jax.data.sources import open_dataset
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.runtime.chunks import ChunkStore
from attrib_jax.runtime.files import read_arrays, write_arrays, write_json
from attrib_jax.runtime.mesh import padded_tiles, replicate, shard_batch, tile_map
from attrib_jax.runtime.progress import progress
from attrib_jax.runtime.stages import lock
from attrib_jax.stages.attribute import AttributeConfig, Attributor
from attrib_jax.stages.query import PreparedQuery
from attrib_jax.stages.root import StageRoot
from launch import common

_QUERIES = flags.DEFINE_integer("queries", 50, "Training pictures to query with.", lower_bound=1)
_EXACT = flags.DEFINE_integer("exact", 4, "Queries whose exact scores are computed too.", lower_bound=0)
_SPLIT = flags.DEFINE_enum("split", "reported", ["reported", "tuning"], "Two disjoint sets of queries.")
_STEP_SIZE = flags.DEFINE_float("step_size", 0.01, "alpha of the Newton step.")
_SGD_STEP_SIZE = flags.DEFINE_float("sgd_step_size", 0.001, "alpha of the SGD step.")
_DRAWS = flags.DEFINE_integer("query_draws", 2048, "Draws of the query's gradient.")
_FISHER_SAMPLES = flags.DEFINE_integer("fisher_samples", 16384, "Samples of the Fisher information.")
_WEIGHTS = flags.DEFINE_string("weights", "cross-attn-kv", "Weights that move.")
_DAMPING = flags.DEFINE_float("damping", 0.0, "Added to the Fisher information.")
_TILE = 8
_ROWS_PER_CHUNK = 256


def main():
    common.require(model=common.MODEL.value, workdir=common.WORKDIR.value)
    pipeline = load_pipeline(common.MODEL.value)
    dataset = open_dataset(common.DATASET.value, common.DATA_DIR.value)
    shared = {"query_draws": _DRAWS.value, "fisher_samples": _FISHER_SAMPLES.value, "weights": _WEIGHTS.value}
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
            moved = {
                name: _unlearn_all(attributor, stage.path / name, rows, config) for name, config in configs.items()
            }
            linear = _linear_scores(attributor, stage.path, moved, configs["newton"])
        results = {name: _summary(dataset, rows, scores) for name, scores in linear.items()}
        random = np.random.default_rng(0).random((len(rows), len(dataset)))
        results["random"] = _summary(dataset, rows, random)
        for name, config in configs.items():
            results |= _exact(attributor, stage.path / f"{name}-exact", rows, name, config, moved[name], linear[name])
        write_json(stage.path / "results.json", results)
    print(_table(results))


def _unlearn_all(attributor, folder: Path, rows, config) -> list:
    """The selected weights after unlearning each of the pictures `rows`, kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    moved = []
    for row in rows:
        file = folder / f"{row}.safetensors"
        if not file.exists():
            data = attributor.data
            query = PreparedQuery(
                attributor.dataset[row].image, data.latents[row, 0], data.text[data.first_caption[row]], ()
            )
            selected, losses = attributor.unlearned(query, config)
            arrays = {name: np.asarray(leaf) for name, leaf in flatten_names(selected).items()}
            write_arrays(file, arrays, list(losses))
        moved.append(unflatten_names(read_arrays(file)[0]))
    return moved


def _linear_scores(attributor, path: Path, moved, config) -> dict[str, np.ndarray]:
    """The linearised scores (queries, N) of every method's weight changes, in one pass over the data set."""
    data, program = attributor.data, attributor.loss_program(config)
    schedule = attributor.pipeline.schedule
    selected, rest = select_weights(attributor.pipeline.params["unet"], config.weights)
    changes = [jax.tree.map(np.subtract, tree, selected) for trees in moved.values() for tree in trees]
    directions = jax.tree.map(lambda *leaves: np.stack(leaves), *changes)
    timesteps = strided_timesteps(config.stride, schedule.num_train_timesteps)

    def tile(shared, batch):
        selected, rest, schedule, key, timesteps, directions = shared

        def loss_fn(selected, rest, example):
            return example_loss(attributor.predict, schedule, merge_weights(selected, rest), key, example, timesteps)

        return influence_matrix(loss_fn, selected, rest, batch, directions)

    mesh = program.mesh
    run = tile_map(mesh, tile)
    shared = replicate(mesh, (selected, rest, schedule, loss_key(config.loss_seed), timesteps, directions))
    store = ChunkStore(path, {"score": ((2, len(changes)), np.float32)}, len(data), _ROWS_PER_CHUNK, "linear")
    missing = list(store.missing())
    with progress(2 * len(data), "linearised scores", "example") as bar:
        for chunk in range(store.num_chunks):
            rows = np.arange(len(data))[store.rows(chunk)]
            if chunk in missing:
                row, flip = np.repeat(rows, 2), np.tile([0, 1], len(rows)).astype(np.int32)
                values = []
                for members, mask in zip(*padded_tiles(len(row), _TILE * mesh.size)):
                    batch = Batch(
                        latents=data.latents[row[members], flip[members]],
                        text=data.text[data.first_caption[row[members]]],
                        row_id=data.row_ids[row[members]],
                        flip=flip[members],
                        caption=np.zeros(len(members), np.int32),
                        mask=mask.astype(np.float32),
                    )
                    values.append(np.asarray(run(shared, shard_batch(mesh, batch)))[mask])
                store.write(chunk, {"score": np.concatenate(values).reshape(len(rows), 2, -1)})
            bar.update(2 * len(rows))
    scores = store.read_all()["score"].max(axis=1).T
    return dict(zip(moved, np.split(scores, len(moved))))


def _exact(attributor, folder: Path, rows, name, config, moved, linear) -> dict[str, dict]:
    """Exact scores of the first queries, and how far the linearised ones agree with them."""
    count = min(_EXACT.value, len(rows))
    if not count:
        return {}
    before = attributor.base_losses(config)
    _, rest = select_weights(attributor.pipeline.params["unet"], config.weights)
    scores = []
    for row, selected in zip(rows[:count], moved):
        params = merge_weights(selected, rest)
        path = folder / str(row)
        after = attributor._losses(path, params, config, attributor.data, f"exact scores of row {row}")
        scores.append((after - before).max(axis=1))
    scores = np.stack(scores)
    overlap = [len(set(np.argsort(-a)[:100]) & set(np.argsort(-b)[:100])) for a, b in zip(scores, linear)]
    exact = {**_summary(attributor.dataset, rows[:count], scores), "top100_shared_with_linearised": overlap}
    return {
        f"{name}, exact, first {count}": exact,
        f"{name}, linearised, first {count}": _summary(attributor.dataset, rows[:count], linear[:count]),
    }


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
