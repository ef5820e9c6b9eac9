"""Text kernels against dense references, and their invariances."""

import numpy as np
import pytest

from attrib_jax.attribution.similarity import (
    gaussian_kernel,
    median_distance,
    normalise_caption,
    same_caption,
    text_statistics,
    token_kernels,
)

TEXT = np.random.default_rng(0).normal(size=(700, 5, 6)).astype(np.float32) + 0.5
ROWS = np.random.default_rng(1).permutation(700)[:600]


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("A red  heart\n", "a Red heart", True),
        ("straße", "STRASSE", True),
        ("ｆｕｌｌ width", "full width", True),
        ("a red heart", "a red heart.", False),
        ("café", "cafe", False),
        ("", " ", True),
    ],
)
def test_captions_are_the_same_but_for_case_white_space_and_compatibility_forms(left, right, same):
    assert (normalise_caption(left) == normalise_caption(right)) is same
    np.testing.assert_array_equal(same_caption(left, [right, left]), [float(same), 1])


def test_statistics_are_those_of_all_rows_together():
    statistics, states = text_statistics(TEXT, ROWS), TEXT[ROWS].astype(np.float64)
    np.testing.assert_allclose(statistics.pooled, states.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(statistics.moment, np.einsum("nld,nle->de", states, states) / 3000, rtol=1e-12)
    pooled = statistics.pooled.astype(np.float64)
    pairs = np.linalg.norm(pooled[:, None] - pooled, axis=-1)[np.triu_indices(600, 1)]
    assert statistics.distance == pytest.approx(np.median(pairs), rel=1e-12)


def test_gaussian_kernel_of_pooled_states():
    statistics, query = text_statistics(TEXT, ROWS), TEXT[3]
    squared = np.square(TEXT[ROWS].astype(np.float64).mean(axis=1) - query.astype(np.float64).mean(axis=0)).sum(axis=1)
    expected = np.exp(-squared / (2 * (0.3 * statistics.distance) ** 2))
    np.testing.assert_allclose(gaussian_kernel(query, statistics, 0.3), expected, rtol=1e-4)
    assert expected.max() > 10 * np.median(expected)
    # One caption for all images: the text tells nothing apart.
    alike = text_statistics(np.repeat(TEXT[:1], 9, axis=0), np.arange(9))
    np.testing.assert_array_equal(gaussian_kernel(query, alike, 0.3), np.ones(9))


def test_token_kernel_is_the_cosine_in_the_metric_of_the_damped_moment():
    statistics = text_statistics(TEXT, ROWS)
    metric = np.linalg.inv(statistics.moment + 0.2 * np.trace(statistics.moment) / 6 * np.eye(6))

    def kernel(left, right):
        return np.einsum("ld,de,le->", left, metric, right)

    found = token_kernels([TEXT[3], TEXT[ROWS[5]]], TEXT, ROWS, statistics, 0.2)
    assert found.shape == (2, 600) and found[1, 5] == pytest.approx(1)
    for column in (0, 5, 599):
        own = TEXT[ROWS[column]].astype(np.float64)
        for query, row in zip((TEXT[3].astype(np.float64), TEXT[ROWS[5]].astype(np.float64)), found):
            expected = kernel(query, own) / np.sqrt(kernel(query, query) * kernel(own, own))
            assert row[column] == pytest.approx(expected, abs=1e-10)
    # A change of the text states' basis and scale changes nothing where damping is small.
    basis = np.random.default_rng(2).normal(size=(6, 6))
    turned = TEXT.astype(np.float64) @ basis
    small = token_kernels([TEXT[3]], TEXT, ROWS, statistics, 1e-9)
    other = token_kernels([turned[3]], turned, ROWS, text_statistics(turned, ROWS), 1e-9)
    np.testing.assert_allclose(other, small, atol=1e-6)
    with pytest.raises(ValueError, match="'tokens'"):
        token_kernels([TEXT[3, :4]], TEXT, ROWS, statistics, 0.2)


def test_the_median_distance_is_of_different_vectors_and_of_a_sample_where_there_are_many():
    line = np.array([0, 0, 1, 3])[:, None]
    assert median_distance(line) == 2  # of 1, 1, 3, 3, 2
    assert median_distance(line[:2]) == median_distance(line[:1]) == 0
    many = np.random.default_rng(0).normal(size=(5000, 3))
    whole = np.median(np.linalg.norm(many[:1500, None] - many[1500:3000], axis=-1))
    assert median_distance(many) == median_distance(many) == pytest.approx(whole, rel=0.02)
