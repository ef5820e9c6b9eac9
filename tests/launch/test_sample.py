"""The command that draws pictures: its sheet, and that wrong flags are told before anything is drawn."""

import json
import subprocess
import sys

from PIL import Image

WRONG = [
    (["--prompts="], "--prompts not given"),
    (
        ["--output=nowhere/sheet.png"],
        "output is 'nowhere/sheet.png'; expected the name of a .png in a folder that exists",
    ),
    (["--output=sheet.foo"], "output is 'sheet.foo'"),
    (["--rows=2", "--seed=4294967295"], "seed is 4294967295: expected a whole number from 0 to 4294967294"),
    (["--rows=0"], "rows is 0"),
    (["--sampler=euler"], "euler"),
]

# A process of its own: its flags have the names of the attribute command's. One for all, as the import takes longest.
SCRIPT = """
import contextlib, io, json, sys
from absl import flags
from absl.testing import flagsaver
from launch import common, sample
common.load_model = None  # which nothing may call
told = []
for arguments in json.loads(sys.argv[1]):
    with flagsaver.flagsaver(), contextlib.redirect_stderr(io.StringIO()) as error:
        flags.FLAGS(["sample", "--model=m", "--prompts=hat", *arguments])
        told.append((common.execute(sample.main), error.getvalue()))
print(json.dumps(told))
"""


def test_a_row_for_each_seed_and_a_column_for_each_prompt(model, tmp_path):
    file = tmp_path / "sheet.png"
    arguments = [f"--model={model}", "--prompts=red heart,hat", "--rows=3", "--sampler_steps=2", f"--output={file}"]
    result = subprocess.run(
        [sys.executable, "-m", "launch.sample", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert Image.open(file).size == (2 * 16, 3 * 16)


def test_wrong_flags_are_told_before_anything_is_drawn():
    arguments = json.dumps([arguments for arguments, _ in WRONG])
    result = subprocess.run([sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for (_, message), (code, told) in zip(WRONG, json.loads(result.stdout), strict=True):
        assert code == 1 and told.startswith("error:") and message in told
