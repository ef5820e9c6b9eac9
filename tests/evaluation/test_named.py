"""Methods and queries of a study: read from files, scored once."""

import json
from pathlib import Path

import numpy as np
import pytest

from attrib_jax.core.fingerprint import json_digest
from attrib_jax.core.types import Scores
from attrib_jax.evaluation.named import (
    QueryFiles,
    QuerySet,
    StoredScores,
    has_cascade,
    keep_scores,
    method_scores,
    read_methods,
    refuse_stored,
)
from attrib_jax.jobs.query import Query, query_settings
from attrib_jax.jobs.query_file import read_queries
from attrib_jax.methods import method_config
from attrib_jax.storage.score_files import write_scores
from tests.evaluation.conftest import COUNT, METHODS, QUERIES, SET, files


def test_scores_are_kept_without_what_the_method_stored(run, tmp_path):
    scores = keep_scores(run, "tuning/unlearn", METHODS["unlearn"], QUERIES)
    assert scores.shape == (3, COUNT) and scores.dtype == np.float32 and len(np.unique(scores)) == 3 * COUNT
    (folder,) = (tmp_path / "evaluation" / "scores" / "tuning").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["scores.safetensors", "stage.json"]
    settings = json.loads((folder / "stage.json").read_text())["settings"]
    assert settings["method"] == METHODS["unlearn"].describe() and len(settings["queries"]) == 3
    stored = files(tmp_path)
    np.testing.assert_array_equal(scores, keep_scores(run, "tuning/unlearn", METHODS["unlearn"], QUERIES))
    assert files(tmp_path) == stored


def test_the_tuning_file_has_shared_noise_and_relative_dampings():
    file = Path(__file__).parents[2] / "configs" / "evaluation" / "tuning_digits.json"
    methods = read_methods(file)
    dampings = {name: config.ekfac_damping for name, config in methods.items() if "-damping" in name}
    assert {name.rsplit("damping", 1)[1]: value for name, value in dampings.items()} == {
        "0.01": 0.01, "0.03": 0.03, "0.3": 0.3, "1": 1.0
    }  # fmt: skip
    assert all(methods[name].curvature == "ekfac" for name in dampings)
    noisy = {name for name, config in methods.items() if getattr(config, "shared_noise", False)}
    shared = {name for name in methods if name.endswith("-shared-noise")}
    assert {methods[name].method for name in shared} == {"unlearn", "influence"} and shared <= noisy
    # Each is a result of its own.
    digests = {name: json_digest(config.describe()) for name, config in methods.items()}
    assert len({digests[name] for name in (*dampings, *shared, "kv-0.01", "kv-ekfac-0.1", "influence-ekfac")}) == (
        len(dampings) + len(shared) + 3
    )


def test_images_that_a_cascade_leaves_out_come_last(run):
    config = method_config(
        flips="none", stride=500, query_draws=8, update="sgd", cascade=0.3, cascade_stride=500, cascade_min=1
    )
    assert has_cascade(config) and not any(map(has_cascade, METHODS.values()))
    (scores,) = keep_scores(run, "cascade", config, QUERIES[:1])
    finalists = config.num_finalists(COUNT)
    assert np.sum(scores == scores.min()) == COUNT - finalists and len(np.unique(scores)) == finalists + 1


def test_a_methods_file(tmp_path):
    file = tmp_path / "methods.json"
    file.write_text(json.dumps({"shared": {"stride": 50}, "a": {"step_size": 0.5}, "b": {"method": "random"}}))
    methods = read_methods(file)
    assert methods["a"] == method_config(stride=50, step_size=0.5) and methods["b"] == method_config("random")
    assert list(read_methods(file, ["b"])) == ["b"]
    with pytest.raises(ValueError, match="'c'"):
        read_methods(file, ["c"])


