"""The teacher: under which noise its queries are scored."""

import dataclasses

import numpy as np

from attrib_jax.methods import METHODS, method_config
from attrib_jax.methods.base import QueryJob
from attrib_jax.retrieval.teacher import TeacherQueryConfig, prepare_teacher_queries, teacher_queries, teacher_scores
from tests.retrieval.conftest import QUERIES


def test_held_out_queries_have_a_noise_of_their_own():
    config = TeacherQueryConfig(teacher_queries=10, query_holdout=0.3, teacher_noises=3)
    assert config.noise_seeds(5).tolist() == [6, 6, 6, 7, 7, 8, 8, 5, 5, 5]
    few = dataclasses.replace(config, teacher_noises=50)
    assert len({*few.noise_seeds(0)[:7].tolist()}) == 7
    assert dataclasses.replace(config, teacher_noises=0).noise_seeds(5).tolist() == [5] * 10


def test_queries_are_scored_under_the_noise_that_they_were_dealt(run, tmp_path):
    config = dataclasses.replace(QUERIES, teacher_noises=2)
    method = method_config(update="sgd", step_size=0.01, query_draws=16, stride=500, flips="none")
    queries = teacher_queries(run, config)
    found = teacher_scores(run, queries, config, method)[:]
    seeds = config.noise_seeds(0)
    assert seeds.tolist() == [1, 1, 2, 2, 0, 0]
    for rows in ([0, 1], [4, 5]):
        own = dataclasses.replace(method, noise_seed=int(seeds[rows[0]]))
        jobs = [
            QueryJob(f"q{row}", {}, query, tmp_path / f"q{row}")
            for row, query in zip(rows, prepare_teacher_queries(run, queries, rows))
        ]
        for job in jobs:
            job.folder.mkdir()
        scored = [each.scores.score for each in METHODS["unlearn"].score(run, jobs, own)]
        np.testing.assert_allclose(found[rows], scored, rtol=1e-6, atol=1e-9)
