"""Images as PNG bytes and data addresses."""

import base64
import io

import numpy as np
from PIL import Image

# A card is at most about 200 CSS pixels wide: twice that is sharp on dense screens, more only makes the file heavy.
_CARD_PIXELS = 400
_QUERY_PIXELS = 1024
_THUMB_PIXELS = 144
_OVERLAY_PIXELS = 768
# Of a region's outline, in pixels and RGBA, and of the veil over all else.
_OUTLINE, _OUTLINE_COLOUR, _VEIL = 4, (178, 58, 30, 255), (246, 243, 236, 150)


def fit(image: np.ndarray, size: int) -> Image.Image:
    """(H, W, 3) uint8 -> the image, reduced so that neither side exceeds `size` pixels; never enlarged."""
    reduced = Image.fromarray(np.ascontiguousarray(image))
    reduced.thumbnail((size, size), Image.Resampling.LANCZOS)
    return reduced


def data_uri(image: np.ndarray, size: int) -> str:
    """(H, W, 3) uint8 -> a data: address with the image as PNG, the very pixels where they fit `size`."""
    buffer = io.BytesIO()
    fit(image, size).save(buffer, format="PNG", optimize=True)
    return _png_uri(buffer)


def _png_uri(buffer: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def card_uri(image: np.ndarray) -> str:
    """The data address of a training image."""
    return data_uri(image, _CARD_PIXELS)


def thumb_uri(image: np.ndarray) -> str:
    """The data address of a training image in the map of regions."""
    return data_uri(image, _THUMB_PIXELS)


def query_uri(image: np.ndarray) -> str:
    """The data address of the query image."""
    return data_uri(image, _QUERY_PIXELS)


def region_overlay(region: np.ndarray, width: int, height: int) -> Image.Image:
    """(H, W) bool -> an RGBA image of the given size to lay over the image: all else veiled, the region outlined."""
    resized = Image.fromarray(np.asarray(region, bool)).resize((width, height), Image.Resampling.NEAREST)
    marked = np.asarray(resized)
    inner = np.pad(marked, _OUTLINE)
    for axis in (0, 1):
        shifted = [np.roll(inner, step, axis) for step in range(-_OUTLINE, _OUTLINE + 1)]
        inner = np.logical_and.reduce(shifted)
    inner = inner[_OUTLINE:-_OUTLINE, _OUTLINE:-_OUTLINE]
    pixels = np.where(marked[..., None], np.uint8(0), np.array(_VEIL, np.uint8))
    pixels[marked & ~inner] = _OUTLINE_COLOUR
    return Image.fromarray(pixels)


def overlay_uri(region: np.ndarray) -> str:
    """The data address of `region_overlay`, large enough for the query image on the page."""
    height, width = region.shape
    factor = max(1, round(_OVERLAY_PIXELS / max(height, width)))
    buffer = io.BytesIO()
    region_overlay(region, width * factor, height * factor).save(buffer, format="PNG", optimize=True)
    return _png_uri(buffer)
