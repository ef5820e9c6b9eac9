"""`folder:PATH`: captions from metadata files, from text files, or none."""

import json
import logging
import os
import pickle
import re

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
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
    assert [captions for _, captions, _ in contents(dataset)] == [("",), ("one", "two"), ("brüllend",)]
    assert "1 of 3 rows" in caplog.text and "(B.png)" in caplog.text
    assert "1 of 2 caption files" in caplog.text and "b/1.txt (Windows-1252)" in caplog.text


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
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "3 of 3 rows" in caplog.text and "have no caption" in caplog.text and "name.txt" in caplog.text
    (tmp_path / "captions.json").write_text('{"9.png": "nine"}')
    open_folder(tmp_path)
    assert "fields that are there: captions.json" in caplog.text


@pytest.mark.parametrize(
    ("entries", "captions", "missing"),
    [
        ([{"text": "x"}, {"caption": "y"}], ["x", "y"], None),
        ([{"TEXT": "x"}, {"Prompt": "y"}], ["x", "y"], None),
        ([{"text": "", "title": "x"}, {"text": None, "description": ["", "y"]}], ["x", "y"], None),
        ([{"caption": float("nan"), "alt-text": "x"}, {"Alt Text": "y"}], ["x", "y"], None),
        (
            [{"text": 5, "caption": "x"}, {"text": " ", "url": "u"}],
            ["x", ""],
            r"1 of 2 .*\(1.png\).*caption, url",
        ),
        ([{"text": None, "tags": "u"}, {}], ["", ""], "2 of 2 rows .*: text, tags"),
    ],
)
def test_the_caption_column_is_chosen_for_each_row(tmp_path, caplog, entries, captions, missing):
    write_images(tmp_path, "0.png", "1.png")
    write_jsonl(tmp_path / "metadata.jsonl", *({"file_name": f"{n}.png"} | entry for n, entry in enumerate(entries)))
    dataset = open_folder(tmp_path)
    assert [dataset.captions(row)[0] for row in range(2)] == captions
    assert len(caplog.records) == (missing is not None) and re.search(missing or "", caplog.text)


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_tables(tmp_path, caplog, kind):
    write_images(tmp_path, "0.png", "1.png", "2.png")
    rows = {"file_name": [f"{row}.png" for row in range(3)], "url": [1, 2, 3], "text": [None] * 3}
    rows |= {"Prompt": ["x", None, ""], "title": [None, "é\u2028y", ""]}
    table, file = pyarrow.table(rows), tmp_path / f"metadata.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        delimiter = {"csv": ",", "tsv": "\t"}[kind]
        pyarrow.csv.write_csv(table, file, pyarrow.csv.WriteOptions(delimiter=delimiter))
    assert [captions for _, captions, _ in contents(open_folder(tmp_path))] == [("x",), ("é\u2028y",), ("",)]
    assert "1 of 3 rows" in caplog.text and "url, text, Prompt, title" in caplog.text


def test_rows_without_a_caption_in_the_metadata_have_the_one_beside_the_image(tmp_path, caplog):
    write_images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "b.txt").write_text("b beside")
    (tmp_path / "a.txt").write_text("not this one")
    write_jsonl(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "a"}, {"file_name": "b.png"})
    assert [caption for _, caption, _ in contents(open_folder(tmp_path))] == [("a",), ("b beside",)]
    assert "1 of 3 images" in caplog.text and "c.png" in caplog.text
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "note": "n"}')
    assert open_folder(tmp_path).captions(0) == ("b beside",)


@pytest.mark.parametrize(
    ("name", "content", "captions"),
    [
        ("a.txt", b"one\r\ntwo\rthree", ("one", "two", "three")),
        ("a.txt", "kept\u2028whole\x0c\x85".encode(), ("kept\u2028whole",)),
        ("a.txt", "one\nzwei ü".encode("utf-16"), ("one", "zwei ü")),
        ("a.txt", "one\nzwei ü".encode("utf-16-le"), ("one", "zwei ü")),
        ("a.txt", "\ufeffone".encode(), ("one",)),
        ("a.TXT", b"one", ("one",)),
        ("a.png.txt", b"one", ("one",)),
        ("a.caption", b"one", ("one",)),
        ("a.json", b'{"caption": "one", "url": "u"}', ("one",)),
        ("a.json", '{"TEXT": ["é", "two"]}'.encode("utf-16"), ("é", "two")),
        ("a.json", b'["one", "two"]', ("one", "two")),
    ],
)
def test_files_beside_an_image(tmp_path, name, content, captions):
    write_images(tmp_path, "a.png")
    (tmp_path / name).write_bytes(content)
    assert open_folder(tmp_path).captions(0) == captions


