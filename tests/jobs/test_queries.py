"""Many queries in one pass: the scores of each alone, resumed whatever comes with it; and files of queries."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from attrib_jax.jobs.queries import queries_in_pass, read_queries

import attrib_jax.jobs.losses as losses_stage
from attrib_jax.attribute import attribute_queries
from attrib_jax.attribution.scores import example_loss
from attrib_jax.core.keys import loss_key
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import flatten_names, merge_weights, select_weights
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.losses import ExampleProgram
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.models.predictor import predictor
from attrib_jax.storage.stage_root import StageRoot
from tests.failures import interrupt_writes

QUERIES = [Query(prompt=prompt, seed=seed, sampler_steps=2) for seed, prompt in enumerate(("red heart", "hat", "flag"))]
CONFIG = method_config(query_draws=32, fisher_samples=96, stride=300)
LINEAR = dataclasses.replace(CONFIG, score="linear")


@pytest.fixture(scope="module")
def alone(pipeline, dataset, tmp_path_factory):
    """The stages that all queries share, and each query attributed by itself."""
    workdir, shared = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("shared")
    attributor = Run(pipeline, dataset, StageRoot(workdir))
    results = [attributor.attribute(query, CONFIG) for query in QUERIES]
    shutil.copytree(workdir, shared, ignore=shutil.ignore_patterns("attribution"), dirs_exist_ok=True)
    return shared, results


@pytest.fixture
def attributor(alone, pipeline, dataset, tmp_path):
    return Run(pipeline, dataset, StageRoot(tmp_path, shipped=alone[0]))


def assert_same(results, expected):
    for result, other in zip(results, expected, strict=True):
        assert result.name == other.name and result.query_loss == other.query_loss
        for field in dataclasses.fields(other.scores):
            np.testing.assert_array_equal(getattr(result.scores, field.name), getattr(other.scores, field.name))


@pytest.fixture
def passes(monkeypatch):
    """Every call of a program of examples, as its number of pictures."""
    calls, call = [], ExampleProgram.__call__

    def counted(self, weights, data, rows, *args):
        calls.append(len(rows))
        return call(self, weights, data, rows, *args)

    monkeypatch.setattr(ExampleProgram, "__call__", counted)
    return calls


@pytest.mark.parametrize("queries_per_pass", [0, 2])
def test_queries_together_have_the_scores_of_each_alone_to_the_bit(alone, attributor, queries_per_pass):
    config = dataclasses.replace(CONFIG, queries_per_pass=queries_per_pass)
    results = attribute_queries(attributor, QUERIES, config)
    assert_same(results, alone[1])
    assert all(result.together == 3 for result in results)
    assert len({result.scores.score.tobytes() for result in results}) == 3


def test_a_killed_pass_resumes_with_other_queries_beside(alone, attributor, monkeypatch, passes):
    monkeypatch.setattr(losses_stage, "_ROWS_PER_CHUNK", 16)
    monkeypatch.setattr(losses_stage, "_TILES_PER_CHUNK", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_writes(patch, every=6)
        attribute_queries(attributor, QUERIES[:2], CONFIG)
    # Five of the six chunks are stored, and one tile of each of these two queries is computed again to see that they
    # are of this device; the third query has none, and chunks of another size.
    passes.clear()
    monkeypatch.setattr(losses_stage, "_ROWS_PER_CHUNK", 24)
    results = attribute_queries(attributor, QUERIES[::-1], CONFIG)
    assert_same(results, alone[1][::-1])
    base_check = resume_check = 8
    assert sorted(passes) == sorted([37 - 32, 24, 13, base_check, resume_check, resume_check])


def test_finished_queries_are_not_run_again(alone, attributor, passes):
    first = attributor.attribute(QUERIES[1], CONFIG, "one")
    passes.clear()
    results = attribute_queries(attributor, QUERIES[:2], CONFIG, [None, "one"])
    assert sorted(passes) == [8, 37]
    assert_same(results[1:], [first])
    passes.clear()
    assert_same(attribute_queries(attributor, QUERIES[:2], CONFIG, [None, "one"]), results)
    assert not passes


def test_a_query_that_fails_is_named_and_leaves_the_others_names_free(attributor):
    broken = dataclasses.replace(CONFIG, step_size=1e38, steps=2)
    with pytest.raises(ValueError, match="query 'a': .*step_size"):
        attribute_queries(attributor, QUERIES[:2], broken, ["a", "b"])
    assert not list(attributor.root.workdir.glob("attribution/*"))


def test_linear_scores_are_gradients_times_the_weight_change(attributor, pipeline, dataset):
    """Against one gradient an example by `jax.grad`, dotted with the change of the weights in float64 by numpy."""
    result = attributor.attribute(QUERIES[0], LINEAR)
    assert result.scores.loss_before is None and "base losses" not in result.timings
    selected, rest = select_weights(pipeline.params["unet"], "cross-attn-kv")
    moved, _ = attributor.unlearned(result.folder, result.query, LINEAR)
    moved, old = flatten_names(moved), flatten_names(selected)
    predict, timesteps = predictor(pipeline.unet), np.arange(0, 1000, 300, dtype=np.int32)

    @jax.jit
    def gradient(selected, rest, example):
        def loss(selected):
            params = merge_weights(selected, rest)
            return example_loss(predict, pipeline.schedule, params, loss_key(0), example, timesteps)

        return jax.grad(loss)(selected)

    rows = [0, 5, 36]
    expected = np.zeros((len(rows), 2))
    for place, row in enumerate(rows):
        for flip in range(2):
            (latents,), (text,) = attributor.data.inputs(row, flip, 0)
            example = Batch(latents, text, np.int32(dataset.row_ids[row]), np.int32(flip), np.int32(0), np.float32(1))
            for name, leaf in flatten_names(gradient(selected, rest, example)).items():
                change = np.asarray(moved[name], np.float64) - np.asarray(old[name], np.float64)
                expected[place, flip] += (np.asarray(leaf, np.float64) * change).sum()
    np.testing.assert_allclose(result.scores.score[rows], expected.max(axis=1), rtol=2e-4)
    np.testing.assert_array_equal(result.scores.flip[rows], expected.argmax(axis=1))


@pytest.mark.parametrize("change", [{}, {"flips": "mean", "captions": "all"}, {"flips": "none"}])
def test_linear_scores_of_many_are_those_of_one(attributor, change):
    config = dataclasses.replace(LINEAR, **change)
    together = attribute_queries(attributor, QUERIES[:2], config, ["a", "b"])
    for result, query in zip(together, QUERIES):
        one = attribute_queries(attributor, [query], config, f"{result.name}-alone")[0]
        scale = np.abs(one.scores.score).max()
        np.testing.assert_allclose(result.scores.score, one.scores.score, rtol=1e-3, atol=1e-5 * scale)
        assert (result.scores.flip is None) == (config.flips == "mean")


def test_linear_scores_are_those_of_a_small_step(attributor):
    small = dataclasses.replace(CONFIG, step_size=1e-4)
    exact = attributor.attribute(QUERIES[0], small).scores.score
    linear = attributor.attribute(QUERIES[0], dataclasses.replace(small, score="linear")).scores.score
    assert np.corrcoef(exact, linear)[0, 1] > 0.999
    np.testing.assert_allclose(exact, linear, atol=0.05 * np.abs(exact).max())


@pytest.mark.parametrize("score", ["exact", "linear"])
def test_scores_in_another_precision(attributor, score):
    config = dataclasses.replace(CONFIG, score=score)
    exact = attributor.attribute(QUERIES[0], config).scores.score
    rounded = attributor.attribute(QUERIES[0], dataclasses.replace(config, precision="bfloat16")).scores.score
    assert not np.array_equal(rounded, exact) and np.corrcoef(rounded, exact)[0, 1] > 0.95


def test_precisions_keep_their_losses_apart(attributor):
    config = dataclasses.replace(CONFIG, precision="bfloat16")
    together = attribute_queries(attributor, QUERIES[:2], config, ["a", "b"])
    one = attributor.attribute(QUERIES[0], config)
    np.testing.assert_array_equal(together[0].scores.score, one.scores.score)
    assert np.abs(attributor.base_losses(CONFIG) - one.scores.loss_before).max() > 0
    names = {path.name for path in (attributor.root.workdir / "losses").iterdir()}
    assert names == {"stride300-first-flips2-seed0", "stride300-first-flips2-seed0-bfloat16"}


def test_settings_from_before_there_were_scores_and_precisions_still_fit():
    settings = CONFIG.settings()
    assert not {"score", "precision", "cascade", "cascade_stride", "queries_per_pass", "batch_size"} & settings.keys()
    assert LINEAR.settings() == {**settings, "score": "linear"}
    cascade = dataclasses.replace(CONFIG, cascade=0.5, cascade_stride=500).settings()
    assert cascade == {**settings, "cascade": 0.5, "cascade_stride": 500, "cascade_min": 1000}


def test_as_many_queries_a_pass_as_fit_into_two_gibibytes():
    tree = {"a": np.empty((77, 2**18), np.float32)}
    assert queries_in_pass(CONFIG, tree) == 26
    assert queries_in_pass(dataclasses.replace(CONFIG, queries_per_pass=3), tree) == 3
    huge = {"a": np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (2**20, 2**10), (0, 0))}
    assert queries_in_pass(CONFIG, huge) == 1


@pytest.mark.parametrize(
    ("queries", "names", "message"),
    [
        ([], None, "at least one"),
        (QUERIES[:2], ["a"], "as many"),
        (QUERIES[:2], ["a", "a"], "number 1, 2 have one name, 'a'"),
        ([QUERIES[0], QUERIES[1], QUERIES[0]], None, "number 1, 3 have one name"),
        (QUERIES[:2], ["a", "b/c"], "query_name is 'b/c'"),
    ],
)
def test_wrong_lists_of_queries_store_nothing(attributor, queries, names, message):
    with pytest.raises(ValueError, match=message):
        attribute_queries(attributor, queries, CONFIG, names)
    assert not list(attributor.root.workdir.glob("attribution/*"))


def test_a_file_of_queries(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_bytes(b"")
    lines = [
        {"prompt": "hat", "seed": 3, "name": "first", "guidance_scale": 2},
        {"prompt": "", "image": "pictures/cat.png"},
    ]
    file = tmp_path / "queries.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    queries, names = read_queries(file, Query(prompt="ignored", seed=7, sampler_steps=9))
    assert names == ["first", None]
    assert [query.prompt for query in queries] == ["hat", ""]
    assert [query.seed for query in queries] == [3, 7]
    assert [query.guidance_scale for query in queries] == [2, 7.5]
    assert queries[1].image == tmp_path / "pictures" / "cat.png"
    assert all(query.sampler_steps == 9 for query in queries)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no queries"),
        ("\n  \n", "has no queries"),
        ('{"prompt": "hat"}\n{"prompt": "hat"', "line 2: no JSON"),
        ('"hat"', "line 1: .* is no object"),
        ('{"seed": 1}', "line 1: prompt is absent"),
        ('{"prompt": "hat", "sead": 1}', "line 1: unknown key 'sead'; known: prompt, seed"),
        ('{"prompt": 3}', "line 1: prompt is 3; expected a string"),
        ('{"prompt": "hat", "seed": 1.5}', "line 1: seed is 1.5; expected a whole number"),
        ('{"prompt": "hat", "seed": true}', "line 1: seed is True"),
        ('{"prompt": "hat", "seed": -1}', "line 1: seed is -1"),
        ('{"prompt": "hat", "guidance_scale": "2"}', "line 1: guidance_scale is '2'; expected a number"),
        ('{"prompt": "hat", "name": "a/b"}', "line 1: query_name is 'a/b'"),
        ('{"prompt": "hat", "image": "nowhere.png"}', "line 1: picture '.*nowhere.png' does not exist"),
        ('{"prompt": "a", "name": "x"}\n\n{"prompt": "b", "name": "x"}', "line 3: name 'x' is that of line 1"),
        ("\n".join(["[]"] * 12), "line 1: .*\n.*line 2: [^$]*and 2 more"),
    ],
)
def test_bad_files_of_queries_name_the_line(tmp_path, content, message):
    file = tmp_path / "queries.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_queries(file)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_files_of_queries_in_other_encodings(tmp_path, encoding):
    file = tmp_path / "queries.jsonl"
    lines = ["ein Hündchen" if encoding == "cp1252" else "ein\u2028Hünd\x85chen \u72d7", "two"]
    file.write_text("\r\n".join(f'{{"prompt": "{line}"}}' for line in lines), encoding=encoding, newline="")
    assert [query.prompt for query in read_queries(file).queries] == lines


def test_files_that_are_absent_or_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        read_queries(tmp_path / "nowhere.jsonl")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe\0")
    with pytest.raises(ValueError, match="picture.png holds binary data; expected a text in UTF-8"):
        read_queries(tmp_path / "picture.png")


def test_a_prompt_is_a_text_that_reports_can_hold(tmp_path):
    (tmp_path / "queries.jsonl").write_text('{"prompt": "cut \\ud83d"}')
    assert read_queries(tmp_path / "queries.jsonl").queries[0].prompt == "cut ?"
    with pytest.raises(ValueError, match="prompt is None; expected a text"):
        Query(prompt=None)
