"""Every flag file under configs/ opens with its command, which knows all its flags."""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

# One process for all files of a command: the import is most of its time, and flags are global.
SCRIPT = """
import importlib, sys
from absl import flags
importlib.import_module(sys.argv[1])
for file in sys.argv[2:]:
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS([sys.argv[0], f"--flagfile={file}"])
    assert flags.FLAGS.workdir, file
"""


def commands():
    """Command -> its flag files, from the command in each file's comment."""
    found = defaultdict(list)
    for path in sorted(Path(__file__).parents[2].glob("configs/*.cfg")):
        comment = re.search(
            rf"^# .*python -m (launch\.\w+) --flagfile=configs/{path.name}", path.read_text(), re.MULTILINE
        )
        found[comment and comment[1]].append(path)
    return dict(found)


@pytest.mark.parametrize(("command", "files"), commands().items())
def test_flagfiles_parse(command, files):
    assert command is not None, f"{files} do not name their command in a comment"
    line = [sys.executable, "-c", SCRIPT, command, *map(str, files)]
    result = subprocess.run(line, cwd=files[0].parents[1], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_help_lists_the_flags_that_commands_share():
    line = [sys.executable, "-m", "launch.encode", "--help"]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    shown = {line.split(":")[0].strip() for line in result.stdout.splitlines() if line.startswith("  --")}
    assert {"--model", "--dataset", "--workdir", "--[no]multihost", "--coordinator"} <= shown
