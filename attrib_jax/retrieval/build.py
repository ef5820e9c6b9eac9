"""From a method and a model to an index: teacher queries, their scores, the student, its vectors; each a stage."""

import os
from typing import Any

import numpy as np

from attrib_jax.core.fingerprint import json_digest
from attrib_jax.evaluation.metrics import mean_and_error
from attrib_jax.jobs.context import Run
from attrib_jax.methods import method_inputs
from attrib_jax.methods.base import MethodConfig
from attrib_jax.retrieval.features import Features, StudentFeatureConfig
from attrib_jax.retrieval.index import LearnedQueries, StudentIndex, write_student_index
from attrib_jax.retrieval.student import (
    Lesson,
    StudentConfig,
    held_out,
    load_student,
    mean_average_precision,
    stored_student,
    train_student,
)
from attrib_jax.retrieval.teacher import (
    TeacherQueries,
    TeacherQueryConfig,
    prepare_teacher_queries,
    teacher_queries,
    teacher_scores,
)
from attrib_jax.storage.files import DamagedFileError

_QUERIES_AT_ONCE = 64


def build_index(
    folder: str | os.PathLike,
    run: Run,
    teacher: MethodConfig,
    query_config: TeacherQueryConfig,
    feature_config: StudentFeatureConfig,
    config: StudentConfig,
) -> StudentIndex:
    """Makes an index of kind `student`, going on from what is stored in the workdir of `run`.

    Args:
      folder: of the index.
      run: model, data set and workdir; hold its lock.
      teacher: config of the method that is learned.
      query_config: the queries that it scores.
      feature_config, config: of the student.

    Raises ValueError where the tower lacks a half or the teacher does not fit the model; before anything is computed.
    """
    features = Features(feature_config, run.pipeline.unet.config.in_channels)
    queries = teacher_queries(run, query_config)
    lesson = make_lesson(run, queries, features, query_config, teacher)
    params = fit_student(run, lesson, features, config, query_config, teacher)
    record = {
        "teacher": {"queries": query_config.describe(), "method": teacher.describe()},
        "student": config.describe(),
        "held_out": held_out_precision(params, config, lesson),
    }
    asked = LearnedQueries(lesson.queries, queries.prompts, np.asarray(queries.latents[:]))
    return write_student_index(folder, run, features, params, config, asked, record)


def make_lesson(
    run: Run, queries: TeacherQueries, features: Features, query_config: TeacherQueryConfig, teacher: MethodConfig
) -> Lesson:
    """Features of queries and training images, and the teacher's scores."""
    row_ids, images = features.of_dataset(run)
    scores = teacher_scores(run, queries, query_config, teacher)
    count = len(queries.prompts)
    with run.timed("query features"):
        found = np.concatenate(
            [
                features.of_queries(prepare_teacher_queries(run, queries, range(i, min(i + _QUERIES_AT_ONCE, count))))
                for i in range(0, count, _QUERIES_AT_ONCE)
            ]
        )
    # Images that the tower or the model could not read have no place in an index.
    columns = np.isin(run.data.row_ids, row_ids)
    return Lesson(found, images, np.asarray(scores[:])[:, columns], queries.held_out)


def fit_student(
    run: Run,
    lesson: Lesson,
    features: Features,
    config: StudentConfig,
    query_config: TeacherQueryConfig,
    teacher: MethodConfig,
) -> Any:
    """The student's parameters: trained, resumed or reused."""
    settings = {
        "student": config.describe(),
        "features": list(features.names),
        "queries": query_config.describe(),
        "method": teacher.describe(),
    }
    inputs = {**method_inputs(run, teacher), "tower": features.fingerprint}
    stage_of = (f"student/{json_digest(settings)[:8]}", settings, inputs)
    with run.timed("student", run.root.is_finished(*stage_of)), run.root.stage(*stage_of) as stage:
        try:
            return load_student(stored_student(stage.path))[0]
        except (FileNotFoundError, DamagedFileError):
            return train_student(stage.path, lesson, config)[0]


def held_out_precision(params: Any, config: StudentConfig, lesson: Lesson) -> dict[str, float]:
    """mAP(L) of the held-out queries against the teacher: the student's, the plain features', and their difference.

    The numbers by name: the means, and the paired difference with its standard error over queries.
    """
    held = lesson.held_out
    student = held_out(params, config, lesson)
    found = lesson.queries[held] @ lesson.images.T
    plain = mean_average_precision(found, np.asarray(lesson.scores)[held], config.student_top)
    difference = mean_and_error(student - plain)
    name = f"map_{config.student_top}"
    return {
        "queries": int(held.sum()),
        f"student_{name}": float(student.mean()),
        f"features_{name}": float(plain.mean()),
        "difference": difference.mean,
        # A single query has no error, which JSON cannot hold.
        "difference_error": difference.error if np.isfinite(difference.error) else 0.0,
    }
