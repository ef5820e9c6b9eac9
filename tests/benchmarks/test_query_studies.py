"""The studies of many queries and of cascades on a tiny model: their numbers, and that nothing is run twice."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.tiny_pipeline import make_torch_pipeline

# A process of its own, since every command defines flags of the same names.
SCRIPT = """
import sys
import tests.conftest
from absl import flags
from attrib_jax.jobs.losses import ExampleProgram
from benchmarks import STUDY as study
from launch import common
from tests.tiny_dataset import make_dataset

common.open_dataset = lambda *args, **keys: make_dataset()
flags.FLAGS(sys.argv)
call, pictures = ExampleProgram.__call__, []
ExampleProgram.__call__ = lambda self, weights, data, rows, *rest: (
    pictures.append(len(rows)), call(self, weights, data, rows, *rest))[1]
assert common.execute(study.main) == 0
print("pictures", sum(pictures))
pictures.clear()
assert common.execute(study.main) == 0
print("pictures", sum(pictures))
"""
TINY = ("--query_draws=32", "--fisher_samples=32", "--stride=300", "--sampler_steps=2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("studies") / "model"
    make_torch_pipeline(str(path), unet_channels=(16,))
    return path


def run(study, model, workdir, *arguments):
    """The study twice -> (its output, results.json, pictures that its second run computed)."""
    command = [sys.executable, "-c", SCRIPT.replace("STUDY", study), f"--model={model}", f"--workdir={workdir}"]
    result = subprocess.run([*command, *TINY, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    results = json.loads(next(workdir.rglob("results.json")).read_text())
    first, again = (int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("pictures"))
    assert first > 0
    return result.stdout, results, again


def test_cost_and_agreement_of_many_queries(model, tmp_path):
    # As many queries in both parts, so that they share their programs.
    arguments = ("--counts=1,2", "--rows=9", "--agreement_rows=30", "--agreement_queries=2")
    output, results, again = run("queries", model, tmp_path, *arguments)
    # Of the base losses and of either query's, the eight pictures that tell whether they are of this device.
    assert again <= 3 * 8
    assert set(results["costs"]) == {"exact 1", "exact 2", "linear 1", "linear 2"}
    assert all(cost["seconds"] > 0 and cost["rows"] == 9 for cost in results["costs"].values())
    assert results["costs"]["exact 2"]["difference"] == 0 < results["costs"]["linear 2"]["difference"] < 1e-3
    assert len(results["agreement"]) == 2
    assert all(-1 <= row["spearman"] <= 1 and row["top"] == 15 for row in results["agreement"])
    assert "| 2 | linear |" in output and "top-15 overlap" in output


def test_recall_and_saving_of_cascades(model, tmp_path):
    arguments = ("--queries=2", "--coarse_strides=300,500", "--fractions=0.5,1", "--captions=all")
    output, results, again = run("cascade", model, tmp_path, *arguments)
    assert again == 0
    assert [(row["coarse_stride"], row["finalists"]) for row in results] == [(300, 19), (300, 37), (500, 19), (500, 37)]
    for row in results:
        # Of 37 pictures the top 100 are all.
        assert row["recall_at_100"] == pytest.approx(row["finalists"] / 37)
        assert row["worst_recall_at_20"] <= row["recall_at_20"] <= 1
        assert row["seconds_saved"] > 0
    assert all(row["recall_at_20"] == 1 for row in results if row["finalists"] == 37)
    captions = np.mean([1 + i % 3 for i in range(37)])
    saved = 37 * 4 * captions / (37 * 2 + 19 * 4 * captions)
    assert results[2]["forwards_saved"] == pytest.approx(saved)
    assert "| 500 | 0.5 | 19 |" in output
