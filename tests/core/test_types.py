"""Scores: ranking, ties and checks."""

import numpy as np
import pytest

from attrib_jax.core.types import Scores


def test_top_and_rank_do_not_depend_on_the_order_of_rows():
    row_id = np.array([40, 7, 3, 12, 5])
    score = np.array([0.5, 2.0, 0.5, -1.0, 0.5])
    flip = np.array([0, 1, 1, 0, 0])
    before = np.arange(10.0).reshape(5, 2)
    rng = np.random.default_rng(0)
    for _ in range(5):
        order = rng.permutation(5)
        scores = Scores(row_id[order], score[order], before[order], before[order] + 1, flip[order])
        best = scores.top(4)
        assert best.row_id.tolist() == [7, 3, 5, 40]
        assert best.flip.tolist() == [1, 1, 0, 0]
        assert best.loss_before[:, 0].tolist() == [2, 4, 8, 0]
        assert [scores.rank_of(row) for row in (7, 3, 5, 40, 12)] == [1, 2, 3, 4, 5]
    assert len(Scores(row_id, score).top()) == 5 and Scores(row_id, score).top(2).flip is None


@pytest.mark.parametrize(
    ("row_id", "score", "further", "named"),
    [
        ([8, 9], [0.0, np.nan], {}, "score .*1 of 2 .*9"),
        ([8, 8], [0.0, 1.0], {}, r"row_id holds \[8\]"),
        ([8, 9], [0.0, 1.0], {"loss_after": np.zeros((3, 2))}, r"loss_after .*\(3, 2\)"),
        ([8, 9], np.zeros((2, 2)), {}, r"\(2,\) and \(2, 2\)"),
        ([8.5, 9.1], [0.0, 1.0], {}, "row_id .*float64"),
        (3, 0.5, {}, r"\(\) and \(\)"),
    ],
)
def test_bad_scores_are_refused(row_id, score, further, named):
    with pytest.raises(ValueError, match=named):
        Scores(row_id, score, **further)


def test_absent_rows_and_bad_counts_are_refused():
    with pytest.raises(KeyError, match="row_id=4"):
        Scores([8, 9], [0.0, 1.0]).rank_of(4)
    with pytest.raises(ValueError, match="k is 0"):
        Scores([8, 9], [0.0, 1.0]).top(0)


def test_whole_numbers_rank_as_numbers():
    assert Scores([4, 5, 6], np.uint8([0, 3, 1])).top().row_id.tolist() == [5, 6, 4]
    assert len(Scores([], [])) == 0
