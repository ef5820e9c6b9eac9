"""The main job on a tiny pipeline: files, reuse, queries together, and refusals that cost nothing stored."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from attrib_jax.attribute import attribute, attribute_queries
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.losses import base_losses
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.methods.random import RandomConfig
from attrib_jax.methods.unlearn import UnlearnConfig
from attrib_jax.report.outputs import write_outputs
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import StageMismatchError
from tests.failures import interrupt_writes, until_done

QUERIES = [Query(prompt=prompt, seed=seed, sampler_steps=2) for seed, prompt in enumerate(("red heart", "hat", "flag"))]
QUERY = QUERIES[0]
CONFIG = UnlearnConfig(query_draws=32, fisher_samples=96, stride=300, step_size=0.01)


@pytest.fixture(scope="module")
def finished(pipeline, dataset, tmp_path_factory):
    """A run, and each query attributed by itself."""
    run = Run(pipeline, dataset, StageRoot(tmp_path_factory.mktemp("finished")))
    return run, [attribute_queries(run, [query], CONFIG)[0] for query in QUERIES]


@pytest.fixture
def run(finished, pipeline, dataset, tmp_path):
    """A run in a workdir of its own, with the finished stages that queries share."""
    shipped = shutil.copytree(
        finished[0].root.workdir, tmp_path / "shipped", ignore=shutil.ignore_patterns("attribution")
    )
    return Run(pipeline, dataset, StageRoot(tmp_path / "work", shipped))


def files_of(run):
    return {path: path.read_bytes() for path in run.root.workdir.rglob("*") if path.is_file() and path.name != ".lock"}


def assert_same(results, expected):
    for result, other in zip(results, expected, strict=True):
        assert result.query_loss == other.query_loss
        for field in dataclasses.fields(other.scores):
            np.testing.assert_array_equal(getattr(result.scores, field.name), getattr(other.scores, field.name))


def test_scores_are_the_largest_loss_change_of_the_two_flips(finished, dataset):
    scores = finished[1][0].scores
    assert scores.loss_before.shape == scores.loss_after.shape == (len(dataset), 2)
    difference = scores.loss_after - scores.loss_before
    np.testing.assert_array_equal(scores.score, difference.max(axis=1))
    np.testing.assert_array_equal(scores.flip, difference.argmax(axis=1))
    np.testing.assert_array_equal(scores.row_id, dataset.row_ids)
    assert np.abs(scores.score).min() > 0
    assert len({result.scores.score.tobytes() for result in finished[1]}) == 3


def test_outputs(finished, dataset):
    result = finished[1][0]
    write_outputs(result, dataset, QUERY, CONFIG, model_name="tiny", top_k=5, record={"flags": {"top_k": 5}})
    stored = np.load(result.folder / "scores.npz")
    np.testing.assert_array_equal(stored["score"], result.scores.score)
    assert {"row_id", "score", "loss_before", "loss_after"} <= set(stored.files)
    with (result.folder / "top.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    top = result.scores.top(5)
    assert [int(row["row_id"]) for row in rows] == top.row_id.tolist()
    assert [float(row["score"]) for row in rows] == top.score.tolist()
    assert rows[0]["caption"] == dataset.captions(int(np.searchsorted(dataset.row_ids, top.row_id[0])))[0]
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["settings"]["stride"] == 300 and manifest["flags"] == {"top_k": 5}
    assert manifest["queries_together"] == 1 and manifest["query_loss"] == list(result.query_loss)
    assert set(manifest["fingerprints"]) == {"model", "dataset", "encoding"}
    for name in ("report.html", "sheet.png", "query.png"):
        assert (result.folder / name).stat().st_size > 500


def test_images_that_have_no_score_are_counted(finished, dataset, tmp_path):
    whole, result = finished
    shutil.copytree(whole.root.workdir, tmp_path / "copy")
    scores = result[0].scores.top(len(dataset) - 2)
    folder = tmp_path / "copy" / result[0].folder.relative_to(whole.root.workdir)
    write_outputs(dataclasses.replace(result[0], scores=scores, folder=folder), dataset, QUERY, CONFIG, model_name="m")
    (note,) = json.loads((folder / "manifest.json").read_text())["notes"]
    assert note.startswith("2 of 37 ") and note in (folder / "report.html").read_text()


def test_another_query_reuses_what_does_not_depend_on_it(run, finished):
    (other,) = attribute_queries(run, QUERIES[1:2], CONFIG)
    assert_same([other], finished[1][1:2])
    assert all(other.timings[stage][1] for stage in ("encode", "fisher", "base losses"))


@pytest.mark.parametrize("queries_per_pass", [0, 2])
def test_queries_together_have_the_scores_of_each_alone_to_the_bit(finished, run, queries_per_pass):
    results = attribute_queries(run, QUERIES, dataclasses.replace(CONFIG, queries_per_pass=queries_per_pass))
    assert_same(results, finished[1])
    assert [result.name for result in results] == [result.name for result in finished[1]]
    assert all(result.num_queries == 3 for result in results)


def test_an_interrupted_run_resumes_to_the_same_bits(finished, pipeline, dataset, tmp_path, monkeypatch):
    interrupt_writes(monkeypatch, every=2)
    scores, interruptions = until_done(lambda: attribute(pipeline, dataset, QUERY, CONFIG, workdir=tmp_path))
    assert interruptions >= 3
    np.testing.assert_array_equal(scores.score, finished[1][0].scores.score)


def test_finished_scores_are_read_and_damaged_ones_computed_again(finished, run):
    (first,) = attribute_queries(run, [QUERY], CONFIG, ["one"])
    again = attribute_queries(run, QUERIES[:2], CONFIG, ["one", None])
    assert_same(again, finished[1][:2])
    (read,) = attribute_queries(run, [QUERY], CONFIG, ["one"])
    assert set(read.timings) == {"query", "scores"} and read.timings["scores"][1]
    file = read.folder / "scores.npz"
    file.write_bytes(file.read_bytes()[:-100])
    (repaired,) = attribute_queries(run, [QUERY], CONFIG, ["one"])
    assert "losses after" in repaired.timings
    assert_same([read, repaired], [first, first])
    np.load(file)


def test_losses_of_another_kind_of_device_are_computed_anew_where_the_scores_are_lost(finished, run, dataset):
    attribute_queries(run, [QUERY], CONFIG, ["one"])
    folder = run.root.workdir / "attribution" / "one"
    store = ChunkStore(folder, {"loss": ((2,), np.float64)}, len(dataset), 512, name="losses")
    store.write(0, {"loss": store.read(0)["loss"] * (1 + 1e-4)})
    (folder / "scores.npz").unlink()
    assert_same(attribute_queries(run, [QUERY], CONFIG, ["one"]), finished[1][:1])


def test_a_subset_of_the_data_set_has_the_scores_of_the_whole(finished, pipeline, dataset, tmp_path):
    rows = [1, 2, 5, 8, 13, 21, 34]
    images, captions = np.stack([dataset[row].image for row in rows]), [dataset.captions(row) for row in rows]
    subset = ArrayDataset(images, captions, row_ids=dataset.row_ids[rows])
    part = Run(pipeline, subset, StageRoot(tmp_path))
    # The Fisher information is the whole set's in both, and N the whole set's size.
    fisher = str(finished[0].root.workdir / "fisher" / "cross-attn-kv-96-seed0")
    config = dataclasses.replace(CONFIG, fisher=fisher, num_examples=len(dataset))
    (result,) = attribute_queries(part, [QUERY], config)
    np.testing.assert_array_equal(result.scores.score, finished[1][0].scores.score[rows])


def test_shipped_stages_of_another_data_set_are_not_used(finished, pipeline, dataset, tmp_path):
    images = np.stack([dataset[row].image for row in range(len(dataset))])[:, ::-1]
    other = ArrayDataset(images, [dataset.captions(row) for row in range(len(dataset))], row_ids=dataset.row_ids)
    losses = base_losses(Run(pipeline, other, StageRoot(tmp_path, finished[0].root.workdir)), CONFIG)
    assert not np.array_equal(losses, finished[1][0].scores.loss_before)


def test_random_scores_need_no_model_run(finished, run):
    results = attribute_queries(run, QUERIES[:2], RandomConfig())
    assert "losses after" not in results[0].timings and len(np.unique(results[0].scores.score)) == 37
    assert abs(np.corrcoef(*(result.scores.score for result in results))[0, 1]) < 0.6
    (alone,) = attribute_queries(run, QUERIES[1:2], RandomConfig(), ["alone"])
    np.testing.assert_array_equal(alone.scores.score, results[1].scores.score)
    with pytest.raises(StageMismatchError, match=r"settings\.loss_seed: found 0, expected 1"):
        attribute_queries(run, QUERIES[1:2], RandomConfig(loss_seed=1), ["alone"])


@pytest.mark.parametrize(
    ("queries", "config", "names", "error", "message"),
    [
        ([], CONFIG, None, ValueError, "queries has 0"),
        (QUERIES[:2], CONFIG, ["a"], ValueError, "queries has 2 and names 1"),
        (QUERIES[:2], CONFIG, ["a", "a"], ValueError, "number 1, 2 have one name, 'a'"),
        ([QUERIES[0], QUERIES[1], QUERIES[0]], CONFIG, None, ValueError, "number 1, 3 have one name"),
        (QUERIES[:2], CONFIG, ["a", "b/c"], ValueError, "query_name is 'b/c'"),
        ([QUERY], dataclasses.replace(CONFIG, stride=2000), None, ValueError, "stride is 2000"),
        ([QUERY], dataclasses.replace(CONFIG, region=(0, 0, 17, 3)), None, ValueError, "region.*17"),
        ([QUERY], dataclasses.replace(CONFIG, region_mask="no.png"), None, FileNotFoundError, "no.png"),
        ([QUERY], dataclasses.replace(CONFIG, fisher="nothing"), None, FileNotFoundError, "nothing"),
        ([QUERY, Query(prompt="hat", image="nothing.png")], CONFIG, None, FileNotFoundError, "nothing.png"),
    ],
)
def test_bad_input_stores_nothing(run, queries, config, names, error, message):
    before = files_of(run)
    with pytest.raises(error, match=message):
        attribute_queries(run, queries, config, names)
    assert files_of(run) == before


def test_a_query_that_fails_is_named_and_gives_all_names_back(finished, run):
    diverging = dataclasses.replace(CONFIG, step_size=1e38, steps=2)
    with pytest.raises(ValueError, match="'a': .*step_size"):
        attribute_queries(run, QUERIES[:2], diverging, ["a", "b"])
    assert not list(run.root.workdir.glob("attribution/*"))
    assert_same(attribute_queries(run, QUERIES[:2], CONFIG, ["a", "b"]), finished[1][:2])


def test_old_names_of_the_library_work_and_warn(pipeline, dataset, tmp_path):
    import attrib_jax

    with pytest.warns(DeprecationWarning, match="AttributeConfig"):
        config = attrib_jax.AttributeConfig(method="random", loss_seed=4)
    with pytest.warns(DeprecationWarning, match="Attributor"):
        attributor = attrib_jax.Attributor(pipeline, dataset, StageRoot(tmp_path))
    assert config == RandomConfig(loss_seed=4)
    one, (same,) = attributor.attribute(QUERY, config, "one"), attributor.attribute_many([QUERY], config, ["one"])
    np.testing.assert_array_equal(one.scores.score, same.scores.score)
    with pytest.warns(DeprecationWarning, match="GradientSettings"):
        gradients = attrib_jax.GradientSettings(projection_dim=8)
    with pytest.warns(DeprecationWarning, match="AttributeConfig"):
        assert attrib_jax.AttributeConfig(method="trak", gradients=gradients) == method_config("trak", projection_dim=8)
