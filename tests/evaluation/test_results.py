"""The table of retrained models: it grows whole, survives a reopening, and tells damage."""

import numpy as np
import pytest

from attrib_jax.evaluation.results import KeptModels, ResultTable
from attrib_jax.storage.files import StorageError

FIELDS = {"loss": (2,), "mse": ()}


def test_models_come_back_after_reopening(tmp_path):
    file = tmp_path / "models.safetensors"
    table = ResultTable(file, FIELDS)
    table.add({"b": {"loss": [1.0, 2.0], "mse": 3.0}})
    table.add({"a": {"loss": [4.0, 5.0], "mse": 6.0}, "c": {"loss": [0.1, 0.2], "mse": 0.3}})
    stored = ResultTable(file, FIELDS)
    assert len(stored) == 3 and "a" in stored and "d" not in stored
    np.testing.assert_array_equal(stored.get("loss", ["c", "b"]), [[0.1, 0.2], [1.0, 2.0]])
    np.testing.assert_array_equal(stored.get("mse", ["a"]), [6.0])
    with pytest.raises(KeyError):
        stored.get("loss", ["d"])


def test_other_fields_are_refused(tmp_path):
    file = tmp_path / "models.safetensors"
    table = ResultTable(file, FIELDS)
    with pytest.raises(ValueError, match="model a has the fields"):
        table.add({"a": {"loss": [1.0]}})
    table.add({"a": {"loss": [1.0, 2.0], "mse": 3.0}})
    with pytest.raises(StorageError, match="expected"):
        ResultTable(file, {"loss": (3,)})


def test_a_damaged_table_counts_as_empty(tmp_path, caplog):
    file = tmp_path / "models.safetensors"
    ResultTable(file, FIELDS).add({"a": {"loss": [1.0, 2.0], "mse": 3.0}})
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert len(ResultTable(file, FIELDS)) == 0
    assert "will be trained again" in caplog.text


def test_weights_beyond_float16_are_not_kept(tmp_path):
    kept = KeptModels(tmp_path)
    with pytest.raises(ValueError, match="conv.*model b.*float16"):
        kept.write(["a", "b"], {"conv": np.array([[1.0], [1e6]], np.float32)})
    assert "b" not in kept
