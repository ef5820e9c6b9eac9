"""The speed benchmark on its tiny model: both sides compute the same, and its limits and measurements can fail."""

import contextlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import throughput, torch_reference
from benchmarks.sizes import SIZES, size_of
from benchmarks.workers import Worker

TINY = SIZES["tiny"]
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.fixture(scope="module")
def workers():
    with throughput.both_sides(TINY, "cpu", "float32", devices=2, threads=1) as workers:
        yield workers


@pytest.fixture(scope="module")
def unet():
    return torch_reference.build_unet(TINY.unet, TINY.seed)


def random_inputs(count, steps=None):
    generator = torch.Generator().manual_seed(1)
    shape = (count, *(() if steps is None else (steps,)), 4, 8, 8)
    return {
        "alphas_cumprod": torch.linspace(0.99, 0.01, 1000),
        "latents": torch.randn(count, 4, 8, 8, generator=generator),
        "text": torch.randn(count, TINY.length, 32, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "timesteps": torch.randint(1000, (steps or count,), generator=generator),
    }


def gradient(unet, weights, inputs, index):
    """One sample's gradient by the noise of its own, in the plainest way."""
    noise, timestep = inputs["noise"][index], inputs["timesteps"][index]
    level = inputs["alphas_cumprod"][timestep]
    text, latents = (inputs[name][index if len(inputs[name]) > 1 else 0] for name in ("text", "latents"))
    noisy = level**0.5 * latents + (1 - level) ** 0.5 * noise
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = torch.nn.functional.mse_loss(unet(noisy[None], timestep, text[None]).sample[0], noise)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return dict(zip(weights, gradients))


def kept_weights(unet):
    return {n: w for n, w in unet.named_parameters() if torch_reference.KEYS_AND_VALUES.fullmatch(n)}


@pytest.mark.parametrize("part", ["losses", "fisher", "gradient"])
def test_sides_agree_and_are_measured(workers, part):
    units = {"ours": 8, "torch": 8}
    row = throughput.take_turns(workers, part, "cpu", units, repeats=1) | {"precision": "float32"}
    assert row["error"] < 1e-5
    assert not any("differ" in miss for miss in throughput.misses(row, "cpu"))
    for side in ("ours", "torch"):
        assert row[side]["rate"] > 0 and row[side]["matmul"] > 0 and row[side]["memory"] < 2**31
    # Ours projects the text once for all timesteps, and its Fisher samples need the keys' and values' gradients only.
    assert 0.4 < row["ours"]["flops"] / row["torch"]["flops"] < 1
    trials = row["torch"]["trials"]
    assert throughput.table(row, "cpu").count("\n") == 3 + (len(trials) if len(trials) > 1 else 0)
    compared = {trial["batch"] for trial in trials if "ratio" in trial}
    fastest = max(trials, key=lambda trial: trial["rate"])["batch"]
    assert compared == {fastest, throughput.PLAIN_BATCHES.get(part, fastest)}
    (chosen,) = (trial for trial in trials if trial["batch"] == fastest)
    assert chosen.items() >= {"ratio": row["ratio"], "memory": row["torch"]["memory"]}.items()
    assert row["torch"]["batch"] == fastest


def test_another_noise_is_noticed(workers):
    workers["ours"].call("prepare", "losses", 8)
    inputs, expected = workers["ours"].call("check", "losses")
    assert len(expected["losses"]) == 4
    assert throughput.largest_error(workers["torch"].call("check", "losses", inputs), expected) < 1e-5
    inputs["noise"][1] = inputs["noise"][0]
    assert throughput.largest_error(workers["torch"].call("check", "losses", inputs), expected) > 1e-3


def test_losses_do_not_depend_on_the_batch(unet):
    inputs = random_inputs(3, steps=4)
    whole = torch_reference.strided_losses(unet, **inputs, batch=100)
    assert whole.shape == (3,)
    torch.testing.assert_close(torch_reference.strided_losses(unet, **inputs, batch=5), whole)


@pytest.mark.parametrize("all_weights", [True, False])
def test_squared_gradients_are_those_of_single_samples(unet, all_weights):
    weights = dict(unet.named_parameters()) if all_weights else kept_weights(unet)
    inputs = random_inputs(3)
    actual = torch_reference.squared_gradients(unet, weights, **inputs, batch=2)
    single = [gradient(unet, weights, inputs, index) for index in range(3)]
    assert actual.keys() == weights.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, sum(each[name] ** 2 for each in single), rtol=1e-4, atol=1e-9)


