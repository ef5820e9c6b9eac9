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


def test_text_states_without_an_axis_of_captions(files):
    path, _, text = files
    np.save(path / "coco17_train_text_embeddings.npy", text[:, 1])
    dataset = open_latents(path)
    np.testing.assert_array_equal(dataset.text, text[:, 1])
    assert dataset.first_caption.tolist() == list(range(COUNT + 1))


def test_the_files_stay_on_disk(files):
    dataset = open_latents(files[0])
    for array in (dataset.latents, dataset.text):
        while array.base is not None and not isinstance(array, np.memmap):
            array = array.base
        assert isinstance(array, np.memmap)


def test_images_and_captions_come_from_another_data_set(files):
    bare = open_latents(files[0])
    assert bare.captions(2) == ("",)
    with pytest.raises(LookupError, match="has no images"):
        bare[2]
    shown = make_dataset(COUNT)
    dataset = open_latents(files[0], images=shown)
    assert dataset.captions(2) == shown.captions(2)
    np.testing.assert_array_equal(dataset[2].image, shown[2].image)
    assert dataset[2].row_id == 2
    with pytest.raises(ValueError, match="has 6 images; expected the 5 stored"):
        open_latents(files[0], images=make_dataset(COUNT + 1))


def test_fingerprint_sees_a_change_and_how_latents_are_scaled(files):
    path, latents, _ = files
    first = open_latents(path).fingerprint()
    assert open_latents(path / "coco17_train").fingerprint() == first
    assert open_latents(path, scaled=False).fingerprint() != first
    latents[3, 0, 0, 0] += 1
    np.save(path / "coco17_train_latents.npy", latents)
    assert open_latents(path).fingerprint() != first


def test_fingerprint_sees_one_changed_number_in_a_file_of_megabytes(tmp_path):
    latents, seen = np.zeros((2, 4, 512, 512), np.float16), set()
    np.save(tmp_path / "a_text_embeddings.npy", np.zeros((1, 2, 3), np.float16))
    places = [(1, 2, row, 3) for row in range(200, 204)]
    for place in places:
        latents[place] += 1
        np.save(tmp_path / "a_latents.npy", latents)
        seen.add(open_latents(tmp_path).fingerprint())
    assert len(seen) == len(places)


def test_counts_that_do_not_fit_are_named(files):
    path, latents, text = files
    np.save(path / "coco17_train_text_embeddings.npy", text[:-1])
    with pytest.raises(ValueError, match=r"has shape \(4, 3, 7, 16\) and .* \(10, 4, 8, 6\); expected \(5, captions"):
        open_latents(path)
    np.save(path / "coco17_train_latents.npy", latents[:-1])
    with pytest.raises(ValueError, match=r"has shape \(9, 4, 8, 6\); expected \(2N"):
        open_latents(path)


def test_latents_without_the_scaling_factor_are_noticed(files):
    path, latents, _ = files
    np.save(path / "coco17_train_latents.npy", latents / 0.18215)
    with pytest.raises(ValueError, match="standard deviation of 5.*--nolatents_scaled"):
        open_latents(path)
    assert not open_latents(path, scaled=False).scaled


@pytest.mark.parametrize(
    ("array", "index", "message"),
    [
        ("latents", (3, 0, 0, 0), r"latents.npy: row 3 \(the image as it is\)"),
        ("latents", (COUNT + 4, 3, 7, 5), r"latents.npy: row 4 \(its mirror image\)"),
        ("text_embeddings", (2, 1, 6, 15), r"text_embeddings.npy: row 2 \(caption 1\)"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("scaled", [True, False])
def test_nan_in_one_row_is_named(files, array, index, message, value, scaled):
    path = files[0] / f"coco17_train_{array}.npy"
    values = np.load(path)
    values[index] = value
    np.save(path, values)
    with pytest.raises(ValueError, match=f"{message} has values that are NaN or infinite") as error:
        open_latents(files[0], scaled=scaled)
    assert "latents_scaled" not in str(error.value)


def test_files_that_are_not_there(files):
    path, latents, text = files
    with pytest.raises(FileNotFoundError, match="other_latents.npy and .*other_text_embeddings.npy not found"):
        open_latents(path / "other")
    np.save(path / "laion_latents.npy", latents)
    open_latents(path)
    np.save(path / "laion_text_embeddings.npy", text)
    with pytest.raises(FileNotFoundError, match="has 2 pairs .*coco17_train, laion"):
        open_latents(path)


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_truncated_file(files, cut):
    file = files[0] / "coco17_train_latents.npy"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="is damaged or not a numpy array"):
        open_latents(files[0])


def test_objects_and_integers_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}, None], object), allow_pickle=True)
    with pytest.raises(ValueError, match="damaged or not a numpy array"):
        open_npy(tmp_path / "objects.npy")
    np.save(tmp_path / "int.npy", np.arange(3))
    with pytest.raises(ValueError, match="holds int64; expected one array of floats"):
        open_npy(tmp_path / "int.npy")
    np.savez(tmp_path / "many.npz", a=np.ones(3))
    with pytest.raises(ValueError, match="holds several arrays"):
        open_npy(tmp_path / "many.npz")
    with pytest.raises(FileNotFoundError):
        open_npy(tmp_path / "absent.npy")
