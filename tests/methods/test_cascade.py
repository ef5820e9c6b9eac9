"""Coarse to fine: the finalists have the scores of the full setting, and only they."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query
from attrib_jax.methods.unlearn import UnlearnConfig
from attrib_jax.report.outputs import write_outputs
from attrib_jax.storage.stage_root import StageRoot
from tests.failures import interrupt_writes, until_done

QUERIES = [Query(prompt=prompt, seed=seed, sampler_steps=2) for seed, prompt in enumerate(("red heart", "hat"))]
FULL = UnlearnConfig(query_draws=32, fisher_samples=96, stride=300, captions="all", step_size=0.01)
CASCADE = dataclasses.replace(FULL, cascade=0.25, cascade_stride=500, cascade_min=5)
FINALISTS = 10


@pytest.fixture(scope="module")
def full(pipeline, dataset, tmp_path_factory):
    """A run, and its results at the full setting by score."""
    run = Run(pipeline, dataset, StageRoot(tmp_path_factory.mktemp("full")))
    configs = {score: dataclasses.replace(FULL, score=score) for score in ("exact", "linear")}
    # Each by itself: linearised scores of several queries are rounded in another way.
    return run, {
        score: [attribute_queries(run, [query], config)[0] for query in QUERIES] for score, config in configs.items()
    }


@pytest.fixture
def run(full, pipeline, dataset, tmp_path):
    """With the finished stages of the full setting."""
    return Run(pipeline, dataset, StageRoot(tmp_path, shipped=full[0].root.workdir))


@pytest.fixture
def run_without_losses(full, pipeline, dataset, tmp_path):
    shipped = shutil.copytree(full[0].root.workdir, tmp_path / "shipped", ignore=shutil.ignore_patterns("losses"))
    return Run(pipeline, dataset, StageRoot(tmp_path / "work", shipped))


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
def test_finalists_have_the_scores_of_the_full_setting(full, run, score):
    config = dataclasses.replace(CASCADE, score=score)
    for results in (attribute_queries(run, QUERIES[:1], config, ["one"]), attribute_queries(run, QUERIES, config)):
        for result, expected in zip(results, full[1][score]):
            assert_finalists(result, expected, config, score == "exact")


def test_losses_of_finalists_alone_where_there_are_no_others(full, run_without_losses):
    run = run_without_losses
    (result,) = attribute_queries(run, QUERIES[:1], CASCADE)
    assert_finalists(result, full[1]["exact"][0], CASCADE, exact=True)
    # Those of all images are stored at the coarse stride alone.
    assert [path.name for path in (run.root.workdir / "losses").iterdir()] == ["stride500-first-flips2-seed0"]


def test_coarse_scores_are_those_of_the_coarse_setting(run):
    (result,) = attribute_queries(run, QUERIES[:1], CASCADE)
    (coarse,) = attribute_queries(run, QUERIES[:1], dataclasses.replace(FULL, stride=500, captions="first"))
    np.testing.assert_array_equal(np.load(result.folder / "coarse.npz")["score"], coarse.scores.score)


def test_an_interrupted_cascade_resumes_to_the_same_bits(full, run, monkeypatch):
    interrupt_writes(monkeypatch, every=2)
    results, interruptions = until_done(lambda: attribute_queries(run, QUERIES, CASCADE))
    assert interruptions >= 3
    for result, expected in zip(results, full[1]["exact"]):
        assert_finalists(result, expected, CASCADE, exact=True)


def test_all_images_are_finalists_where_they_are_few(full, run):
    (result,) = attribute_queries(run, QUERIES[:1], dataclasses.replace(CASCADE, cascade_min=1000))
    np.testing.assert_array_equal(result.scores.score, full[1]["exact"][0].scores.score)


@pytest.mark.parametrize("score", ["exact", "linear"])
def test_report_and_manifest_tell_how_many_were_scored(run, dataset, score):
    config = dataclasses.replace(CASCADE, score=score)
    (result,) = attribute_queries(run, QUERIES[:1], config)
    write_outputs(result, dataset, QUERIES[0], config, model_name="tiny", top_k=3)
    page, manifest = (
        (result.folder / "report.html").read_text(),
        json.loads((result.folder / "manifest.json").read_text()),
    )
    assert "10 of 37 " in manifest["scored"] and manifest["scored"] in page
    assert ("linearised" in page) == (score == "linear") and "least influential" not in page
    assert len((result.folder / "top.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cascade": -0.1}, "cascade is -0.1"),
        ({"cascade": 1.5}, "cascade is 1.5"),
        ({"cascade": float("nan")}, "cascade is nan"),
        ({"cascade": 0.1, "cascade_stride": 50}, "cascade_stride is 50: expected at least stride, 100"),
        ({"cascade_min": 0}, "cascade_min is 0"),
        ({"cascade_stride": 300}, "cascade_stride is 300.*cascade is 0.0"),
        ({"queries_per_pass": -1}, "queries_per_pass is -1"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnlearnConfig(**arguments)