def test_query_gradient_is_the_sum_of_single_draws(unet):
    inputs = random_inputs(5)
    inputs |= {"latents": inputs["latents"][:1], "text": inputs["text"][:1]}
    weights = kept_weights(unet)
    assert len(weights) == 8
    actual = torch_reference.query_gradient(unet, weights, **inputs, batch=2)
    single = [gradient(unet, weights, inputs, index) for index in range(5)]
    for name, value in actual.items():
        torch.testing.assert_close(value, sum(each[name] for each in single), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"ratio": [3.99, 3, 5]}, ["ratio 3.99 below 4.0"]),
        ({"ours": {"memory": 3 * 2**30}}, ["3.00 GiB not under 3"]),
        ({"error": 1.1e-4}, ["the sides differ by 1.1e-04, more than 0.0001"]),
        ({"error": float("nan")}, ["the sides differ by nan, more than 0.0001"]),
    ],
)
def test_limits(changes, missed):
    row = {"part": "fisher", "precision": "float32", "error": 1e-5, "ratio": [4.0, 3, 5], "ours": {"memory": 2**30}}
    assert throughput.misses(row | changes, "cpu") == missed


def test_largest_error():
    wanted = {"a": np.array([4.0, -2.0]), "b": np.zeros((2, 2)) + 1}
    found = throughput.largest_error({"a": np.array([4.0, -1.0]), "b": np.full((2, 2), 1.1)}, wanted)
    assert found == pytest.approx(0.25)
    with pytest.raises(ValueError, match="expected the same"):
        throughput.largest_error({"a": wanted["a"]}, wanted)
    with pytest.raises(ValueError, match="b holds a NaN"):
        throughput.largest_error(wanted | {"b": np.full((2, 2), np.nan)}, wanted)


def test_worker_keeps_its_object_and_reports_errors():
    with Worker("threading:Event") as worker:
        assert worker.call("is_set") is False
        worker.call("set")
        with pytest.raises(RuntimeError, match="AttributeError.*no_such_method"):
            worker.call("no_such_method")
        assert worker.call("is_set") is True
    with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
        Worker("no_such_module:Thing")
    with pytest.raises(RuntimeError, match="exit code 3"):
        Worker("os:_exit", 3)


def test_worker_inherits_all_variables_but_those_left_out(monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")
    with Worker("pathlib:Path", "~") as worker:
        assert str(worker.call("expanduser")) == "/nowhere"
    with Worker("pathlib:Path", "~", without=["HOME", "NOT_SET_ANYWAY"]) as worker:
        assert str(worker.call("expanduser")) != "/nowhere"
    assert os.environ["HOME"] == "/nowhere"


def test_worker_sees_memory_that_was_freed_again():
    with Worker("io:BytesIO") as worker:
        before = worker.peak
        worker.call("write", bytes(100_000_000))
        worker.call("truncate", 0)
        assert worker.peak - before > 90e6
        assert worker.cpu_seconds() > 0


def test_command_prints_and_writes_its_rows(workers, tmp_path, monkeypatch, capsys):
    started = []

    @contextlib.contextmanager
    def both_sides(*arguments):
        started.append(arguments)
        yield workers

    output = tmp_path / "rows.json"
    values = {"parts": ["losses"], "repeats": 1, "quick": True, "size": "tiny", "precisions": None, "threads": 1}
    values |= {"platform": "cpu", "cpu_devices": 2, "output": str(output)}
    monkeypatch.setattr(throughput, "FLAGS", types.SimpleNamespace(**values))
    monkeypatch.setattr(throughput, "both_sides", both_sides)
    with pytest.raises(SystemExit) as exit:
        throughput.main(["throughput"])
    (row,) = json.loads(output.read_text())
    assert exit.value.code == bool(throughput.misses(row, "cpu"))
    assert started == [(TINY, "cpu", "float32", 2, 1)]
    assert capsys.readouterr().out.startswith("losses, float32: ratio")


def test_command_knows_its_parts():
    command = [sys.executable, "-m", "benchmarks.throughput", "--size=tiny", "--parts=loss"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600)
    assert done.returncode and "parts has ['loss']" in done.stderr


def test_size_of_a_pipeline_folder(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(TINY.unet))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(TINY.scheduler))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 16}))
    size = size_of(str(tmp_path))
    assert (size.unet, size.length, size.num_train_timesteps) == (TINY.unet, 16, 1000)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match="predicts 'v_prediction'"):
        size_of(str(tmp_path))
    with pytest.raises(ValueError, match="size is 'huge'; expected one of mscoco, tiny"):
        size_of("huge")
