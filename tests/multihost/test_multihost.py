"""One device, eight devices, and two processes of two devices give the same answer; a killed process ends the run.

So do two processes whose weights are divided over their four devices.
"""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from attrib_jax.convert.load import load_pipeline
from attrib_jax.core.weights import select_weights
from attrib_jax.jobs.curvature import fisher_file, load_fisher
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.skipped import read_skipped
from tests.multihost.ports import free_port
from tests.tiny_dataset import make_dataset
from tests.tiny_pipeline import make_torch_pipeline

_ROWS = 13
_SETTINGS = (
    "--prompt=hat",
    "--query_name=hat",
    "--query_draws=40",
    "--fisher_samples=71",
    "--stride=250",
    "--captions=all",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("multihost") / "model"
    make_torch_pipeline(str(path), unet_channels=(16,))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Thirteen images, one of them damaged, with one to three captions."""
    folder, dataset = tmp_path_factory.mktemp("images"), make_dataset(_ROWS)
    for index in range(_ROWS):
        file = folder / f"{index:02d}.png"
        Image.fromarray(dataset[index].image).save(file)
        file.with_suffix(".txt").write_text("\n".join(dataset.captions(index)))
    file = folder / "06.png"
    file.write_bytes(file.read_bytes()[:80])
    return folder


class Run:
    """One attribution by one or several processes in a workdir; several meet on a free port."""

    def __init__(self, model, images, workdir, devices: int, hosts: int = 1, arguments: tuple[str, ...] = ()):
        self.workdir, self.logs, self.processes = workdir, [], []
        workdir.mkdir(exist_ok=True)
        port = free_port()
        for host in range(hosts):
            several = (
                "--multihost",
                f"--coordinator=127.0.0.1:{port}",
                f"--num_hosts={hosts}",
                f"--host_index={host}",
                "--heartbeat_timeout=10",
            )
            command = [
                *(sys.executable, "-m", "tests.multihost.commands"),
                *(f"--model={model}", f"--dataset=folder:{images}", f"--workdir={workdir}"),
                f"--query={images / '00.png'}",
                *(f"--cpu_devices={devices}", "--use_shipped_stages=false", "--workers=0", *_SETTINGS, *arguments),
                *(several if hosts > 1 else ()),
            ]
            self.logs.append(workdir.with_name(f"{workdir.name}-{host}.log"))
            with open(self.logs[-1], "wb") as log:
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))

    def output(self, host: int = 0) -> str:
        return self.logs[host].read_text(errors="replace")

    def wait(self, seconds: float = 600) -> list[int]:
        try:
            return [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def succeed(self) -> "Run":
        assert self.wait() == [0] * len(self.processes), "\n".join(map(self.output, range(len(self.processes))))
        return self


_SIZES = {"one": (1, 1), "eight": (8, 1), "hosts": (2, 2)}  # name -> devices of a host, hosts


@pytest.fixture(scope="module", params=["float32", "float64"])
def runs(request, model, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    arguments = ("--float64",) if request.param == "float64" else ()
    runs = {name: Run(model, images, folder / name, *size, arguments).succeed() for name, size in _SIZES.items()}
    if request.param == "float32":
        divided = Run(model, images, folder / "divided", *_SIZES["hosts"], ("--model_parallel=4",))
        runs["divided"] = divided.succeed()
    return {**runs, "dtype": request.param}


def _scores(workdir):
    with np.load(workdir / "attribution" / "hat" / "scores.npz") as stored:
        return dict(stored)


def _fisher(workdir, model):
    selected, _ = select_weights(load_pipeline(str(model)).params["unet"], "cross-attn-kv")
    (stage,) = (workdir / "fisher").iterdir()
    return load_fisher(fisher_file(stage), selected).to_flat()


def _latents(workdir):
    return ChunkStore(workdir / "latents", {"latents": ((2, 8, 8, 4), np.float32)}, _ROWS, 4, "latents").read_all()


@pytest.mark.parametrize("other", ["eight", "hosts"])
def test_runs_agree_as_far_as_their_dtype_goes(runs, model, other):
    expected, found = _scores(runs["one"].workdir), _scores(runs[other].workdir)
    np.testing.assert_array_equal(found["row_id"], expected["row_id"])
    assert len(found["row_id"]) == _ROWS - 1
    precision = 1e-9 if runs["dtype"] == "float64" else 1e-6
    for name in ("loss_before", "loss_after", "query_loss"):
        np.testing.assert_allclose(found[name], expected[name], rtol=precision)
    # The same ranking throughout: Spearman's correlation is 1.
    np.testing.assert_array_equal(np.argsort(found["score"]), np.argsort(expected["score"]))
    if runs["dtype"] == "float64":
        np.testing.assert_allclose(found["score"], expected["score"], rtol=0, atol=1e-9 * np.ptp(expected["score"]))
    theirs = _fisher(runs["one"].workdir, model)
    for name, leaf in _fisher(runs[other].workdir, model).items():
        np.testing.assert_allclose(leaf, theirs[name], rtol=10 * precision, atol=1e-9 * theirs[name].max())


@pytest.mark.parametrize("runs", ["float32"], indirect=True)
def test_divided_weights_give_what_whole_ones_give(runs, model):
    """A group of four devices in two processes."""
    expected, divided = _scores(runs["hosts"].workdir), runs["divided"].workdir
    found = _scores(divided)
    np.testing.assert_array_equal(found["loss_before"], expected["loss_before"])
    for name in ("loss_after", "query_loss"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
    np.testing.assert_array_equal(np.argsort(found["score"]), np.argsort(expected["score"]))
    theirs = _fisher(runs["hosts"].workdir, model)
    for name, leaf in _fisher(divided, model).items():
        np.testing.assert_allclose(leaf, theirs[name], rtol=1e-5, atol=1e-9 * theirs[name].max())


def test_every_host_encodes_and_the_damaged_image_is_listed(runs):
    expected, found = (_latents(runs[name].workdir)["latents"] for name in ("one", "hosts"))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    listed = read_skipped(runs["hosts"].workdir / "latents")
    assert listed == read_skipped(runs["one"].workdir / "latents") and list(listed) == [6]
    assert not list((runs["hosts"].workdir / "latents").glob("skipped-*"))


def test_host_0_alone_prints_and_shows_progress(runs):
    first, second = (runs["hosts"].output(host) for host in range(2))
    assert "report:" in first and "losses after" in first
    assert "report:" not in second and "losses after" not in second


def _kill(run: Run, victim: int, pattern: str) -> None:
    """Kills a host when a file is there; the other must end within a minute and say what to do."""
    end = time.monotonic() + 600
    while not list(run.workdir.glob(pattern)):
        assert time.monotonic() < end and run.processes[victim].poll() is None, run.output()
        time.sleep(0.02)
    run.processes[victim].send_signal(signal.SIGKILL)
    codes = run.wait(60)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 75
    last = run.output(1 - victim).strip().splitlines()[-1]
    assert last.startswith("error: ") and "another host" in last and "same command on all hosts" in last


@pytest.mark.parametrize("runs", ["float32"], indirect=True)
def test_killed_hosts_end_the_run_and_the_next_one_resumes_to_the_same_bits(runs, model, images, tmp_path):
    workdir = tmp_path / "killed"
    _kill(Run(model, images, workdir, 2, 2), 0, "latents/latents/chunk-*")
    _kill(Run(model, images, workdir, 2, 2, ("--pause=5",)), 1, "fisher/*/partial/state-*")
    assert not (workdir / "losses").exists()
    Run(model, images, workdir, 2, 2).succeed()
    expected, found = _scores(runs["hosts"].workdir), _scores(workdir)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_hosts_in_lockstep(tmp_path):
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.multihost.lockstep", str(tmp_path), port, str(host)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    try:
        for process in processes:
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 0 and output.splitlines()[-1] == "done", errors
    finally:
        for process in processes:
            process.kill()
