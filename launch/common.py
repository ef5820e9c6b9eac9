"""What every command shares: devices, compilation cache, the model and data flags, and one-line errors."""

import contextlib
import dataclasses
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import jax
from absl import app, flags
from absl import logging as absl_logging

from attrib_jax.convert import load as assemble
from attrib_jax.convert.load import ModelSource
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.core.checks import expand_path
from attrib_jax.core.settings import Settings, setting
from attrib_jax.core.text import replace_surrogates
from attrib_jax.data.concat import concatenate
from attrib_jax.data.latents import open_latents
from attrib_jax.data.sources import Dataset, check_separate, open_dataset
from attrib_jax.jobs.encode import EncodeConfig
from attrib_jax.parallel.hosts import independent_hosts, run_on_host0
from attrib_jax.storage.files import StorageError
from launch import multihost
from launch.flags import define_flags, read_config
from launch.packaged import check_model_folder, find_configs

_LATENTS = "latents:"


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """The training data set."""

    dataset: str = setting(
        "openmoji",
        "Training data set: openmoji, digits, tfds:NAME[:SPLIT], folder:PATH, coco:PATH, webdataset:PATH or "
        "latents:PATH.",
    )
    data_dir: str | None = setting(
        None, "Folder where prepared data sets are kept; TFDS's default if not given.", path=True
    )
    exemplars: str | None = setting(
        None, "Data set (as --dataset) that is put before it: the exemplars of a customised model."
    )
    images: str | None = setting(None, "Data set (as --dataset) whose images are shown for latents:PATH.")
    latents_scaled: bool = setting(
        True, "Whether latents that are given as files are already multiplied by the scaling factor."
    )
    image_key: str | None = setting(None, "Image feature of a tfds: data set, where it has several.")
    caption_key: str | None = setting(None, "Caption feature or column, where the usual names do not fit.")


define_flags(ModelSource, defaults={"model": None})
define_flags(DataConfig)
MODEL, TOKENIZER, DATASET, DATA_DIR, EXEMPLARS, LATENTS_SCALED, CAPTION_KEY = (
    flags.FLAGS[name]
    for name in ("model", "tokenizer", "dataset", "data_dir", "exemplars", "latents_scaled", "caption_key")
)
define_flags(EncodeConfig, defaults={"workers": None})

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder where stages and results are kept; finished stages are reused where their inputs match."
)
DEVICES = flags.DEFINE_integer(
    "cpu_devices", None, "Devices to split a CPU into (default: one a core). Changes speed only.", lower_bound=1
)


def arguments() -> list[str]:
    """The command line for `app.run`, with flagfiles that come with the package where the current folder has none."""
    return find_configs(sys.argv)


def run(main: Callable[[], None], one_host: bool = False) -> None:
    """Parses flags and calls `main` inside of `command`."""

    def started(argv):
        with command(argv, many_hosts=not one_host):
            main()

    adopt_shared_flags(sys.argv[0])
    app.run(started, argv=arguments())


def adopt_shared_flags(module: str | None = None) -> None:
    """Makes the flags of this module and of `multihost` those of the command, which are what its `--help` lists."""
    module = module or sys.argv[0]
    for source in (__name__, multihost.__name__):
        for flag in flags.FLAGS.get_flags_for_module(source):
            flags.FLAGS.register_key_flag_for_module(module, flag)


@contextlib.contextmanager
def command(argv: Sequence[str], many_hosts: bool = False) -> Iterator[None]:
    """The context of a command's work: prepares JAX, joins the other hosts, and turns errors into one line.

    Errors that a user can mend print one line and no traceback, unless ATTRIB_JAX_TRACEBACK is set, and exit with code
    1. With --multihost the command runs in a child process, see launch/multihost.py.

    Args:
      argv: what is left of the command line after its flags: the name of the program alone.
      many_hosts: whether the command can run on several hosts.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")
    try:
        multihost.check_flags(one_host=not many_hosts)
    except ValueError as error:
        sys.exit(_exit_code(error))
    if multihost.is_parent():
        sys.exit(multihost.supervise())
    from launch.process import restart_with_huge_pages

    restart_with_huge_pages()
    connected, code, lost = multihost.MULTIHOST.value, 0, None
    if connected:
        multihost.attach()
    try:
        try:
            _prepare_jax()
            if connected:
                multihost.connect()
                _check_same_flags()
            yield
        except (ValueError, OSError, StorageError, jax.errors.JaxRuntimeError, MemoryError, KeyboardInterrupt) as error:
            code = _exit_code(error)
    except multihost.LostHostError as error:
        code, lost = multihost.LOST_HOST, str(error)
    except BaseException:
        if not connected:
            raise
        traceback.print_exc()
        code = 1
    if connected:
        multihost.leave(code, lost)
    if code:
        sys.exit(code)


def _exit_code(error: BaseException) -> int:
    """Prints what a user should know of an error -> the command's exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted: finished chunks are kept, the same command goes on from them", file=sys.stderr)
        return 130
    out_of_memory = isinstance(error, (jax.errors.JaxRuntimeError, MemoryError))
    if out_of_memory:
        multihost.check_connection(error)
    if os.environ.get("ATTRIB_JAX_TRACEBACK"):
        raise error
    if not out_of_memory:
        print(f"error: {error}", file=sys.stderr)
        return 1
    hint = (
        "if it ran out of memory, select fewer weights with --weights, take a smaller --batch_size or "
        "--projection_dim, or a device with more"
    )
    print(f"error: the device gave up ({error}); {hint}", file=sys.stderr)
    return 1


