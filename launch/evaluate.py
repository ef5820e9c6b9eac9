"""Evaluates attribution methods: by retraining without pictures, or by retrieval of pictures that are known.

python -m launch.evaluate --flagfile=configs/evaluate_digits.cfg
python -m launch.evaluate --flagfile=configs/evaluate_lds_digits.cfg --split=tuning
python -m launch.evaluate --flagfile=configs/evaluate_self.cfg
"""

from collections.abc import Mapping
from pathlib import Path

from absl import flags

from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.convert.tower import load_tower
from attrib_jax.data.sources import Dataset
from attrib_jax.evaluation.counterfactual import Counterfactuals, MeasureConfig
from attrib_jax.evaluation.customized import CustomizedConfig, random_rows, read_cases, run_customized
from attrib_jax.evaluation.lds import LdsConfig, run_lds
from attrib_jax.evaluation.leave_k_out import LeaveKOutConfig, run_leave_k_out
from attrib_jax.evaluation.named import SPLITS, QuerySet, read_methods
from attrib_jax.evaluation.retrain import Recipe
from attrib_jax.evaluation.self_retrieval import SelfConfig, run_self
from attrib_jax.evaluation.similarity import check_sees_pictures
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.jobs.query import Query, prepare_query
from attrib_jax.jobs.query_file import read_queries
from attrib_jax.methods.base import MethodConfig
from attrib_jax.storage.files import write_json
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common

_PROTOCOL = flags.DEFINE_enum(
    "protocol", None, ["leave-k-out", "lds", "customized", "self"], "What to do with the methods."
)
_METHODS = flags.DEFINE_string("methods", None, "JSON file: name -> settings that differ from the defaults.")
_ONLY = flags.DEFINE_list("only", [], "Names of methods in that file, separated by commas; all if not given.")
_SPLIT = flags.DEFINE_enum(
    "split", "reported", SPLITS, "Queries to report; settings are chosen on the tuning ones, never on the others."
)
_TUNING = flags.DEFINE_string("tuning_queries", None, "JSON Lines file of generated queries, see launch.attribute.")
_REPORTED = flags.DEFINE_string("reported_queries", None, "Another one, of other queries.")
_GUIDANCE = flags.DEFINE_float("guidance_scale", 2.0, "Classifier-free guidance of the queries.", lower_bound=0)
_SAMPLER_STEPS = flags.DEFINE_integer("sampler_steps", 50, "DDIM steps of the queries.", lower_bound=1)

_STEPS = flags.DEFINE_integer("train_steps", 400, "Steps of a training.", lower_bound=1)
_BATCH = flags.DEFINE_integer("train_batch_size", 64, "Pictures a step.", lower_bound=1)
_RATE = flags.DEFINE_float("learning_rate", 3e-3, "Peak rate.", lower_bound=0)
_DROPOUT = flags.DEFINE_float("caption_dropout", 0.1, "Share of empty captions.", lower_bound=0, upper_bound=1)
_FLIPS = flags.DEFINE_boolean("random_flips", False, "Mirror half of the pictures that are drawn.")
_PER_DEVICE = flags.DEFINE_integer(
    "models_per_device", 1, "Models that one device trains at once. Changes the speed, and results by rounding.", 1
)
_MEASURE_STRIDE = flags.DEFINE_integer("measure_stride", 5, "Timesteps of the queries' own losses.", lower_bound=1)
_MEASURE_SEED = flags.DEFINE_integer("measure_seed", 0, "Of the noise of these losses.", lower_bound=0)

