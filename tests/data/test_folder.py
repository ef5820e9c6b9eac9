"""`folder:PATH`: captions from metadata files, from text files, or none."""

import json
import logging
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from attrib_jax.data.folder import open_folder
from attrib_jax.data.images import UnreadableRowError


def write_images(folder, *names, size=(6, 5)):
    """An image of one colour for each name; the colour is the position among them."""
    for position, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (position, 100, 200)).save(file)


def write_jsonl(file, *entries):
    file.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")


def contents(dataset) -> list[tuple]:
    """(red value, captions, row id) of every row."""
    rows = [dataset[index] for index in range(len(dataset))]
    assert [row.captions for row in rows] == [dataset.captions(index) for index in range(len(dataset))]
    assert [row.row_id for row in rows] == dataset.row_ids.tolist()
    return [(int(row.image[0, 0, 0]), row.captions, row.row_id) for row in rows]


def test_jsonl_rows_are_in_the_files_order(tmp_path):
    write_images(tmp_path, "a.png", "sub/b.PNG", "c.png")
    write_jsonl(
        tmp_path / "metadata.jsonl",
        {"file_name": "c.png", "text": ["eine Tür", "a door"], "extra": 1},
        {"file_name": "sub\\b.PNG", "text": "two\u2028lines"},
        {"file_name": "a.png", "text": None},
    )
    dataset = open_folder(tmp_path)
    assert contents(dataset) == [(2, ("eine Tür", "a door"), 0), (1, ("two\u2028lines",), 1), (0, ("",), 2)]
    assert dataset.row_ids.dtype == np.int32 and dataset.groups is None
    assert dataset[0].image.shape == (5, 6, 3) and dataset[0].image.dtype == np.uint8
    assert open_folder(tmp_path, resolution=4)[0].image.shape == (4, 4, 3)


def test_csv_with_bom_quotes_and_spaces_in_its_header(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    text = '\ufefffile_name, caption\r\nb.png,"a cat, and\na dog"\r\na.png,\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    assert contents(open_folder(tmp_path)) == [(1, ("a cat, and\na dog",), 0), (0, ("",), 1)]


def test_metadata_in_subfolders_is_relative_to_its_own_folder(tmp_path):
    write_images(tmp_path, "x/a.png", "y/a.png")
    write_jsonl(tmp_path / "y" / "metadata.jsonl", {"file_name": "a.png", "text": "in y"})
    write_jsonl(tmp_path / "x" / "metadata.jsonl", {"file_name": "a.png", "text": "in x"})
    assert contents(open_folder(tmp_path)) == [(0, ("in x",), 0), (1, ("in y",), 1)]


def test_the_caption_column_can_be_named(tmp_path):
    write_images(tmp_path, "a.png")
    write_jsonl(tmp_path / "metadata.jsonl", {"file_name": "a.png", "prompt": "p", "caption": "c", "captions": ["d"]})
    assert open_folder(tmp_path).captions(0) == ("c",)
    assert open_folder(tmp_path, caption_key="prompt").captions(0) == ("p",)
    with pytest.raises(ValueError, match="no column 'promt'; its columns: file_name, prompt, caption, captions"):
        open_folder(tmp_path, caption_key="promt")


def test_text_files_beside_images_and_hidden_files(tmp_path, caplog):
    write_images(tmp_path, "b/1.jpg", "a.webp", "B.png", ".hidden.png", "__MACOSX/a.png")
    (tmp_path / "a.txt").write_text("one\n\n  two \n", encoding="utf-8")
    (tmp_path / "b" / "1.txt").write_bytes("br\xfcllend".encode("latin-1"))
    (tmp_path / "notes.md").write_text("no image")
    dataset = open_folder(tmp_path)
    assert [captions for _, captions, _ in contents(dataset)] == [("",), ("one", "two"), ("br\ufffdllend",)]
    assert "1 of 3 images" in caplog.text and "B.png" in caplog.text


def test_text_files_in_capitals(tmp_path, caplog):
    write_images(tmp_path, "1.JPG", "2.jpg")
    (tmp_path / "1.TXT").write_text("one")
    (tmp_path / "2.TXT").write_text("capitals")
    (tmp_path / "2.txt").write_text("two")
    dataset = open_folder(tmp_path)
    assert [dataset.captions(row) for row in range(2)] == [("one",), ("two",)]
    assert not caplog.records


def test_plain_images_have_empty_captions_and_a_warning(tmp_path, caplog):
    write_images(tmp_path, "10.png", "9.png", "sub/1.png")
    assert contents(open_folder(tmp_path)) == [(0, ("",), 0), (1, ("",), 1), (2, ("",), 2)]
    warning = "has no captions: those of all 3 rows are empty; give them as name.txt beside name.jpg, or in metadata"
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and warning in caplog.text


def test_empty_texts_are_no_captions(tmp_path, caplog):
    write_images(tmp_path, "a.png", "b.png")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n")
    open_folder(tmp_path)
    assert "has no captions: those of all 2 rows" in caplog.text
    write_jsonl(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": None}, {"file_name": "b.png", "text": ""})
    caplog.clear()
    open_folder(tmp_path)
    assert "has no captions: those of all 2 rows" in caplog.text
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "metadata.jsonl").unlink()
    caplog.clear()
    open_folder(tmp_path)
    assert not caplog.records


def test_split_folders(tmp_path):
    write_images(tmp_path, "train/a.png", "test/b.png")
    assert contents(open_folder(tmp_path)) == [(0, ("",), 0)]
    assert contents(open_folder(tmp_path, split="test")) == [(1, ("",), 0)]
    with pytest.raises(ValueError, match=r"split is 'val'.*\(there are: test, train\)"):
        open_folder(tmp_path, split="val")
    write_images(tmp_path, "steamboat/c.png")  # now `train` is a kind of vehicle
    assert len(open_folder(tmp_path)) == 3


def test_unlike_lists_of_images_are_counted(tmp_path, caplog):
    write_images(tmp_path, *(f"{number}.png" for number in range(8)))
    entries = [{"file_name": f"{name}.png", "text": str(name)} for name in (0, 100, 7)]
    write_jsonl(tmp_path / "metadata.jsonl", *entries)
    dataset = open_folder(tmp_path)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "1 of 3 images" in caplog.text and "100.png" in caplog.text
    assert "6 of 8 images" in caplog.text and "1.png, 2.png, 3.png, 4.png, 5.png, ..." in caplog.text
    # The missing one keeps its place, so that row ids do not depend on what was copied.
    assert len(dataset) == 3 and dataset[2].captions == ("7",) and dataset.captions(1) == ("100",)
    with pytest.raises(UnreadableRowError, match="100.png' does not exist"):
        dataset[1]
    write_jsonl(tmp_path / "metadata.jsonl", entries[1])
    with pytest.raises(ValueError, match="names 1 images, and none of them exists"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "sub/../../a.png", "C:\\a.png", "..\\a.png", "", None, 3])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    write_images(tmp_path, "a.png")
    inner = tmp_path / "data"
    write_images(inner, "b.png")
    write_jsonl(inner / "metadata.jsonl", {"file_name": "b.png", "text": ""}, {"file_name": name, "text": ""})
    with pytest.raises(ValueError, match="metadata.jsonl, line 2: file name.*expected a path inside the folder"):
        open_folder(inner)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "a"}\n{"file_', "metadata.jsonl, line 2: no JSON"),
        ("metadata.jsonl", "[1]", "line 1: expected an object"),
        ("metadata.jsonl", "[" * 100_000, "line 1: no JSON"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 5}', "line 1: caption 5; expected a text or a list"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 5}', "no caption column .*caption_key"),
        ("metadata.jsonl", '{"image": "a.png"}', "no column 'file_name'"),
        ("metadata.jsonl", "\n\n", "has no entries"),
        ("metadata.csv", "", "has no entries"),
        ("metadata.csv", "file_name,text\na.png,a cat, and a dog\n", "line 2: 3 cells for 2 columns"),
        ("metadata.csv", 'file_name,text\na.png,"' + "a" * 200_000, "line 2: damaged"),
        ("metadata.csv", "image,text\na.png,b\n", "line 2: no column 'file_name'"),
    ],
)
def test_damaged_metadata_is_named_with_its_line(tmp_path, file, text, message):
    write_images(tmp_path, "a.png")
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path)


