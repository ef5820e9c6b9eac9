"""Decoding of texts that other programs wrote, and paths as people write them."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attrib_jax.core.checks import expand_path
from attrib_jax.core.text import BINARY, decode_text, read_text, split_lines

MARKED = ["utf-8-sig", "utf-16", "utf-32"]
TEXTS = ["a cat", "brüllend", "naïve café 🎉", "红苹果\n一只猫", "two\u2028lines", "e\u0301 is not \u00e9"]


@pytest.mark.parametrize("text", TEXTS)
def test_marked_texts_are_decoded_without_a_guess_and_wide_ones_recognized(text):
    for encoding in ["utf-8", *MARKED]:
        assert decode_text(text.encode(encoding)) == (text, None)
    for encoding, mark in (("utf-16-be", b"\xfe\xff"), ("utf-32-be", b"\0\0\xfe\xff")):
        assert decode_text(mark + text.encode(encoding)) == (text, None)
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        assert decode_text(text.encode(encoding)) == (text, f"{encoding} without a mark")


@pytest.mark.parametrize(
    ("content", "text", "guess"),
    [
        (b"br\xfcllend", "brüllend", "Windows-1252"),
        (b"\x93quoted\x94 \x80", "“quoted” €", "Windows-1252"),
        (b"br\xfcllend \x81", "brüllend \x81", "Latin-1"),
        ("naïve caf".encode() + b"\xc3", "naïve caf\ufffd", "damaged utf-8"),
        (b"\xff\xfea\0b", "a\ufffd", "damaged utf-16-le"),
        (b"a cat\0", "a cat", BINARY),
        (b"\0" * 8, "", BINARY),
        (b"", "", None),
    ],
)
def test_other_texts_are_guessed(content, text, guess):
    assert decode_text(content) == (text, guess)


@given(st.text(min_size=1), st.sampled_from(["utf-8", *MARKED]), st.integers(1, 200))
def test_a_beginning_that_ends_within_a_character_loses_that_character_alone(text, encoding, size):
    text = text.replace("\0", "").replace("\ufffd", "").lstrip("\ufeff").encode("utf-8", "replace").decode()
    content = text.encode(encoding)
    if len(content) > size > 4:
        decoded = decode_text(content[:size], cut=True)
        assert text.startswith(decoded.text) and decoded.guess is None


@given(st.binary())
def test_any_bytes_give_a_text(content):
    assert isinstance(decode_text(content).text, str)


def test_read_text_warns_of_a_guess_and_refuses_binary_data(tmp_path, caplog):
    file = tmp_path / "a.txt"
    file.write_text("é", encoding="utf-16")
    assert read_text(file) == "é" and not caplog.records
    file.write_bytes(b"\xe9")
    assert read_text(file) == "é" and f"{file} is not UTF-8 and was read as Windows-1252" in caplog.text
    file.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(ValueError, match="a.txt holds binary data; expected a text in UTF-8"):
        read_text(file)


def test_only_line_ends_split_lines():
    kept = "a\u2028b\u2029c\x0cd\x85e\x0bf\x1cg"
    assert split_lines(f"{kept}\nx\r\ny\rz\n") == [kept, "x", "y", "z", ""]


@pytest.mark.parametrize("path", ["", "a\0b", "~nobody-of-this-name/x"])
def test_home_folders_are_expanded_and_paths_that_name_nothing_refused(monkeypatch, tmp_path, path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_path("~/x y") == str(tmp_path / "x y") and expand_path("~") == str(tmp_path)
    for unchanged in ("a/~/b", "/a~", "./~x", tmp_path):
        assert expand_path(unchanged) == os.fspath(unchanged)
    with pytest.raises(ValueError, match="path is"):
        expand_path(path)
