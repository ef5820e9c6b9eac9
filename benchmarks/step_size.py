"""The automatic step on training sets of every size: how far it goes, and whether the ranking still means something.

python -m benchmarks.step_size --workdir=runs/step_size --output=runs/step_size.json

For each size a UNet is trained from scratch on as many random digits (the recipe of configs/train_digits.cfg), draws
eight digits, and each is attributed with the automatic step and with the paper's. Prints a JSON line for each size and
step: step size, rise of the mean loss of random images and of the query, the share of the query's digit among the ten
best images, and in the data set. Resumable: models and scores are stages of the workdir.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from attrib_jax.attribute import attribute_queries
from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.load import load_pipeline
from attrib_jax.data.digits import WORDS, DigitsDataset
from attrib_jax.evaluation.retrain import Recipe, Retrainer
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query
from attrib_jax.methods.unlearn import UnlearnConfig, read_unlearning
from attrib_jax.retrieval.index import SubsetDataset
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from attrib_jax.training.draws import Training
from launch import common

_SIZES = flags.DEFINE_list("sizes", ["60", "120", "500", "1797"], "Sizes of the training sets.")
_RISES = flags.DEFINE_list("rises", ["0.005"], "Values of --loss_rise.")
_STEPS = flags.DEFINE_list("steps", ["0.01"], "Step sizes to compare with.")
_CURVATURES = flags.DEFINE_list("curvatures", ["diagonal", "ekfac"], "Curvatures.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file of the rows.")
_BEST = 10


def rows_of_size(workdir: Path, size: int) -> Iterator[dict[str, Any]]:
    """The rows of one training set; its model is trained if the workdir lacks it."""
    digits = DigitsDataset()
    rows = np.sort(np.random.default_rng(size).permutation(len(digits))[:size])
    dataset = SubsetDataset(digits, rows)
    base = load_pipeline("models/digits")
    model = workdir / "model"
    if not model.exists():
        run = Run(base, dataset, StageRoot(workdir / "training"))
        recipe = Recipe(steps=400, batch_size=min(64, size))
        (params,) = _models(Retrainer(base, run.data, recipe).train([Training(np.zeros(0, np.int64))]))
        save_pipeline(dataclasses.replace(base, params={**base.params, "unet": params}), model)
    run = Run(load_pipeline(str(model)), dataset, StageRoot(workdir / "attribution"))
    captions = [dataset.captions(place)[0] for place in range(size)]
    queries = [Query(prompt=f"digit {name}", seed=0, guidance_scale=2.0) for name in WORDS[:8]]
    shared = {"flips": "none", "query_draws": 1024, "fisher_samples": 8192}
    settings = [{"loss_rise": float(rise)} for rise in _RISES.value] + [{"step_size": float(s)} for s in _STEPS.value]
    for curvature in _CURVATURES.value:
        for own in settings:
            config = UnlearnConfig(**shared, **own, curvature=curvature)
            found = attribute_queries(run, queries, config)
            records = [read_unlearning(each.folder) for each in found]
            rises = np.array([[new / old - 1 for old, new in zip(each.before, each.after)] for each in records])
            place = {int(row): number for number, row in enumerate(dataset.row_ids)}
            hits = [
                np.mean([captions[place[row]] == query.prompt for row in each.scores.top(_BEST).row_id.tolist()])
                for query, each in zip(queries, found)
            ]
            yield {
                "images": size,
                "curvature": curvature,
                **own,
                "taken": [float(f"{np.mean([each.step_size for each in records]):.3g}")],
                "rise_of_images": float(np.median(rises[:, 0])),
                "largest_rise_of_images": float(rises[:, 0].max()),
                "rise_of_query": float(np.median(rises[:, 1])),
                f"precision_at_{_BEST}": float(np.mean(hits)),
                "error": float(np.std(hits, ddof=1) / len(hits) ** 0.5),
                "share": float(np.mean([np.mean([text == query.prompt for text in captions]) for query in queries])),
                "warned": sum(each.went_too_far for each in records),
            }


def _models(stacked: Any) -> list[Any]:
    count = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda leaf, place=place: np.asarray(leaf[place]), stacked) for place in range(count)]


def main():
    workdir = Path(common.workdir())
    rows = []
    with lock(workdir):
        for size in map(int, _SIZES.value):
            for row in rows_of_size(workdir / str(size), size):
                rows.append(row)
                print(json.dumps(row), flush=True)
    if _OUTPUT.value is not None:
        Path(_OUTPUT.value).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    common.run(main, one_host=True)
