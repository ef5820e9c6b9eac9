"""The study of customised models: its concepts fit the shipped model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attrib_jax.convert.load import load_pipeline

_MODEL = Path(__file__).parents[2] / "models" / "openmoji"
# A process of its own, since every command defines flags of the same names.
_SCRIPT = """
import json
from benchmarks.customized import CONCEPTS
print(json.dumps({name: concept.initializer for name, concept in CONCEPTS.items()}))
"""


@pytest.fixture(scope="module")
def words():
    command = [sys.executable, "-c", _SCRIPT]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_every_token_starts_from_one_word_of_the_shipped_model(words):
    tokenizer = load_pipeline(str(_MODEL)).tokenizer
    tokens = {name: len(tokenizer.tokenize(word)) for name, word in words.items()}
    assert tokens == dict.fromkeys(tokens, 1)
