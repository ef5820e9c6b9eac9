"""One tiny random model folder for all commands."""

import pytest

from tests.tiny_pipeline import make_torch_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("commands") / "model"
    make_torch_pipeline(str(path), unet_channels=(32,))
    return path