def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist; expected a folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no image in"):
        open_folder(tmp_path)
    write_images(tmp_path, "a.png")
    with pytest.raises(FileNotFoundError, match="a.png' is a file; expected a folder"):
        open_folder(tmp_path / "a.png")
    with pytest.raises(ValueError, match="caption_key is 'text'"):
        open_folder(tmp_path, caption_key="text")
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,\xff\n")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        open_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="has both"):
        open_folder(tmp_path)


def test_it_travels_to_worker_processes(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    dataset = open_folder(tmp_path)
    assert contents(pickle.loads(pickle.dumps(dataset))) == contents(dataset)


def test_fingerprint_sees_names_captions_resolution_and_images(tmp_path):
    def fingerprint(**options):
        return open_folder(tmp_path, **options).fingerprint()

    write_images(tmp_path, "a.png", "b.png")
    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    seen.append(fingerprint(resolution=4))
    (tmp_path / "a.txt").write_text("a")
    seen.append(fingerprint())
    image = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes())
    seen.append(fingerprint())
    (tmp_path / "a.png").write_bytes(image + b"\0")
    seen.append(fingerprint())
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


def test_fingerprint_does_not_depend_on_where_the_folder_lies(tmp_path):
    for place in ("x", "y"):
        write_images(tmp_path / place, "a.png", "b.png")
    assert open_folder(tmp_path / "x").fingerprint() == open_folder(tmp_path / "y").fingerprint()


@given(st.sampled_from([".jsonl", ".csv"]), st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_metadata_give_rows_or_a_message(tmp_path, suffix, content):
    write_images(tmp_path, "a.png")
    for file in tmp_path.glob("metadata.*"):
        file.unlink()
    start = b'{"file_name": "a.png", "text": "a"}\n' if suffix == ".jsonl" else b"file_name,text\na.png,a\n"
    (tmp_path / f"metadata{suffix}").write_bytes(start + content)
    try:
        dataset = open_folder(tmp_path)
    except ValueError as error:
        assert str(tmp_path) in str(error)
    else:
        assert dataset[0].captions == ("a",)
        assert all(isinstance(dataset.captions(index)[0], str) for index in range(len(dataset)))


def test_half_a_surrogate_pair_in_a_caption_counts_as_a_question_mark(tmp_path):
    """JSON can escape it, and no report could be written with it."""
    write_images(tmp_path, "a.png")
    write_jsonl(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "cut \ud83d, whole \U0001f600"})
    assert open_folder(tmp_path)[0].captions == ("cut ?, whole \U0001f600",)
