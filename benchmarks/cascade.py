"""How many of the best images a coarse pass keeps among the finalists, and what a cascade saves.

    python -m benchmarks.cascade --model=models/openmoji --workdir=runs/cascade

Each query, generated from the caption of a random training image, is scored in full, and at every coarse stride with
the first caption. The finalists of a cascade have the scores of the full pass to the bit, so what a fraction keeps of
the exact top 100 is what of it lies among that fraction of the best coarse scores. Seconds are those of the passes over
the data set: the losses before are shared by all queries, and not counted. Prints a markdown table and writes
results.json; a run that was stopped goes on where it was. About 16 minutes on two idle cores at the default settings.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from absl import flags

from attrib_jax.attribute import attribute_queries
from attrib_jax.attribution.scores import FLIP_RULES
from attrib_jax.core.types import ranking
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query, query_name, query_settings
from attrib_jax.jobs.settings import CAPTIONS, SCORES
from attrib_jax.methods import method_config
from attrib_jax.storage.files import write_json
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common

_QUERIES = flags.DEFINE_integer("queries", 3, "Number of queries.", lower_bound=1)
_STRIDES = flags.DEFINE_list("coarse_strides", ["200", "250", "500"], "Coarse strides.")
_FRACTIONS = flags.DEFINE_list("fractions", ["0.05", "0.1", "0.15", "0.25", "0.4"], "Shares of the images kept.")
_STRIDE = flags.DEFINE_integer("stride", 100, "Stride of the full setting.")
_CAPTIONS = flags.DEFINE_enum("captions", "first", CAPTIONS, "Captions of the full setting.")
_FLIPS = flags.DEFINE_enum("flips", "max", FLIP_RULES, "How the scores of an image and of its mirror image make one.")
_SCORE = flags.DEFINE_enum("score", "exact", SCORES, "Exact or linearised scores.")
_DRAWS = flags.DEFINE_integer("query_draws", 2048, "Draws of each query's gradient.")
_FISHER_SAMPLES = flags.DEFINE_integer("fisher_samples", 16384, "Samples of the Fisher information.")
_SAMPLER_STEPS = flags.DEFINE_integer("sampler_steps", 50, "Sampling steps of the queries.")
# The pass over the data set in `Attribution.timings`.
_PASSES = ("losses after", "linearised scores")


def main():
    common.require(model=common.MODEL.value, workdir=common.workdir())
    pipeline, dataset = common.load_model(), common.load_dataset()
    full = method_config(
        query_draws=_DRAWS.value,
        fisher_samples=_FISHER_SAMPLES.value,
        stride=_STRIDE.value,
        captions=_CAPTIONS.value,
        flips=_FLIPS.value,
        score=_SCORE.value,
    )
    # The library's own check that a coarse stride is none that is finer.
    coarse = {
        int(stride): dataclasses.replace(full, cascade=1.0, cascade_stride=int(stride)).coarse()
        for stride in _STRIDES.value
    }
    fractions = [float(fraction) for fraction in _FRACTIONS.value]
    images = np.random.default_rng(11).permutation(len(dataset))[: _QUERIES.value]
    queries = [
        Query(dataset.captions(int(row))[0], seed=seed, guidance_scale=2.0, sampler_steps=_SAMPLER_STEPS.value)
        for seed, row in enumerate(images)
    ]
    with lock(common.workdir()):
        run = Run(pipeline, dataset, StageRoot(common.workdir(), common.shipped_stages()))
        seconds_file = Path(common.workdir()) / "seconds.json"
        exact = [_timed(run, query, full, seconds_file) for query in queries]
        fast = {
            stride: [_timed(run, query, config, seconds_file) for query in queries] for stride, config in coarse.items()
        }
        results = _summary(run, full, coarse, fractions, exact, fast)
        write_json(Path(common.workdir()) / "results.json", results)
    print(_table(results))


def _timed(run, query, config, seconds_file: Path):
    """The scores of one query at one setting, and the seconds of its pass over the data set.

    A pass that was stopped and went on has no time of its own: NaN.
    """
    name = query_name(query, {"query": query_settings(query), **config.describe()})
    fresh = not (run.root.workdir / "attribution" / name / "losses").exists()
    result = attribute_queries(run, [query], config)[0]
    seconds = json.loads(seconds_file.read_text()) if seconds_file.exists() else {}
    if fresh:
        (seconds[name],) = (taken for stage, (taken, _) in result.timings.items() if stage in _PASSES)
        write_json(seconds_file, seconds)
    return result.scores, seconds.get(name, math.nan)


def _summary(run, full, coarse, fractions, exact, fast) -> list[dict]:
    """One row for every coarse stride and fraction; means over the queries, and the worst recall."""
    steps = run.pipeline.schedule.num_train_timesteps
    count = len(run.data)
    captions = run.data.num_captions.mean() if full.captions == "all" else 1.0
    per_image = full.num_flips * len(strided_timesteps(full.stride, steps)) * captions
    full_seconds = np.nanmean([seconds for _, seconds in exact])
    rows = []
    for stride, config in coarse.items():
        coarse_forwards = count * full.num_flips * len(strided_timesteps(stride, steps))
        coarse_seconds = np.nanmean([seconds for _, seconds in fast[stride]])
        for fraction in fractions:
            finalists = math.ceil(fraction * count)
            kept = {
                top: [_recall(scores, quick, top, finalists) for (scores, _), (quick, _) in zip(exact, fast[stride])]
                for top in (20, 100)
            }
            rows.append(
                {
                    "coarse_stride": config.stride,
                    "fraction": fraction,
                    "finalists": finalists,
                    "recall_at_100": float(np.mean(kept[100])),
                    "worst_recall_at_100": float(np.min(kept[100])),
                    "recall_at_20": float(np.mean(kept[20])),
                    "worst_recall_at_20": float(np.min(kept[20])),
                    "forwards_saved": float(count * per_image / (coarse_forwards + finalists * per_image)),
                    "seconds_saved": float(full_seconds / (coarse_seconds + finalists / count * full_seconds)),
                }
            )
    return rows


def _recall(exact, coarse, top: int, finalists: int) -> float:
    best, kept = ranking(exact.score, exact.row_id)[:top], ranking(coarse.score, coarse.row_id)[:finalists]
    return len(np.intersect1d(best, kept)) / len(best)


def _table(rows: list[dict]) -> str:
    lines = [
        "| coarse stride | fraction | finalists | recall@100 (worst) | of the top 20 (worst) | forwards | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['coarse_stride']}", f"{row['fraction']:g}", f"{row['finalists']}"]
        cells += [f"{row[f'recall_at_{top}']:.3f} ({row[f'worst_recall_at_{top}']:.2f})" for top in (100, 20)]
        cells += [f"{row['forwards_saved']:.1f}x fewer", f"{row['seconds_saved']:.1f}x faster"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    common.run(main)
