"""Our stages against the plain method in PyTorch (torch_reference.py): speed, memory and agreement.

    python -m benchmarks.throughput                          # the MSCOCO model: an hour on two cores
    python -m benchmarks.throughput --quick --parts=losses   # two minutes
    python -m benchmarks.throughput --platform=cuda          # also TF32 and bfloat16, and the time of the full pass

Both sides hold the same random weights, each in a process of its own as its users start it, ours with huge pages and
PyTorch without, and take turns; their results are compared once, on the same noise. A rate is the median over the
turns, and a ratio the median over pairs of neighbouring turns. FLOPs are XLA's count for our side (which projects the
text once for all timesteps) and PyTorch's for the other; the share is of the higher of the two rates of matrix
products. Memory is anonymous memory of the process (on a GPU, that of the device), the most from loading to the last
turn, compilation included, over that with the model loaded; so our second copy of the weights on a CPU counts. PyTorch
runs in the fastest of a few batch sizes, tried before, which ratio and limits are over, and in that of `PLAIN_BATCHES`
where it is another; its memory is that of the trial. The last column is how much of a core the waiting side used,
which should be about 0, as should the cores that other processes used: on a busy machine PyTorch's threads, which wait
for each other after every operation, lose most.
Exits with 1 if a limit is missed or the sides disagree.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from attrib_jax.models.predictor import PRECISIONS
from benchmarks.sizes import Size, size_of
from benchmarks.workers import Worker, busy_seconds
from launch import process

FLAGS = flags.FLAGS

PARTS = ("losses", "fisher", "fisher-kv", "gradient")

# What a turn has at least, rounded up to whole tiles and batches: forwards, samples or draws.
_UNITS = {
    "cpu": {"losses": 400, "fisher": 128, "fisher-kv": 128, "gradient": 128},
    "cuda": {"losses": 20000, "fisher": 512, "fisher-kv": 512, "gradient": 2048},
}
# Our turn of the Fisher information ends with storing it, which takes as long as a few samples and comes once in a
# thousand of a real run. So it has eight times the samples.
_OURS_LONGER = {"fisher": 8, "fisher-kv": 8}
_QUICK_UNITS = {"losses": 100, "fisher": 16, "fisher-kv": 16, "gradient": 32}
_UNIT_NAMES = {"losses": "forwards", "fisher": "samples", "fisher-kv": "samples", "gradient": "draws"}
# At least this ratio of the rates, on a CPU, and at most this much memory of ours.
RATIO_LIMITS = {"losses": 1.3, "fisher": 4.0, "gradient": 1.2}
MEMORY_LIMITS = {"fisher": 3 * 2**30}
# PyTorch's batch size on a CPU that is timed beside the fastest, as what users find who do not look for that. It has
# no limit: that of the Fisher information was set when PyTorch had been seen with 5 to 8 GiB, which this takes, but is
# held over the fastest.
PLAIN_BATCHES = {"fisher": 16}
# The largest difference over the largest absolute value of an array. Rounded products differ by more.
ERROR_LIMITS = {
    "float32": 1e-4,
    "tensorfloat32": 2e-2,
    "bfloat16-products": 1e-1,
    "bfloat16": 1e-1,
}
# All losses of the MSCOCO model: images, flips, captions, timesteps.
_FULL_PASS = 118287 * 2 * 5 * 20


@contextlib.contextmanager
def both_sides(size: Size, device: str, precision: str, devices: int, threads: int) -> Iterator[dict[str, Worker]]:
    """Starts the two processes with one set of random weights -> {"ours": ..., "torch": ...}.

    Args:
      size: of the model.
      device: "cpu" or "cuda".
      precision: one of `attrib_jax.models.predictor.PRECISIONS`.
      devices: that our side splits a CPU into.
      threads: of PyTorch on a CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "weights.safetensors")
        with (
            Worker(
                "benchmarks.torch_reference:TorchSide",
                size,
                file,
                device,
                precision,
                threads,
                without=[process.TUNABLES],
            ) as torch_side,
            Worker("benchmarks.our_side:OurSide", size, file, device, precision, devices) as our_side,
        ):
            yield {"ours": our_side, "torch": torch_side}


