"""`webdataset:PATH` and the index of tar archives beneath it; tarfile writes the archives and is the reference."""

import io
import json
import re
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attrib_jax.data.images import UnreadableRowError
from attrib_jax.data.tar_index import index_tar
from attrib_jax.data.webdataset import WebDataset
from tests.data.rows import captions_or_message, contents, png


def write_tar(path, members: dict[str, bytes], form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write_shard(path, *numbers: int):
    """As img2dataset writes it: key.jpg, key.json, key.txt; the image's red value is the key's number."""
    members = {}
    for number in numbers:
        members[f"{number:09}.jpg"] = png(number)
        members[f"{number:09}.json"] = json.dumps({"caption": f"json {number}", "url": "x"}).encode()
        members[f"{number:09}.txt"] = f"caption {number}".encode()
    return write_tar(path, members)


@pytest.fixture
def shards(tmp_path):
    write_shard(tmp_path / "00001.tar", 20, 21)
    write_shard(tmp_path / "00000.tar", 10, 11, 12)
    (tmp_path / "00000.parquet").write_bytes(b"img2dataset writes this beside each shard")
    return tmp_path


EXPECTED = [(number, f"caption {number}") for number in (10, 11, 12, 20, 21)]


@pytest.mark.parametrize("pattern", ["", "{00000..00001}.tar", "0000{1,0}.tar", "*.tar", "0000?.tar"])
def test_rows_run_through_the_sorted_shards(shards, pattern):
    assert contents(WebDataset(shards / pattern)) == EXPECTED
    assert contents(WebDataset(shards / "00001.tar")) == EXPECTED[3:]
    assert WebDataset(shards, resolution=4)[0].image.shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("place", "error", "named"),
    [
        ("{00000..00012}.tar", FileNotFoundError, "00002.tar'"),
        ("nowhere", FileNotFoundError, "nowhere'"),
        ("empty", FileNotFoundError, "no .tar file"),
        ("deeper", FileNotFoundError, "0.tar.gz .*part/1.tar"),
        ("zipped", ValueError, "no image in 1 shards; .*a.tar.*not an uncompressed tar"),
    ],
)
def test_places_without_shards(shards, place, error, named):
    for file in ("empty/a.txt", "deeper/0.tar.gz", "deeper/part/1.tar", "zipped/a.tar"):
        (shards / file).parent.mkdir(parents=True, exist_ok=True)
        (shards / file).write_bytes(b"\x1f\x8b compressed" * 100)
    with pytest.raises(error, match=named):
        WebDataset(shards / place)


# Members of a row beside its image -> its captions.
CAPTIONS = [
    ({}, ("",)),
    ({"json": b'{"caption": "from json"}'}, ("from json",)),
    ({"json": b'{"TEXT": "a", "URL": "u"}'}, ("a",)),
    ({"json": b'{"caption": null, "Alt": "a"}'}, ("a",)),
    ({"json": b'{"caption": ["one", "two"], "alt": "other"}'}, ("one", "two")),
    ({"json": '{"text": "é"}'.encode("utf-16")}, ("é",)),
    ({"json": b'{"caption": '}, ("",)),
    ({"json": b'{"caption": 5}'}, ("",)),
    ({"caption": b"a\n"}, ("a",)),
    ({"txt": b"\xef\xbb\xbfa", "caption": b"b", "json": b'{"caption": "c"}'}, ("a",)),
    ({"txt": b"", "caption": b" ", "json": b'{"caption": "c"}', "cls": b"d"}, ("c",)),
    ({"TXT": b"br\xfcllend \n"}, ("brüllend",)),
    ({"txt": "zwei ü".encode("utf-16-le")}, ("zwei ü",)),
    ({"txt": "one\u2028caption\nof two lines".encode()}, ("one\u2028caption\nof two lines",)),
    ({"cls": b"cat"}, ("cat",)),
    ({"prompt": b"a"}, ("a",)),
    ({"cls": b"7"}, ("",)),
    ({"txt": b"a cat\0\0"}, ("a cat",)),
    ({"txt": png(0)}, ("",)),
]


