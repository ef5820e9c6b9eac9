"""The tiny pipeline of PyTorch, its folder, and the same as ours."""

import diffusers
import pytest

from attrib_jax.convert.load import load_pipeline
from tests.convert import old_layout
from tests.convert.shrunken import Model
from tests.tiny_pipeline import make_torch_pipeline


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("models") / "torch")
    make_torch_pipeline(path)
    return path


@pytest.fixture(scope="session")
def ours(folder):
    return load_pipeline(folder)


@pytest.fixture
def theirs(folder):
    return diffusers.StableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return old_layout.copy_folder(folder, tmp_path / "copy")


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    return Model(tmp_path_factory.mktemp("models"), "sd1")


@pytest.fixture(scope="session")
def sd2(tmp_path_factory):
    return Model(tmp_path_factory.mktemp("models"), "sd2")
