"""Every flag file under configs/ is for one command, which knows all its flags."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = {
    "launch.attribute": ["abc", "mscoco", "openmoji", "queries", "quickstart"],
    "launch.evaluate": [
        "evaluate_customized",
        "evaluate_digits",
        "evaluate_lds_digits",
        "evaluate_openmoji",
        "evaluate_self",
    ],
    "launch.train": ["customize_openmoji", "train_digits", "train_openmoji", "train_openmoji_small", "train_tower"],
}
DATASETS = {"abc": "latents:data/abc/laion", "mscoco": "coco:data/coco"}

# One process for all files of a command: the import is most of its time, and flags are global.
SCRIPT = """
import importlib, json, sys
from absl import flags
importlib.import_module(sys.argv[1])
datasets = {}
for file in sys.argv[2:]:
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS([sys.argv[0], f"--flagfile=configs/{file}.cfg"])
    datasets[file] = flags.FLAGS.dataset
print(json.dumps(datasets))
"""


def expected_dataset(file):
    return DATASETS.get(file, "digits" if file.endswith("digits") else "openmoji")


def test_every_flagfile_has_its_command():
    assert sorted(sum(COMMANDS.values(), [])) == sorted(path.stem for path in Path("configs").glob("*.cfg"))


@pytest.mark.parametrize("command", COMMANDS)
def test_flagfiles_parse(command):
    files = COMMANDS[command]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, command, *files], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {file: expected_dataset(file) for file in files}


def test_help_lists_the_flags_that_commands_share():
    result = subprocess.run(
        [sys.executable, "-m", "launch.encode", "--help"], capture_output=True, text=True, check=False
    )
    shown = {line.split(":")[0].strip() for line in result.stdout.splitlines() if line.startswith("  --")}
    assert {"--model", "--dataset", "--workdir", "--[no]multihost", "--coordinator"} <= shown
