"""Two data sets as one, exemplars first."""

import pickle

import numpy as np
import pytest

from attrib_jax.data.concat import ConcatDataset, concatenate
from attrib_jax.data.sources import ArrayDataset


def make(count, seed, row_ids=None, groups=None, credit=(None, None)) -> ArrayDataset:
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    captions = [[f"{seed} {row}"] * (1 + row % 2) for row in range(count)]
    dataset = ArrayDataset(images, captions, row_ids, groups, name=f"data{seed}")
    dataset.credit, dataset.credit_url = credit
    return dataset


def test_exemplars_come_first_and_row_ids_do_not_meet():
    first, second = make(2, 1, row_ids=[5, 3]), make(3, 2, row_ids=[0, 7, 2])
    both = concatenate(first, second)
    assert isinstance(both, ConcatDataset) and both.first is first and both.second is second
    assert both.name == "data1+data2" and len(both) == 5
    assert both.row_ids.tolist() == [5, 3, 6, 13, 8] and both.row_ids.dtype == np.int32
    for index, (part, inner) in enumerate([(first, 0), (first, 1), (second, 0), (second, 1), (second, 2)]):
        row = both[index]
        assert np.array_equal(row.image, part[inner].image) and row.row_id == both.row_ids[index]
        assert row.captions == both.captions(index) == part.captions(inner)
    with pytest.raises(IndexError):
        both[5]
    assert np.array_equal(pickle.loads(pickle.dumps(both))[3].image, second[1].image)


def test_groups_stay_apart():
    grouped, plain = make(3, 1, groups=np.array([0, 0, 2], np.int32)), make(2, 2)
    assert concatenate(plain, make(1, 3)).groups is None
    for first, second in ((grouped, plain), (plain, grouped), (grouped, grouped)):
        groups = concatenate(first, second).groups
        own = [data.groups if data.groups is not None else data.row_ids for data in (first, second)]
        same = groups[:, None] == groups[None]
        count = len(first)
        assert np.array_equal(same[:count, :count], own[0][:, None] == own[0][None])
        assert np.array_equal(same[count:, count:], own[1][:, None] == own[1][None])
        assert not same[:count, count:].any()


@pytest.mark.parametrize(
    ("first", "second", "joined"),
    [
        ((None, None), (None, None), (None, None)),
        ((None, None), ("A", "http://a"), ("A", "http://a")),
        (("A", "http://a"), ("A", "http://a"), ("A", "http://a")),
        (("A", "http://a"), ("B", None), ("A (http://a); B", None)),
    ],
)
def test_credits_are_joined(first, second, joined):
    both = concatenate(make(1, 1, credit=first), make(1, 2, credit=second))
    assert (both.credit, both.credit_url) == joined


def test_fingerprint_is_of_both_in_order():
    a, b = make(2, 1), make(2, 2)
    pairs = [(a, b), (b, a), (a, make(2, 3)), (make(2, 1, row_ids=[0, 2]), b)]
    assert len({concatenate(*pair).fingerprint() for pair in pairs}) == 4
    assert concatenate(make(2, 1), make(2, 2)).fingerprint() == concatenate(a, b).fingerprint()


def test_row_ids_beyond_32_bits():
    top = make(1, 1, row_ids=[2**31 - 2])
    assert concatenate(top, make(1, 2)).row_ids.tolist() == [2**31 - 2, 2**31 - 1]
    with pytest.raises(ValueError, match=f"data1\\+data2.* {2**31};"):
        concatenate(top, make(2, 2))
