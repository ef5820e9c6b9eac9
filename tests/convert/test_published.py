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


def write(tmp_path, content, save=pickle.dump):
    path = tmp_path / "influence_3.pkl"
    with open(path, "wb") as file:
        save(content, file)
    return path


FORMS = {
    "numpy": np.asarray,
    "torch": torch.tensor,
    "list": lambda x: x.tolist(),
    "list of scalars": list,
    "bfloat16": lambda x: torch.tensor(x).bfloat16(),
}


@pytest.mark.parametrize("rank", [RANK, [2, 3, 0, 4, 1]], ids=["rank", "equal"])
@pytest.mark.parametrize("form", [*FORMS, "torch.save"])
def test_influence_in_every_form(tmp_path, form, rank):
    """Rows 0 and 3 have the same value and may be ranked either way."""
    save, convert = (torch.save, torch.tensor) if form == "torch.save" else (pickle.dump, FORMS[form])
    rank = list(rank) if form.startswith("list") else torch.tensor(rank)
    scores = read_influence(write(tmp_path, {"influence": convert(INFLUENCE), "rank": rank}, save))
    np.testing.assert_array_equal(scores.row_id, np.arange(5))
    np.testing.assert_array_equal(scores.score, INFLUENCE)
    assert scores.top(1).row_id[0] == 2 and scores.loss_before is None


NESTED = [0.0] * 10
for _ in range(12):
    NESTED = [NESTED] * 10  # 10^13 values in a small file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": [2, 0, 3, 1, 4]}, r"1 places: rank .*row 1 \(-1\).*row 4 \(0\)"),
        ({"rank": RANK[::-1]}, "3 places"),
        ({"rank": [2, 0, 3, 4, 4]}, "rank holds 5 rows"),
        ({"rank": [2, 0, 3, 4]}, "rank holds 4 rows"),
        ({"rank": [3, 1, 4, 5, 2]}, "rank holds .*0 to 4"),
        ({"rank": RANK.astype(float)}, "rank has shape"),
        ({"influence": INFLUENCE[None]}, r"influence has shape \(1, 5\)"),
        ({"influence": []}, r"influence has shape \(0,\)"),
        ({"influence": [0.1, [0.2]]}, "influence holds a list"),
        ({"influence": NESTED}, "influence holds a list"),
        ({"influence": [0.1, "x"]}, "influence holds a str"),
        ({"influence": [2**70] * 5}, "type object"),
        ({"influence": "abcde"}, "influence is a str"),
        ({"influence": np.where(INFLUENCE > 1, np.nan, INFLUENCE)}, "NaN"),
        ({"influence": INFLUENCE > 0}, "type bool"),
    ],
)
def test_contradictions_are_named(tmp_path, change, message):
    path = write(tmp_path, {"influence": INFLUENCE, "rank": RANK} | change)
    with pytest.raises(ValueError, match=message) as error:
        read_influence(path)
    assert "influence_3.pkl" in str(error.value)


@pytest.mark.parametrize("save", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_missing_parts_are_named(tmp_path, save):
    for name, content in (("influence", {"rank": RANK, "x": INFLUENCE}), ("rank", {"influence": INFLUENCE})):
        content = {key: torch.tensor(value) for key, value in content.items()}
        with pytest.raises(ValueError, match=f"lacks {name}"):
            read_influence(write(tmp_path, content, save))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl"):
        read_influence(tmp_path / "nowhere.pkl")


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), protocol=st.integers(0, 5))
def test_any_influence_is_read_back(tmp_path_factory, values, protocol):
    path = tmp_path_factory.mktemp("any") / "influence.pkl"
    influence = np.array(values, np.float32)
    path.write_bytes(pickle.dumps({"influence": influence, "rank": np.argsort(-influence)}, protocol))
    np.testing.assert_array_equal(read_influence(path).score, influence)
