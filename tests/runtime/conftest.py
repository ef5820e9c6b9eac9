"""What the tests that start and kill processes share."""

from pathlib import Path

import pytest

import attrib_jax


@pytest.fixture(scope="session")
def quick_import() -> str:
    """First lines of a script: its imports then run only the modules that it names, not the whole library.

    A process that is to be killed should spend its time in the code under test, not in importing the models.
    """
    folder = str(Path(attrib_jax.__file__).parent)
    return (
        "import sys, types\n"
        "package = types.ModuleType('attrib_jax')\n"
        f"package.__path__ = [{folder!r}]\n"
        "sys.modules['attrib_jax'] = package\n"
    )
