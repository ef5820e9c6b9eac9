"""One tiny random pipeline and data set for all tests of a folder."""

import pytest

from attrib_jax.convert.load import load_pipeline
from tests.tiny_dataset import make_dataset
from tests.tiny_pipeline import make_torch_pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_torch_pipeline(str(path), unet_channels=(32,))
    return load_pipeline(str(path))


@pytest.fixture(scope="session")
def dataset():
    return make_dataset()
