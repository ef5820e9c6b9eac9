"""`open_dataset`: names, arguments, and what goes wrong."""

import pytest
from PIL import Image

from attrib_jax.data.protocol import FilePart, hash_files
from attrib_jax.data.sources import check_separate, open_dataset


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


@pytest.mark.parametrize("kind", ["folder", "coco", "webdataset", "latents", "tfds"])
def test_a_path_in_the_home_folder_is_found(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nothing"):
        open_dataset("tfds:mnist", "~/nothing") if kind == "tfds" else open_dataset(f"{kind}:~/nothing")


@pytest.mark.parametrize("kind", ["folder", "coco", "webdataset"])
@pytest.mark.parametrize(
    ("workdir", "place"),
    [
        ("data", "data"),
        ("data/run1", "data"),
        ("data/a/b/run1", "data/"),
        ("link/run1", "data"),
        ("data/run1", "link"),
        (".", "data"),
        ("data/../data/run", "data"),
        ("~/data/run", "data"),
    ],
)
def test_a_workdir_among_images_is_refused(tmp_path, monkeypatch, kind, workdir, place):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"workdir is '{workdir}', which"):
        check_separate(workdir, f"{kind}:{place}")
    check_separate("runs/one", f"{kind}:{place}")
    check_separate("database", f"{kind}:{place}")


@pytest.mark.parametrize(
    "dataset", ["openmoji", "tfds:mnist", "latents:data", "folder:absent", "webdataset:data/*.tar"]
)
def test_data_sets_that_are_no_folder_of_images_are_never_in_the_way(tmp_path, monkeypatch, dataset):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    check_separate("data/run", dataset)


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
