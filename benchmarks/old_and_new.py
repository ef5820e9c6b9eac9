"""Speed of two checkouts of this project in alternating turns: strided losses, Fisher information, query gradient.

    python -m benchmarks.old_and_new --old=/path/to/another/checkout

Each checkout runs its own `benchmarks.our_side` in a process of its own, on the same random weights of the model that
benchmarks/throughput.py measures. Rates drift by a fifth from hour to hour on one machine: only the ratio of
neighbouring turns counts. The table has its median, lowest and highest over the turns. A checkout that fails in a part
ends the run with its traceback. With the two checkouts the same one, the spread is the machine's.
"""

import base64
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

PARTS = ("losses", "fisher", "gradient")
# What a turn has at least: forwards, samples or draws.
_UNITS = {"losses": 400, "fisher": 256, "gradient": 128}
_QUICK_UNITS = {"losses": 100, "fisher": 16, "gradient": 32}


class Checkout:
    """`benchmarks.our_side.OurSide` of a checkout, in a process that imports from there alone."""

    def __init__(self, folder: Path, *arguments: Any):
        """Starts the process; `arguments` are those of `OurSide`, with a size's name in place of the size."""
        environment = os.environ | {"PYTHONPATH": os.fspath(folder)}
        # The file itself and not the module: `benchmarks` is the other checkout's in that process.
        command = [sys.executable, "-P", os.path.abspath(__file__), "serve"]
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self.call("start", *arguments)
        except RuntimeError:
            self.__exit__()
            raise

    def __enter__(self) -> "Checkout":
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.wait()

    def call(self, method: str, *arguments: Any) -> Any:
        """The result of a method there; RuntimeError with the traceback if it raised or the process ended."""
        self._process.stdin.write(_pack((method, arguments)))
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {method} ended with exit code {self._process.wait()}")
        error, value = _unpack(line)
        if error is not None:
            raise RuntimeError(f"{method} failed:\n{error}")
        return value


def serve() -> None:
    """Answers the calls of a `Checkout`, one a line of standard input, until that ends."""
    answers = os.fdopen(os.dup(1), "w")
    # Standard output is for answers alone: what the stages print goes to standard error.
    os.dup2(2, 1)
    side = None
    for line in sys.stdin:
        method, arguments = _unpack(line)
        try:
            if method == "start":
                size, *arguments = arguments
                size = importlib.import_module("benchmarks.sizes").SIZES[size]
                side, value = importlib.import_module("benchmarks.our_side").OurSide(size, *arguments), None
            else:
                value = getattr(side, method)(*arguments)
            answer = None, value
        except Exception:
            answer = traceback.format_exc(), None
        answers.write(_pack(answer))
        answers.flush()


def _pack(value: Any) -> str:
    return base64.b64encode(pickle.dumps(value)).decode() + "\n"


def _unpack(line: str) -> Any:
    return pickle.loads(base64.b64decode(line))  # of the two processes of this file


def compare(sides: dict[str, Checkout], part: str, units: int, turns: int) -> dict[str, list[float]]:
    """Rates (units a second) of one part in alternating turns, by side."""
    for side in sides.values():
        side.call("prepare", part, units)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        # Each side is first in every second turn.
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            done, seconds = sides[name].call("turn", part)
            rates[name].append(done / seconds)
    return rates


def row(part: str, rates: dict[str, list[float]]) -> str:
    """A line of the table: both median rates, and new over old as median, lowest and highest of the turns."""
    ratios = np.divide(rates["new"], rates["old"])
    old, new = (float(np.median(rates[name])) for name in ("old", "new"))
    return f"| {part} | {old:.2f} | {new:.2f} | {np.median(ratios):.3f} ({ratios.min():.3f}, {ratios.max():.3f}) |"


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")
    # Here, so that the processes of the checkouts import nothing of this one.
    from safetensors.torch import save_file

    from benchmarks.sizes import SIZES
    from benchmarks.torch_reference import build_unet

    size = flags.FLAGS.size
    cores = flags.FLAGS.cpu_devices or len(os.sched_getaffinity(0))
    folders = {"old": flags.FLAGS.old, "new": flags.FLAGS.new or Path(__file__).parents[1]}
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "weights.safetensors")
        unet = build_unet(SIZES[size].unet, SIZES[size].seed)
        save_file({name: weight.contiguous() for name, weight in unet.state_dict().items()}, file)
        del unet
        print("| part | old, 1/s | new, 1/s | new / old |\n|---|---|---|---|", flush=True)
        for part in flags.FLAGS.parts:
            # Fresh processes: memory that an earlier part left counts.
            arguments = (size, file, "cpu", "float32", cores)
            with Checkout(Path(folders["old"]), *arguments) as old, Checkout(Path(folders["new"]), *arguments) as new:
                units = (_QUICK_UNITS if flags.FLAGS.quick else _UNITS)[part]
                rates = compare({"old": old, "new": new}, part, units, flags.FLAGS.turns)
            print(row(part, rates), flush=True)


def define_flags() -> None:
    """Defines the command's flags; not on import, as benchmarks share names of flags."""
    flags.DEFINE_string("old", None, "Folder of the other checkout.", required=True)
    flags.DEFINE_string("new", None, "Folder of this checkout (default: that of this file).")
    flags.DEFINE_multi_enum("parts", list(PARTS), PARTS, "Parts to measure.")
    flags.DEFINE_enum("size", "mscoco", ["mscoco", "tiny"], "Model, with random weights.")
    flags.DEFINE_integer("turns", 5, "Turns of each checkout.", lower_bound=1)
    flags.DEFINE_boolean("quick", False, "Short turns.")
    flags.DEFINE_integer("cpu_devices", None, "Devices that the CPU is split into (default: one a core).")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        from launch import process  # not for a checkout's process, whose `launch` may have no such module

        process.restart_with_huge_pages()
        define_flags()
        app.run(main)
