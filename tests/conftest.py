"""Four virtual devices for every test, so that what is sharded in production is sharded here."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

# Compiling is most of the suite's time, and the code that it makes runs once: without LLVM's optimisations the suite
# takes half as long, and without XLA's fusion emitters compiling takes a third of that. Splitting a program for several
# threads costs a sixth more again, and the other core has tests of its own. The commands that tests start inherit it.
# `XLA_FLAGS= pytest` tests what users run. XLA aborts at a flag that it does not know, as jaxlib 0.11 does at the last.
_FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

_CACHE = Path(__file__).parents[1] / ".pytest_cache"
# Where commands that tests start keep their compiled programs.
os.environ["XDG_CACHE_HOME"] = str(_CACHE)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")
# Tests and their subprocesses compile many of the same programs.
jax.config.update("jax_compilation_cache_dir", str(_CACHE / "attrib_jax" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_finish():
    """Leaves what is imported out of garbage collection.

    Going through it takes 0.7 seconds, and tracing makes so many objects that it would happen every few tests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A tiny random pipeline."""
    from attrib_jax.convert.load import load_pipeline
    from tests.tiny_pipeline import make_torch_pipeline

    path = tmp_path_factory.mktemp("model") / "tiny"
    make_torch_pipeline(str(path), unet_channels=(32,))
    return load_pipeline(str(path))


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory):
    """A tiny random pipeline of Stable Diffusion XL, saved by diffusers; of one level, which compiles faster."""
    from tests.tiny_pipeline import make_torch_xl_pipeline

    path = str(tmp_path_factory.mktemp("models") / "xl")
    make_torch_xl_pipeline(path, unet_channels=(64,))
    return path


@pytest.fixture(scope="session")
def xl_pipeline(xl_folder):
    """The same as ours."""
    from attrib_jax.convert.load import load_pipeline

    return load_pipeline(xl_folder)


@pytest.fixture(scope="session")
def dataset():
    """Its training set."""
    from tests.tiny_dataset import make_dataset

    return make_dataset()


@pytest.fixture(scope="session")
def openmoji_dir(tmp_path_factory):
    """Where tests keep the prepared OpenMoji data set, whose thousands of images take a while to draw."""
    return tmp_path_factory.mktemp("openmoji")
