"""Masks of regions as PNG files: what counts in each kind, what is refused, and their place among the settings."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from attrib_jax.attribution import region_mask
from attrib_jax.jobs.query import PreparedQuery, query_mask, read_region_mask
from attrib_jax.methods import method_config

QUERY = PreparedQuery(np.zeros((16, 16, 3), np.uint8), np.zeros((8, 8, 4), np.float32), np.zeros((3, 4)), ())
MARKED = np.zeros((16, 16), bool)
MARKED[2:7, 4:16] = True


def save(path, mode: str):
    """A mask of MARKED in a mode of Pillow's, with the least value that counts."""
    if mode == "I;16":
        picture = Image.fromarray(MARKED.astype(np.uint16))
    elif mode == "1":
        picture = Image.fromarray(MARKED)
    elif mode == "P":
        picture = Image.fromarray(MARKED.astype(np.uint8), "P")
        picture.putpalette([0, 0, 0, 0, 0, 9])
    elif mode == "RGBA":
        pixels = np.full((16, 16, 4), 255, np.uint8)
        pixels[..., 3] = MARKED
        # Opaque black does not count.
        pixels[0] = 0, 0, 0, 255
        picture = Image.fromarray(pixels)
    else:
        values = MARKED.astype(np.uint8)
        picture = Image.fromarray(values if mode == "L" else np.stack([0 * values, values, 0 * values], axis=-1))
    picture.save(path)
    return path


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "P", "RGB", "RGBA"])
def test_pixels_count_that_are_neither_black_nor_transparent(tmp_path, mode):
    file = save(tmp_path / "mask.png", mode)
    np.testing.assert_array_equal(read_region_mask(file, (16, 16)), MARKED)


def test_a_mask_weighs_latents_as_the_box_does(tmp_path):
    config = method_config(region_mask=str(save(tmp_path / "mask.png", "L")))
    expected = region_mask((4, 2, 16, 7), (16, 16), (8, 8))
    np.testing.assert_allclose(query_mask(QUERY, config), expected, atol=1e-6)
    np.testing.assert_array_equal(query_mask(QUERY, method_config(region=(4, 2, 16, 7))), expected)
    assert query_mask(QUERY, method_config()) is None


def test_settings_hold_the_content(tmp_path):
    assert "region_mask" not in method_config().settings()
    first, second = save(tmp_path / "a.png", "L"), save(tmp_path / "b.png", "L")
    config = method_config(region_mask=str(first))
    assert config.settings() == dataclasses.replace(config, region_mask=str(second)).settings()
    save(second, "RGB")
    assert config.settings() != dataclasses.replace(config, region_mask=str(second)).settings()


def test_wrong_masks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give one of them"):
        method_config(region=(0, 0, 1, 1), region_mask="mask.png")
    with pytest.raises(FileNotFoundError, match="region_mask 'nowhere.png' does not exist"):
        read_region_mask("nowhere.png", (16, 16))
    file = tmp_path / "mask.png"
    Image.new("L", (16, 8), 255).save(file)
    with pytest.raises(ValueError, match="has 16 x 8 pixels; expected 16 x 16"):
        read_region_mask(file, (16, 16))
    Image.new("L", (16, 16)).save(file)
    with pytest.raises(ValueError, match="marks no pixel"):
        read_region_mask(file, (16, 16))
    Image.new("L", (16, 16), 255).save(file, format="JPEG")
    with pytest.raises(ValueError, match="cannot be read as a PNG"):
        read_region_mask(file, (16, 16))
    file.write_bytes(save(tmp_path / "whole.png", "L").read_bytes()[:45])
    with pytest.raises(ValueError, match="cannot be read as a PNG"):
        read_region_mask(file, (16, 16))
