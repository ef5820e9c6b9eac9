"""SIGKILL at moments of the main job and of training, in real processes: started again, they end with the same bits."""

import dataclasses
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import attrib_jax.stages.fill
import attrib_jax.stages.fisher
import attrib_jax.stages.losses
import attrib_jax.stages.unlearn
from attrib_jax.convert.pipeline import load_pipeline, save_pipeline
from attrib_jax.stages.attribute import attribute
from attrib_jax.stages.config import AttributeConfig
from attrib_jax.stages.fit import FitConfig
from attrib_jax.stages.query import Query
from attrib_jax.stages.train import TrainConfig, train
from launch import common
from tests.tiny_dataset import make_dataset

_CONFIG = AttributeConfig(query_draws=64, fisher_samples=256, stride=200, steps=4, keep_ewc_gradient=True)
_FIT = FitConfig(steps=6, batch_size=8, learning_rate=1e-3, warmup_steps=1, checkpoint_every=2, log_every=1)
_TRAIN = TrainConfig(
    autoencoder=_FIT,
    diffusion=dataclasses.replace(_FIT, steps=40),
    vae_channels=(8, 8),
    vae_groups=4,
    unet_channels=(16, 16),
    unet_heads=2,
    unet_groups=4,
    text_width=16,
    text_layers=1,
    text_heads=2,
    vocab_size=560,
    max_tokens=8,
)


def store_often(setattr=setattr) -> None:
    """Small chunks, and a state after every tile and step."""
    setattr(attrib_jax.stages.fill, "_MAX_ROWS_PER_CHUNK", 16)
    setattr(attrib_jax.stages.fisher, "_TILES_PER_CHECKPOINT", 1)
    setattr(attrib_jax.stages.losses, "_ROWS_PER_CHUNK", 4)
    setattr(attrib_jax.stages.losses, "_TILES_PER_CHUNK", 1)
    setattr(attrib_jax.stages.unlearn, "_SECONDS_BETWEEN_STATES", 0.0)
    setattr(attrib_jax.stages.unlearn, "_STORING_SHARE", np.inf)


def run_attribute(pipeline, workdir) -> None:
    attribute(pipeline, make_dataset(), Query(prompt="hat", sampler_steps=2), _CONFIG, workdir=workdir)


def attribute_job(model, workdir) -> None:
    run_attribute(load_pipeline(model), workdir)


def train_job(workdir) -> None:
    train(workdir, make_dataset(), _TRAIN)


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


def _signal_when(process, workdir, pattern, number) -> int:
    """Sends a signal as soon as a file appears -> the exit code."""
    while process.poll() is None and not list(workdir.glob(pattern)):
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(120)


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("killed") / "model"
    save_pipeline(pipeline, str(path))
    return path


def test_killed_runs_resume_to_the_same_bits_and_a_second_run_is_refused(
    pipeline, model, tmp_path, monkeypatch, capsys
):
    killed, log = tmp_path / "killed", tmp_path / "killed.log"
    patterns = (
        "latents/latents/chunk*",
        "fisher/*/partial/*",
        "attribution/*/unlearning/state-1*",
        "attribution/*/losses/chunk*",
    )
    for pattern in patterns:
        process = _start(killed, "attribute_job", model)
        assert _signal_when(process, killed, pattern, signal.SIGKILL) == -signal.SIGKILL, log.read_text()
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
    process = _start(killed, "train_job")
    assert _signal_when(process, killed, "autoencoder/2", signal.SIGKILL) == -signal.SIGKILL, log.read_text()
    process = _start(killed, "train_job")
    assert _signal_when(process, killed, "diffusion/4", signal.SIGTERM) == 1, log.read_text()
    assert "error: stopped by SIGTERM at step " in log.read_text()
    last = _start(killed, "train_job")
    assert last.wait(600) == 0, log.read_text()

    train_job(tmp_path / "whole")
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "model").rglob("*.*"))
    assert len(files) > 6
    for file in files:
        assert (killed / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert not list(killed.glob(".model*"))
