"""Coarse to fine: the finalists have the scores of the full setting, and only they."""

import dataclasses

import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.losses import ExampleProgram
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.report.outputs import write_outputs
from attrib_jax.storage.stage_root import StageRoot
from tests.failures import interrupt_writes, until_done

QUERIES = [Query(prompt=prompt, seed=seed, sampler_steps=2) for seed, prompt in enumerate(("red heart", "hat"))]
FULL = method_config(query_draws=32, fisher_samples=96, stride=300, captions="all")
CASCADE = dataclasses.replace(FULL, cascade=0.25, cascade_stride=500, cascade_min=5)
FINALISTS = 10


@pytest.fixture(scope="module")
def full(pipeline, dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("full")
    attributor = Run(pipeline, dataset, StageRoot(workdir))
    results = {"exact": [attributor.attribute(query, FULL) for query in QUERIES]}
    linear = dataclasses.replace(FULL, score="linear")
    return workdir, results | {"linear": [attributor.attribute(query, linear) for query in QUERIES]}


@pytest.fixture(params=[True, False], ids=["base losses there", "no base losses"])
def attributor(request, full, pipeline, dataset, tmp_path):
    """With the finished stages of the full setting, and without its base losses."""
    attributor = Run(pipeline, dataset, StageRoot(tmp_path, shipped=full[0]))
    if not request.param:
        fits = attributor.root._fits
        attributor.root._fits = lambda name, *rest: not name.startswith("losses/") and fits(name, *rest)
    return attributor


def assert_finalists(result, full, config, exact):
    scores, coarse = result.scores, np.load(result.folder / "coarse.npz")
    assert len(scores) == config.num_finalists(37) == FINALISTS
    np.testing.assert_array_equal(coarse["row_id"], full.scores.row_id)
    best = np.argsort(-coarse["score"], kind="stable")[:FINALISTS]
    np.testing.assert_array_equal(scores.row_id, np.sort(full.scores.row_id[best]))
    rows = np.searchsorted(full.scores.row_id, scores.row_id)
    if exact:
        for name in ("score", "loss_before", "loss_after", "flip"):
            np.testing.assert_array_equal(getattr(scores, name), getattr(full.scores, name)[rows])
    else:
        scale = np.abs(full.scores.score).max()
        np.testing.assert_allclose(scores.score, full.scores.score[rows], rtol=1e-3, atol=1e-5 * scale)
        assert scores.loss_before is None and "loss_before" not in coarse.files


@pytest.mark.parametrize("score", ["exact", "linear"])
def test_finalists_have_the_scores_of_the_full_setting(full, attributor, score):
    config = dataclasses.replace(CASCADE, score=score)
    one = attributor.attribute(QUERIES[0], config, "one")
    assert_finalists(one, full[1][score][0], config, score == "exact")
    together = attribute_queries(attributor, QUERIES, config)
    for result, expected in zip(together, full[1][score]):
        assert_finalists(result, expected, config, score == "exact")


def test_coarse_scores_are_those_of_the_coarse_setting(full, pipeline, dataset, tmp_path):
    attributor = Run(pipeline, dataset, StageRoot(tmp_path, shipped=full[0]))
    result = attributor.attribute(QUERIES[0], CASCADE)
    coarse = attributor.attribute(QUERIES[0], dataclasses.replace(FULL, stride=500, captions="first")).scores
    np.testing.assert_array_equal(np.load(result.folder / "coarse.npz")["score"], coarse.score)


def test_base_losses_of_finalists_alone_where_there_are_no_others(full, pipeline, dataset, tmp_path, monkeypatch):
    calls, call = [], ExampleProgram.__call__

    def counted(self, weights, data, rows, flips, captions, advance):
        calls.append((self.stride, len(rows)))
        return call(self, weights, data, rows, flips, captions, advance)

    monkeypatch.setattr(ExampleProgram, "__call__", counted)
    for name, shipped, expected in (
        # Losses before and after: of all at the coarse stride, then of the finalists.
        ("without", None, [(300, FINALISTS)] * 2 + [(500, 37)] * 2),
        # The check that this device gives the stored losses takes eight pictures.
        ("with", full[0], [(300, FINALISTS)] + [(300, 8)] + [(500, 37)] * 2),
    ):
        attributor = Run(pipeline, dataset, StageRoot(tmp_path / name, shipped))
        calls.clear()
        attributor.attribute(QUERIES[0], CASCADE)
        assert sorted(calls) == sorted(expected)


def test_an_interrupted_cascade_resumes_to_the_same_bits(full, pipeline, dataset, tmp_path, monkeypatch):
    attributor = Run(pipeline, dataset, StageRoot(tmp_path, shipped=full[0]))
    interrupt_writes(monkeypatch, every=2)
    results, interruptions = until_done(lambda: attribute_queries(attributor, QUERIES, CASCADE))
    assert interruptions >= 3
    for result, expected in zip(results, full[1]["exact"]):
        assert_finalists(result, expected, CASCADE, exact=True)


def test_all_pictures_are_finalists_where_they_are_few(full, pipeline, dataset, tmp_path):
    attributor = Run(pipeline, dataset, StageRoot(tmp_path, shipped=full[0]))
    result = attributor.attribute(QUERIES[0], dataclasses.replace(CASCADE, cascade_min=1000))
    np.testing.assert_array_equal(result.scores.score, full[1]["exact"][0].scores.score)


def test_report_and_manifest_tell_how_many_were_scored(full, pipeline, dataset, tmp_path):
    attributor = Run(pipeline, dataset, StageRoot(tmp_path, shipped=full[0]))
    for score in ("exact", "linear"):
        config = dataclasses.replace(CASCADE, score=score)
        result = attributor.attribute(QUERIES[0], config)
        write_outputs(result, dataset, QUERIES[0], config, model_name="tiny", top_k=3)
        page, manifest = (result.folder / "report.html").read_text(), (result.folder / "manifest.json").read_text()
        assert "10 of 37 pictures scored at the full setting" in page and "10 of 37 pictures" in manifest
        assert ("linearised" in page) == (score == "linear") and "least influential" not in page
        assert len((result.folder / "top.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cascade": -0.1}, "cascade is -0.1"),
        ({"cascade": 1.5}, "cascade is 1.5"),
        ({"cascade": float("nan")}, "cascade is nan"),
        ({"cascade": 0.1, "cascade_stride": 50}, "cascade_stride is 50, finer than stride 100"),
        ({"cascade_min": 0}, "cascade_min is 0"),
        ({"score": "exakt"}, "did you mean 'exact'"),
        ({"precision": "float16"}, "unknown precision 'float16'"),
        ({"queries_per_pass": -1}, "queries_per_pass is -1"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        method_config(**arguments)


def test_a_coarse_stride_beyond_the_timesteps_is_refused(pipeline, dataset, tmp_path):
    attributor = Run(pipeline, dataset, StageRoot(tmp_path))
    with pytest.raises(ValueError, match="cascade_stride is 2000"):
        attributor.attribute(QUERIES[0], dataclasses.replace(CASCADE, cascade_stride=2000))
