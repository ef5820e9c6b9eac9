"""Training in real processes that are killed, and newest checkpoints that are damaged: resumed to the same bits."""

import json
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.training.loop import FitConfig, fit

CONFIG = FitConfig(steps=120, batch_size=8, learning_rate=0.1, warmup_steps=2, checkpoint_every=4, log_every=1)
SHORT = FitConfig(steps=12, batch_size=8, learning_rate=0.1, warmup_steps=2, checkpoint_every=4, log_every=1)
# Large enough that most of a checkpoint is weights.
SOURCE = np.random.default_rng(0).normal(size=(20, 3000)).astype(np.float32)
SCRIPT = "import sys, tests.conftest\nfrom tests.training.test_killed import job\njob(sys.argv[1])\n"


def train(path, config=CONFIG):
    def loss(params, batch, key):
        return jnp.mean(jnp.square(batch + jax.random.normal(key, batch.shape) - params["centre"])), {}

    return fit(path, loss, {"centre": jnp.full((3000,), 5.0)}, SOURCE, config, "test")["centre"]


def job(path):
    np.save(f"{path}.npy", train(path))


def start(path):
    with open(f"{path}.log", "ab") as log:
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], stderr=log)


def newest_step(folder):
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def stop_after(process, folder, step, number):
    """Sends a signal once a checkpoint after `step` is stored -> the exit code."""
    while process.poll() is None and newest_step(folder) <= step:
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(60)


def logged(folder):
    """The lines of the log but for their speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "examples_per_second"} for line in lines]


def test_killed_training_resumes_to_the_same_bits_and_sigterm_stores_the_step(tmp_path):
    killed, log = tmp_path / "killed", tmp_path / "killed.log"
    assert stop_after(start(killed), killed, 0, signal.SIGKILL) == -signal.SIGKILL, log.read_text()
    stored = newest_step(killed)
    assert stop_after(start(killed), killed, stored, signal.SIGTERM) == 1, log.read_text()
    (step,) = re.findall(r"InterruptedError: stopped by SIGTERM at step (\d+)", log.read_text())
    assert stored < int(step) == newest_step(killed) < CONFIG.steps
    assert start(killed).wait(60) == 0, log.read_text()
    np.testing.assert_array_equal(np.load(f"{killed}.npy"), train(tmp_path / "whole"))
    assert logged(killed) == logged(tmp_path / "whole") and len(logged(killed)) == CONFIG.steps


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, damage):
    whole, lines = train(tmp_path, SHORT), logged(tmp_path)
    files = [path for path in (tmp_path / "12").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 4
    largest.write_bytes(content if damage == "flip" else content[:middle])
    # What a power loss makes of the end of a log.
    with open(tmp_path / "metrics.jsonl", "ab") as log:
        log.write(bytes(20) + b"\n")
    np.testing.assert_array_equal(train(tmp_path, SHORT), whole)
    assert "checkpoint 12 in" in caplog.text and "resuming from an earlier one" in caplog.text
    assert logged(tmp_path) == lines and newest_step(tmp_path) == 12
    # Stored anew, beside what was damaged.
    assert [path.name for path in tmp_path.glob("damaged-*")] == ["damaged-12-0"]
    caplog.clear()
    np.testing.assert_array_equal(train(tmp_path, SHORT), whole)
    assert "damaged" not in caplog.text
