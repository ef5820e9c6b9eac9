"""The commands' programs on the compiler for TPUs, which needs none: what only a CPU can compile fails here.

The folder of libtpu is in TPU_COMPILER, apart from the environment that runs the tests, where JAX would look for a TPU
at every start: `pip install --no-deps --target FOLDER libtpu`.
"""

import json
import os
import subprocess
import sys

import pytest

COMPILER = os.environ.get("TPU_COMPILER", "")


@pytest.mark.skipif(not COMPILER, reason="TPU_COMPILER names no folder of libtpu")
@pytest.mark.parametrize("program", ["losses", "newton"])
def test_the_commands_programs_compile_for_a_tpu(program):
    path = os.pathsep.join(filter(None, [COMPILER, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerators", f"--worker=tiny/v5e/{program}/float32/1"],
        capture_output=True,
        text=True,
        check=False,
        # The suite's own flags are for the CPU's compiler, which that of TPUs refuses.
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["fits"] and record["temporary_gib"] > 0 and record["collectives"] == {}
