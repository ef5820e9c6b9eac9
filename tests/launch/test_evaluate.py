"""`launch.evaluate`: its tables on a tiny model, and flags that do not fit, refused before anything is computed."""

import csv
import json
import subprocess
import sys

from tests.towers import save_torch_tower

_CONFIG = "configs/evaluate_digits.cfg"


# Arguments, and what the error says of them.
_BAD_FLAGS = [
    ([], "--protocol, --model, --workdir, --methods not given"),
    ([f"--flagfile={_CONFIG}", "--lds_models=9"], "--lds_models belong to --protocol=lds"),
    ([f"--flagfile={_CONFIG}", "--remove=5000"], "5000 pictures are to be removed from a data set of 1797"),
    ([f"--flagfile={_CONFIG}", "--remove=-1"], "remove is '-1'"),
    ([f"--flagfile={_CONFIG}", "--remove=inf"], "remove is 'inf'"),
    ([f"--flagfile={_CONFIG}", "--tower=models/openmoji_tower"], "give --pictures too"),
    ([f"--flagfile={_CONFIG}", "--tower=nowhere", "--pictures"], "'nowhere' does not exist"),
    (["--flagfile=configs/evaluate_self.cfg", "--train_steps=9"], "--train_steps belong to --protocol=leave-k-out"),
]
# Starting the command takes far longer than refusing flags, so one process is given them all.
_ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys
from absl import flags
from absl.testing import flagsaver
from launch import common, evaluate

for arguments in json.loads(sys.argv[1]):
    with flagsaver.flagsaver(), contextlib.redirect_stderr(io.StringIO()) as stderr:
        flags.FLAGS(["evaluate", *arguments])
        code = common.execute(evaluate.main)
    print(json.dumps([code, stderr.getvalue().splitlines()]))
"""


def test_bad_flags_end_with_one_line(tmp_path):
    calls = [[*arguments, f"--workdir={tmp_path}"] if arguments else [] for arguments, _ in _BAD_FLAGS]
    command = [sys.executable, "-c", _ONE_AFTER_ANOTHER, json.dumps(calls)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for (_, message), line in zip(_BAD_FLAGS, result.stdout.splitlines(), strict=True):
        code, lines = json.loads(line)
        errors = [line for line in lines if line.startswith("error: ")]
        assert code == 1 and len(errors) == 1 and message in errors[0], lines


def test_without_flags_the_program_ends_with_one_line():
    result = subprocess.run([sys.executable, "-m", "launch.evaluate"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("error: ") == 1, result.stderr
    assert "--protocol, --model, --workdir, --methods not given" in result.stderr


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
    for name, rows in (("leave_k_out", ["no pictures", "random pictures", "m"]), ("queries", ["m", "m"])):
        with open(folder / f"{name}.csv") as file:
            table = list(csv.DictReader(file))
        assert sorted(row["method"] for row in table) == sorted(rows)
        assert all(-1 <= float(row["similarity"]) <= 1 + 1e-9 for row in table)
    assert json.loads((folder / "flags.json").read_text())["tower"] == str(tmp_path / "tower")
