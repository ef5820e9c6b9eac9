"""Trains a model again without the images that a method named, and shows what its image loses.

A LoRA:
python -m launch.verify --flagfile=configs/train_lora_openmoji.cfg --workdir=runs/verify_lora \
  --lora=runs/train_lora/lora --scores=runs/train_lora/attribute/attribution/QUERY/scores.npz --prompt="panda by ada"
A Custom Diffusion fine-tune (--mode=customize --exemplars=... --custom_diffusion=...), or a small model's UNet
(--mode=unet --model=WORKDIR/model), by the flags that trained it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from attrib_jax.convert.adapters.custom_diffusion import apply_custom_diffusion
from attrib_jax.convert.adapters.lora import merge_lora
from attrib_jax.convert.load import ModelSource
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.core.checks import expand_path
from attrib_jax.core.fingerprint import json_digest
from attrib_jax.core.settings import setting
from attrib_jax.core.types import Scores
from attrib_jax.data.images import UnreadableRowError
from attrib_jax.data.sources import Dataset
from attrib_jax.evaluation.retrain import Recipe
from attrib_jax.evaluation.trainers import CustomizeTrainer, LoraTrainer, Trainer, UNetTrainer
from attrib_jax.evaluation.verify import ALL, RANDOM, TOP, VerifyConfig, verify
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.jobs.query import PreparedQuery, Query, prepare_query, query_settings
from attrib_jax.models.predictor import predictor
from attrib_jax.report.verify import write_verify_page
from attrib_jax.storage.files import make_folder, write_json
from attrib_jax.storage.score_files import read_scores
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from attrib_jax.training.customize import Customization, CustomizeConfig
from attrib_jax.training.lora import LoraConfig
from launch import common
from launch.flags import check_unread, define_choice, define_flags, define_mode_flags, read_config

_PROMPT = flags.DEFINE_string("prompt", None, "Caption of the query.")
_QUERY = flags.DEFINE_string("query", None, "Image of the query; generated with --lora if not given.")
_SCORES = flags.DEFINE_string("scores", None, "Scores of the query: scores.npz of its result, or another score file.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Customize(CustomizeConfig):
    exemplars: str | None = setting(None, "")
    custom_diffusion: str | None = setting(None, "")
    prior_dataset: str | None = setting(None, "The real images that were trained beside the exemplars (as --dataset).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _UNet(Recipe):
    seed: int = setting(0, "Seed of weights, batches and noise.", low=0, high=2**32 - 1, flag="train_seed")


_MODES = {"lora": LoraConfig, "customize": _Customize, "unet": _UNet}
_MODE = define_choice(
    "mode",
    "lora",
    _MODES,
    "What is trained again, as `launch.train` trains it by the same flags: a LoRA on --dataset, a new word on "
    "--exemplars (Custom Diffusion), or the UNet of --model from scratch on --dataset.",
)
define_flags(Query, VerifyConfig)
define_mode_flags(_MODES)


def main(argv: Sequence[str]) -> None:
    with common.command(argv):
        common.require(model=common.MODEL.value, workdir=common.workdir(), prompt=_PROMPT.value, scores=_SCORES.value)
        source, config, mode = read_config(ModelSource), read_config(VerifyConfig), _MODE.value
        check_unread(f"mode {mode!r}", {f"mode {name!r}": each for name, each in _MODES.items()}, flagfiles=True)
        query = read_config(Query, prompt=_PROMPT.value, image=_QUERY.value)
        adapter = {"lora": source.lora, "customize": source.custom_diffusion, "unet": source.model}[mode]
        if query.image is None and not adapter:
            name = "lora" if mode == "lora" else "custom_diffusion"
            raise ValueError(f"{name} is not given, so no query can be drawn; give --{name}, or its image with --query")
        scores = read_scores(expand_path(_SCORES.value))
        without = {"lora": ["lora"], "customize": ["custom_diffusion"], "unet": []}[mode]
        base = common.load_model(without=without)
        with lock(common.workdir()):
            root = StageRoot(common.workdir())
            trainer, dataset = _trainer(mode, base, root)
            if mode == "customize":
                # In an attribution the exemplars come before --dataset, with their own row ids.
                own_rows = np.isin(scores.row_id, trainer.row_ids)
                scores = Scores(scores.row_id[own_rows], scores.score[own_rows])
            prepared = _prepared(base, source, mode, query)
            with root.stage(
                f"verify/{mode}-{json_digest(trainer.settings)[:8]}", trainer.settings, trainer.inputs
            ) as stage:
                verified = verify(stage.path, trainer, query, prepared, scores, config)
            named = json_digest([query_settings(query), config.describe(), verified.removed.tolist()])[:8]
            folder = Path(common.workdir()) / "verified" / named
            make_folder(folder)
            index = {int(row): place for place, row in enumerate(dataset.row_ids)}
            rows = trainer.row_ids[verified.removed].tolist()
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


def _trainer(mode: str, base: Pipeline, root: StageRoot) -> tuple[Trainer, Dataset]:
    """What trains again, and the images that it may go without."""
    if mode == "customize":
        own = flags.FLAGS
        common.require(exemplars=own.exemplars, initializer_token=own.initializer_token)
        resolution = image_resolution(base)
        exemplars = common.open_source(own.exemplars, resolution, caption_key=common.CAPTION_KEY.value)
        prior = own.prior_dataset and common.open_source(
            own.prior_dataset, resolution, caption_key=common.CAPTION_KEY.value
        )
        images = root.workdir / "verify" / "customize_images"
        config = read_config(CustomizeConfig)
        return CustomizeTrainer(Customization(base, exemplars, config, prior, images)), exemplars
    dataset = common.load_dataset(image_resolution(base))
    run = Run(base, dataset, root, common.encode_config())
    if mode == "lora":
        return LoraTrainer(run, read_config(LoraConfig)), dataset
    return UNetTrainer(run, read_config(Recipe), read_config(_UNet).seed), dataset


def _prepared(base: Pipeline, source: ModelSource, mode: str, query: Query) -> PreparedQuery:
    """The query as the model that is verified draws it, or its given image."""
    drawn = base
    if mode == "lora" and source.lora:
        drawn = merge_lora(base, list(source.lora), source.lora_scale)
    if mode == "customize" and source.custom_diffusion is not None:
        drawn = apply_custom_diffusion(base, expand_path(source.custom_diffusion))
    return prepare_query(drawn, predictor(drawn.unet), query)


def _image(dataset: Dataset, index: int) -> np.ndarray | None:
    try:
        return dataset[index].image
    except (LookupError, UnreadableRowError):
        return None


if __name__ == "__main__":
    common.adopt_shared_flags()
    app.run(main, argv=common.arguments())