_PICTURES = flags.DEFINE_boolean(
    "pictures", False, "leave-k-out: keep the queries as retrained models draw them, and show them."
)
_TOWER = flags.DEFINE_string(
    "tower",
    None,
    "leave-k-out, with --pictures: transformers folder or Hugging Face id of the feature tower in which these pictures "
    "are compared with the queries, such as models/openmoji_tower.",
)
_REMOVE = flags.DEFINE_list("remove", ["0.05"], "leave-k-out: pictures removed, as numbers or as shares below 1.")
_CURVE = flags.DEFINE_list("curve", [], "leave-k-out: further numbers or shares of random pictures.")
_RANDOM_SETS = flags.DEFINE_integer("random_sets", 10, "leave-k-out: random sets of each number.", lower_bound=1)
_SEEDS = flags.DEFINE_list("train_seeds", ["0"], "leave-k-out: seeds of trainings, over which changes are averaged.")
_MODELS = flags.DEFINE_integer("lds_models", 64, "lds: models.", lower_bound=3)
_SHARE = flags.DEFINE_float("lds_share", 0.5, "lds: share of the pictures that a model is trained on.", 0.0, 1.0)
_SUBSET_SEED = flags.DEFINE_integer("lds_seed", 0, "lds: of the subsets.", lower_bound=0)

_QUERIES = flags.DEFINE_integer("self_queries", 50, "self: training pictures to query with.", lower_bound=1)
_CASES = flags.DEFINE_string("cases", None, "customized: task list in the layout of the Customized-Model benchmark.")
_CASES_ROOT = flags.DEFINE_string("cases_root", None, "customized: folder that its paths are relative to; its own.")
_TOKEN = flags.DEFINE_string("token", "<new1>", "customized: the new word V*, left out in the second form of a prompt.")
_ROWS = flags.DEFINE_integer(
    "rows", 0, "customized: random pictures of --dataset to hide exemplars among; 0 for all.", 0
)
_SHIPPED = flags.DEFINE_boolean("use_shipped_stages", True, "Reuse the finished stages that came with the model.")

_TRAINING = (
    *("tuning_queries", "reported_queries", "guidance_scale", "sampler_steps", "measure_stride", "measure_seed"),
    *("train_steps", "train_batch_size", "learning_rate", "caption_dropout", "random_flips", "models_per_device"),
)
# Flags of some protocols: given with another, they show a mistake.
_OF = (
    (("leave-k-out",), ("remove", "curve", "random_sets", "train_seeds", "pictures", "tower")),
    (("lds",), ("lds_models", "lds_share", "lds_seed")),
    (("customized",), ("cases", "cases_root", "token", "rows")),
    (("self",), ("self_queries",)),
    (("leave-k-out", "lds"), _TRAINING),
    (("leave-k-out", "lds", "self"), ("split", "use_shipped_stages")),
)


def main():
    common.require(protocol=_PROTOCOL.value, model=common.MODEL.value, workdir=common.workdir(), methods=_METHODS.value)
    _refuse_flags_of_another_protocol()
    methods = read_methods(_METHODS.value, _ONLY.value)
    pipeline = common.load_model()
    dataset = common.load_dataset(image_resolution(pipeline))
    if _PROTOCOL.value == "customized":
        table = _customized(pipeline, dataset, methods)
    else:
        root = StageRoot(common.workdir(), common.shipped_stages() if _SHIPPED.value else None)
        with lock(common.workdir()):
            run = Run(pipeline, dataset, root, common.encode_config())
            if _PROTOCOL.value == "self":
                table = run_self(run, methods, SelfConfig(_QUERIES.value, _SPLIT.value))
            else:
                table = _counterfactual(run, methods)
    name = _PROTOCOL.value if _PROTOCOL.value == "customized" else f"{_PROTOCOL.value}-{_SPLIT.value}"
    write_json(Path(common.workdir()) / "evaluation" / name / "flags.json", common.own_flags("launch.evaluate"))
    print(table)


def _customized(pipeline: Pipeline, dataset: Dataset, methods: Mapping[str, MethodConfig]) -> str:
    common.require(cases=_CASES.value)
    cases, rest = read_cases(_CASES.value, _CASES_ROOT.value), random_rows(dataset, _ROWS.value)
    settings = (CustomizedConfig(_TOKEN.value), common.encode_config())
    with lock(common.workdir()):
        return run_customized(common.workdir(), pipeline, rest, cases, methods, *settings)


