"""One tiny random model folder, and a folder of images, for all commands."""

import pytest
from PIL import Image

from tests.tiny_dataset import make_dataset
from tests.tiny_pipeline import make_torch_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("commands") / "model"
    make_torch_pipeline(str(path), unet_channels=(32,))
    return path


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """The tiny data set as `--dataset=folder:`."""
    path, dataset = tmp_path_factory.mktemp("images"), make_dataset()
    for index in range(len(dataset)):
        Image.fromarray(dataset[index].image).save(path / f"{index:02d}.png")
        (path / f"{index:02d}.txt").write_text("\n".join(dataset.captions(index)) + "\n")
    return path
