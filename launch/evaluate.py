"""Evaluates attribution methods: by retraining without images, or by retrieval of images that are known.

python -m launch.evaluate --flagfile=configs/evaluate_digits.cfg
python -m launch.evaluate --flagfile=configs/evaluate_lds_digits.cfg --split=tuning
python -m launch.evaluate --flagfile=configs/evaluate_self.cfg
"""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from absl import app, flags

from attrib_jax.convert.tower import load_tower
from attrib_jax.core.checks import check_range
from attrib_jax.core.settings import Settings, setting
from attrib_jax.evaluation.counterfactual import Counterfactuals, MeasureConfig
from attrib_jax.evaluation.customized import CustomizedConfig, run_customized
from attrib_jax.evaluation.lds import LdsConfig, run_lds
from attrib_jax.evaluation.leave_k_out import LeaveKOutConfig, run_leave_k_out
from attrib_jax.evaluation.named import QueryFiles, StoredScores, read_methods, refuse_stored
from attrib_jax.evaluation.retrain import Recipe
from attrib_jax.evaluation.self_retrieval import SelfConfig, run_self
from attrib_jax.evaluation.similarity import check_sees_images
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.jobs.query import Query, prepare_query
from attrib_jax.methods.base import MethodConfig, moved_weights
from attrib_jax.storage.files import write_json
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common
from launch.flags import check_unread, define_choice, define_flags, read_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings(Settings):
    """Where a study's stages may come from."""

    use_shipped_stages: bool = setting(True, "Whether finished stages that came with the model are reused.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """How models are spread over devices."""

    models_per_device: int = setting(
        1, "Models that one device trains at once; changes the speed, and results by rounding.", low=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegenerationSettings(Settings):
    """What becomes of the queries as retrained models draw them."""

    pictures: bool = setting(False, "Whether the queries as retrained models draw them are kept and shown.")
    tower: str | None = setting(
        None,
        "Transformers folder or Hugging Face id of the feature tower that compares these images with the queries, such "
        "as models/openmoji_tower.",
        path=True,
        only_if="pictures",
    )


_RETRAINING = (QueryFiles, Query, Recipe, MeasureConfig, DeviceSettings, StageSettings)
# Protocol -> the settings that it reads.
PROTOCOLS: dict[str, tuple[type[Settings], ...]] = {
    "leave-k-out": (LeaveKOutConfig, RegenerationSettings, *_RETRAINING),
    "lds": (LdsConfig, *_RETRAINING),
    "customized": (CustomizedConfig,),
    "self": (SelfConfig, StageSettings),
}

_PROTOCOL = define_choice(
    "protocol",
    None,
    PROTOCOLS,
    "Study: retraining without each method's top images (leave-k-out), the linear datamodeling score (lds), exemplars "
    "of customised models (customized), or training images as queries (self).",
)
_METHODS = flags.DEFINE_string(
    "methods", None, "JSON file of the methods: name -> settings that differ from the defaults."
)
_ONLY = flags.DEFINE_list("only", [], "Names of methods in that file, separated by commas; all if not given.")
define_flags(
    *(config for configs in PROTOCOLS.values() for config in configs),
    skip=["seed", "sampler", "recall_k"],
    defaults={"guidance_scale": 2.0},
)


def main(argv: Sequence[str]) -> None:
    with common.command(argv):
        protocol, workdir = _PROTOCOL.value, common.workdir()
        common.require(protocol=protocol, model=common.MODEL.value, workdir=workdir, methods=_METHODS.value)
        check_unread(f"protocol {protocol!r}", {f"protocol {name!r}": configs for name, configs in PROTOCOLS.items()})
        config = read_config(PROTOCOLS[protocol][0])
        methods = read_methods(_METHODS.value, _ONLY.value)
        if isinstance(config, CustomizedConfig):
            table, name = _customized(workdir, refuse_stored(methods, protocol), config), protocol
        elif isinstance(config, SelfConfig):
            table, name = _self(workdir, refuse_stored(methods, protocol), config), f"{protocol}-{config.split}"
        else:
            table, name = _retraining(workdir, methods, config), f"{protocol}-{config.split}"
        write_json(Path(workdir) / "evaluation" / name / "flags.json", common.own_flags("launch.evaluate"))
        print(table)


def _customized(workdir: str, methods: Mapping[str, MethodConfig], config: CustomizedConfig) -> str:
    common.require(cases=config.cases)
    base = common.load_model()
    dataset = common.load_dataset(image_resolution(base))
    with lock(workdir):
        return run_customized(workdir, base, dataset, methods, config, common.encode_config())


def _self(workdir: str, methods: Mapping[str, MethodConfig], config: SelfConfig) -> str:
    moved = set().union(*map(moved_weights, methods.values()))
    with _open_run(workdir, moved) as run:
        return run_self(run, methods, config)


def _retraining(
    workdir: str, methods: Mapping[str, MethodConfig | StoredScores], config: LeaveKOutConfig | LdsConfig
) -> str:
    # All that can be wrong with the flags, before anything is drawn or trained.
    recipe, files, devices = (read_config(each) for each in (Recipe, QueryFiles, DeviceSettings))
    regeneration = read_config(RegenerationSettings) if isinstance(config, LeaveKOutConfig) else RegenerationSettings()
    measure = read_config(MeasureConfig, pictures=regeneration.pictures)
    common.require(reported_queries=files.reported_queries)
    # A retrained model is asked about the queries of both splits, whichever are reported.
    queries = files.read(read_config(Query, prompt=""))
    queries.split(config.split)
    tower = None if regeneration.tower is None else load_tower(regeneration.tower)
    if tower is not None:
        check_sees_images(tower)

    with _open_run(workdir) as run:
        check_range("measure_stride", measure.stride, 1, run.pipeline.schedule.num_train_timesteps, integer=True)
        if isinstance(config, LeaveKOutConfig):
            config.all_counts(len(run.dataset))
        prepared = [prepare_query(run.pipeline, run.predict, query) for query in queries.queries]
        counterfactuals = Counterfactuals(run, queries.queries, prepared, recipe, measure, devices.models_per_device)
        if isinstance(config, LeaveKOutConfig):
            return run_leave_k_out(counterfactuals, methods, queries, config, tower)[1]
        return run_lds(counterfactuals, methods, queries, config)[1]


@contextlib.contextmanager
def _open_run(workdir: str, weights: Collection[str] = ()) -> Iterator[Run]:
    """The run of the flags' model, of which `weights` are selected, data set and workdir, which is locked."""
    pipeline = common.load_model(weights)
    dataset = common.load_dataset(image_resolution(pipeline))
    shipped = common.shipped_stages() if read_config(StageSettings).use_shipped_stages else None
    with lock(workdir):
        yield Run(pipeline, dataset, StageRoot(workdir, shipped), common.encode_config())


if __name__ == "__main__":
    common.adopt_shared_flags()
    app.run(main, argv=common.arguments())
