"""SIGKILL at moments of the main job, in a real process: started again, it ends with the same bits."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from attrib_jax.convert.pipeline import save_pipeline

_SCRIPT = """
import sys
import tests.conftest
import attrib_jax.stages.fisher, attrib_jax.stages.losses
from attrib_jax.convert.pipeline import load_pipeline
from attrib_jax.stages.attribute import attribute
from attrib_jax.stages.config import AttributeConfig
from attrib_jax.stages.query import Query
from tests.tiny_dataset import make_dataset
attrib_jax.stages.losses._ROWS_PER_CHUNK = 4
attrib_jax.stages.fisher._TILES_PER_CHECKPOINT = 1
config = AttributeConfig(query_draws=64, fisher_samples=256, stride=200)
attribute(load_pipeline(sys.argv[1]), make_dataset(), Query(prompt="hat", sampler_steps=2), config, workdir=sys.argv[2])
"""


def _start(model, workdir):
    with open(f"{workdir}.log", "wb") as log:
        return subprocess.Popen([sys.executable, "-c", _SCRIPT, str(model), str(workdir)], stderr=log)


def _scores(workdir):
    (file,) = workdir.rglob("scores.npz")
    return np.load(file)


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("killed") / "model"
    save_pipeline(pipeline, str(path))
    return path


def test_killed_runs_resume_to_the_same_bits(model, tmp_path):
    whole = _start(model, tmp_path / "whole")
    assert whole.wait(600) == 0, (tmp_path / "whole.log").read_text()

    killed = tmp_path / "killed"
    for pattern in ("fisher/*/partial/*", "losses/*/losses/chunk*", "attribution/*/losses/chunk*"):
        process = _start(model, killed)
        while process.poll() is None and not list(killed.glob(pattern)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    last = _start(model, killed)
    assert last.wait(600) == 0, (tmp_path / "killed.log").read_text()

    expected, found = _scores(tmp_path / "whole"), _scores(killed)
    assert set(expected.files) == set(found.files)
    for name in expected.files:
        np.testing.assert_array_equal(found[name], expected[name])
