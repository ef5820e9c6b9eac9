"""The study of customised models: its concepts fit the shipped model, and its metrics are right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.metrics import average_precision_score

from attrib_jax.convert.pipeline import load_pipeline

_MODEL = Path(__file__).parents[2] / "models" / "openmoji"
_RANKS = [[1], [3], [1, 2, 4], [7, 2], [1, 10, 11, 400]]
# A process of its own, since every command defines flags of the same names.
_SCRIPT = f"""
import json
from benchmarks.customized import CONCEPTS, average_precision, recall_at
print(json.dumps({{
    "words": {{name: concept.initializer for name, concept in CONCEPTS.items()}},
    "precision": [average_precision(ranks) for ranks in {_RANKS}],
    "recall": [recall_at(ranks, 10) for ranks in {_RANKS}],
}}))
"""


@pytest.fixture(scope="module")
def study():
    command = [sys.executable, "-c", _SCRIPT]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_every_token_starts_from_one_word_of_the_shipped_model(study):
    tokenizer = load_pipeline(str(_MODEL)).tokenizer
    tokens = {name: len(tokenizer.tokenize(word)) for name, word in study["words"].items()}
    assert tokens == dict.fromkeys(tokens, 1)


def test_average_precision_is_scikit_learns(study):
    places = range(1, 401)
    expected = [
        average_precision_score([place in ranks for place in places], [-place for place in places]) for ranks in _RANKS
    ]
    assert study["precision"] == pytest.approx(expected)


def test_recall_counts_ranks_up_to_k(study):
    assert study["recall"] == [1, 1, 1, 1, 0.5]
