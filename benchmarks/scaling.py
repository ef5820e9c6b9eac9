"""The cost of the losses stage as the data set grows: time per example, memory, and the input pipeline's part.

    python -m benchmarks.scaling --output=runs/scaling.json            # 1k, 4k, 16k and 64k examples, a tiny model

An example is an image or its mirror image, with one caption. For each number of them latents and text states are
written to disk as a `latents:` data set, and the stage runs on it in a process of its own, in chunks that it writes.
Memory is anonymous memory (see workers.py) beyond what the process held before the stage, when the model was compiled:
the most during the stage, and what is left after it once the allocator has given back what it keeps for reuse. Of the
first some tens of MiB are such free memory, which fills up over the first twenty thousand examples and then stays; what
is left must not grow. Two numbers say what inputs cost: reading and placing them over the whole step, and how much
shorter a step is with all inputs in memory. On a machine that others use, the CPU time says more than the time. Exits
with 1 if the time per example changes or the memory that is left grows.
"""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.sizes import Size, size_of
from benchmarks.workers import Worker
from launch import process

FLAGS = flags.FLAGS

# How far the time per example may be from that of the largest number of examples, and memory above the smallest's.
TIME_LIMIT = 0.1
MEMORY_LIMIT = 16 * 2**20
_SHARE_TILES = 64
_BLOCK = 1024


def write_latents(folder: str, size: Size, images: int) -> None:
    """Writes random latents and text states of `images` images as the pair of files of a `latents:` data set."""
    rng = np.random.default_rng(size.seed)
    side, channels = size.unet["sample_size"], size.unet["in_channels"]
    shapes = {
        "latents": (2 * images, channels, side, side),
        "text_embeddings": (images, 1, size.length, size.unet["cross_attention_dim"]),
    }
    for name, shape in shapes.items():
        file = os.path.join(folder, f"random_{name}.npy")
        array = np.lib.format.open_memmap(file, "w+", np.float32, shape)
        for first in range(0, shape[0], _BLOCK):
            block = array[first : first + _BLOCK]
            block[:] = rng.standard_normal(block.shape, np.float32)
        array.flush()


def measure(size: Size, examples: int, devices: int, repeats: int = 1) -> dict[str, Any]:
    """Runs the stage on `examples` random ones.

    Returns a row: `examples`, `seconds` of an example (of the fastest of `repeats` runs) and `cpu` seconds (the mean),
    `peak` and `left` (bytes), and `read` and `waited`, the two shares of `LossesRun.input_share`.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_latents(folder, size, -(-examples // 2))
        with Worker("benchmarks.losses_run:LossesRun", size, folder, devices) as worker:
            worker.call("trim")
            worker.peak = before = worker.memory()
            used = worker.cpu_seconds()
            seconds = min(worker.call("stage") for _ in range(repeats)) / examples
            cpu = (worker.cpu_seconds() - used) / examples / repeats
            peak = worker.peak - before
            worker.call("trim")
            left = worker.memory() - before
            read, waited = worker.call("input_share", _SHARE_TILES)
    row = {"examples": examples, "seconds": seconds, "cpu": cpu, "peak": peak, "left": left}
    return row | {"read": read, "waited": waited}


def misses(rows: list[dict[str, Any]]) -> list[str]:
    """What grows with the number of examples and should not, in words; rows by rising number."""
    found = []
    for row in rows[:-1]:
        change = rows[-1]["seconds"] / row["seconds"] - 1
        if not abs(change) <= TIME_LIMIT:
            found.append(f"time per example changes by {change:+.0%} from {row['examples']} to {rows[-1]['examples']}")
    for row in rows[1:]:
        growth = row["left"] - rows[0]["left"]
        if growth > MEMORY_LIMIT:
            found.append(f"memory grows by {growth / 2**20:.0f} MiB from {rows[0]['examples']} to {row['examples']}")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    columns = (
        "examples",
        "ms an example",
        "CPU ms",
        "peak, MiB",
        "left, MiB",
        "reading / step",
        "saved by inputs in memory",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [
        f"| {row['examples']} | {1e3 * row['seconds']:.3f} | {1e3 * row['cpu']:.3f} "
        f"| {row['peak'] / 2**20:.0f} | {row['left'] / 2**20:.0f} | {row['read']:.1%} | {row['waited']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")
    size = dataclasses.replace(size_of(FLAGS.size), stride=FLAGS.stride)
    counts = sorted(int(count) for count in FLAGS.counts)
    devices, rows = len(os.sched_getaffinity(0)), []
    for count in counts:
        repeats = FLAGS.repeats if 4 * count <= counts[-1] else 1
        rows.append(measure(size, count, devices, repeats))
        print(table(rows[-1:]) if len(rows) == 1 else table(rows[-1:]).splitlines()[-1], flush=True)
    print("\n".join(misses(rows)) or "pass")
    if FLAGS.output:
        Path(FLAGS.output).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    sys.exit(bool(misses(rows)))


def define_flags() -> None:
    """Defines the command's flags; not on import, as tests import several benchmarks with the same flags."""
    flags.DEFINE_list("counts", ["1024", "4096", "16384", "65536"], "Numbers of examples.")
    flags.DEFINE_string("size", "tiny", "`mscoco`, `tiny`, or a pipeline folder whose UNet is built.")
    flags.DEFINE_integer(
        "stride", 500, "Stride of the timesteps: an example has 1000 / stride forwards.", lower_bound=1
    )
    flags.DEFINE_integer("repeats", 3, "Runs of a data set up to the fourth of the largest; the fastest counts.")
    flags.DEFINE_string("output", None, "Json file for the rows.")


if __name__ == "__main__":
    process.restart_with_huge_pages()
    define_flags()
    app.run(main)
