"""`launch.evaluate`: its tables on a tiny model, and flags that do not fit, refused before anything is computed."""

import csv
import json
import subprocess
import sys

import pytest

from tests.towers import save_torch_tower

_CONFIG = "configs/evaluate_digits.cfg"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--protocol, --model, --workdir, --methods not given"),
        ([f"--flagfile={_CONFIG}", "--lds_models=9"], "--lds_models belong to --protocol=lds"),
        ([f"--flagfile={_CONFIG}", "--remove=5000"], "5000 pictures are to be removed from a data set of 1797"),
        ([f"--flagfile={_CONFIG}", "--remove=-1"], "remove is '-1'"),
        ([f"--flagfile={_CONFIG}", "--remove=inf"], "remove is 'inf'"),
        ([f"--flagfile={_CONFIG}", "--tower=models/openmoji_tower"], "give --pictures too"),
        ([f"--flagfile={_CONFIG}", "--tower=nowhere", "--pictures"], "'nowhere' does not exist"),
        (["--flagfile=configs/evaluate_self.cfg", "--train_steps=9"], "--train_steps belong to --protocol=leave-k-out"),
    ],
)
def test_bad_flags_end_with_one_line(arguments, message, tmp_path):
    command = [sys.executable, "-m", "launch.evaluate", *arguments]
    if arguments:
        command.append(f"--workdir={tmp_path}")
    result = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(lines) == 1 and message in lines[0], result.stderr


# A process of its own: its flags have the names of other commands'.
_ON_A_TINY_MODEL = """
from launch import common, evaluate
from tests.evaluation.conftest import make_dataset, make_model
common.load_model, common.load_dataset = make_model, lambda resolution: make_dataset()
common.run(evaluate.main)
"""


def test_leave_k_out_with_a_tower(tmp_path):
    save_torch_tower("dino", tmp_path / "tower")
    (tmp_path / "methods.json").write_text('{"m": {"method": "random"}}')
    (tmp_path / "queries.jsonl").write_text('{"prompt": "digit one"}\n{"prompt": "digit two"}\n')
    files = [f"--workdir={tmp_path / 'work'}", f"--tower={tmp_path / 'tower'}", f"--methods={tmp_path}/methods.json"]
    settings = ["--protocol=leave-k-out", "--model=tiny", f"--reported_queries={tmp_path}/queries.jsonl", "--pictures"]
    fast = ["--remove=2", "--random_sets=2", "--train_steps=2", "--train_batch_size=2", "--sampler_steps=2"]
    command = [sys.executable, "-c", _ON_A_TINY_MODEL, *files, *settings, *fast, "--measure_stride=500"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "| MSE | MSE error | similarity | similarity error |" in result.stdout
    folder = tmp_path / "work" / "evaluation" / "leave-k-out-reported"
    for name, rows in (("leave_k_out", ["random pictures", "m"]), ("queries", ["m", "m"])):
        with open(folder / f"{name}.csv") as file:
            table = list(csv.DictReader(file))
        assert sorted(row["method"] for row in table) == sorted(rows)
        assert all(-1 <= float(row["similarity"]) <= 1 + 1e-9 for row in table)
    assert json.loads((folder / "flags.json").read_text())["tower"] == str(tmp_path / "tower")
