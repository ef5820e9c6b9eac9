"""`launch.evaluate`: flags that do not fit are refused before anything is computed."""

import subprocess
import sys

import pytest

_CONFIG = "configs/evaluate_digits.cfg"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--protocol, --model, --workdir, --methods not given"),
        ([f"--flagfile={_CONFIG}", "--lds_models=9"], "--lds_models belong to --protocol=lds"),
        ([f"--flagfile={_CONFIG}", "--remove=5000"], "5000 pictures are to be removed from a data set of 1797"),
        ([f"--flagfile={_CONFIG}", "--remove=-1"], "remove is '-1'"),
    ],
)
def test_bad_flags_end_with_one_line(arguments, message, tmp_path):
    command = [sys.executable, "-m", "launch.evaluate", *arguments]
    if arguments:
        command.append(f"--workdir={tmp_path}")
    result = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(lines) == 1 and message in lines[0], result.stderr