def test_of_several_files_beside_an_image_the_first_with_a_caption_counts(tmp_path, caplog):
    write_images(tmp_path, "a.png", "b.png", "c.png")
    for name, content in (
        ("a.txt", "txt"),
        ("a.caption", "caption"),
        ("b.txt", "\n"),
        ("b.caption", " "),
        ("b.json", '{"prompt": "json", "alt": "other"}'),
        ("c.json", "{"),
    ):
        (tmp_path / name).write_text(content)
    assert [caption for _, caption, _ in contents(open_folder(tmp_path))] == [("txt",), ("json",), ("",)]
    assert "1 of 3 rows" in caplog.text and "(c.png); fields that are there: prompt (in .json), alt" in caplog.text
    assert ", .caption, .txt" in caplog.text
    assert "damaged" in caplog.text and "c.json" in caplog.text
    named = open_folder(tmp_path, caption_key="alt")
    assert [caption for _, caption, _ in contents(named)] == [("",), ("other",), ("",)]
    with pytest.raises(ValueError, match="no column 'atl'; its columns: prompt, alt"):
        open_folder(tmp_path, caption_key="atl")


def test_folders_of_repeated_images_name_the_concept(tmp_path, caplog):
    write_images(tmp_path, "10_red hat/a.png", "10_red hat/b.png", "2020_summer/c.png", "01_x/d.png", "cats/e.png")
    (tmp_path / "10_red hat" / "b.txt").write_text("own caption")
    dataset = open_folder(tmp_path)
    captions = [dataset.captions(row)[0] for row in range(5)]  # in the order of the sorted paths
    assert captions == ["", "red hat", "own caption", "", ""]
    assert "1 of 5 images have the caption in their folder's name" in caplog.text and "3 of 5 rows" in caplog.text
    assert open_folder(tmp_path / "10_red hat").captions(0) == ("red hat",)


def test_tables_of_spreadsheets(tmp_path):
    write_images(tmp_path, "a.png")
    for content in ("file_name;text\na.png;a cat, and\n", "file_name\ttext\na.png\ta cat, and\n"):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            (tmp_path / "metadata.csv").write_text(content, encoding=encoding)
            assert open_folder(tmp_path).captions(0) == ("a cat, and",)


def test_names_in_the_metadata_are_found_in_either_unicode_form(tmp_path):
    write_images(tmp_path, "Tu\u0308r.png")
    write_jsonl(tmp_path / "metadata.jsonl", {"file_name": "T\u00fcr.png", "text": "Tu\u0308r"})
    assert contents(open_folder(tmp_path)) == [(0, ("Tu\u0308r",), 0)]


def test_results_of_ours_are_left_out(tmp_path, caplog):
    write_images(tmp_path, "a.png", "run/attribution/cat/query.png", "runs/one/query.png", "other/b.png")
    for folder, stage in (("run/inputs", "inputs"), ("runs/one", "attribution/cat")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        record = {"format": 1, "stage": stage, "settings": {}, "inputs": {}, "finished": True}
        (tmp_path / folder / "stage.json").write_text(json.dumps(record))
    (tmp_path / "other" / "stage.json").write_text('{"stage": "a theatre"}')
    assert len(open_folder(tmp_path)) == 2
    assert "2 folders" in caplog.text and "run, runs/one" in caplog.text
    with pytest.raises(ValueError, match="no image in"):
        open_folder(tmp_path / "run")


def test_linked_folders_are_read_once(tmp_path):
    write_images(tmp_path / "data", "a/1.png")
    write_images(tmp_path / "elsewhere", "2.png", "inner/3.png")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "link2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert len(open_folder(tmp_path / "data")) == 3


def test_what_is_no_readable_image_is_named(tmp_path, caplog):
    (tmp_path / "images.zip").write_bytes(b"")
    (tmp_path / "b.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image in .*\(there are: 1 .*, 1 .*\)"):
        open_folder(tmp_path)
    write_images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a")
    assert len(open_folder(tmp_path)) == 1
    assert "1 files of" in caplog.text and ".heic" in caplog.text


def test_odd_names(tmp_path, caplog):
    write_images(tmp_path, "a b\nc.PNG", "ü'\"%.Jpg", "-.png", os.fsdecode(b"\xff.png"))
    dataset = open_folder(tmp_path)
    assert len(contents(dataset)) == 4 and len(dataset.fingerprint()) == 64
    assert "\n" not in caplog.records[0].getMessage()


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
        ("metadata.jsonl", '{"file_name": "a.png", "text": "a"}\n{"file_', "metadata.jsonl, line 2: not valid JSON"),
        ("metadata.jsonl", "[1]", "line 1: expected an object"),
        ("metadata.jsonl", "[" * 100_000, "line 1: not valid JSON"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 5}', "line 1: caption is 5; expected a text or a list"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 5}', "no caption column .*caption_key"),
        ("metadata.jsonl", '{"image": "a.png"}', "no column 'file_name'"),
        ("metadata.jsonl", "\n\n", "has no entries"),
        ("metadata.csv", "", "has no entries"),
        ("metadata.csv", "file_name,text\na.png,a cat, and a dog\n", "line 2: 3 cells for 2 columns"),
        ("metadata.csv", 'file_name,text\na.png,"' + "a" * 200_000, "line 2: damaged"),
        ("metadata.csv", "image,text\na.png,b\n", r"line 1: no column 'file_name' \(columns: image, text\)"),
        ("metadata.csv", "a.png,a cat\n", r"line 1: no column 'file_name' .*expected a header such as file_name,text"),
        ("metadata.csv", "file_name,text\n", "has no entries"),
        ("metadata.csv", "PK\3\4abc\0", "holds binary data"),
        ("metadata.parquet", "PAR1", "is damaged or not a Parquet file"),
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
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a\n")
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
