"""Scores as csv, npz and parquet, and back."""

import csv
import json
import pickle
import sys

import numpy as np
import pyarrow.parquet
import pytest

from attrib_jax.core.types import Scores
from attrib_jax.storage.score_files import read_result, read_scores, write_result, write_scores

COUNT = 40


def make_scores(flips: int = 2, dtype=np.float64) -> Scores:
    rng = np.random.default_rng(flips)
    before = rng.normal(size=(COUNT, flips)).astype(dtype)
    after = before + 1e-7 * rng.normal(size=(COUNT, flips)).astype(dtype)
    change = after - before
    row_id = rng.permutation(1000)[:COUNT].astype(np.int32)
    return Scores(row_id, change.max(axis=1), before, after, change.argmax(axis=1))


def assert_same(found: Scores, expected: Scores, types: bool = True):
    for name in ("row_id", "score", "loss_before", "loss_after", "flip"):
        left, right = getattr(found, name), getattr(expected, name)
        if right is None:
            assert left is None, name
        else:
            assert not types or left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("flips", [1, 2])
@pytest.mark.parametrize("suffix", [".csv", ".npz", ".parquet"])
def test_every_digit_comes_back(tmp_path, suffix, flips, dtype):
    scores = make_scores(flips, dtype)
    for expected in (scores, Scores(scores.row_id, scores.score)):
        write_scores(expected, tmp_path / f"x{suffix}")
        found = read_scores(tmp_path / f"x{suffix}")
        if suffix != ".npz":
            expected = expected.top()
        assert_same(found, expected, types=suffix != ".csv")
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]


def test_csv_is_ranked_and_has_captions(tmp_path):
    scores = make_scores()
    captions = {int(row): f'woman’s "hat", {row}\nred' for row in scores.row_id}
    write_scores(scores, tmp_path / "x.csv", captions.__getitem__)
    with open(tmp_path / "x.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["rank", "row_id", "score", "flip", "loss_before_0", "loss_before_1", "loss_after_0", "loss_after_1"]
    assert list(rows[0]) == [*names, "caption"]
    order = np.argsort(-scores.score)
    assert [int(row["rank"]) for row in rows] == list(range(1, COUNT + 1))
    assert [int(row["row_id"]) for row in rows] == scores.row_id[order].tolist()
    assert [float(row["loss_after_1"]) for row in rows] == scores.loss_after[order, 1].tolist()
    assert all(row["caption"] == captions[int(row["row_id"])] for row in rows)
    assert_same(read_scores(tmp_path / "x.csv"), scores.top(), types=False)


def test_parquet_carries_captions_and_metadata(tmp_path):
    scores = make_scores()
    write_scores(scores, tmp_path / "x.parquet", lambda row: f"row {row}", {"method": "unlearn"})
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert json.loads(table.schema.metadata[b"attrib_jax"]) == {"method": "unlearn"}
    assert table["caption"][0].as_py() == f"row {scores.top(1).row_id[0]}"
    assert table["score"].type == "double" and table["row_id"].type == "int32"


def test_folder_and_published_result(tmp_path):
    scores = make_scores()
    write_result(tmp_path / "scores.npz", scores, (1.5, 0.25))
    found, losses = read_result(tmp_path / "scores.npz")
    for each in (found, read_scores(tmp_path)):
        assert_same(each, scores)
    assert losses == (1.5, 0.25)
    influence = np.float32([0.5, 2, 1])
    (tmp_path / "influence.pkl").write_bytes(pickle.dumps({"influence": influence, "rank": [1, 2, 0]}))
    assert_same(read_scores(tmp_path / "influence.pkl"), Scores(np.arange(3), influence))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def caption(row):
        raise ValueError("no caption")

    for name in ("x.csv", "x.parquet"):
        write_scores(make_scores(), tmp_path / name)
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ValueError, match="no caption"):
            write_scores(make_scores(1), tmp_path / name, caption)
        assert (tmp_path / name).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"x.csv", "x.parquet"}


@pytest.mark.parametrize(
    ("name", "error", "named"),
    [("x.xlsx", ValueError, r"\.xlsx"), ("nowhere.csv", FileNotFoundError, "nowhere"), ("", FileNotFoundError, "npz")],
)
def test_wrong_names(tmp_path, name, error, named):
    (tmp_path / "x.xlsx").write_text("x")
    with pytest.raises(error, match=named):
        read_scores(tmp_path / name)
    if error is ValueError:
        with pytest.raises(error, match=named):
            write_scores(make_scores(), tmp_path / name)


@pytest.mark.parametrize("suffix", [".csv", ".npz", ".parquet"])
def test_damaged_files_are_named(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write_scores(make_scores(), path)
    content = path.read_bytes()
    # A csv that ends between two rows is a shorter csv.
    cut = [content[:size].rstrip(b"\n") for size in (0, 10, len(content) // 2, len(content) - 10, len(content) - 1)]
    for damaged in (*cut, b"\xff\x00" * 50):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=path.name):
            read_scores(path)


def test_no_bit_of_a_stored_result_flips_unnoticed(tmp_path):
    """In the headers, too, where numpy fails in many ways or reads another array."""
    file = tmp_path / "scores.npz"
    write_result(file, make_scores(), [1.0])
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        found = read_result(file)
        if found is not None:
            assert_same(found[0], make_scores())
    file.unlink()
    assert read_result(file) is None


_ROWS = np.arange(3)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("rank,row_id\n1,2\n", "score"),
        ("row_id,score\n1,0.5\n2,\n", "'score'"),
        ("row_id,score\n1,0.5\n2\n", "2 fields"),
        ("row_id,score\n1.5,0.5\n", "'row_id'"),
        ("row_id,score\n1,0.5\n1,0.6\n", "row_id holds .1."),
        ("row_id,score\n1,nan\n", "score is NaN"),
        ("row_id,score\n99999999999999999999,1\n", "'row_id'"),
        ({"row_id": _ROWS}, "score"),
        ({"row_id": _ROWS, "score": np.array([object()] * 3)}, "x.npz"),
        ({"row_id": _ROWS, "score": np.array(["a", "b", "c"])}, "score .*<U1"),
        ({"row_id": _ROWS, "score": np.zeros((3, 2))}, r"score .*\(3, 2\)"),
        ({"row_id": _ROWS / 2, "score": np.zeros(3)}, "row_id .*float64"),
        ({"row_id": _ROWS, "score": np.zeros(3), "loss_before": np.zeros(3)}, r"loss_before .*\(3,\)"),
    ],
)
def test_files_of_something_else(tmp_path, content, named):
    if isinstance(content, str):
        (tmp_path / "x.csv").write_text(content)
    else:
        np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(ValueError, match=named):
        read_scores(*tmp_path.iterdir())


def test_missing_pyarrow_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pyarrow"):
        write_scores(make_scores(), tmp_path / "x.parquet")