def test_scores_that_were_made_elsewhere(run, tmp_path):
    expected = method_scores(run, "unlearn", METHODS["unlearn"], SET, "reported")
    for number, (query, values) in enumerate(zip(SET.of("reported"), expected)):
        order = np.argsort(values)  # as another program may have them
        scores = Scores(row_id=run.data.row_ids[order], score=values[order])
        write_scores(scores, tmp_path / f"theirs {number} {query.prompt} {query.seed}.csv")
    theirs = StoredScores(f"{tmp_path}/theirs {{number}} {{prompt}} {{seed}}.csv")
    np.testing.assert_array_equal(method_scores(run, "theirs", theirs, SET, "reported"), expected)
    with pytest.raises(FileNotFoundError, match="theirs 0 digit one 3"):
        method_scores(run, "theirs", theirs, SET, "tuning")
    write_scores(Scores(run.data.row_ids[:-1], values[:-1]), tmp_path / "few.npz")
    with pytest.raises(ValueError, match="few.npz has no score of row 25"):
        method_scores(run, "theirs", StoredScores(f"{tmp_path}/few.npz"), SET, "reported")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "methods.json"),
        ("[]", "methods.json"),
        ('{"a": 1}', "methods.json"),
        ('{"shared": {}}', "methods.json"),
        ('{"a/b": {}}', "a/b"),
        ('{"a": {"stepsize": 1}}', "'a' of .*stepsize"),
        ('{"a": {"steps": 0}}', "'a' of .*steps is 0"),
        ('{"a": {"damping": Infinity}}', "'a' of .*damping is inf"),
        ('{"a": {"method": "pixle"}}', "'pixle': did you mean 'pixel'"),
        ('{"a": {"method": "pixel", "damping": 1}}', "damping is 1.*belongs to method 'unlearn', 'influence'"),
        ('{"default": {"step_size": 1}}', "'default' .*step_size"),
        ('{"a": {"scores": "x.npz", "method": "random"}}', "'a' .*path of scores alone"),
        ('{"a": {"scores": "{query}.npz"}}', "scores is '{query}.npz'"),
        ('{"shared": {"strid": 50}, "a": {}}', "'strid': did you mean 'stride'"),
    ],
)
def test_wrong_methods_files(tmp_path, content, named):
    file = tmp_path / "methods.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=named):
        read_methods(file)


def test_stored_scores_are_of_queries_in_a_file():
    assert refuse_stored(METHODS, "self") == METHODS
    with pytest.raises(ValueError, match="'theirs' is stored scores.*protocol 'self'"):
        refuse_stored({**METHODS, "theirs": StoredScores("{number}.npz")}, "self")


def test_splits_of_a_query_set():
    np.testing.assert_array_equal(SET.split("reported"), [1, 2])
    assert SET.of("tuning") == [QUERIES[0]]
    for queries, split in ((QuerySet(QUERIES, 0), "tuning"), (QuerySet(QUERIES, 3), "reported"), (SET, "other")):
        with pytest.raises(ValueError, match=split):
            queries.split(split)


def test_query_files_hold_both_splits(tmp_path):
    tuning, reported = tmp_path / "tuning.jsonl", tmp_path / "reported.jsonl"
    tuning.write_text('{"prompt": "digit one"}\n')
    reported.write_text('{"prompt": "digit one", "seed": 1}\n{"prompt": "digit two"}\n')
    defaults = Query("", guidance_scale=2.0)
    both = QueryFiles(tuning_queries=tuning, reported_queries=reported).read(defaults)
    assert [query.seed for query in both.queries] == [0, 1, 0] and both.num_tuning == 1
    assert {query.guidance_scale for query in both.queries} == {2.0}
    assert QueryFiles(reported_queries=reported).read(defaults).num_tuning == 0
    with pytest.raises(ValueError, match="'digit one' with seed 0 comes twice"):
        QueryFiles(tuning_queries=tuning, reported_queries=tuning).read(defaults)


def test_the_shipped_scores_are_those_of_the_configs():
    """Else a study would compute anew, without a word, what took hours."""
    defaults, stages = Query("", guidance_scale=2.0, sampler_steps=50), Path("models/digits/stages/evaluation/scores")
    expected = {}
    for name, split, suffix in (
        ("methods", "reported", ""),
        ("methods", "reported", "_12"),
        ("tuning", "tuning", "_12"),
    ):
        file = f"configs/evaluation/digits_{split}{suffix}.jsonl"
        queries = [query_settings(query) for query in read_queries(file, defaults).queries]
        for method, config in read_methods(f"configs/evaluation/{name}_digits.json").items():
            settings = {"method": config.describe(), "queries": queries}
            expected[f"{split}/{method}-{json_digest(settings)[:8]}"] = settings
    stored = {
        record.parent.relative_to(stages).as_posix(): json.loads(record.read_text())
        for record in stages.glob("*/*/stage.json")
    }
    assert {name: record["settings"] for name, record in stored.items()} == expected
    assert all(record["stage"] == f"evaluation/scores/{name}" for name, record in stored.items())
