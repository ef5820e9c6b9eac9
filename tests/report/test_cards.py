"""Ranking, cards and the number format."""

import numpy as np
import pytest

from attrib_jax.report.cards import distinct_cards, least_cards, score_scale, top_cards


def test_cards_follow_the_scores_and_show_the_winning_flip(make_report):
    report = make_report()
    cards = top_cards(report)
    assert [(card.rank, card.row_id) for card in cards] == [(1, 14), (2, 12), (3, 10)]
    assert [card.relative for card in cards] == pytest.approx([1.0, 0.5, 0.25])
    assert [card.mirrored for card in cards] == [True, True, False]
    for card in cards:
        original = report.image(card.row_id)
        np.testing.assert_array_equal(card.image, original[:, ::-1] if card.mirrored else original)


def test_equal_scores_rank_by_row_id_whatever_their_order(make_report):
    row_id = np.array([13, 10, 14, 11, 12])
    cards = top_cards(make_report(row_id=row_id, score=np.full(5, 1e-5), top_k=5))
    assert [card.row_id for card in cards] == [10, 11, 12, 13, 14]


def test_least_cards_are_the_lowest_and_never_repeat_the_top(make_report):
    assert [(card.rank, card.row_id) for card in least_cards(make_report())] == [(4, 13), (5, 11)]
    assert [card.rank for card in least_cards(make_report(top_k=4))] == [5]
    assert least_cards(make_report(top_k=50)) == []


def test_near_duplicates_point_at_the_first_of_their_group(make_report):
    groups = {14: "a", 12: "b", 10: "a", 13: None, 11: None}
    cards = top_cards(make_report(group=groups, top_k=5))
    assert [card.duplicate_of for card in cards] == [None, None, 1, None, None]
    distinct = distinct_cards(make_report(group=groups), count=4)
    assert [(card.rank, card.row_id) for card in distinct] == [(1, 14), (2, 12), (4, 13), (5, 11)]
    assert distinct_cards(make_report(), count=4) == []


def test_losses_are_of_the_winning_flip_or_the_mean(make_report):
    before = np.arange(10.0).reshape(5, 2)
    won = top_cards(make_report(loss_before=before, loss_after=before + 0.5))
    assert [card.losses for card in won] == [(9.0, 9.5), (5.0, 5.5), (0.0, 0.5)]
    mean = top_cards(make_report(loss_before=before, loss_after=before + 0.5, flip=None))
    assert mean[0].losses == (8.5, 9.0)


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ([4.207e-4, -8e-6, -1e-9], ["4.21 ×10⁻⁴", "−0.08 ×10⁻⁴", "0.00 ×10⁻⁴"]),
        ([0.95, 0.4], ["0.950", "0.400"]),
        ([-250.0, 3.0], ["−250.0", "3.0"]),
        ([1.5e12], ["1.50 ×10¹²"]),
        ([0.0, 0.0], ["0.00", "0.00"]),
    ],
)
def test_scores_share_one_exponent(scores, shown):
    scale = score_scale(np.array(scores))
    assert [scale.with_unit(score) for score in scores] == shown


def test_no_share_of_rank_one_where_it_is_not_positive(make_report):
    report = make_report(score=-np.arange(1.0, 6.0))
    assert {card.relative for card in top_cards(report)} == {None}


def test_a_image_of_another_kind_is_refused_with_its_row(make_report):
    with pytest.raises(ValueError, match=r"image\(14\) has shape \(4, 4\)"):
        top_cards(make_report(image=lambda row_id: np.zeros((4, 4), np.uint8)))
