"""Decoding, resizing and cropping of images."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from attrib_jax.data.images import (
    MAX_FILE_BYTES,
    UnreadableRowError,
    decode_image,
    image_suffixes,
    read_image,
    resize_and_crop,
)


def save(image: Image.Image, form: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


PNG = save(Image.fromarray(noise(9, 7)))
JPEG = save(Image.fromarray(noise(9, 7)), "jpeg")


def test_lossless_pixels_arrive_as_they_are(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    for content in (PNG, tmp_path / "a.png", save(Image.fromarray(noise(9, 7)), "webp", lossless=True)):
        assert np.array_equal(decode_image(content), noise(9, 7))
    assert np.array_equal(read_image(tmp_path / "a.png", 4, 4), resize_and_crop(noise(9, 7), 4, 4))


@pytest.mark.parametrize("form", ["png", "jpeg", "tiff"])
def test_every_orientation_is_turned_as_pillow_does(form):
    stored = noise(6, 4)
    for orientation in range(10):  # 0 and 9 mean nothing
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = save(Image.fromarray(stored), form, exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
        assert np.array_equal(decode_image(content), expected)


@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_damaged_exif_does_not_cost_the_image(form):
    image = Image.fromarray(noise(6, 4))
    plain = decode_image(save(image, form))
    assert np.array_equal(decode_image(save(image, form, exif=b"Exif\0\0no TIFF header")), plain)
    # A resolution that is a text: the orientation before it can be read, and the whole cannot be written anew.
    entries = struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHL4s", 0x011A, 2, 4, b"abc")
    half = b"Exif\0\0" + struct.pack("<2sHLH", b"II", 42, 8, 2) + entries + bytes(4)
    assert np.array_equal(decode_image(save(image, form, exif=half)), np.rot90(plain, -1))


def test_transparency_is_laid_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    # 0 * 128 / 255 + 255 * 127 / 255 = 127
    assert decode_image(save(Image.fromarray(rgba))).tolist() == [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    assert decode_image(save(palette)).tolist() == [[[200, 0, 0], [0, 0, 200]]]
    assert decode_image(save(palette, transparency=1)).tolist() == [[[200, 0, 0], [255, 255, 255]]]


SHORTS = np.array([[0, 255, 256, 0x7FFF, 0xFFFF]], np.uint16)
CYAN = Image.new("CMYK", (8, 8), (255, 0, 0, 0))


@pytest.mark.parametrize(
    ("content", "expected", "tolerance"),
    [
        (save(Image.fromarray(noise(3, 5)[..., 0])), noise(3, 5)[..., :1], 0),
        (save(Image.new("1", (2, 2), 1)), np.full((2, 2, 1), 255), 0),
        (save(CYAN, "jpeg", quality=100), np.full((8, 8, 3), [0, 255, 255]), 2),
        (save(Image.fromarray(SHORTS)), SHORTS[..., None] >> 8, 0),  # of sixteen bits the upper eight
        (save(Image.fromarray(SHORTS), "tiff"), SHORTS[..., None] >> 8, 0),
    ],
)
def test_other_kinds_of_pixels_become_rgb(content, expected, tolerance):
    image = decode_image(content)
    assert image.shape == (*expected.shape[:2], 3) and np.abs(image.astype(int) - expected).max() <= tolerance


def tiff(values: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1, orientation: int = 1) -> bytes:
    """One row of grey values as an uncompressed TIFF; of 12 bits, two values share three bytes."""
    data = values.tobytes()
    if bits == 12:
        data = b"".join(int(a << 12 | b).to_bytes(3, "big") for a, b in values.reshape(-1, 2).tolist())
    entries = [(256, values.size), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 0), (274, orientation)]
    entries += [(277, 1), (278, 1), (279, len(data)), (339, sample_format)]
    start = 8 + 2 + 12 * len(entries) + 4
    fields = [struct.pack("<HHLL", tag, 4, 1, start if tag == 273 else value) for tag, value in entries]
    return b"II*\0" + struct.pack("<LH", 8, len(entries)) + b"".join(fields) + bytes(4) + data


GREYS = np.array([0, 1000, 2047, 4095])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff(GREYS, 12), [0, 62, 127, 255]),
        (tiff((GREYS * 16).astype("<u2"), 16), [0, 62, 127, 255]),
        (tiff((GREYS * 16).astype("<u2"), 16, photometric=0), [255, 193, 128, 0]),
        (tiff((GREYS // 16).astype(np.uint8), 8, photometric=0), [255, 193, 128, 0]),
        (b"P5 4 1 1000\n" + np.array([0, 250, 500, 1000], ">u2").tobytes(), [0, 64, 128, 255]),
        (b"P5 4 1 100\n" + bytes([0, 25, 50, 100]), [0, 64, 128, 255]),
    ],
)
def test_grey_values_are_scaled_by_their_bits(content, expected):
    assert decode_image(content)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("dtype", "sample_format", "reason"),
    [
        ("<u4", 1, "32-bit pixels"),
        ("<i4", 2, "signed"),
        ("<i2", 2, "signed"),
        ("i1", 2, "signed"),
        ("<f4", 3, "floating-point"),
        ("<f2", 3, "no known format"),
        ("<u8", 1, "no known format"),
    ],
)
def test_grey_values_without_a_range_are_refused(dtype, sample_format, reason, orientation):
    values = GREYS.astype(dtype)
    with pytest.raises(UnreadableRowError, match=reason):
        decode_image(tiff(values, 8 * values.itemsize, sample_format=sample_format, orientation=orientation))


@pytest.mark.parametrize("form", ["gif", "webp", "png", "tiff", "avif"])
def test_of_an_animation_the_first_frame_is_read(form):
    Image.init()
    if form.upper() not in Image.SAVE_ALL:
        pytest.skip(f"Pillow was built without {form}")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    first = decode_image(save(frames[0], form, save_all=True, append_images=frames[1:]))
    assert np.abs(first.astype(int) - [200, 0, 0]).max() <= 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no known format"),
        (b"<html>not found</html>", "no known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known format"),  # would start Ghostscript
        (PNG[:60], "truncated"),
        (JPEG[: len(JPEG) // 2], "Truncated"),
        (PNG[:60] + bytes(20) + PNG[80:], "broken|checksum|CRC"),
        (save(Image.fromarray(np.zeros((2, 2), np.float32)), "tiff"), "floating-point"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, content, reason):
    with pytest.raises(UnreadableRowError, match=f"'cat.png' .*({reason})"):
        decode_image(content, "cat.png")
    (tmp_path / "c.png").write_bytes(content)
    with pytest.raises(ValueError, match="c.png'"):
        read_image(tmp_path / "c.png", 4, 4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("absent.png", "not exist"), ("c" * 500, "not exist"), ("", "folder"), ("huge.png", "more than")],
)
def test_a_missing_file_a_folder_and_a_huge_file(tmp_path, name, reason):
    with open(tmp_path / "huge.png", "wb") as file:
        file.write(PNG)
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UnreadableRowError, match=reason):
        decode_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="b.png'"):
        read_image(tmp_path / "b.png", 4, 4)


def test_a_bomb_is_refused_before_it_is_unpacked():
    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    for side in (11_000, 60_000):  # where Pillow itself warns, and where it refuses
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
        with warnings.catch_warnings(), pytest.raises(UnreadableRowError, match="pixels"):
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            decode_image(bomb)


@given(st.integers(0, len(PNG) + len(JPEG) - 1), st.integers(0, 255), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_damaged_bytes_give_an_image_or_a_reason(position, value, cut):
    for content in (PNG, JPEG):
        at = position % len(content)
        damaged = content[:at] + bytes([value]) + content[at + 1 : len(content) - cut]
        try:
            image = decode_image(damaged, "a")
        except UnreadableRowError as error:
            assert "image 'a' cannot be read" in str(error)
        else:
            assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8


# (height, width) of the image; of the target; after resizing as torchvision's rule gives it; top and left of the crop
SIZES = [
    ((480, 640), (128, 128), (128, 170), (0, 21)),  # 128 * 640 / 480 = 170.67; 42 / 2
    ((640, 427), (128, 128), (191, 128), (32, 0)),  # 128 * 640 / 427 = 191.85; 63 / 2 = 31.5 is rounded to the even 32
    ((100, 133), (100, 100), (100, 133), (0, 16)),  # 33 / 2 = 16.5 is rounded to the even 16
    ((427, 640), (512, 512), (512, 767), (0, 128)),  # 512 * 640 / 427 = 767.4; 255 / 2 = 127.5 is rounded to 128
    ((50, 50), (64, 64), (64, 64), (0, 0)),
    ((100, 200), (50, 80), (50, 100), (0, 10)),
    ((200, 100), (50, 80), (160, 80), (55, 0)),
]


@pytest.mark.parametrize(("size", "target", "resized", "corner"), SIZES)
def test_resize_and_crop_follow_torchvisions_rule(size, target, resized, corner):
    image = noise(*size)
    whole = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.Resampling.BILINEAR))
    expected = whole[corner[0] : corner[0] + target[0], corner[1] : corner[1] + target[1]]
    assert expected.shape == (*target, 3)
    assert np.array_equal(resize_and_crop(image, *target), expected)
    assert resize_and_crop(expected, *target) is expected


def test_the_filter_is_antialiased():
    # Halving with Pillow's triangle filter, whose support grows to 2 old pixels: inside the image a new pixel has
    # weights 1, 3, 3, 1 over 8, at its left edge 3, 3, 1 over 7; 80 / 7 = 11.4. Plain interpolation has 1, 1 over 2.
    row = np.array([0, 0, 80, 0, 0, 0, 0, 0], np.uint8)
    image = np.repeat(np.repeat(row[None, :, None], 8, 0), 3, -1)
    assert resize_and_crop(image, 4, 4)[2, :, 0].tolist() == [11, 30, 0, 0]


def test_an_image_that_would_become_huge_is_refused():
    with pytest.raises(UnreadableRowError, match="too narrow"):
        resize_and_crop(np.zeros((1, 200_000, 3), np.uint8), 512, 512)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 80), st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_every_size_is_filled(old_height, old_width, height, width):
    image = np.full((old_height, old_width, 3), 200, np.uint8)
    assert np.array_equal(resize_and_crop(image, height, width), np.full((height, width, 3), 200, np.uint8))


def test_suffixes_are_those_of_readable_formats():
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif"} <= image_suffixes()
    assert not {".eps", ".pdf", ".ps", ".wmf", ".h5", ".mpg"} & image_suffixes()
