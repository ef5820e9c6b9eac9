"""The study of customised models: its concepts fit the shipped model, and its metrics are right."""

from pathlib import Path

import pytest
from sklearn.metrics import average_precision_score

from attrib_jax.convert.pipeline import load_pipeline
from benchmarks.customized import CONCEPTS, average_precision, recall_at

_MODEL = Path(__file__).parents[2] / "models" / "openmoji"


def test_every_token_starts_from_one_word_of_the_shipped_model():
    tokenizer = load_pipeline(str(_MODEL)).tokenizer
    assert {name: len(tokenizer.tokenize(concept.initializer)) for name, concept in CONCEPTS.items()} == dict.fromkeys(
        CONCEPTS, 1
    )


@pytest.mark.parametrize("ranks", [[1], [3], [1, 2, 4], [7, 2]])
def test_average_precision_is_scikit_learns(ranks):
    relevant = [rank in ranks for rank in range(1, 11)]
    expected = average_precision_score(relevant, [-rank for rank in range(1, 11)])
    assert average_precision(ranks) == pytest.approx(expected)


def test_recall_counts_ranks_up_to_k():
    assert recall_at([1, 10, 11, 400], 10) == 0.5