def write_captions(path, rows):
    members = {}
    for row, files in enumerate(rows):
        members[f"{row:02}.png"] = png(row)
        members |= {f"{row:02}.{ending}": content for ending, content in files.items()}
    return write_tar(path, members)


def test_where_captions_come_from(tmp_path, caplog):
    write_captions(tmp_path / "a.tar", [files for files, _ in CAPTIONS])
    assert contents(WebDataset(tmp_path)) == [(row, *captions) for row, (_, captions) in enumerate(CAPTIONS)]
    assert "5 of 19 rows" in caplog.text and "(00, 06, 07, 16, 18)" in caplog.text
    assert "caption (in .json), TEXT (in .json), URL (in .json)" in caplog.text and ".cls" in caplog.text
    assert "3 of 20 caption files" in caplog.text and "11.txt in" in caplog.text and "(Windows-1252)" in caplog.text
    assert "are damaged" in caplog.text and "06.json in" in caplog.text and "18.txt in" in caplog.text
    named = WebDataset(tmp_path, caption_key="alt")
    assert [row for row in range(len(named)) if named.captions(row) != ("",)] == [3, 4]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([{"json": b'{"url": "u"}'}, {}], r"2 of 2 rows .*\(00, 01\).*: url \(in .json\)"),
        ([{"txt": b"a"}, {"txt": b""}, {}], r"2 of 3 rows .*\(01, 02\).*: .txt"),
        ([{"cls": b"3"}], "1 of 1 rows .*: .cls"),
        ([{"comment": b"a cat"}], "1 of 1 rows .*: .comment"),
    ],
)
def test_rows_without_a_caption_are_counted(tmp_path, caplog, files, said):
    write_captions(tmp_path / "a.tar", files)
    WebDataset(tmp_path).fingerprint()
    assert len(caplog.records) == 1 and re.search(said, caplog.text)


