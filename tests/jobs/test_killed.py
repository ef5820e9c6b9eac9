"""SIGKILL at moments of the main job and of training, in real processes: started again, they end with the same bits."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attrib_jax.jobs.draws
import attrib_jax.jobs.encode_to_store
import attrib_jax.jobs.losses
import attrib_jax.methods.unlearn
from attrib_jax.attribute import attribute
from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.load import load_pipeline
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.training.loop import FitConfig, fit
from launch import common
from tests.tiny_dataset import make_dataset

_CONFIG = method_config(query_draws=64, fisher_samples=256, stride=300, steps=4, keep_ewc_gradient=True)
_FIT = FitConfig(steps=120, batch_size=8, learning_rate=0.1, warmup_steps=2, checkpoint_every=4, log_every=1)
_SOURCE = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)


def store_often(setattr=setattr) -> None:
    """Small chunks, and a state after every tile and step."""
    setattr(attrib_jax.jobs.encode_to_store, "_MAX_ROWS_PER_CHUNK", 16)
    setattr(attrib_jax.jobs.draws, "_SAMPLES_PER_CPU", 8)
    setattr(attrib_jax.jobs.draws, "tiles_per_checkpoint", lambda mesh: 1)
    setattr(attrib_jax.jobs.losses, "_ROWS_PER_CHUNK", 4)
    setattr(attrib_jax.jobs.losses, "_TILES_PER_CHUNK", 1)
    setattr(attrib_jax.methods.unlearn, "_SECONDS_BETWEEN_STATES", 0.0)
    setattr(attrib_jax.methods.unlearn, "_STORING_SHARE", np.inf)


def run_attribute(pipeline, workdir) -> None:
    attribute(pipeline, make_dataset(), Query(prompt="hat", sampler_steps=2), _CONFIG, workdir=workdir)


def attribute_job(model, workdir) -> None:
    run_attribute(load_pipeline(model), workdir)


def fit_job(workdir) -> None:
    def loss(params, batch, key):
        noisy = batch + 0.1 * jax.random.normal(key, batch.shape)
        return jnp.mean(jnp.square(noisy - params["centre"])), {}

    os.makedirs(workdir, exist_ok=True)
    result = fit(workdir, loss, {"centre": jnp.full((3,), 5.0)}, _SOURCE, _FIT, "test")
    np.save(f"{workdir}/result.npy", result["centre"])


def _start(workdir, job, *arguments):
    script = (
        "import sys, tests.conftest\n"
        "from launch import common\n"
        "from tests.stages import test_killed as jobs\n"
        "jobs.store_often()\n"
        f"sys.exit(common.execute(lambda: jobs.{job}(*sys.argv[1:])))\n"
    )
    with open(f"{workdir}.log", "ab") as log:
        return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments), str(workdir)], stderr=log)


def _signal_when(process, happened, number) -> int:
    """Sends a signal as soon as `happened()` -> the exit code."""
    while process.poll() is None and not happened():
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(120)


def _any_file(folder, patterns) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _newest_step(folder) -> int:
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def _logged(folder) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("killed") / "model"
    save_pipeline(pipeline, str(path))
    return path


def test_killed_runs_resume_to_the_same_bits_and_a_second_run_is_refused(
    pipeline, model, tmp_path, monkeypatch, capsys
):
    killed, log = tmp_path / "killed", tmp_path / "killed.log"
    moments = (
        # States go when their sum is stored, and a busy machine may see only that.
        ["fisher/*/partial/state-1*", "fisher/*/fisher.safetensors"],
        ["attribution/*/unlearning/state-1*", "attribution/*/unlearned.safetensors"],
        ["attribution/*/losses/*"],
    )
    for patterns in moments:
        process = _start(killed, "attribute_job", model)
        happened = functools.partial(_any_file, killed, patterns)
        assert _signal_when(process, happened, signal.SIGKILL) == -signal.SIGKILL, log.read_text()
    last = _start(killed, "attribute_job", model)
    while last.poll() is None and str(last.pid) not in (killed / ".lock").read_text():
        time.sleep(0.01)
    assert common.execute(lambda: run_attribute(pipeline, killed)) == 1
    assert f"error: {killed} is in use by another run (pid {last.pid} on " in capsys.readouterr().err
    assert last.wait(600) == 0, log.read_text()

    store_often(monkeypatch.setattr)
    run_attribute(pipeline, tmp_path / "whole")
    (expected,), (found,) = ([*path.rglob("scores.npz")] for path in (tmp_path / "whole", killed))
    expected, found = np.load(expected), np.load(found)
    assert set(expected.files) == set(found.files) and len(expected["query_loss"]) == 4
    for name in expected.files:
        np.testing.assert_array_equal(found[name], expected[name])
    assert not list(killed.rglob(".partial-*")) and not list(killed.rglob("unlearning"))


def test_killed_training_resumes_to_the_same_bits_and_sigterm_stores_the_step(tmp_path):
    killed, log = tmp_path / "killed", tmp_path / "killed.log"
    process = _start(killed, "fit_job")
    assert _signal_when(process, lambda: _newest_step(killed), signal.SIGKILL) == -signal.SIGKILL, log.read_text()
    stored = _newest_step(killed)
    process = _start(killed, "fit_job")
    assert _signal_when(process, lambda: _newest_step(killed) > stored, signal.SIGTERM) == 1, log.read_text()
    (step,) = re.findall(r"error: stopped by SIGTERM at step (\d+)", log.read_text())
    assert stored < int(step) < _FIT.steps and (killed / step).is_dir()
    last = _start(killed, "fit_job")
    assert last.wait(600) == 0, log.read_text()
    fit_job(tmp_path / "whole")
    np.testing.assert_array_equal(np.load(killed / "result.npy"), np.load(tmp_path / "whole" / "result.npy"))
    found, expected = _logged(killed), _logged(tmp_path / "whole")
    assert found == expected and len(found) == _FIT.steps
