"""Pictures as PNG bytes and data addresses, and files that appear whole or not at all."""

import base64
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

# A card is at most about 200 CSS pixels wide: twice that is sharp on dense screens, more only makes the file heavy.
_CARD_PIXELS = 400
_QUERY_PIXELS = 1024


def fit(picture: np.ndarray, size: int) -> Image.Image:
    """(H, W, 3) uint8 -> the image, reduced so that neither side exceeds `size` pixels; never enlarged."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return image


def data_uri(picture: np.ndarray, size: int) -> str:
    """(H, W, 3) uint8 -> a data: address with the picture as PNG, the very pixels where they fit `size`."""
    buffer = io.BytesIO()
    fit(picture, size).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def card_uri(picture: np.ndarray) -> str:
    """The data address of a training picture."""
    return data_uri(picture, _CARD_PIXELS)


def query_uri(picture: np.ndarray) -> str:
    """The data address of the query picture."""
    return data_uri(picture, _QUERY_PIXELS)


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Writes `content` beside `path` and moves it there, so that a full disk leaves the earlier file as it was."""
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
