"""The layout of docs/DECISIONS.md, read from the source: the order of folders, no import circles, small folders."""

import ast
import functools
import subprocess
import sys
import traceback
from pathlib import Path

import jax
import pytest

from attrib_jax.jobs.losses import dataset_pass
from attrib_jax.models.unet import UNet2DConditionModel
from launch import attribute, common
from tests.launch.calls import call

ROOT = Path(__file__).parents[1]
# In the order of the data; a folder imports only folders before it, and itself.
FOLDERS = (
    "core",
    "ops",
    "models",
    "diffusion",
    "convert",
    "parallel",
    "storage",
    "data",
    "curvature",
    "attribution",
    "jobs",
    "methods",
    "training",
    "evaluation",
    "retrieval",
    "report",
    "serving",
    "attribute",
)
# `launch` has a file for each command.
MAX_MODULES_PER_FOLDER = {"attrib_jax": 16, "launch": 20}
MAX_MODULES_OF_ATTRIBUTE = 103
MAX_FRAMES, MAX_FILES = 15, 8


def sources(*folders: str) -> dict[str, Path]:
    """Module name -> file, of packages at the root."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(name: str) -> frozenset[str]:
    """The project's modules that a module imports, inside functions and for type checking too."""
    modules, found = sources("attrib_jax", "launch"), set()
    for node in ast.walk(tree(modules[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            # A name is a module of a package, or something in the module.
            each = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in modules else node.module for module in each}
    return frozenset(found & modules.keys() - {name})


def folder_of(name: str) -> str | None:
    """The part of the library that a module belongs to; None for the package itself and for other packages."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] or None if package == "attrib_jax" else None


LIBRARY = [name for name in sources("attrib_jax") if name != "attrib_jax"]


def test_every_folder_has_its_place():
    assert {folder_of(name) for name in LIBRARY} <= {*FOLDERS}


def test_a_folder_imports_only_folders_before_it():
    wrong = {
        f"{name} imports {other}"
        for name in LIBRARY
        for other in imports(name)
        if folder_of(other) is None or FOLDERS.index(folder_of(other)) > FOLDERS.index(folder_of(name))
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_no_import_circle():
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(imports(name)):
                visit(other)
            done.add(path.pop())

    for name in [*LIBRARY, *sources("launch")]:
        visit(name)


@pytest.mark.parametrize("package", ["attrib_jax", "launch"])
def test_folders_are_small(package):
    folders = [ROOT / package, *(path for path in (ROOT / package).rglob("*") if path.is_dir())]
    sizes = {str(path.relative_to(ROOT)): len(list(path.glob("*.py"))) for path in folders}
    assert {name: size for name, size in sizes.items() if size > MAX_MODULES_PER_FOLDER[package]} == {}


def test_the_main_job_loads_few_modules():
    # Modules, not packages: those hold little more than a docstring.
    script = (
        "import sys, launch.attribute\n"
        "for name, module in sorted(sys.modules.items()):\n"
        "    if name.startswith(('attrib_jax.', 'launch.')) and not hasattr(module, '__path__'):\n"
        "        print(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    names = result.stdout.splitlines()
    assert {"launch.attribute", "attrib_jax.attribute", "attrib_jax.jobs.losses"} <= {*names}
    assert len(names) <= MAX_MODULES_OF_ATTRIBUTE, names


class Traced(Exception):
    """The UNet is being traced: code objects of the callers, the command first."""


def test_few_frames_lie_between_the_command_and_the_unet(pipeline, dataset, tmp_path, monkeypatch):
    """Those of the project in a traceback of the pass over the training set under the unlearned weights."""

    def traced(*_args, **_kwargs):
        raise Traced([frame.f_code for frame, _ in traceback.walk_stack(sys._getframe(1))][::-1])

    def traced_anew(run, paths, program, weights, description, *args, **kwargs):
        assert description == "losses after"
        # The losses before have compiled the same program.
        jax.clear_caches()
        monkeypatch.setattr(UNet2DConditionModel, "__call__", traced)
        return dataset_pass(run, paths, program, weights, description, *args, **kwargs)

    monkeypatch.setattr("attrib_jax.methods.unlearn.dataset_pass", traced_anew)
    monkeypatch.setattr(common, "load_model", lambda weights: pipeline)
    monkeypatch.setattr(common, "load_dataset", lambda resolution: dataset)
    size = ("--sampler_steps=1", "--query_draws=16", "--fisher_samples=16", "--stride=500", "--flips=none")
    with pytest.raises(Traced) as outcome:
        call(attribute.main, "--model=tiny", f"--workdir={tmp_path}", "--prompt=hat", "--method=unlearn", *size)
    (codes,) = outcome.value.args
    files = sources("attrib_jax", "launch").values()
    frames = [(code.co_filename, code.co_name) for code in codes if Path(code.co_filename) in files]
    assert [name for _, name in frames if name in ("main", "dataset_pass", "batched")] == [
        "main",
        "dataset_pass",
        "batched",
    ]
    assert len(frames) <= MAX_FRAMES and len({file for file, _ in frames}) <= MAX_FILES, frames


def test_no_model_or_method_asks_for_the_platform():
    """What depends on it is a lowering rule in `ops`, or a choice of the command."""
    asking = {
        name
        for name, path in sources("attrib_jax").items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr == "default_backend" and folder_of(name) != "ops"
    }
    assert not asking, sorted(asking)


def test_nothing_imports_the_main_job_back():
    assert not {name for name in LIBRARY if "attrib_jax.attribute" in imports(name)}
