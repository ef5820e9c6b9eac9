"""The library's contract: every public name loads, is documented, and importing the package is light."""

import subprocess
import sys

import pytest

import attrib_jax


@pytest.mark.parametrize("name", attrib_jax.__all__)
def test_public_names_are_documented(name):
    assert getattr(attrib_jax, name).__doc__.strip()


def test_import_is_light():
    script = "import sys, attrib_jax; print([m for m in ('jax', 'torch', 'transformers', 'flax') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_attribute_is_the_function_after_its_module_was_imported():
    script = "import attrib_jax, attrib_jax.attribute; print(type(attrib_jax.attribute).__name__)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "function"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="unlern"):
        attrib_jax.unlern  # noqa: B018
