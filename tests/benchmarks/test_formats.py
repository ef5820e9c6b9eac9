"""The formats benchmark on shrunken models: every format loads and computes what PyTorch computes, and it can fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import format_worker, formats, torch_models

# Every row with Stable Diffusion 1, and of the others what differs from it.
ROWS = {
    "sd14": formats.rows_of("sd14"),
    "sd21": ["single .ckpt", "folder to single", "single to folder"],
    "mscoco": ["folder", "bare UNet + SD 2 folder", "folder to folder"],
}


def make_benchmark(name, output, call=formats.here):
    return formats.Benchmark(torch_models.spec(name, "small"), output, call)


@pytest.fixture(scope="module", params=ROWS)
def results(request, tmp_path_factory):
    output = tmp_path_factory.mktemp(request.param)
    return request.param, output, make_benchmark(request.param, output).run(ROWS[request.param])


@pytest.fixture(scope="module")
def mscoco(tmp_path_factory):
    """Puts the MSCOCO model, built once, where a benchmark in the folder expects it -> the benchmark."""
    built = make_benchmark("mscoco", tmp_path_factory.mktemp("built"))
    torch_models.build(built.model, built.base, built.reference("float32").parent)

    def put(output):
        shutil.copytree(built.output, output, dirs_exist_ok=True)
        return make_benchmark("mscoco", output)

    return put


def test_every_format_computes_what_pytorch_computes(results):
    name, _, rows = results
    assert {row["row"]: formats.misses(row, "small") for row in rows} == {row: [] for row in ROWS[name]}
    errors = [error for row in rows for error in row.get("errors", {}).values()]
    assert len(errors) >= 3 and all(0 < error < 1e-5 for error in errors)


def test_conversions_compare_every_tensor(results):
    name, _, rows = results
    model = torch_models.spec(name, "small")
    expected = sum(len(torch_models.new_part(model, part, 0).state_dict()) for part in torch_models.PARTS)
    counts = {row["row"]: row["equal_tensors"] for row in rows if row["row"] in formats.CONVERSIONS}
    assert len(counts) == (1 if name == "mscoco" else 2)
    assert set(counts.values()) == {expected}


def test_weights_are_deleted_and_finished_rows_not_run_again(results):
    name, output, rows = results
    assert not (output / "files" / name).exists()

    def call(*arguments):
        raise AssertionError("a finished row ran again")

    assert make_benchmark(name, output, call).run(ROWS[name]) == rows


def test_broken_row_is_kept_apart_and_run_again(mscoco, tmp_path, monkeypatch):
    benchmark = mscoco(tmp_path)
    whole = formats.FORMATS["folder"]
    missing = formats.Format(None, lambda base, target, model: formats.ModelSource(str(target)))
    monkeypatch.setitem(formats.FORMATS, "folder", missing)
    (row,) = benchmark.run(["folder"])
    assert "does not exist" in row["failed"]
    assert formats.misses(row, "small") == [row["failed"]]
    monkeypatch.setitem(formats.FORMATS, "folder", whole)
    # The weights are gone: it builds them again.
    assert not benchmark.base.exists()
    (row,) = benchmark.run(["folder"])
    assert formats.misses(row, "small") == []


def write_swapped(base, target, model):
    """A copy of the folder whose autoencoder has queries and keys exchanged, and whose betas are others."""
    formats.torch_formats.write_folder(base, target, model)
    file = target / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    names = [f"encoder.mid_block.attentions.0.{part}.bias" for part in ("to_q", "to_v")]
    state[names[0]], state[names[1]] = state[names[1]].clone(), state[names[0]].clone()
    save_file(state, file, metadata={"format": "pt"})
    torch_models.write_json({**model.scheduler, "beta_end": 0.03}, target / "scheduler" / "scheduler_config.json")
    tokenizer = target / "tokenizer" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"pad_token": "<|endoftext|>"}))


def test_wrong_weights_schedule_and_padding_are_noticed(mscoco, tmp_path, monkeypatch):
    wrong = formats.Format(write_swapped, lambda base, target, model: formats.ModelSource(str(target)))
    monkeypatch.setitem(formats.FORMATS, "folder", wrong)
    (row,) = mscoco(tmp_path).run(["folder"])
    assert formats.misses(row, "small") == ["other tokens", "other schedule", "error of vae"]


def test_changed_tensor_is_noticed_after_a_conversion(mscoco, tmp_path):
    benchmark = mscoco(tmp_path)
    formats.torch_formats.write_folder(benchmark.base, tmp_path / "copy", benchmark.model)
    file = tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.bias"][3] = torch.nextafter(state["conv_in.bias"][3], torch.tensor(9.0))
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unet: 1 of \d+ tensors differ or are missing: \['conv_in.bias'\]"):
        formats.torch_formats.same_folder(benchmark.base, tmp_path / "copy")


def test_no_parameter_keeps_a_constant():
    for part in torch_models.PARTS:
        for name, parameter in torch_models.new_part(torch_models.spec("sd14", "small"), part, 0).named_parameters():
            assert torch.unique(parameter).numel() > 1, f"{part}: {name}"


def test_peak_memory_is_what_was_held_at_once():
    with format_worker.PeakMemory() as memory:
        for _ in range(3):
            np.ones(80_000_000, np.uint8).sum()
    result = memory.result({"a": np.zeros((3, 5), np.float16)})
    assert 70e6 < result["peak"] < 160e6
    assert result["weights"] == 4 * 15


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"peak": 131}, ["memory"]),
        ({"errors": {"unet": 1.1e-4}}, ["error of unet"]),
        ({"errors": {"unet": float("nan")}}, ["error of unet"]),
    ],
)
def test_limits(changes, missed):
    row = {"model": "sd14", "row": "folder", "seconds": 1.0, "peak": 130, "weights": 100, "errors": {"unet": 1e-4}}
    row |= {"differing": []} | changes
    assert formats.misses(row, "full") == missed
    assert formats.table([row], "full").splitlines()[2].startswith("| sd14 | folder |")
    assert ("memory" in formats.misses(row, "small")) is False


def test_functions_run_in_processes_of_their_own():
    assert formats.in_fresh_process(os.getpid) != os.getpid()


def test_command(tmp_path):
    # As `python -m benchmarks.formats`, in one process: those that it starts take ten seconds to import PyTorch.
    script = "from benchmarks import formats as f; f.in_fresh_process = f.here; f.common.run(f.main)"
    arguments = ["--scale=small", "--models=sd14", "--formats=bare UNet .bin", f"--output={tmp_path}"]
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert done.returncode == 0, done.stderr
    assert "| sd14 | bare UNet .bin |" in (tmp_path / "results.md").read_text()
    assert json.loads((tmp_path / "rows" / "sd14-bare-UNet-.bin.json").read_text())["seconds"] > 0