def take_turns(
    workers: dict[str, Worker], part: str, device: str, units: dict[str, int], repeats: int
) -> dict[str, Any]:
    """Compares the results of one of `PARTS` and times it on both sides, in turns.

    Args:
      workers: from `both_sides`, best fresh ones: memory that an earlier part left counts.
      part: in float32, but for "losses".
      device: "cpu" or "cuda".
      units: least number of forwards, samples or draws in a turn of each side, {"ours": ..., "torch": ...}.
      repeats: turns of each side.

    Returns:
      A row: `part`, `error`, `ratio` (median, lowest, highest of neighbouring turns), `others` (cores that other
      processes used meanwhile), and under "ours" and "torch" `rate` (1/s), `flops` of a unit, `matmul` (FLOP/s),
      `batch`, `memory` (bytes) and `idle` (cores used while the other ran); under "torch" also `trials`, the `batch`,
      `rate` and `memory` of each batch size that was tried, with the rate of its `turns` and their `ratio` where it had
      some. The row's ratio is that over PyTorch in the fastest.
    """
    parts = {"ours": part.removesuffix("-kv"), "torch": part}
    before = {side: _memory(worker, device) for side, worker in workers.items()}
    tile = workers["ours"].call("prepare", parts["ours"], units["ours"])
    trials = _trials(workers["torch"], part, device, before["torch"])
    chosen = max(trials, key=lambda trial: trial["rate"])
    fastest = chosen["batch"]
    plain = PLAIN_BATCHES.get(part, fastest) if device == "cpu" else fastest
    batches = tuple(dict.fromkeys([fastest, plain]))
    inputs, expected = workers["ours"].call("check", parts["ours"])
    error = largest_error(workers["torch"].call("check", part, inputs), expected)
    ours, theirs = [], {batch: [] for batch in batches}
    for _ in range(repeats):
        ours.append(_turn(workers, "ours", parts["ours"]))
        for batch, turns in theirs.items():
            workers["torch"].call("prepare", part, units["torch"], batch)
            turns.append(_turn(workers, "torch", part))
    for trial in trials:
        if trial["batch"] in theirs:
            rates = [turn.rate for turn in theirs[trial["batch"]]]
            ratios = np.divide([turn.rate for turn in ours], rates)
            trial["turns"] = float(np.median(rates))
            trial["ratio"] = [float(np.median(ratios)), float(ratios.min()), float(ratios.max())]
    of_torch = [turn for turns in theirs.values() for turn in turns]
    row = {
        "ours": {
            "rate": float(np.median([turn.rate for turn in ours])),
            "batch": tile,
            "memory": _memory(workers["ours"], device, peak=True) - before["ours"],
            "idle": float(np.mean([turn.idle for turn in of_torch])),
        },
        "torch": {
            "rate": chosen["turns"],
            "batch": fastest,
            "memory": chosen["memory"],
            "idle": float(np.mean([turn.idle for turn in ours])),
            "trials": trials,
        },
    }
    for side, worker in workers.items():
        row[side] |= {"flops": worker.call("flops", parts[side]), "matmul": worker.call("matmul_rate")}
    others = float(np.mean([turn.others for turn in ours + of_torch]))
    return {"part": part, "error": error, "ratio": chosen["ratio"], "others": others} | row


class _Turn(NamedTuple):
    """`rate` (1/s), and the cores that the waiting side (`idle`) and other processes (`others`) used meanwhile."""

    rate: float
    idle: float
    others: float


def _turn(workers: dict[str, Worker], side: str, part: str) -> _Turn:
    used = {name: worker.cpu_seconds() for name, worker in workers.items()}
    busy, began = busy_seconds(), time.monotonic()
    done, seconds = workers[side].call("turn", part)
    wall = time.monotonic() - began
    used = {name: worker.cpu_seconds() - used[name] for name, worker in workers.items()}
    idle = sum(cores for name, cores in used.items() if name != side)
    return _Turn(done / seconds, idle / wall, (busy_seconds() - busy - sum(used.values())) / wall)


def _trials(worker: Worker, part: str, device: str, before: int) -> list[dict[str, Any]]:
    """`batch`, `rate` (1/s) and `memory` (bytes) of PyTorch in each batch size, up to the first that does not fit."""
    trials = []
    for size in worker.call("batches", part):
        rate = worker.call("trial", part, size)
        if not rate:
            break
        trials.append({"batch": size, "rate": rate, "memory": _memory(worker, device, peak=True) - before})
    if not trials:
        raise RuntimeError(f"the GPU's memory does not hold PyTorch's smallest batch of {part}; free some of it")
    return trials


def misses(row: dict[str, Any], device: str) -> list[str]:
    """The limits that a row misses, in words."""
    found = []
    ratio, memory = RATIO_LIMITS.get(row["part"], 0), MEMORY_LIMITS.get(row["part"], np.inf)
    if device == "cpu" and row["ratio"][0] < ratio:
        found.append(f"ratio {row['ratio'][0]:.2f} below {ratio}")
    if device == "cpu" and row["ours"]["memory"] >= memory:
        found.append(f"{row['ours']['memory'] / 2**30:.2f} GiB not under {memory / 2**30:.0f}")
    if not row["error"] <= ERROR_LIMITS[row["precision"]]:
        found.append(f"the sides differ by {row['error']:.1e}, more than {ERROR_LIMITS[row['precision']]}")
    return found


