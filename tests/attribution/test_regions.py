"""A box in image pixels as weights over latent pixels."""

import re

import numpy as np
import pytest

from attrib_jax.attribution import region_mask, shape_mask


def test_box_on_the_grid_selects_whole_latent_pixels():
    mask = region_mask((16, 8, 32, 40), image_size=(64, 48), latent_size=(8, 6))
    expected = np.zeros((8, 6), np.float32)
    expected[1:5, 2:4] = 1
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(region_mask((0, 0, 48, 64), (64, 48), (8, 6)), np.ones((8, 6)))


@pytest.mark.parametrize("box", [(3, 5, 21, 50), (1, 2, 4, 7), (9, 9, 10, 10), (40, 60, 48, 64)])
def test_cut_pixels_count_by_their_share(box):
    """The box drawn at full resolution, averaged over each latent pixel's 8x8 block."""
    x0, y0, x1, y1 = box
    image = np.zeros((64, 48))
    image[y0:y1, x0:x1] = 1
    blocks = image.reshape(8, 8, 6, 8).mean(axis=(1, 3))
    np.testing.assert_allclose(region_mask(box, (64, 48), (8, 6)), blocks, atol=1e-7)


@pytest.mark.parametrize(
    "box", [(5, 5, 5, 9), (9, 5, 5, 9), (-1, 0, 5, 5), (0, 0, 49, 5), (0, 0, 5, 65), (0, 0, 5), (0, 0, 5, float("nan"))]
)
def test_bad_boxes_are_refused(box):
    with pytest.raises(ValueError, match=re.escape(f"region is {box}: expected")):
        region_mask(box, (64, 48), (8, 6))


@pytest.mark.parametrize("latent_size", [(8, 6), (64, 48), (5, 7)])
def test_a_shape_that_is_a_box_has_the_mask_of_the_box(latent_size):
    shape = np.zeros((64, 48), bool)
    shape[9:40, 3:30] = True
    expected = region_mask((3, 9, 30, 40), (64, 48), latent_size)
    np.testing.assert_allclose(shape_mask(shape, latent_size), expected, atol=1e-6)


def test_a_latent_pixel_counts_by_the_share_that_a_shape_covers():
    shape = np.tri(8, dtype=bool)
    # Blocks of 4 x 4: on the diagonal 10 of 16 pixels, below all, above none.
    np.testing.assert_allclose(shape_mask(shape, (2, 2)), [[10 / 16, 0], [1, 10 / 16]])
    with pytest.raises(ValueError, match="mask of 8 x 8 pixels is empty"):
        shape_mask(np.zeros((8, 8), bool), (2, 2))
