"""Messages name only options that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "attrib_jax").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])
# absl's own, placeholders, and options of the TFDS and Custom Diffusion scripts that messages name.
FOREIGN = {
    "help",
    "helpfull",
    "flagfile",
    "flag",
    "noflag",
    "mode",
    "file_format",
    "out_file_format",
    "dataset_version_dir",
}


def texts(tree):
    """The strings of a module that are no docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


@pytest.fixture(scope="module")
def flags():
    """The flags of all commands: the page of them is tested to be up to date."""
    found = re.findall(r"^\| `--(?:\[no\])?(\w+)`", (ROOT / "docs/FLAGS.md").read_text(), re.MULTILINE)
    assert len(found) > 50
    return {*found, *(f"no{name}" for name in found)} | FOREIGN


def test_every_flag_that_a_text_names_is_defined(flags):
    unknown = {
        f"{path.relative_to(ROOT)}: --{name}"
        for path in SOURCES
        for text in texts(ast.parse(path.read_text()))
        for name in re.findall(r"(?<![\w-])--([a-z]\w*)", text)
        if name not in flags
    }
    assert unknown == set()
