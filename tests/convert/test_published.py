"""Result files of the published code."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attrib_jax.convert.published import read_influence

INFLUENCE = np.array([0.5, -1.0, 2.0, 0.5, 0.0], np.float32)
RANK = np.argsort(-INFLUENCE)


def write(tmp_path, content, save=pickle.dump, name="influence_3.pkl"):
    path = tmp_path / name
    with open(path, "wb") as file:
        save(content, file)
    return path


@pytest.mark.parametrize(
    "convert",
    [np.asarray, torch.tensor, lambda x: x.tolist(), list, lambda x: torch.tensor(x).bfloat16()[: len(x)]],
    ids=["numpy", "torch", "list", "list of scalars", "bfloat16"],
)
def test_influence_in_every_form(tmp_path, convert):
    rank = RANK.tolist() if convert(RANK[:1]).__class__ is list else torch.tensor(RANK)
    scores = read_influence(write(tmp_path, {"influence": convert(INFLUENCE), "rank": rank}))
    np.testing.assert_array_equal(scores.row_id, np.arange(5))
    np.testing.assert_array_equal(scores.score, INFLUENCE)
    assert scores.top(1).row_id[0] == 2 and scores.loss_before is None


def test_file_that_torch_saved(tmp_path):
    content = {"influence": torch.tensor(INFLUENCE), "rank": torch.tensor(RANK)}
    scores = read_influence(write(tmp_path, content, torch.save, "influence.pkl"))
    assert scores.score.dtype == np.float32
    np.testing.assert_array_equal(scores.score, INFLUENCE)


def test_equal_values_may_be_ranked_either_way(tmp_path):
    for rank in ([2, 0, 3, 4, 1], [2, 3, 0, 4, 1]):
        np.testing.assert_array_equal(
            read_influence(write(tmp_path, {"influence": INFLUENCE, "rank": rank})).score, INFLUENCE
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": [2, 0, 3, 1, 4]}, r"disagree at 1 places: rank puts row 1 \(-1\) right before row 4 \(0\)"),
        ({"rank": RANK[::-1]}, "disagree at 3 places"),
        ({"rank": [2, 0, 3, 4, 4]}, "rank holds 5 rows that are not 0 to 4"),
        ({"rank": [2, 0, 3, 4]}, "rank holds 4 rows"),
        ({"rank": [3, 1, 4, 5, 2]}, "not 0 to 4 once each"),
        ({"rank": RANK.astype(float)}, "rank has shape .* expected .* whole numbers"),
        ({"influence": INFLUENCE[None]}, r"influence has shape \(1, 5\)"),
        ({"influence": []}, r"influence has shape \(0,\)"),
        ({"influence": [0.1, [0.2]]}, "influence holds a list"),
        ({"influence": [0.1, "x"]}, "influence holds a str"),
        ({"influence": [2**70] * 5}, "type object"),
        ({"influence": "abcde"}, "influence is a str"),
        ({"influence": np.where(INFLUENCE > 1, np.nan, INFLUENCE)}, "score is NaN"),
        ({"influence": INFLUENCE > 0}, "type bool"),
    ],
)
def test_contradictions_are_named(tmp_path, change, message):
    path = write(tmp_path, {"influence": INFLUENCE, "rank": RANK} | change)
    with pytest.raises(ValueError, match=message) as error:
        read_influence(path)
    assert "influence_3.pkl" in str(error.value)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(ValueError, match="lacks influence; it holds: rank, influence_subset"):
        read_influence(write(tmp_path, {"rank": RANK, "influence_subset": INFLUENCE}))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl"):
        read_influence(tmp_path / "nowhere.pkl")
    with pytest.raises(ValueError, match="lacks rank"):
        read_influence(write(tmp_path, {"influence": torch.tensor(INFLUENCE)}, torch.save))


def test_nested_shared_lists_stay_small(tmp_path):
    inner = [0.0] * 10
    for _ in range(12):
        inner = [inner] * 10
    with pytest.raises(ValueError, match="influence holds a list"):
        read_influence(write(tmp_path, {"influence": inner, "rank": [0]}))


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), protocol=st.integers(0, 5))
def test_any_influence_is_read_back(tmp_path_factory, values, protocol):
    path = tmp_path_factory.mktemp("any") / "influence.pkl"
    influence = np.array(values, np.float32)
    path.write_bytes(pickle.dumps({"influence": influence, "rank": np.argsort(-influence)}, protocol))
    np.testing.assert_array_equal(read_influence(path).score, influence)
