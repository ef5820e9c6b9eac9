"""`open_dataset`: names, arguments, and what goes wrong."""

import pytest
from PIL import Image

from attrib_jax.data.protocol import FilePart, hash_files
from attrib_jax.data.sources import open_dataset


def test_a_folder_through_its_name(tmp_path):
    Image.new("RGB", (9, 7)).save(tmp_path / "a.png")
    dataset = open_dataset(f"folder:{tmp_path}", resolution=5)
    assert dataset.name == f"folder:{tmp_path}" and dataset[0].image.shape == (5, 5, 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("openmojo", {}, "unknown dataset 'openmojo': did you mean 'openmoji'"),
        ("foldr:/x", {}, "unknown dataset 'foldr': did you mean 'folder'"),
        ("web-dataset:/x", {}, "did you mean 'webdataset'"),
        ("/data/images", {}, "unknown dataset '/data/images'.*Known: openmoji, tfds, folder, coco, webdataset"),
        ("folder", {}, "'folder' names no place; expected folder:PATH"),
        ("tfds:", {}, "'tfds:' names no place; expected tfds:NAME"),
        ("openmoji:train", {}, "expected openmoji, which has no parts"),
        ("folder:/x", {"resolution": 0}, "resolution is 0"),
        ("folder:/x", {"image_key": "a"}, "image_key is 'a', which folder data sets do not take"),
        ("openmoji", {"split": "train"}, "split is 'train', which openmoji data sets do not take"),
    ],
)
def test_wrong_names_and_arguments(name, options, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(name, **options)


@pytest.mark.parametrize("kind", ["folder", "coco", "webdataset", "latents"])
def test_a_path_that_is_not_there(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nothing"):
        open_dataset(f"{kind}:{tmp_path}/nothing")


def test_hash_files_reads_sizes_and_ends(tmp_path):
    file = tmp_path / "a"
    content = bytearray(20_000)

    def digest(described=("x",), size=None):
        file.write_bytes(content)
        return hash_files(described, [FilePart(str(file), 0, size), FilePart(str(tmp_path / "absent"))])

    seen = [digest()]
    content[10_000] = 1  # in the middle: not looked at, which is what makes it fast
    assert digest() == seen[0]
    content[0] = 1
    seen.append(digest())
    content[-1] = 1
    seen.append(digest())
    content.append(1)
    seen += [digest(), digest(described=("y",)), digest(size=5000)]
    assert len(set(seen)) == len(seen)
