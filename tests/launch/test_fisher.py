"""`launch.fisher`: the curvature that it leaves in a workdir is the one that the attribute command takes."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from attrib_jax.storage.files import read_arrays
from launch import attribute, common
from tests.evaluation.conftest import make_dataset, make_model

EKFAC = ("--curvature=ekfac", "--fisher_samples=24", "--loss_seed=3")
STAGE = "ekfac/cross-attn-kv-24-seed3"
QUERY = ("--prompt=digit one", "--sampler_steps=2", "--query_draws=16", "--stride=500", "--flips=none", "--top_k=2")

# A process of its own: its flags have the names of the attribute command's.
FISHER = """
from launch import common, fisher
from tests.evaluation.conftest import make_dataset, make_model
common.load_model, common.load_dataset = make_model, lambda resolution: make_dataset()
common.run(fisher.main)
"""


def fisher(workdir, *arguments):
    command = [sys.executable, "-c", FISHER, "--model=tiny", f"--workdir={workdir}", "--cpu_devices=4", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def attributed(monkeypatch, capsys):
    monkeypatch.setattr(common, "load_model", make_model)
    monkeypatch.setattr(common, "load_dataset", lambda resolution: make_dataset())

    def run(workdir, *arguments):
        with flagsaver.flagsaver():
            flags.FLAGS(["attribute", "--model=tiny", f"--workdir={workdir}", "--query_name=q", *QUERY, *arguments])
            code = common.execute(attribute.main)
        assert code == 0, capsys.readouterr().err
        with np.load(workdir / "attribution" / "q" / "scores.npz") as stored:
            return stored["score"], json.loads((workdir / "attribution" / "q" / "manifest.json").read_text())

    return run


def test_attribution_takes_the_ekfac_that_was_fitted_before(attributed, tmp_path, monkeypatch):
    result = fisher(tmp_path / "before", *EKFAC)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"EKFAC of 512 values in 2 matrices in {tmp_path / 'before'}/ekfac\n"
    stored = {path.name: path.read_bytes() for path in (tmp_path / "before" / STAGE).iterdir()}
    assert stored.keys() == {"stage.json", "bases.safetensors", "eigenvalues.safetensors"}
    alone, _ = attributed(tmp_path / "alone", *EKFAC)
    with monkeypatch.context() as patch:
        for half in ("_fit_bases", "_fit_eigenvalues"):
            patch.setattr(f"attrib_jax.jobs.ekfac.{half}", lambda *args: pytest.fail("fitted again"))
        scores, manifest = attributed(tmp_path / "before", *EKFAC)
    np.testing.assert_array_equal(scores, alone)
    assert np.abs(scores).max() > 0
    assert "ekfac" in manifest["timings_seconds"] and not (tmp_path / "before" / "fisher").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "before" / STAGE).iterdir()} == stored
    for name in stored.keys() - {"stage.json"}:
        first, second = (read_arrays(tmp_path / workdir / STAGE / name)[0] for workdir in ("before", "alone"))
        assert first.keys() == second.keys()
        jax.tree.map(np.testing.assert_array_equal, first, second)


def test_an_unknown_curvature_is_one_clear_line_and_stores_nothing(tmp_path):
    result = fisher(tmp_path / "work", "--curvature=kfac")
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 1 and len(lines) == 1 and "'kfac': did you mean 'ekfac'" in lines[0]
    assert not (tmp_path / "work").exists()
