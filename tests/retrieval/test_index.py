"""Indexes: what they answer, how they grow, and what they refuse."""

import json
import shutil

import numpy as np
import pytest

from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query, prepare_query
from attrib_jax.methods import METHODS
from attrib_jax.methods.base import QueryJob
from attrib_jax.retrieval.index import IndexMismatchError, SubsetDataset, check_index, open_index, update_index
from attrib_jax.retrieval.search import benchmark
from attrib_jax.storage.files import DamagedFileError, StorageError
from attrib_jax.storage.stage_root import StageRoot
from tests.retrieval.conftest import RESIDUAL
from tests.tiny_dataset import make_dataset


@pytest.fixture(scope="module")
def asked(run):
    return [prepare_query(run.pipeline, run.predict, Query(prompt=text, sampler_steps=1)) for text in ("hat", "flag")]


def test_a_search_is_the_cosine_of_both_sides_whatever_else_is_asked(student_index, run, asked):
    together = student_index.search(run, asked)
    vectors = student_index.embed(asked).astype(np.float64) @ np.asarray(student_index.vectors.vectors, np.float64).T
    for query, scores, expected in zip(asked, together, vectors):
        np.testing.assert_allclose(scores.score, expected, rtol=1e-5, atol=1e-6)
        (alone,) = student_index.search(run, [query], 7)
        np.testing.assert_array_equal(alone.row_id, scores.top(7).row_id)
        np.testing.assert_array_equal(alone.score, scores.top(7).score)


def test_residuals_of_an_index_score_as_the_method_does(residual_index, run, asked, tmp_path):
    jobs = [QueryJob(f"query{place}", {}, query, tmp_path) for place, query in enumerate(asked)]
    for found, (scores, _) in zip(residual_index.search(run, asked), METHODS["residual"].score(run, jobs, RESIDUAL)):
        np.testing.assert_array_equal(found.row_id, scores.row_id)
        np.testing.assert_array_equal(found.score, scores.score)


@pytest.mark.parametrize("kind", ["student", "residual"])
def test_a_grown_data_set_gives_the_vectors_of_an_index_made_at_once(
    kind, student_index, residual_index, run, asked, pipeline, dataset, tmp_path
):
    whole = {"student": student_index, "residual": residual_index}[kind]
    shutil.copytree(whole.folder, tmp_path / "index")
    index = open_index(tmp_path / "index")
    kept = np.setdiff1d(index.row_ids, index.row_ids[[3, 5]])
    index = index.remove(index.row_ids[[3, 5]])
    np.testing.assert_array_equal(np.sort(index.row_ids), kept)
    (less,) = index.search(run, asked[:1])
    assert set(less.row_id) == set(kept)
    part = Run(pipeline, SubsetDataset(dataset, [3, 5]), StageRoot(tmp_path / "part"))
    index, added, removed = update_index(index, run, lambda rows: part if rows.tolist() == [3, 5] else None)
    assert (added, removed) == (2, 0)
    for found, expected in zip(index.search(run, asked), whole.search(run, asked)):
        found, expected = found.top(), expected.top()
        np.testing.assert_array_equal(found.row_id, expected.row_id)
        np.testing.assert_allclose(found.score, expected.score, rtol=1e-5, atol=1e-7)
    smaller = Run(pipeline, SubsetDataset(dataset, np.arange(30)), StageRoot(tmp_path / "smaller"))
    index, added, removed = update_index(index, smaller, None)
    assert (added, removed, len(index.row_ids)) == (0, len(dataset) - 30, 30)
    check_index(index, smaller)


def test_a_graph_is_searched_changed_and_scores_as_brute_force(student_index, run, asked, tmp_path, pipeline, dataset):
    pytest.importorskip("usearch")
    shutil.copytree(student_index.folder, tmp_path / "index")
    gone = student_index.row_ids[[0, 9]]
    index = open_index(tmp_path / "index").remove(gone, graph_from=10)
    assert index.record["graph"]["bytes"] > 0
    part = Run(pipeline, SubsetDataset(dataset, [0, 9]), StageRoot(tmp_path / "part"))
    index = index.add(part, graph_from=10).remove(student_index.row_ids[[1]], graph_from=10)
    for found, exact in zip(index.search(run, asked, 8), index.search(run, asked, 8, exact=True)):
        np.testing.assert_array_equal(found.row_id, exact.row_id)
        np.testing.assert_array_equal(found.score, exact.score)
    result = benchmark(index, run, asked, 4, k=8)
    assert result["recall"] == 1 and result["vectors"] == len(dataset) - 1 and 0 < result["p50_ms"] <= result["p99_ms"]


def test_the_reverse_question_names_the_queries_nearest_to_an_image(student_index):
    queries = student_index.learned_queries()
    row = int(student_index.row_ids[4])
    found = student_index.reverse(row, 3)
    products = queries.vectors @ student_index.vectors.vector(row)
    assert [prompt for prompt, _, _ in found] == [queries.prompts[place] for place in np.argsort(-products)[:3]]
    with pytest.raises(KeyError, match="row_id 2 is not among"):
        student_index.reverse(2, 3)


@pytest.mark.parametrize("file", ["vectors.safetensors", "student.safetensors", "index.json", "graph.usearch"])
def test_a_truncated_file_is_refused(file, student_index, tmp_path):
    shutil.copytree(student_index.folder, tmp_path / "index")
    index = open_index(tmp_path / "index")
    if file == "graph.usearch":
        pytest.importorskip("usearch")
        index.remove(index.row_ids[:1], graph_from=10)
    path = tmp_path / "index" / file
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedFileError, match=file):
        open_index(tmp_path / "index")


def test_indexes_of_others_are_refused(student_index, run, pipeline, tower, tmp_path):
    other = Run(pipeline, make_dataset(seed=1), StageRoot(tmp_path / "other"))
    with pytest.raises(IndexMismatchError, match="made for another dataset .* --dataset"):
        check_index(student_index, other)
    shutil.copytree(student_index.folder, tmp_path / "index")
    record = json.loads((tmp_path / "index" / "index.json").read_text())

    def changed(**values):
        (tmp_path / "index" / "index.json").write_text(json.dumps({**record, **values}))
        return open_index(tmp_path / "index")

    with pytest.raises(IndexMismatchError, match="made for another model"):
        check_index(changed(inputs={**record["inputs"], "model": "0" * 64}), run)
    with pytest.raises(IndexMismatchError, match=f"tower is {tower!r}.*does not fit"):
        _ = changed(tower="0" * 64).features
    with pytest.raises(StorageError, match="has format 2"):
        changed(format=2)
    with pytest.raises(FileNotFoundError, match=r"has no index\.json"):
        open_index(tmp_path)