def table(row: dict[str, Any], device: str) -> str:
    """A row for people."""
    unit = _UNIT_NAMES[row["part"]]
    machine = max(row[side]["matmul"] for side in ("ours", "torch"))
    low, high = row["ratio"][1:]
    lines = [
        f"{row['part']}, {row['precision']}: ratio {row['ratio'][0]:.2f} ({low:.2f} to {high:.2f}), "
        f"largest difference {row['error']:.1e}, other processes {row['others']:.2f} cores: "
        + ("; ".join(misses(row, device)) or "pass"),
        f"  {'':8}{unit + '/s':>12}{'GFLOP/' + unit[:-1]:>16}{'GFLOP/s':>10}{'share':>7}{'matmul':>10}"
        f"{'GiB':>7}{'batch':>7}{'idle':>7}",
    ]
    for side, name in (("ours", "ours"), ("torch", "PyTorch")):
        values = row[side]
        speed = values["rate"] * values["flops"]
        lines.append(
            f"  {name:8}{values['rate']:12.2f}{values['flops'] / 1e9:16.3f}{speed / 1e9:10.1f}{speed / machine:7.2f}"
            f"{values['matmul'] / 1e9:10.1f}{values['memory'] / 2**30:7.2f}{values['batch']:7d}{values['idle']:7.2f}"
        )
    trials = row["torch"]["trials"]
    for trial in trials if len(trials) > 1 else ():
        size = f"batches of {trial['batch']} ({trial['memory'] / 2**30:.2f} GiB)"
        line = f"  PyTorch in {size}: {trial['rate']:.2f} {unit}/s in a trial"
        if "ratio" in trial:
            middle, low, high = trial["ratio"]
            line += f", {trial['turns']:.2f} in its turns, ratio {middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append(line)
    return "\n".join(lines)


def largest_error(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest difference of two arrays of one name, over the largest absolute value of the expected one.

    Raises ValueError where names or shapes differ or a number is not finite.
    """
    shapes = [{name: v.shape for name, v in side.items()} for side in (actual, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the sides return arrays of shapes {shapes[0]} and {shapes[1]}; expected the same")
    broken = [name for side in (actual, expected) for name, v in side.items() if not np.isfinite(v).all()]
    if broken:
        raise ValueError(f"{broken[0]} holds a NaN or an infinity")
    return max(float(np.abs(actual[name] - v).max() / np.abs(v).max()) for name, v in expected.items())


def _memory(worker: Worker, device: str, peak: bool = False) -> int:
    if device == "cuda":
        return worker.call("device_memory", peak)
    if not peak:
        worker.peak = 0
        return worker.memory()
    return worker.peak


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")
    unknown = sorted(set(FLAGS.parts) - set(PARTS))
    if unknown:
        raise app.UsageError(f"parts has {unknown}; expected some of {', '.join(PARTS)}")
    device = FLAGS.platform
    precisions = FLAGS.precisions
    if precisions is None:
        precisions = ["float32"] if device == "cpu" else ["float32", "tensorfloat32", "bfloat16"]
    # Both sides share the GPU: neither may take all of its memory beforehand.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    repeats = min(2, FLAGS.repeats) if FLAGS.quick else FLAGS.repeats
    cores = len(os.sched_getaffinity(0))
    devices, threads = FLAGS.cpu_devices or cores, FLAGS.threads or cores
    rows, missed = [], False
    for part in FLAGS.parts:
        quick = FLAGS.quick or FLAGS.size == "tiny"
        units = dict.fromkeys(("ours", "torch"), (_QUICK_UNITS if quick else _UNITS[device])[part])
        if device == "cpu" and not quick:
            units["ours"] *= _OURS_LONGER.get(part, 1)
        for precision in precisions if part == "losses" else ["float32"]:
            with both_sides(size_of(FLAGS.size), device, precision, devices, threads) as workers:
                row = take_turns(workers, part, device, units, repeats) | {"precision": precision}
            print(table(row, device), flush=True)
            if part == "losses" and FLAGS.size == "mscoco":
                hours = {side: _FULL_PASS / row[side]["rate"] / 3600 for side in ("ours", "torch")}
                print(f"  all {_FULL_PASS / 1e6:.1f} M forwards: {hours['ours']:.2f} h, PyTorch {hours['torch']:.2f} h")
            rows.append(row)
            missed |= bool(misses(row, device))
    if FLAGS.output:
        Path(FLAGS.output).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    sys.exit(int(missed))


def define_flags() -> None:
    """Of the command; not on import, as benchmarks share names of flags and tests import several."""
    flags.DEFINE_list("parts", list(PARTS), "Of: losses, fisher, fisher-kv (PyTorch's restricted too), gradient.")
    flags.DEFINE_integer("repeats", 5, "Turns of each side.", lower_bound=1)
    flags.DEFINE_boolean("quick", False, "Short turns, two of each.")
    flags.DEFINE_string("size", "mscoco", "`mscoco`, `tiny`, or a pipeline folder whose UNet is built.")
    flags.DEFINE_enum("platform", "cpu", ["cpu", "cuda"], "Where both sides run.")
    flags.DEFINE_list(
        "precisions",
        None,
        f"Of the losses: {', '.join(PRECISIONS)} (default: float32; on a GPU tensorfloat32 and bfloat16, too).",
    )
    flags.DEFINE_integer("cpu_devices", None, "Devices that our side splits a CPU into (default: one a core).")
    flags.DEFINE_integer("threads", None, "Threads of PyTorch on a CPU (default: one a core).")
    flags.DEFINE_string("output", None, "Json file for the rows.")


if __name__ == "__main__":
    process.restart_with_huge_pages()
    define_flags()
    app.run(main)
