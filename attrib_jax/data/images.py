"""Image files -> (H, W, 3) uint8 arrays of one size."""

import errno
import io
import math
import os

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from attrib_jax.core.checks import expand_path
from attrib_jax.data.protocol import ABSENT_ERRNOS

# Pillow's own list would let a file start other programs: it hands EPS to Ghostscript.
_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF"),
    "WEBP",
)
# What shows an image upright, by its EXIF orientation; that of 1 is upright as it is stored.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of TIFF: bits a sample, what is black, and what kind of numbers samples are.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO = 0
_SIGNED_OR_FLOAT = frozenset((2, 3))
# More than MAX_IMAGE_PIXELS need when stored without compression, in 16 bits and four channels.
MAX_FILE_BYTES = 2**30


class UnreadableRowError(ValueError):
    """An image that cannot be read; the message names it and says why."""


def image_suffixes() -> frozenset[str]:
    """Lower-case file name endings, with the dot, of the formats that `decode_image` reads."""
    return frozenset(suffix for suffix, form in Image.registered_extensions().items() if form in _FORMATS)


def decode_image(source: bytes | str | os.PathLike, name: str | None = None) -> np.ndarray:
    """Decodes an image file -> (H, W, 3) uint8, RGB.

    It is turned upright as its EXIF orientation says; where that is damaged, it stays as it is stored. Transparency is
    laid on white. Of channels of 12 or 16 bits the upper 8 bits are kept. Of an animation the first frame is read.

    Args:
      source: path of the file, or its content.
      name: for messages; the path if None.

    Raises:
      UnreadableRowError: no such file, no image, one that is damaged or cut off, one with more pixels than
        `PIL.Image.MAX_IMAGE_PIXELS`, or one whose pixels are floating-point, signed or 32-bit numbers, since nothing
        says what black and white are among them.
      OSError: the file is there and its disk or its permissions fail.
    """
    if not isinstance(source, bytes):
        name, source = name or os.fspath(source), _read_file(source, name or os.fspath(source))
    name = name or f"of {len(source)} bytes"
    Image.init()
    formats = [form for form in _FORMATS if form in Image.OPEN]  # which ones depends on how Pillow was built
    try:
        with Image.open(io.BytesIO(source), formats=formats) as opened:
            if opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError(f"{opened.width} x {opened.height} pixels are too many")
            opened.load()
            return np.asarray(_turn_upright(_to_rgb(opened), opened))
    # Pillow's decoders answer damaged data with exceptions of many types; reading the disk is done by now.
    except Exception as error:
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise UnreadableRowError(
            f"image {name!r} cannot be read as an image ({reason}); give a PNG, JPEG or another format that Pillow "
            "reads"
        ) from error


def resize_and_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes (H, W, 3) uint8 until it just covers (height, width), then cuts out the centre.

    As torchvision's `Resize(size, BILINEAR)` and `CenterCrop(size)` do to a Pillow image, which the method's authors
    use: the shorter side becomes `size`, the longer one int(size * long / short), with Pillow's antialiased bilinear
    filter; the crop starts at int(round((long - size) / 2.0)), where Python rounds halves to the even number. For a
    target that is not square, the side that needs the larger factor takes the place of the shorter one.

    Returns:
      (height, width, 3) uint8; `image` itself where it has that size.

    Raises:
      UnreadableRowError: an image so narrow that it would have more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    old_height, old_width = image.shape[:2]
    if (old_height, old_width) == (height, width):
        return image
    (new_height, new_width), (top, left) = cover((old_height, old_width), (height, width))
    if new_height * new_width > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise UnreadableRowError(
            f"image of {old_width} x {old_height} pixels is too narrow: filling {width} x {height} makes it "
            f"{new_width} x {new_height}"
        )
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + width, top + height)))


def cover(original: tuple[int, int], size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """What `resize_and_crop` resizes an image to, (height, width), and the crop of `size` in that, (top, left)."""
    (old_height, old_width), (height, width) = original, size
    if height * old_width >= width * old_height:
        new_height, new_width = height, int(height * old_width / old_height)
    else:
        new_height, new_width = int(width * old_height / old_width), width
    return (new_height, new_width), (round((new_height - height) / 2.0), round((new_width - width) / 2.0))


def read_image(path: str | os.PathLike, height: int, width: int) -> np.ndarray:
    """Reads an image file -> (height, width, 3) uint8; see `decode_image` and `resize_and_crop`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read as an image.
    """
    path = expand_path(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"image {path!r} does not exist")
    return resize_and_crop(decode_image(path), height, width)


def fit_image(image: np.ndarray, resolution: int | None) -> np.ndarray:
    """A data set's image at its resolution: a square of that many pixels, or as it is where that is None."""
    return image if resolution is None else resize_and_crop(image, resolution, resolution)


def _read_file(path: str | os.PathLike, name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise UnreadableRowError(f"image {name!r} has more than {MAX_FILE_BYTES} bytes; make it smaller")
            return file.read()
    except OSError as error:
        if error.errno not in ABSENT_ERRNOS:
            raise
        what = "is a folder" if error.errno == errno.EISDIR else "does not exist"
        raise UnreadableRowError(f"image {name!r} {what}") from error


def _turn_upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    """`image` turned as the file that it was `opened` from says."""
    # Not Pillow's `exif_transpose`, which also rewrites the EXIF and fails where that is damaged elsewhere.
    try:
        method = _UPRIGHT.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of many types, as from the decoders
        method = None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits, sample_format = (tags.get(tag, (default,)) for tag, default in ((_BITS, 16), (_SAMPLE_FORMAT, 1)))
    if image.mode == "F" or not _SIGNED_OR_FLOAT.isdisjoint(sample_format):
        raise ValueError("floating-point or signed pixels, whose range is not known; save it with 8 bits a channel")
    if image.mode.startswith("I"):
        if max(bits) > 16:
            raise ValueError("32-bit pixels, whose range is not known; save it with 8 or 16 bits a channel")
        # Greyscale, which Pillow may open with 32 bits; its own conversion clips all above 255 to white.
        grey = (np.asarray(image).clip(0, 2 ** bits[0] - 1) >> (bits[0] - 8)).astype(np.uint8)
        return Image.fromarray(~grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