def workdir() -> str | None:
    """The folder of --workdir, with `~` expanded."""
    return expand_path(WORKDIR.value) if WORKDIR.value else None


def require(**values: object) -> None:
    """Raises ValueError naming the flags among `values` that were not given."""
    missing = [f"--{name}" for name, value in values.items() if value is None or value == ""]
    if missing:
        raise ValueError(f"{', '.join(missing)} not given; see --help, or start from a flagfile under configs/")


def load_model(weights: Collection[str] = (), without: Collection[str] = ()) -> Pipeline:
    """The pipeline of --model and the flags that change it, but for those in `without`: `lora`, `custom_diffusion`.

    `weights` are the subsets of weights that will be selected.
    """
    require(model=flags.FLAGS.model)
    check_model_folder(flags.FLAGS.model)
    # Before gigabytes are read.
    folder, data = workdir(), read_config(DataConfig)
    for name in (data.dataset, data.exemplars, data.images):
        if folder is not None and name is not None:
            check_separate(folder, name)
    source = read_config(ModelSource)
    if "lora" in without:
        source = dataclasses.replace(source, lora=(), lora_scale=(1.0,))
    if "custom_diffusion" in without:
        source = dataclasses.replace(source, custom_diffusion=None)
    return assemble.load_model(source, weights=weights)


def open_source(name: str, resolution: int | None = None, **keys: str | None) -> Dataset:
    """A data set by name, in --data_dir; ValueError where --workdir lies among its images."""
    folder = workdir()
    if folder is not None:
        check_separate(folder, name)
    return open_dataset(name, read_config(DataConfig).data_dir, resolution=resolution, **keys)


def load_dataset(resolution: int | None = None) -> Dataset:
    """The data set of --dataset and the flags that go with it, its images at `resolution` (native if None)."""
    config = read_config(DataConfig)
    keys = {"image_key": config.image_key, "caption_key": config.caption_key}
    dataset: Dataset
    if config.dataset.startswith(_LATENTS):
        images = None if config.images is None else open_source(config.images, resolution, **keys)
        dataset = open_latents(config.dataset.removeprefix(_LATENTS), images, config.latents_scaled)
    elif config.images is not None:
        raise ValueError(f"images is {config.images!r}, but {config.dataset!r} has its own; it goes with latents:PATH")
    else:
        dataset = open_source(config.dataset, resolution, **keys)
    return dataset if config.exemplars is None else concatenate(open_source(config.exemplars, resolution), dataset)


def encode_config() -> EncodeConfig:
    """How images and captions are encoded; the number of reading processes follows the cores if it is not given."""
    cores, workers = _cpu_count(), flags.FLAGS.workers
    return read_config(
        EncodeConfig, workers=workers if workers is not None else 0 if cores <= 4 else min(8, cores // 2)
    )


def shipped_stages() -> Path:
    """Where a model folder keeps the finished stages that came with it."""
    return Path(expand_path(flags.FLAGS.model)) / "stages"


def model_credit() -> str | None:
    """The licence line in a model folder's CREDIT file, if it has one."""
    file = Path(expand_path(flags.FLAGS.model)) / "CREDIT"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def own_flags(module: str) -> dict:
    """The values of the flags that command `module` and this one define; not those of absl and other libraries.

    They are JSON values that any file takes: half a surrogate pair, as which Python reads bytes that are not UTF-8,
    becomes '?'.
    """
    by_module = flags.FLAGS.flags_by_module_dict()
    # absl files the flags of the program that runs under its path.
    names = [flag.name for key in (__name__, module, sys.argv[0]) for flag in by_module.get(key, ())]
    values = {name: flags.FLAGS[name].value for name in sorted(names)}
    return json.loads(replace_surrogates(json.dumps(values, default=str, ensure_ascii=False)))


def _check_same_flags() -> None:
    """Raises ValueError where another host was started with other flags than host 0."""
    defined = flags.FLAGS.flags_by_module_dict()
    modules = [name for name in defined if name.startswith("launch.") or name == sys.argv[0]]
    names = sorted({flag.name for module in modules for flag in defined[module]} - multihost.OWN_FLAGS - {"workers"})
    own = {name: repr(flags.FLAGS[name].value) for name in names}
    first = run_on_host0(lambda: own)
    with independent_hosts():
        for name in names:
            if own[name] != first.get(name):
                raise ValueError(
                    f"{name} is {own[name]} on this host and {first.get(name)} on host 0; start every host with the "
                    "same flags"
                )


def _cpu_count() -> int:
    """Cores that this process may use; not every system can say, and then all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare_jax() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    # A CPU split into one device a core runs each core's tiles as a program of its own: measured 1.1 to 1.3 times as
    # fast as one device whose threads share every operation (docs/PERFORMANCE.md).
    jax.config.update("jax_num_cpu_devices", DEVICES.value or _cpu_count())
    # Only its tokenizers are used: that PyTorch is missing is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from attrib_jax.parallel.compilation_cache import enable_compilation_cache

    enable_compilation_cache()
