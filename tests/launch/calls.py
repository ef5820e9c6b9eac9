"""Commands called in this process: `python -m tests.launch.calls launch.sample '[["--rows=0"], ["--rows=2"]]'`.

Commands define flags of the same names, so each needs a process of its own; importing one takes far longer than a call.
"""

import contextlib
import importlib
import inspect
import io
import json
import subprocess
import sys
from typing import NamedTuple

from absl import app, flags
from absl.testing import flagsaver


class Outcome(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


def call(main, *arguments: str) -> Outcome:
    """Calls a command's `main` with the arguments as its command line; the flags are as before afterwards."""
    argv = sys.argv
    with flagsaver.flagsaver(), contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(
        io.StringIO()
    ) as err:  # fmt: skip
        try:
            sys.argv = [argv[0], "--cpu_devices=4", *arguments]
            main(flags.FLAGS(sys.argv))
            code = 0
        except (flags.Error, app.UsageError) as error:
            code = 1
            print(f"error: {error}", file=err)
        except SystemExit as error:
            code = error.code
        finally:
            sys.argv = argv
    return Outcome(code, out.getvalue(), err.getvalue())


def call_elsewhere(command: str, *calls: list[str], tiny: bool = False) -> list[Outcome]:
    """Calls a command in a process of its own, once for each list of arguments; with `tiny` on tests' tiny model."""
    line = [sys.executable, "-m", __name__, command, json.dumps(calls), str(tiny)]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [Outcome(*json.loads(each)) for each in result.stdout.splitlines()]


def _use_tiny_model() -> None:
    from launch import common
    from tests.evaluation.conftest import make_dataset, make_model

    common.load_model, common.load_dataset = lambda weights=(): make_model(), lambda resolution: make_dataset()


def _main_of(name: str):
    """`main(argv)` of a command; where it takes no arguments, it is started as `common.run` does."""
    from launch import common

    main = importlib.import_module(name).main
    if inspect.signature(main).parameters:
        return main

    def started(argv):
        with common.command(argv):
            main()

    return started


if __name__ == "__main__":
    import tests.conftest  # noqa: F401, the flags that tests compile with

    if sys.argv[3] == "True":
        _use_tiny_model()
    command = _main_of(sys.argv[1])
    for arguments in json.loads(sys.argv[2]):
        print(json.dumps(call(command, *arguments)), flush=True)
