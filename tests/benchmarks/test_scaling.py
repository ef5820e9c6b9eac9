"""The scaling benchmark on few examples: its data set is read as users' are, and its limits can be missed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from attrib_jax.data.latents import open_latents
from benchmarks import losses_run, scaling
from benchmarks.sizes import SIZES

TINY = SIZES["tiny"]


def test_written_latents_are_a_data_set(tmp_path):
    scaling.write_latents(tmp_path, TINY, 1100)
    data = open_latents(tmp_path)
    assert data.latents.shape == (1100, 2, 8, 8, 4) and data.text.shape == (1100, TINY.length, 32)
    values = np.asarray(data.latents)
    assert abs(values.std() - 1) < 0.01
    # Neither pictures nor mirror images repeat.
    assert len(np.unique(values.reshape(2200, -1)[:, 0])) > 2190


def test_cached_data_set_gives_the_same_and_reads_once(tmp_path):
    scaling.write_latents(tmp_path, TINY, 6)
    stored = open_latents(tmp_path)
    arrays = stored.row_ids, stored.latents, stored.text, stored.first_caption, stored.positions
    plain, cached = losses_run.EncodedDataset(*arrays), losses_run._CachedDataset(*arrays)
    rows, flips = np.array([4, 0]), np.array([1, 0])
    for _ in range(2):
        for actual, expected in zip(cached.inputs(rows, flips, 0), plain.inputs(rows, flips, 0)):
            np.testing.assert_array_equal(actual, expected)
    assert cached.inputs(rows, flips, 0)[0] is cached.inputs(rows, flips, 0)[0]
    assert not np.array_equal(cached.inputs(rows, 1 - flips, 0)[0], plain.inputs(rows, flips, 0)[0])


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"seconds": 0.0111}, ["time per example changes by +11% from 100 to 400"]),
        ({"seconds": 0.0089}, ["time per example changes by -11% from 100 to 400"]),
        ({"left": 27 * 2**20}, ["memory grows by 17 MiB from 100 to 400"]),
    ],
)
def test_limits(changes, missed):
    row = {"examples": 100, "seconds": 0.01, "cpu": 0.02, "peak": 30 * 2**20, "left": 10 * 2**20}
    row |= {"read": 0.01, "waited": 0.02}
    rows = [row, row | {"examples": 400} | changes]
    assert scaling.misses(rows) == missed
    assert scaling.table(rows).splitlines()[2] == "| 100 | 10.000 | 20.000 | 30 | 10 | 1.0% | 2.0% |"


def test_command(tmp_path):
    output = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.scaling", "--counts=24,48", "--repeats=1", f"--output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600)
    rows = json.loads(output.read_text())
    assert [row["examples"] for row in rows] == [24, 48]
    assert done.returncode == bool(scaling.misses(rows)), done.stderr
    for row in rows:
        assert row["seconds"] > 0 and row["cpu"] > 0 and row["left"] <= row["peak"] < 2**30
        assert 0 < row["read"] and row["waited"] < 1
