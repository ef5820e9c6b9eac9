"""Makes an index for instant attribution: teacher scores, a student of them, and its vectors of all training images.

python -m launch.index --flagfile=configs/index_openmoji.cfg
python -m launch.index --flagfile=configs/index_openmoji.cfg --refresh
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from attrib_jax.core.checks import expand_path
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.methods import METHODS, ensemble_parts, method_readers
from attrib_jax.retrieval.build import build_index
from attrib_jax.retrieval.features import StudentFeatureConfig
from attrib_jax.retrieval.index import SubsetDataset, open_index, update_index, write_residual_index
from attrib_jax.retrieval.student import StudentConfig
from attrib_jax.retrieval.teacher import TeacherQueryConfig
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common
from launch.flags import check_unread, define_choice, define_flags, read_config

KINDS = ("student", "residual")

_KIND = define_choice(
    "kind",
    "student",
    KINDS,
    "What the index holds. student: vectors that are learned from the scores of --method; residual: the stored "
    "residuals of method residual, which need no training.",
)
_INDEX = flags.DEFINE_string("index", None, "Folder of the index; <workdir>/index if not given.")
_REFRESH = flags.DEFINE_boolean(
    "refresh",
    False,
    "Brings a finished index up to --dataset: new images are embedded and added, those that are gone removed; nothing "
    "is trained.",
)
_METHOD = define_choice("method", "unlearn", METHODS, "The teacher, an attribution method as of launch.attribute.")
define_flags(
    TeacherQueryConfig,
    StudentFeatureConfig,
    StudentConfig,
    *(method.config for method in METHODS.values()),
    skip=["method", "region", "region_mask"],
)


def main(argv: Sequence[str]) -> None:
    with common.command(argv):
        common.require(model=common.MODEL.value, workdir=common.workdir())
        folder = expand_path(_INDEX.value or f"{common.workdir()}/index")
        method = read_method("residual" if _KIND.value == "residual" else _METHOD.value)
        if _REFRESH.value:
            index = open_index(folder, flags.FLAGS.tower)
        elif _KIND.value == "student":
            configs = tuple(map(read_config, (TeacherQueryConfig, StudentFeatureConfig, StudentConfig)))
        pipeline = common.load_model()
        dataset = common.load_dataset(image_resolution(pipeline))
        root = StageRoot(common.workdir(), common.shipped_stages())
        with lock(common.workdir()):
            if _REFRESH.value:
                # Another folder for each content: stages belong to one data set.
                name = f"updates/{dataset.fingerprint()[:12]}"
                part = functools.partial(_run, pipeline, name=name)
                run = Run(pipeline, dataset, StageRoot(f"{common.workdir()}/{name}/whole"), common.encode_config())
                index, added, removed = update_index(index, run, lambda rows: part(SubsetDataset(dataset, rows)))
                print(f"{added} images added, {removed} removed")
            else:
                run = Run(pipeline, dataset, root, common.encode_config())
                if _KIND.value == "student":
                    index = build_index(folder, run, method, *configs)
                    for name, value in index.record["held_out"].items():
                        print(f"{name}: {value:.3f}")
                else:
                    index = write_residual_index(folder, run, method, {})
        print(f"index of {len(index.row_ids)} images: {folder}")


def _run(pipeline: Any, dataset: Any, name: str) -> Run:
    digest = dataset.fingerprint()[:12]
    return Run(pipeline, dataset, StageRoot(f"{common.workdir()}/{name}/new-{digest}"), common.encode_config())


def read_method(method: str) -> Any:
    """The config of the teacher, from the flags that it reads."""
    names = tuple(flags.FLAGS.ensemble_methods or ())
    own = method_readers(method, names)
    shared = (TeacherQueryConfig, StudentFeatureConfig, StudentConfig)
    check_unread(f"method {method!r}", {owner: (*configs, *shared) for owner, configs in own.items()})

    def build(name: str, **values: Any) -> Any:
        config = METHODS[name].config
        fields = {field.name for field in dataclasses.fields(config)}
        return read_config(config, method=name, **{key: value for key, value in values.items() if key in fields})

    parts = tuple(build(name) for name in ensemble_parts(method, names))
    return build(method, **({"parts": parts} if parts else {}))


if __name__ == "__main__":
    common.adopt_shared_flags()
    app.run(main, argv=common.arguments())
