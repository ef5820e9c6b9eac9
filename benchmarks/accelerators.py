"""What the programs would do on accelerators that are not here: XLA's compilers for TPUs and the H100 need no device.

    pip install libtpu
    pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin nvidia-cuda-runtime-cu12 nvidia-cuda-nvcc-cu12
    python -m benchmarks.accelerators --targets=v5e,h100 --models=mscoco --output=runs/accelerators.json

Compiles the functions that the commands call, at a model's real size and precision, and prints a table: whether weights
and temporary arrays fit the device's memory, operations and bytes an example, what binds, and the time at peak rates,
which a real run does not reach. Each program is compiled in a process of its own and its record is added to --output at
once, so a run that was stopped goes on; --again compiles what is there anew.

The first package is that of the extra `tpu-compiler`; the plugins have the version of jaxlib.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from attrib_jax.evaluation.tables import markdown_table
from attrib_jax.storage.files import write_json
from benchmarks.accelerator_programs import MODELS, PROGRAMS, build, lower, planned
from benchmarks.accelerator_targets import TARGETS, versions
from benchmarks.hlo_counts import count_flops, count_traffic, parse

_TARGETS = flags.DEFINE_list("targets", ["v5e", "h100"], f"Devices: {', '.join(TARGETS)}.")
_MODELS = flags.DEFINE_list("models", ["mscoco"], f"Models: {', '.join(MODELS)}.")
_PROGRAMS = flags.DEFINE_list("programs", list(PROGRAMS), f"Programs: {', '.join(PROGRAMS)}.")
_PRECISIONS = flags.DEFINE_list(
    "precisions", ["float32", "bfloat16"], "Compute precisions of the scoring programs; the others are float32."
)
_MODEL_PARALLEL = flags.DEFINE_integer(
    "model_parallel", 1, "Devices that divide the denoiser's parameters among themselves.", lower_bound=1
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file of the records; made or added to.")
_LIMIT = flags.DEFINE_integer("limit_s", 900, "Seconds that one program may take to compile.", lower_bound=1)
_AGAIN = flags.DEFINE_bool("again", False, "Whether programs with a record are compiled anew.")
_WORKER = flags.DEFINE_string(
    "worker", None, "Internal: compile this one, MODEL/TARGET/PROGRAM/PRECISION/MODEL_PARALLEL, and print it."
)

_KEY = ("model", "target", "program", "precision", "model_parallel")
_COLUMNS = {
    "compile_s": "compile s",
    "arguments_gib": "arguments GiB",
    "temporary_gib": "temporary GiB",
    "fits": "fits",
    "gflop_per_example": "GFLOP/example",
    "mb_per_example": "MB/example",
    "copied": "copied",
    "roofline_s": "roofline s",
    "binds": "binds",
    "collectives": "collectives",
}


def compile_program(model: str, target: str, program: str, precision: str, model_parallel: str) -> dict[str, Any]:
    """Compiles one program -> its record.

    `gflop_per_example` and `mb_per_example` are of one device's share; `roofline_s` is an example's time where products
    run at the peak rate of their precision or memory at its bandwidth, whichever takes longer; `copied` is the share of
    the bytes that copies and transpositions move.
    """
    device = TARGETS[target]
    built = build(model, device.mesh(int(model_parallel)), program, precision)
    lowered = lower(built)
    flops = count_flops(parse(lowered.as_text(dialect="hlo"))) / built.examples
    began = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - began
    memory, traffic = compiled.memory_analysis(), count_traffic(parse(compiled.as_text()))
    moved = traffic.bytes / built.examples
    products, bandwidth = flops / (1e12 * device.tflops[built.precision]), moved / (1e9 * device.gbytes_per_s)
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    held -= memory.alias_size_in_bytes
    return {
        "compile_s": round(seconds, 1),
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "fits": held < 2**30 * device.memory_gib,
        "gflop_per_example": flops / 1e9,
        "mb_per_example": moved / 1e6,
        "copied": traffic.copied / max(traffic.bytes, 1),
        "roofline_s": max(products, bandwidth),
        "binds": "products" if products > bandwidth else "memory",
        "collectives": traffic.collectives,
        "custom_calls": traffic.calls,
        "unknown_loops": traffic.unknown_loops,
        "examples": built.examples,
        "peaks": device.source,
        "versions": versions(),
    }


def run_worker(key: tuple[Any, ...], limit: float) -> dict[str, Any]:
    """The record of one program, compiled in another process; {"error": ...} where that failed or took too long."""
    command = [sys.executable, "-m", "benchmarks.accelerators", f"--worker={'/'.join(map(str, key))}"]
    # In a group of its own: compilers start processes, which would outlive it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": f"not compiled after {limit:g} s"}
    if process.returncode:
        last = [line for line in err.splitlines() if line.strip()] or [f"exit status {process.returncode}"]
        return {"error": last[-1][:400]}
    return json.loads(out.splitlines()[-1])


def main(argv):
    del argv
    if _WORKER.value:
        print(json.dumps(compile_program(*_WORKER.value.split("/"))))
        return
    file = Path(_OUTPUT.value) if _OUTPUT.value else None
    stored = json.loads(file.read_text()) if file is not None and file.exists() else []
    records = {tuple({"model_parallel": 1, **record}[name] for name in _KEY): record for record in stored}
    plan = planned(_TARGETS.value, _MODELS.value, _PROGRAMS.value, _PRECISIONS.value)
    wanted = [(*key, _MODEL_PARALLEL.value) for key in plan]
    for key in wanted:
        if key not in records or _AGAIN.value:
            print(f"compiling {' '.join(map(str, key))}", file=sys.stderr)
            records[key] = dict(zip(_KEY, key)) | run_worker(key, _LIMIT.value)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, list(records.values()))
    rows = []
    for key in wanted:
        record = records[key]
        cells = {head: record.get(name, float("nan")) for name, head in _COLUMNS.items()}
        if "error" in record:
            cells |= {"fits": record["error"]}
        cells["collectives"] = ", ".join(record.get("collectives", {})) or "-"
        rows.append(dict(zip(_KEY, key)) | cells)
    print(markdown_table(rows))


if __name__ == "__main__":
    app.run(main)
