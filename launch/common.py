"""What every command shares: devices, compilation cache, the model and data flags, and one-line errors."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags
from absl import logging as absl_logging

from attrib_jax.runtime.cache import enable_compilation_cache
from attrib_jax.runtime.files import StorageError

MODEL = flags.DEFINE_string("model", None, "Pipeline folder in the diffusers layout.")
DATASET = flags.DEFINE_string("dataset", "openmoji", "Training data set: `openmoji`.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where prepared data sets are kept; TFDS's default if not given.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the stages; finished ones are reused if their inputs match.")
DEVICES = flags.DEFINE_integer(
    "cpu_devices", None, "Devices to split a CPU into (default: one a core). Changes speed only.", lower_bound=1
)


def run(main: Callable[[], None]) -> None:
    """Parses flags, prepares JAX and calls `main`."""

    def wrapped(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")
        _prepare_jax()
        sys.exit(execute(main))

    app.run(wrapped)


def execute(main: Callable[[], None]) -> int:
    """Calls `main` -> exit code; errors that a user can mend print one line and no traceback."""
    try:
        main()
    except (ValueError, OSError, StorageError) as error:
        if os.environ.get("ATTRIB_JAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if os.environ.get("ATTRIB_JAX_TRACEBACK"):
            raise
        print(f"error: the device gave up ({error}); if it ran out of memory, select fewer weights", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: finished chunks are kept, the same command goes on from them", file=sys.stderr)
        return 130
    return 0


def require(**values: object) -> None:
    """Raises ValueError naming the flags among `values` that were not given."""
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not given; see --help, or start from a flagfile under configs/")


def shipped_stages() -> Path:
    """Where a model folder keeps the finished stages that came with it."""
    return Path(MODEL.value) / "stages"


def model_credit() -> str | None:
    """The licence line in a model folder's CREDIT file, if it has one."""
    file = Path(MODEL.value) / "CREDIT"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def own_flags(module: str) -> dict:
    """The values of the flags that command `module` and this one define; not those of absl and other libraries."""
    by_module = flags.FLAGS.flags_by_module_dict()
    # absl files the flags of the program that runs under its path.
    names = [flag.name for key in (__name__, module, sys.argv[0]) for flag in by_module.get(key, ())]
    return {name: json.loads(json.dumps(flags.FLAGS[name].value, default=str)) for name in sorted(names)}


def _cpu_count() -> int:
    """Cores that this process may use; not every system can say, and then all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare_jax() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    # A CPU split into one device a core runs each core's tiles as a program of its own: measured 1.2 to 1.5 times as
    # fast as one device whose threads share every operation ("Speed" in BUILD_NOTES.md).
    jax.config.update("jax_num_cpu_devices", DEVICES.value or _cpu_count())
    # Only its tokenizers are used: that PyTorch is missing is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    enable_compilation_cache()
