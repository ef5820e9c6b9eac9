"""SIGKILL at moments of the main job in real processes: started again, it ends with the same bits."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from attrib_jax.attribute import attribute
from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.load import load_pipeline
from attrib_jax.jobs.query import Query
from attrib_jax.methods.unlearn import UnlearnConfig
from attrib_jax.storage.files import StorageError
from tests.tiny_dataset import make_dataset

CONFIG = UnlearnConfig(query_draws=64, fisher_samples=256, stride=300, steps=4, keep_ewc_gradient=True, step_size=0.01)
SCRIPT = "import sys, tests.conftest\nfrom tests.jobs.test_killed import job\njob(*sys.argv[1:])\n"
# What is stored when the process is killed.
MOMENTS = ("text/text/chunk-*", "fisher/*/fisher.safetensors", "attribution/*/losses/chunk-*")


def job(model, workdir):
    attribute(load_pipeline(str(model)), make_dataset(), Query(prompt="hat", sampler_steps=2), CONFIG, workdir=workdir)


def start(model, workdir):
    with open(f"{workdir}.log", "ab") as log:
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(model), str(workdir)], stderr=log)


def test_killed_runs_resume_to_the_same_bits_and_a_second_run_is_refused(pipeline, tmp_path):
    model, killed, log = tmp_path / "model", tmp_path / "killed", tmp_path / "killed.log"
    save_pipeline(pipeline, str(model))
    for pattern in MOMENTS:
        process = start(model, killed)
        while process.poll() is None and not next(killed.glob(pattern), None):
            time.sleep(0.01)
        process.kill()
        assert process.wait(120) in (-signal.SIGKILL, 0), log.read_text()
    last = start(model, killed)
    while last.poll() is None and str(last.pid) not in (killed / ".lock").read_text():
        time.sleep(0.01)
    with pytest.raises(StorageError, match=f"in use by another run .*{last.pid}"):
        job(model, killed)
    assert last.wait(600) == 0, log.read_text()

    job(model, tmp_path / "whole")
    (expected,), (found,) = ([*path.rglob("scores.npz")] for path in (tmp_path / "whole", killed))
    expected, found = np.load(expected), np.load(found)
    assert set(expected.files) == set(found.files) and len(expected["query_loss"]) == 4
    for name in expected.files:
        np.testing.assert_array_equal(found[name], expected[name])
    assert not list(killed.rglob(".partial-*")) and not list(killed.rglob("unlearning"))