def _counterfactual(run: Run, methods: Mapping[str, MethodConfig]) -> str:
    tower = None if _TOWER.value is None else load_tower(_TOWER.value)
    if tower is not None:
        check_sees_pictures(tower)
    queries = _query_set()
    config = _leave_k_out(len(run.dataset)) if _PROTOCOL.value == "leave-k-out" else None
    recipe = Recipe(
        steps=_STEPS.value,
        batch_size=_BATCH.value,
        learning_rate=_RATE.value,
        warmup_steps=min(50, _STEPS.value // 10),
        caption_dropout=_DROPOUT.value,
        random_flips=_FLIPS.value,
    )
    prepared = [prepare_query(run.pipeline, run.predict, query) for query in queries.queries]
    counterfactuals = Counterfactuals(
        run,
        queries.queries,
        prepared,
        recipe,
        MeasureConfig(_MEASURE_STRIDE.value, _MEASURE_SEED.value, _PICTURES.value),
        _PER_DEVICE.value,
    )
    if config is not None:
        return run_leave_k_out(counterfactuals, methods, queries, _SPLIT.value, config, tower)[1]
    lds = LdsConfig(_MODELS.value, _SHARE.value, _SUBSET_SEED.value)
    return run_lds(counterfactuals, methods, queries, _SPLIT.value, lds)[1]


def _query_set() -> QuerySet:
    """The queries of both splits: a retrained model is asked about all of them, whichever are reported."""
    common.require(reported_queries=_REPORTED.value)
    defaults = Query("", guidance_scale=_GUIDANCE.value, sampler_steps=_SAMPLER_STEPS.value)
    files = [file for file in (_TUNING.value, _REPORTED.value) if file is not None]
    read = [read_queries(file, defaults).queries for file in files]
    seen = set()
    for query in (query for queries in read for query in queries):
        if (query.prompt, query.seed) in seen:
            raise ValueError(f"query {query.prompt!r} with seed {query.seed} comes twice in {' and '.join(files)}")
        seen.add((query.prompt, query.seed))
    tuning = len(read[0]) if _TUNING.value is not None else 0
    return QuerySet(tuple(query for queries in read for query in queries), tuning)


def _leave_k_out(size: int) -> LeaveKOutConfig:
    try:
        seeds = tuple(map(int, _SEEDS.value))
    except ValueError as error:
        raise ValueError(f"train_seeds is {','.join(_SEEDS.value)!r}; expected whole numbers") from error
    config = LeaveKOutConfig(
        _counts("remove", _REMOVE.value, size), _counts("curve", _CURVE.value, size), _RANDOM_SETS.value, seeds
    )
    config.check_size(size)
    return config


def _counts(name: str, values: list[str], size: int) -> tuple[int, ...]:
    """Numbers of pictures; a share below 1 is of `size` of them."""
    try:
        numbers = [float(value) for value in values]
        if not all(0 < number < 1 or (number >= 1 and number.is_integer()) for number in numbers):
            raise ValueError("out of range")
    except ValueError as error:
        raise ValueError(
            f"{name} is {','.join(values)!r}; expected numbers of pictures, or shares of all between 0 and 1"
        ) from error
    # A number and a share may be one.
    return tuple(dict.fromkeys(max(1, round(number * size)) if number < 1 else int(number) for number in numbers))


def _refuse_flags_of_another_protocol() -> None:
    for protocols, names in _OF:
        wrong = [f"--{name}" for name in names if flags.FLAGS[name].present]
        if wrong and _PROTOCOL.value not in protocols:
            raise ValueError(
                f"{', '.join(wrong)} belong to --protocol={' or '.join(protocols)}, but the protocol is "
                f"{_PROTOCOL.value}; leave them out"
            )
    if _TOWER.value is not None and not _PICTURES.value:
        raise ValueError(
            f"tower is {_TOWER.value!r}, but it compares the pictures that --pictures keeps: give --pictures too. "
            "Models that were trained without it are trained again."
        )


if __name__ == "__main__":
    common.run(main, one_host=True)
