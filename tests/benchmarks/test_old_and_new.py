"""benchmarks/old_and_new.py: the table, and a checkout in a process of its own."""

from pathlib import Path

import pytest

from benchmarks import old_and_new

ROOT = Path(__file__).parents[2]


def test_a_row_has_the_ratio_of_neighbouring_turns():
    rates = {"old": [1.0, 2.0, 4.0], "new": [2.0, 2.0, 2.0]}
    assert old_and_new.row("losses", rates) == "| losses | 2.00 | 2.00 | 1.000 (0.500, 2.000) |"


def test_each_side_is_first_in_every_second_turn():
    order = []

    class Side:
        def __init__(self, name, rate):
            self.name, self.rate = name, rate

        def call(self, method, *arguments):
            order.append((self.name, method))
            return (8, 8 / self.rate) if method == "turn" else None

    rates = old_and_new.compare({"old": Side("old", 2.0), "new": Side("new", 4.0)}, "losses", 8, 2)
    assert rates == {"old": [2.0, 2.0], "new": [4.0, 4.0]}
    assert order[2:] == [("old", "turn"), ("new", "turn"), ("new", "turn"), ("old", "turn")]


def test_a_failure_in_a_checkout_is_told_with_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="start failed:\n(.|\n)*KeyError: 'huge'"):
        old_and_new.Checkout(ROOT, "huge", "weights.safetensors", "cpu", "float32", 1)
    with pytest.raises(RuntimeError, match="start failed:\n(.|\n)*No module named 'benchmarks.sizes'"):
        (tmp_path / "benchmarks").mkdir()
        (tmp_path / "benchmarks" / "__init__.py").touch()
        old_and_new.Checkout(tmp_path, "tiny", "weights.safetensors", "cpu", "float32", 1)
