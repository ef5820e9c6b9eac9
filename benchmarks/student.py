"""Studies the student of an index: features, loss and number of teacher queries; and the index beside simpler methods.

python -m benchmarks.student --flagfile=configs/index_openmoji.cfg --output=runs/student.json

The flags are those of launch.index, whose stages it reuses. Choices are compared on a fifth of the queries that the
student is trained on otherwise, so that the held-out queries choose nothing; methods are compared on the held-out ones.
"""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from attrib_jax.evaluation.metrics import mean_and_error
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.methods import METHODS, method_config
from attrib_jax.methods.base import QueryJob
from attrib_jax.retrieval.build import fit_student, make_lesson
from attrib_jax.retrieval.features import KINDS, Features, StudentFeatureConfig
from attrib_jax.retrieval.student import (
    LOSSES,
    Lesson,
    StudentConfig,
    held_out,
    mean_average_precision,
    train_student,
)
from attrib_jax.retrieval.teacher import TeacherQueryConfig, prepare_teacher_queries, scores_by_row, teacher_queries
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common
from launch.flags import read_config
from launch.index import read_method

_OUTPUT = flags.DEFINE_string("output", None, "JSON file of the rows.")
_EPOCHS = flags.DEFINE_integer("study_epochs", 20, "Epochs of the compared students.", lower_bound=1)
_VARIANTS = flags.DEFINE_boolean("variants", True, "Whether settings are compared, or only methods.")


def variants(lesson: Lesson, widths: Sequence[int], config: StudentConfig) -> list[dict[str, Any]]:
    """Rows of students that differ in one setting, mAP(L) on the last fifth of the training queries."""
    train = np.flatnonzero(~lesson.held_out)
    inner = train[-(len(train) // 5) :]
    ends = np.cumsum(widths)
    columns = {name: np.arange(end - width, end) for name, end, width in zip(KINDS, ends, widths)}
    tried: list[tuple[str, StudentConfig, tuple[str, ...], float]] = [
        *((f"loss {loss}", dataclasses.replace(config, student_loss=loss), ("image", "text"), 1.0) for loss in LOSSES),
        *((f"features {'+'.join(names)}", config, names, 1.0) for names in (("image",), ("text",), KINDS)),
        *((f"{share:.0%} of the queries", config, ("image", "text"), share) for share in (0.25, 0.5)),
        ("linear", dataclasses.replace(config, student_layers=0), ("image", "text"), 1.0),
    ]
    rows = []
    for title, own, names, share in tried:
        rest = np.setdiff1d(train, inner)
        rows_of = np.concatenate([rest[: round(share * len(rest))], inner])
        picked = np.concatenate([columns[name] for name in names])
        part = Lesson(
            lesson.queries[rows_of][:, picked],
            lesson.images[:, picked],
            np.asarray(lesson.scores)[rows_of],
            np.isin(rows_of, inner),
        )
        with tempfile.TemporaryDirectory() as folder:
            params, _ = train_student(Path(folder), part, own)
        found = mean_and_error(held_out(params, own, part))
        plain = part.queries[part.held_out] @ part.images.T
        features = mean_average_precision(plain, part.scores[part.held_out], own.student_top).mean()
        rows.append(
            {
                "student": title,
                "queries": int((~part.held_out).sum()),
                "map": found.mean,
                "error": found.error,
                "features_map": float(features),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def methods(run: Run, lesson: Lesson, queries: Any, student: np.ndarray, top: int) -> list[dict[str, Any]]:
    """Rows of the student and of other methods: mAP(L) of the held-out queries, and the student's paired difference."""
    held = np.flatnonzero(lesson.held_out)
    teacher = np.asarray(lesson.scores)[held]
    width = lesson.images.shape[1] // 2
    halves = {
        "tower, image and caption": slice(None),
        "tower, image": slice(width),
        "tower, caption": slice(width, None),
    }
    found = {"student": student} | {
        name: mean_average_precision(lesson.queries[held][:, part] @ lesson.images[:, part].T, teacher, top)
        for name, part in halves.items()
    }
    prepared = prepare_teacher_queries(run, queries, held.tolist())
    for name, config in (
        ("pixel", method_config("pixel", flips="none")),
        ("residual", method_config("residual", flips="none")),
        ("random", method_config("random")),
    ):
        with tempfile.TemporaryDirectory() as folder:
            jobs = [QueryJob(f"q{row}", {"row": int(row)}, query, Path(folder)) for row, query in zip(held, prepared)]
            scored = [each.scores for each in METHODS[name].score(run, jobs, config)]
        values = np.stack([scores_by_row(run, each) for each in scored])
        found[name] = mean_average_precision(values, teacher, top)
    rows = []
    for name, values in found.items():
        own, gain = mean_and_error(values), mean_and_error(student - values)
        rows.append(
            {"method": name, "map": own.mean, "error": own.error, "student_less": gain.mean, "its_error": gain.error}
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main():
    common.require(model=common.MODEL.value, workdir=common.workdir())
    teacher = read_method(flags.FLAGS.method)
    query_config, feature_config, config = map(read_config, (TeacherQueryConfig, StudentFeatureConfig, StudentConfig))
    pipeline = common.load_model()
    dataset = common.load_dataset(image_resolution(pipeline))
    with lock(common.workdir()):
        run = Run(pipeline, dataset, StageRoot(common.workdir(), common.shipped_stages()), common.encode_config())
        queries = teacher_queries(run, query_config)
        channels = pipeline.unet.config.in_channels
        every = Features(dataclasses.replace(feature_config, student_features=KINDS), channels)
        whole = make_lesson(run, queries, every, query_config, teacher)
        features = Features(feature_config, channels)
        lesson = make_lesson(run, queries, features, query_config, teacher)
        params = fit_student(run, lesson, features, config, query_config, teacher)
        rows = methods(run, lesson, queries, held_out(params, config, lesson), config.student_top)
        short = dataclasses.replace(config, student_epochs=_EPOCHS.value)
        rows += variants(whole, every.widths, short) if _VARIANTS.value else []
    if _OUTPUT.value is not None:
        Path(_OUTPUT.value).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    common.run(main, one_host=True)
