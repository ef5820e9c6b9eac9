"""Trains a LoRA again without the images that a method named, and shows what its image loses.

python -m launch.verify --flagfile=configs/train_lora_openmoji.cfg --workdir=runs/verify_lora \
  --lora=runs/train_lora/lora --scores=runs/train_lora/attribute/attribution/QUERY/scores.npz --prompt="panda by ada"
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from attrib_jax.convert.adapters.lora import merge_lora
from attrib_jax.convert.load import ModelSource
from attrib_jax.core.checks import expand_path
from attrib_jax.core.fingerprint import json_digest
from attrib_jax.data.images import UnreadableRowError
from attrib_jax.data.sources import Dataset
from attrib_jax.evaluation.verify import ALL, RANDOM, TOP, VerifyConfig, verify
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.jobs.query import Query, prepare_query, query_settings
from attrib_jax.models.predictor import predictor
from attrib_jax.report.verify import write_verify_page
from attrib_jax.storage.files import make_folder, write_json
from attrib_jax.storage.score_files import read_scores
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from attrib_jax.training.lora import LoraConfig
from launch import common
from launch.flags import define_flags, read_config

_PROMPT = flags.DEFINE_string("prompt", None, "Caption of the query.")
_QUERY = flags.DEFINE_string("query", None, "Image of the query; generated with --lora if not given.")
_SCORES = flags.DEFINE_string("scores", None, "Scores of the query: scores.npz of its result, or another score file.")
_MODE = flags.DEFINE_enum("mode", "lora", ["lora"], "What is trained, as in `launch.train`, whose flagfile it takes.")
define_flags(Query, VerifyConfig, LoraConfig)


def main(argv: Sequence[str]) -> None:
    with common.command(argv):
        common.require(model=common.MODEL.value, workdir=common.workdir(), prompt=_PROMPT.value, scores=_SCORES.value)
        source, config, lora = (read_config(each) for each in (ModelSource, VerifyConfig, LoraConfig))
        query = read_config(Query, prompt=_PROMPT.value, image=_QUERY.value)
        if query.image is None and not source.lora:
            raise ValueError("lora is not given, so the query cannot be drawn; give --lora, or its image with --query")
        scores = read_scores(expand_path(_SCORES.value))
        base = common.load_model(with_lora=False)
        dataset = common.load_dataset(image_resolution(base))
        with lock(common.workdir()):
            root = StageRoot(common.workdir())
            run = Run(base, dataset, root, common.encode_config())
            drawn = merge_lora(base, list(source.lora), source.lora_scale) if source.lora else base
            prepared = prepare_query(drawn, predictor(drawn.unet), query)
            settings = {name: value for name, value in lora.describe().items() if name != "seed"}
            with root.stage(f"verify/{_MODE.value}-{json_digest(settings)[:8]}", settings, run.inputs) as stage:
                verified = verify(stage.path, run, query, prepared, scores, config, lora)
            named = json_digest([query_settings(query), config.describe(), verified.removed.tolist()])[:8]
            folder = Path(common.workdir()) / "verified" / named
            make_folder(folder)
            index = {int(row): place for place, row in enumerate(dataset.row_ids)}
            rows = run.data.row_ids[verified.removed].tolist()
            removed = [(_image(dataset, index[row]), next(iter(dataset.captions(index[row])), "")) for row in rows]
            write_verify_page(folder / "report.html", query.prompt, prepared.image, verified, removed)
            table = {variant: losses.tolist() for variant, losses in verified.losses.items()}
            content = {"prompt": query.prompt, "seeds": list(verified.seeds), "losses": table, "removed": rows}
            write_json(folder / "verified.json", content)
        for name, estimate in (
            (f"{TOP} {config.num_removed}", verified.change(TOP)),
            (f"{RANDOM} {config.num_removed}", verified.change(RANDOM)),
            ("top over random", verified.over_random()),
        ):
            print(f"dL {name}: {estimate.mean:.5f} +- {estimate.error:.5f}")
        print(f"loss {ALL}: {verified.losses[ALL].mean():.5f}\nreport: {folder / 'report.html'}")


def _image(dataset: Dataset, index: int) -> np.ndarray | None:
    try:
        return dataset[index].image
    except (LookupError, UnreadableRowError):
        return None


if __name__ == "__main__":
    common.adopt_shared_flags()
    app.run(main, argv=common.arguments())
