"""The studies of many queries and of cascades on a tiny model: their numbers, and that nothing is computed twice."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.launch.calls import call_elsewhere
from tests.tiny_dataset import make_dataset
from tests.tiny_pipeline import make_torch_pipeline

TINY = ("--query_draws=32", "--fisher_samples=32", "--stride=300", "--sampler_steps=2")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Flags of the model and of a folder of images, each with one to three captions."""
    folder, dataset = tmp_path_factory.mktemp("studies"), make_dataset()
    make_torch_pipeline(str(folder / "model"), unet_channels=(16,))
    (folder / "images").mkdir()
    for index in range(len(dataset)):
        Image.fromarray(dataset[index].image).save(folder / "images" / f"{index:02d}.png")
        (folder / "images" / f"{index:02d}.txt").write_text("\n".join(dataset.captions(index)) + "\n")
    return [f"--model={folder / 'model'}", f"--dataset=folder:{folder / 'images'}", *TINY]


def study(name, shared, workdir, *arguments):
    """Runs the study twice -> its output and results.json; the second run computes no losses."""
    line = [*shared, f"--workdir={workdir}", *arguments]
    (first,) = call_elsewhere(f"benchmarks.{name}", line)
    assert first.code == 0, first.err
    stored = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.suffix in (".safetensors", ".bin")}
    (again,) = call_elsewhere(f"benchmarks.{name}", line)
    assert again.code == 0 and again.out == first.out, again.err
    assert stored and all(path.stat().st_mtime_ns == time for path, time in stored.items())
    return first.out, json.loads(next(workdir.rglob("results.json")).read_text())


def test_cost_and_agreement_of_many_queries(shared, tmp_path):
    # As many queries in both parts, so that they share their programs.
    arguments = ("--counts=1,2", "--rows=9", "--agreement_rows=30", "--agreement_queries=2")
    output, results = study("queries", shared, tmp_path, *arguments)
    assert set(results["costs"]) == {"exact 1", "exact 2", "linear 1", "linear 2"}
    assert all(cost["seconds"] > 0 and cost["rows"] == 9 for cost in results["costs"].values())
    assert results["costs"]["exact 2"]["difference"] == 0 < results["costs"]["linear 2"]["difference"] < 1e-3
    assert len(results["agreement"]) == 2
    assert all(-1 <= row["spearman"] <= 1 and row["top"] == 15 for row in results["agreement"])
    assert "| 2 | linear |" in output and "top-15 overlap" in output


def test_recall_and_saving_of_cascades(shared, tmp_path):
    arguments = ("--queries=2", "--coarse_strides=300,500", "--fractions=0.5,1", "--captions=all")
    output, results = study("cascade", shared, tmp_path, *arguments)
    assert [(row["coarse_stride"], row["finalists"]) for row in results] == [(300, 19), (300, 37), (500, 19), (500, 37)]
    for row in results:
        # Of 37 images the top 100 are all.
        assert row["recall_at_100"] == pytest.approx(row["finalists"] / 37)
        assert row["worst_recall_at_20"] <= row["recall_at_20"] <= 1
        assert row["seconds_saved"] > 0
    assert all(row["recall_at_20"] == 1 for row in results if row["finalists"] == 37)
    captions = np.mean([1 + i % 3 for i in range(37)])
    saved = 37 * 4 * captions / (37 * 2 + 19 * 4 * captions)
    assert results[2]["forwards_saved"] == pytest.approx(saved)
    assert "| 500 | 0.5 | 19 |" in output
