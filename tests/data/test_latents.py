"""Latents and text states as numpy files."""

import numpy as np
import pytest

from attrib_jax.data.latents import open_latents, open_npy
from tests.tiny_dataset import make_dataset

COUNT = 5


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2 * COUNT, 4, 8, 6)).astype(np.float32)
    text = rng.normal(size=(COUNT, 3, 7, 16)).astype(np.float16)
    np.save(tmp_path / "coco17_train_latents.npy", latents)
    np.save(tmp_path / "coco17_train_text_embeddings.npy", text)
    return tmp_path, latents, text


@pytest.fixture
def save(files):
    def save(array, values):
        np.save(files[0] / f"coco17_train_{array}.npy", values)

    return save


def test_rows_as_they_are_and_mirrored_channels_last(files):
    path, latents, text = files
    dataset = open_latents(path / "coco17_train")
    assert len(dataset) == COUNT and dataset.latents.shape == (COUNT, 2, 8, 6, 4)
    rows, flips = np.array([4, 0, 2]), np.array([1, 0, 1])
    expected = np.stack([latents[COUNT * flip + row].transpose(1, 2, 0) for row, flip in zip(rows, flips)])
    np.testing.assert_array_equal(dataset.latents[rows, flips], expected)
    np.testing.assert_array_equal(dataset.text[dataset.first_caption[3] + 2], text[3, 2])
    assert dataset.row_ids.tolist() == list(range(COUNT))
    assert open_latents(path).name == f"latents:{path}"  # the one pair in a folder
    for array in (dataset.latents, dataset.text):  # which stay on disk
        while array.base is not None and not isinstance(array, np.memmap):
            array = array.base
        assert isinstance(array, np.memmap)


def test_text_states_without_an_axis_of_captions(files, save):
    save("text_embeddings", files[2][:, 1])
    dataset = open_latents(files[0])
    np.testing.assert_array_equal(dataset.text, files[2][:, 1])
    assert dataset.first_caption.tolist() == list(range(COUNT + 1))


def test_images_and_captions_come_from_another_data_set(files):
    bare = open_latents(files[0])
    assert bare.captions(2) == ("",)
    with pytest.raises(LookupError, match="no images"):
        bare[2]
    shown = make_dataset(COUNT)
    dataset = open_latents(files[0], images=shown)
    assert dataset.captions(2) == shown.captions(2)
    np.testing.assert_array_equal(dataset[2].image, shown[2].image)
    assert dataset[2].row_id == 2
    with pytest.raises(ValueError, match="has 6 images; .* 5 "):
        open_latents(files[0], images=make_dataset(COUNT + 1))


def test_fingerprint_sees_one_changed_number_and_how_latents_are_scaled(tmp_path):
    latents, seen = np.zeros((2, 4, 512, 512), np.float16), set()  # of megabytes
    np.save(tmp_path / "a_text_embeddings.npy", np.zeros((1, 2, 3), np.float16))
    places = [(1, 2, row, 3) for row in range(200, 204)]
    for place in places:
        latents[place] += 1
        np.save(tmp_path / "a_latents.npy", latents)
        seen.add(open_latents(tmp_path).fingerprint())
        assert open_latents(tmp_path / "a").fingerprint() in seen
    seen.add(open_latents(tmp_path, scaled=False).fingerprint())
    assert len(seen) == len(places) + 1


@pytest.mark.parametrize(
    ("array", "change", "named"),
    [
        ("text_embeddings", lambda x: x[:-1], r"\(4, 3, 7, 16\) .*\(10, 4, 8, 6\); expected \(5,"),
        ("latents", lambda x: x[:-1], r"\(9, 4, 8, 6\); expected \(2N"),
        ("latents", lambda x: x / 0.18215, "standard deviation of 5.*--nolatents_scaled"),
    ],
)
def test_arrays_that_do_not_fit_are_named(files, save, array, change, named):
    save(array, change(files[1 if array == "latents" else 2]))
    with pytest.raises(ValueError, match=named):
        open_latents(files[0])
    if "scaled" in named:
        assert not open_latents(files[0], scaled=False).scaled


@pytest.mark.parametrize(
    ("array", "index", "named"),
    [
        ("latents", (3, 0, 0, 0), r"row 3 \(the image as it is\)"),
        ("latents", (COUNT + 4, 3, 7, 5), r"row 4 \(its mirror image\)"),
        ("text_embeddings", (2, 1, 6, 15), r"row 2 \(caption 1\)"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("scaled", [True, False])
def test_nan_in_one_row_is_named(files, save, array, index, named, value, scaled):
    values = files[1 if array == "latents" else 2]
    values[index] = value
    save(array, values)
    with pytest.raises(ValueError, match=f"{array}.npy: {named}") as error:
        open_latents(files[0], scaled=scaled)
    assert "latents_scaled" not in str(error.value)


def test_files_that_are_not_there(files):
    path, latents, text = files
    with pytest.raises(FileNotFoundError, match="other_latents.npy and .*other_text_embeddings.npy"):
        open_latents(path / "other")
    np.save(path / "laion_latents.npy", latents)
    open_latents(path)
    np.save(path / "laion_text_embeddings.npy", text)
    with pytest.raises(FileNotFoundError, match="2 pairs .*coco17_train, laion"):
        open_latents(path)


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_truncated_file(files, cut):
    file = files[0] / "coco17_train_latents.npy"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"{file.name}.* is damaged"):
        open_latents(files[0])


@pytest.mark.parametrize(
    ("name", "error", "named"),
    [
        ("objects.npy", ValueError, "damaged"),
        ("int.npy", ValueError, "int64"),
        ("many.npz", ValueError, "several arrays"),
        ("absent.npy", FileNotFoundError, ""),
    ],
)
def test_objects_and_integers_are_refused(tmp_path, name, error, named):
    np.save(tmp_path / "objects.npy", np.array([{}, None], object), allow_pickle=True)
    np.save(tmp_path / "int.npy", np.arange(3))
    np.savez(tmp_path / "many.npz", a=np.ones(3))
    with pytest.raises(error, match=f"{name}.*{named}"):
        open_npy(tmp_path / name)