def test_a_caption_key_that_no_row_has_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": png(1), "a.txt": b"a", "b.png": png(2), "b.json": b"{"})
    with pytest.raises(ValueError, match="a.tar: .*'captoin'.* none"):
        WebDataset(tmp_path / "a.tar", caption_key="captoin")
    write_tar(tmp_path / "b.tar", {"c.png": png(3), "c.json": b'{"caption": "c", "alt": null}'})
    with pytest.raises(ValueError, match="'captoin'.* caption, alt. .*caption_key"):
        WebDataset(tmp_path, caption_key="captoin")
    assert WebDataset(tmp_path, caption_key="alt").captions(2) == ("",)


def test_names_without_an_image_of_their_own_are_counted(tmp_path, caplog):
    members = {"x/a.seg.png": png(9), "x/a.jpg": png(1), "x/a.png": png(2), "y/a.jpg": png(3), "lonely.txt": b"?"}
    write_tar(tmp_path / "a.tar", members)
    assert contents(WebDataset(tmp_path)) == [(1, ""), (3, "")]
    assert "3 of 5 names" in caplog.text and "x/a.png" in caplog.text and "lonely" in caplog.text
    assert contents(WebDataset(tmp_path, image_key="seg.png")) == [(9, "")]
    # An ending begins at a name's first dot.
    dotted = {"b.v2.jpg": png(2), "b.v2.txt": b"b", "x.y/St. Ives.JPG": png(3), "._a.jpg": b"", "c.jpg.part": b""}
    write_tar(tmp_path / "a.tar", dotted)
    with pytest.raises(ValueError, match="1 shards; .*a.tar: b.v2.jpg: .*image_key"):
        WebDataset(tmp_path)
    write_tar(tmp_path / "a.tar", {"x.y/a.jpg": png(1)} | dotted)
    assert contents(WebDataset(tmp_path)) == [(1, "")]
    assert "2 of 3 names" in caplog.text and "a.tar: b.v2.jpg" in caplog.text and "a.tar: x.y/St. Ives" in caplog.text


def test_a_broken_image_is_a_row_that_cannot_be_read(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": png(1), "b.png": png(2)[:50], "b.txt": b"b", "c.png": b""})
    dataset = WebDataset(tmp_path)
    assert dataset[0].captions == ("",) and dataset.captions(1) == ("b",)
    for row, name in ((1, "b"), (2, "c")):
        with pytest.raises(UnreadableRowError, match=f"{name} in .*a.tar'"):
            dataset[row]
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UnreadableRowError, match="shorter than when it was opened"):
        dataset[0]


def test_a_truncated_shard_keeps_the_rows_before_the_cut(shards, caplog):
    whole = (shards / "00000.tar").read_bytes()
    second = whole.index(b"000000011.json")
    # Row 11 has its image, and has lost its captions, half of its first caption's file, or a header.
    for content in (whole[:second], whole[: second + 700], whole[:second] + b"?" * 512 + whole[second + 512 :]):
        (shards / "00000.tar").write_bytes(content)
        assert contents(WebDataset(shards)) == [EXPECTED[0], *EXPECTED[3:]]
    assert "1 of 2 shards" in caplog.text and "00000.tar" in caplog.text and "without the mark" in caplog.text
    assert "there is no header at byte" in caplog.text
    # A shard's only row is known to be cut by what rows of the other shards have.
    only = write_shard(shards / "00000.tar", 5).read_bytes()
    for member in (b"000000005.json", b"000000005.txt"):
        (shards / "00000.tar").write_bytes(only[: only.index(member)])
        assert contents(WebDataset(shards)) == EXPECTED[3:]


def test_fingerprint_sees_images_captions_and_keys(tmp_path):
    seen = set()
    original = {"a.png": png(1), "a.txt": b"a", "b.png": png(2)}
    for change in ({}, {"a.png": png(3)}, {"a.txt": b"x"}, {"b.png": b"", "c.png": png(2)}):
        write_tar(tmp_path / "a.tar", {name: content for name, content in (original | change).items() if content})
        seen.add(WebDataset(tmp_path).fingerprint())
        assert WebDataset(tmp_path).fingerprint() in seen
    seen.add(WebDataset(tmp_path, resolution=4).fingerprint())
    assert len(seen) == 5


NAMES = ["a.jpg", "d" * 90 + "/" + "é" * 60 + ".png", "x" * 180 + ".txt", "folder/ü.json"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_agrees_with_tarfile(tmp_path, form):
    names = NAMES[:1] + ["p" * 80 + "/" + "q" * 80] if form == tarfile.USTAR_FORMAT else NAMES
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            entry = tarfile.TarInfo(f"kind{kind.decode()}.jpg")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        for length, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.size = length * 511
            if form == tarfile.PAX_FORMAT:
                entry.pax_headers = {"size": str(entry.size)}
            archive.addfile(entry, io.BytesIO(bytes(entry.size)))
    with tarfile.open(path) as archive:
        expected = [(entry.name, entry.offset_data, entry.size) for entry in archive if entry.isreg()]
    index = index_tar(path)
    assert index.damage is None
    assert [(name, part.offset, part.size) for name, part in index.members] == expected
    assert [name for name, _, _ in expected] == names


@pytest.mark.parametrize("size", [b"\x80" + b"\xff" * 11, b"77777777777\0", b"\xff" * 12, b"0000000zz00\0"])
def test_an_absurd_size_is_damage(tmp_path, size):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"a", "b.jpg": b"b"})
    content = bytearray(path.read_bytes())
    header = content[1024:1536]
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[1024:1536] = header
    path.write_bytes(content)
    index = index_tar(path)
    assert [name for name, _ in index.members] == ["a.jpg"] and index.damage is not None


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=20), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_leaves_parts_within_the_file(tmp_path, position, noise, fix_sum):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": png(1), NAMES[1]: b"b" * 600, "c.txt": b"c"})
    content = bytearray(path.read_bytes())
    position %= len(content)
    content[position : position + len(noise)] = noise
    if fix_sum:  # so that the damage gets past the check
        start = position // 512 * 512
        content[start + 148 : start + 156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path.write_bytes(content)
    index = index_tar(path)
    assert index.damage is None or isinstance(index.damage, str)
    assert all(0 <= part.offset and part.offset + part.size <= len(content) for _, part in index.members)
    captions = captions_or_message(WebDataset, path)
    assert not isinstance(captions, str) or "no image" in captions
