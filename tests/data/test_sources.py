"""`open_dataset`: names, arguments, and what goes wrong."""

import io

import numpy as np
import pytest
from PIL import Image

from attrib_jax.data.protocol import FilePart, hash_files
from attrib_jax.data.sources import check_separate, open_dataset


def test_a_folder_through_its_name(tmp_path):
    Image.new("RGB", (9, 7)).save(tmp_path / "a.png")
    dataset = open_dataset(f"folder:{tmp_path}", resolution=5)
    assert dataset.name == f"folder:{tmp_path}" and dataset[0].image.shape == (5, 5, 3)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("openmojo", {}, "'openmojo'.*'openmoji'"),
        ("foldr:/x", {}, "'foldr'.*'folder'"),
        ("web-dataset:/x", {}, "'webdataset'"),
        ("/data/images", {}, "'/data/images'.*openmoji, tfds, folder, coco, webdataset"),
        ("folder", {}, "'folder' .*folder:PATH"),
        ("tfds:", {}, "'tfds:' .*tfds:NAME"),
        ("openmoji:train", {}, "'openmoji:train'"),
        ("folder:/x", {"resolution": 0}, "resolution is 0"),
        ("folder:/x", {"image_key": "a"}, "image_key is 'a'.*folder"),
        ("openmoji", {"split": "train"}, "split is 'train'.*openmoji"),
    ],
)
def test_wrong_names_and_arguments(name, options, named):
    with pytest.raises(ValueError, match=named):
        open_dataset(name, **options)


@pytest.mark.parametrize("kind", ["folder", "coco", "webdataset", "latents", "tfds"])
@pytest.mark.parametrize("home", ["~", ""])
def test_a_path_that_is_not_there_is_named_in_full(kind, home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = f"{home or tmp_path}/nothing"
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nothing"):
        open_dataset("tfds:mnist", path) if kind == "tfds" else open_dataset(f"{kind}:{path}")


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


def changed(content: bytes, *places: int) -> list[bytes]:
    """Copies that differ in one byte each."""
    return [content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in places]


def image_file(form: str, side: int = 300) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


WHOLE = ["bmp", "tiff", "ppm", "tga", "sgi"]


@pytest.mark.parametrize(
    ("form", "side"), [(form, 300) for form in WHOLE] + [(form, 90) for form in (*WHOLE, "png", "jpeg", "webp")]
)
def test_a_change_of_any_byte_of_an_image_that_is_read_whole_changes_the_hash(tmp_path, form, side):
    content = image_file(form, side)
    copies = [content, content[:-1], content + b"1", *changed(content, 0, len(content) // 2, 4200, len(content) - 1)]
    seen = set()
    for copy in copies:
        (tmp_path / "a").write_bytes(copy)
        (tmp_path / "b").write_bytes(b"tar" + copy + b"further members")
        part = FilePart(str(tmp_path / "b"), 3, len(copy))
        alone = hash_files(["x"], [FilePart(str(tmp_path / "a"))])
        assert hash_files(["x"], [part]) == alone and hash_files(["y"], [part]) != alone
        seen.add(alone)
    assert len(seen) == len(copies)


def test_of_compressed_and_of_large_files_samples_are_read(tmp_path):
    """Which is what makes it fast; the digests are those that stages were made with."""

    def seen(content, images=True):
        (tmp_path / "a").write_bytes(content)
        return hash_files(["x"], [FilePart(str(tmp_path / "a")), FilePart(str(tmp_path / "absent"))], images=images)

    jpeg = image_file("jpeg", 600)
    assert seen(changed(jpeg, 4500)[0]) == seen(jpeg)
    assert seen(changed(jpeg, (len(jpeg) - 4096) // 3)[0]) != seen(jpeg)
    many = bytes(20_000)
    digests = [seen(copy, images=False) for copy in (many, *changed(many, 10_000, 0, 19_999), many + b"1")]
    assert digests[1] == digests[0] and len(set(digests)) == 4
