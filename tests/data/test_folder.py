"""`folder:PATH`: captions from metadata files, from text files, or none."""

import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attrib_jax.data.folder import open_folder
from attrib_jax.data.images import UnreadableRowError
from tests.data.rows import captions_or_message, contents, png


def write(folder, images: str = "", files: dict = {}):  # noqa: B006
    """An image for each name in `images`, whose red value is its position, and `files` with their contents."""
    for position, name in enumerate(images.split(", ") if images else ()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(position))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def jsonl(*entries) -> str:
    return "\n".join(json.dumps(entry) for entry in entries)


def table(*entries) -> dict:
    """Entries of the images 0.png, 1.png ... as a metadata file."""
    return {"metadata.jsonl": jsonl(*({"file_name": f"{row}.png"} | entry for row, entry in enumerate(entries)))}


# Images; files; rows as (position of the image, captions); what is warned of, in this order.
FOLDERS = {
    "jsonl_in_its_order": (
        "a.png, sub/b.PNG, c.png",
        {
            "metadata.jsonl": jsonl(
                {"file_name": "c.png", "text": ["eine Tür", "a door"], "extra": 1},
                {"file_name": "sub\\b.PNG", "text": "two\u2028lines"},
                {"file_name": "a.png", "text": None},
            )
        },
        [(2, "eine Tür", "a door"), (1, "two\u2028lines"), (0, "")],
        ["1 of 3 rows"],
    ),
    "csv_with_mark_and_spaces": (
        "a.png, b.png",
        {"metadata.csv": '\ufefffile_name, caption\r\nb.png,"a cat, and\na dog"\r\na.png,\r\n'},
        [(1, "a cat, and\na dog"), (0, "")],
        ["1 of 2 rows"],
    ),
    "metadata_of_subfolders": (
        "x/a.png, y/a.png",
        {f"{name}/metadata.jsonl": jsonl({"file_name": "a.png", "text": f"in {name}"}) for name in "yx"},
        [(0, "in x"), (1, "in y")],
        [],
    ),
    "text_files_and_hidden_files": (
        "b/1.jpg, a.webp, B.png, .hidden.png, __MACOSX/a.png",
        {"a.txt": "one\n\n  two \n", "b/1.txt": b"br\xfcllend", "notes.md": "no image"},
        [(2, ""), (1, "one", "two"), (0, "brüllend")],
        [r"1 of 3 rows .*\(B.png\)", r"1 of 2 caption files .*b/1.txt \(Windows-1252\)"],
    ),
    "capitals": (
        "1.JPG, 2.jpg",
        {"1.TXT": "one", "2.TXT": "capitals", "2.txt": "two"},
        [(0, "one"), (1, "two")],
        [],
    ),
    "no_captions": (
        "10.png, 9.png, sub/1.png",
        {"captions.json": '{"9.png": "nine"}'},
        [(0, ""), (1, ""), (2, "")],
        ["3 of 3 rows .*captions.json.*name.txt"],
    ),
    "a_column_for_each_row": (
        ", ".join(f"{row}.png" for row in range(8)),
        table(
            *({"text": "x"}, {"caption": "x"}, {"TEXT": "x"}, {"Prompt": "x"}, {"text": "", "title": "x"}),
            *({"text": None, "description": ["", "x"]}, {"caption": float("nan"), "alt-text": "x"}, {"Alt Text": "x"}),
        ),
        [(row, "x") for row in range(8)],
        [],
    ),
    "a_column_of_numbers": (
        "0.png, 1.png",
        table({"text": 5, "caption": "x"}, {"text": " ", "url": "u"}),
        [(0, "x"), (1, "")],
        [r"1 of 2 .*\(1.png\).*caption, url"],
    ),
    "no_column": (
        "0.png, 1.png",
        table({"text": None, "tags": "u"}, {}),
        [(0, ""), (1, "")],
        ["2 of 2 rows .*: text, tags"],
    ),
    "one_without_an_entry": (
        "a.png, b.png, c.png",
        {
            "a.txt": "not this one",
            "b.txt": "b beside",
            "metadata.jsonl": jsonl({"file_name": "a.png", "text": "a"}, {"file_name": "b.png"}),
        },
        [(0, "a"), (1, "b beside")],
        ["1 of 3 images .*c.png"],
    ),
    "entries_without_a_caption": (
        "b.png",
        {"b.txt": "beside", "metadata.jsonl": '{"file_name": "b.png", "note": "n"}'},
        [(0, "beside")],
        [],
    ),
    "the_first_file_with_a_caption": (
        "a.png, b.png, c.png",
        {"a.txt": "txt", "a.caption": "no", "b.txt": "\n", "b.caption": " "}
        | {"b.json": '{"prompt": "json", "alt": "other"}', "c.json": "{"},
        [(0, "txt"), (1, "json"), (2, "")],
        [r"1 of 3 rows .*\(c.png\); .*: prompt \(in .json\), alt.*, .caption, .txt", "damaged.*c.json"],
    ),
    "concepts_of_repeated_images": (
        "01_x/d.png, 10_red hat/a.png, 10_red hat/b.png, 2020_summer/c.png, cats/e.png",
        {"10_red hat/b.txt": "own caption"},
        [(0, ""), (1, "red hat"), (2, "own caption"), (3, ""), (4, "")],
        ["1 of 5 images .*folder", "3 of 5 rows"],
    ),
    "either_unicode_form": (
        "Tu\u0308r.png",
        {"metadata.jsonl": jsonl({"file_name": "T\u00fcr.png", "text": "Tu\u0308r"})},
        [(0, "Tu\u0308r")],
        [],
    ),
    "half_a_surrogate_pair": ("0.png", table({"text": "cut \ud83d, \U0001f600"}), [(0, "cut ?, \U0001f600")], []),
    "an_unknown_format": ("a.png", {"a.txt": "a", "b.heic": ""}, [(0, "a")], ["1 files .*.heic"]),
}


@pytest.mark.parametrize(("images", "files", "rows", "said"), FOLDERS.values(), ids=FOLDERS)
def test_rows_captions_and_what_is_warned_of(tmp_path, caplog, images, files, rows, said):
    write(tmp_path, images, files)
    dataset = open_folder(tmp_path)
    assert contents(dataset) == rows and dataset.groups is None
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(said), messages
    for pattern in said:
        assert any(re.search(pattern, message) for message in messages), messages


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_tables(tmp_path, caplog, kind):
    write(tmp_path, "0.png, 1.png, 2.png")
    rows = {"file_name": [f"{row}.png" for row in range(3)], "url": [1, 2, 3], "text": [None] * 3}
    rows |= {"Prompt": ["x", None, ""], "title": [None, "é\u2028y", ""]}
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "metadata.parquet")
    else:
        lines = [rows, *([cell or "" for cell in line] for line in zip(*rows.values()))]
        separator = {"csv": ",", "tsv": "\t"}[kind]
        write(tmp_path, files={f"metadata.{kind}": "\n".join(separator.join(map(str, line)) for line in lines)})
    assert contents(open_folder(tmp_path)) == [(0, "x"), (1, "é\u2028y"), (2, "")]
    assert "1 of 3 rows" in caplog.text and "url, text, Prompt, title" in caplog.text


SEMICOLONS, TABS = "file_name;text\na.png;a cat, and\n", "file_name\ttext\na.png\ta cat, and\n"


@pytest.mark.parametrize(
    ("name", "content", "captions"),
    [
        ("a.txt", b"one\r\ntwo\rthree", ("one", "two", "three")),
        ("a.txt", "kept\u2028whole\x0c\x85", ("kept\u2028whole",)),
        ("a.txt", "one\nzwei ü".encode("utf-16"), ("one", "zwei ü")),
        ("a.txt", "one\nzwei ü".encode("utf-16-le"), ("one", "zwei ü")),
        ("a.txt", "\ufeffone", ("one",)),
        ("a.TXT", "one", ("one",)),
        ("a.png.txt", "one", ("one",)),
        ("a.caption", "one", ("one",)),
        ("a.json", '{"caption": "one", "url": "u"}', ("one",)),
        ("a.json", '{"TEXT": ["é", "two"]}'.encode("utf-16"), ("é", "two")),
        ("a.json", '["one", "two"]', ("one", "two")),
        *(
            ("metadata.csv", sheet.encode(encoding), ("a cat, and",))
            for sheet in (SEMICOLONS, TABS)
            for encoding in ("utf-8", "utf-8-sig", "utf-16")
        ),
    ],
)
def test_a_caption_in_many_forms(tmp_path, name, content, captions):
    write(tmp_path / "10_red hat", "a.png", {name: content})
    assert open_folder(tmp_path / "10_red hat").captions(0) == captions
    (tmp_path / "10_red hat" / name).unlink()
    assert open_folder(tmp_path / "10_red hat").captions(0) == ("red hat",)


def test_the_caption_column_can_be_named(tmp_path):
    write(tmp_path, "0.png", table({"prompt": "p", "caption": "c", "captions": ["d"]}))
    assert open_folder(tmp_path).captions(0) == ("c",)
    assert open_folder(tmp_path, caption_key="prompt").captions(0) == ("p",)
    write(tmp_path / "beside", "b.png", {"b.json": '{"prompt": "json", "alt": "other"}'})
    assert open_folder(tmp_path / "beside", caption_key="alt").captions(0) == ("other",)
    for place, columns in ((tmp_path, "file_name, prompt, caption, captions"), (tmp_path / "beside", "prompt, alt")):
        with pytest.raises(ValueError, match=f"'promt'.*{columns}"):
            open_folder(place, caption_key="promt")


def test_results_of_ours_are_left_out(tmp_path, caplog):
    write(tmp_path, "a.png, run/attribution/cat/query.png, runs/one/query.png, other/b.png")
    for folder, stage in (("run/inputs", "inputs"), ("runs/one", "attribution/cat")):
        record = {"format": 1, "stage": stage, "settings": {}, "inputs": {}, "finished": True}
        write(tmp_path, files={f"{folder}/stage.json": json.dumps(record)})
    write(tmp_path, files={"other/stage.json": '{"stage": "a theatre"}'})
    assert len(open_folder(tmp_path)) == 2
    assert "2 folders" in caplog.text and "run, runs/one" in caplog.text
    with pytest.raises(ValueError, match="no image"):
        open_folder(tmp_path / "run")


def test_linked_folders_are_read_once(tmp_path):
    write(tmp_path, "data/a/1.png, elsewhere/2.png, elsewhere/inner/3.png")
    links = {"data/circle": "data", "data/up": "", "data/again": "data/a", "elsewhere/back": "data"}
    for link, target in (links | {"data/link": "elsewhere", "data/link2": "elsewhere"}).items():
        (tmp_path / link).symlink_to(tmp_path / target)
    assert len(open_folder(tmp_path / "data")) == 3


def test_odd_names(tmp_path, caplog):
    write(tmp_path, "a b\nc.PNG, ü'\"%.Jpg, -.png, " + os.fsdecode(b"\xff.png"))
    assert len(contents(open_folder(tmp_path))) == 4
    assert "\n" not in caplog.records[0].getMessage()


def test_split_folders(tmp_path):
    write(tmp_path, "train/a.png, test/b.png")
    assert contents(open_folder(tmp_path)) == [(0, "")]
    assert contents(open_folder(tmp_path, split="test")) == [(1, "")]
    with pytest.raises(ValueError, match=r"split is 'val'.*test, train"):
        open_folder(tmp_path, split="val")
    write(tmp_path, "steamboat/c.png")  # now `train` is a kind of vehicle
    assert len(open_folder(tmp_path)) == 3


def test_an_absent_image_keeps_its_row_and_unlike_lists_are_counted(tmp_path, caplog):
    """So that row ids do not depend on what was copied."""
    write(tmp_path, ", ".join(f"{number}.png" for number in range(8)))
    entries = [{"file_name": f"{name}.png", "text": str(name)} for name in (0, 100, 7)]
    write(tmp_path, files={"metadata.jsonl": jsonl(*entries)})
    dataset = open_folder(tmp_path)
    assert "1 of 3 images" in caplog.text and "100.png" in caplog.text
    assert "6 of 8 images" in caplog.text and "1.png, 2.png, 3.png, 4.png, 5.png, ..." in caplog.text
    assert len(dataset) == 3 and dataset[2].captions == ("7",) and dataset.captions(1) == ("100",)
    with pytest.raises(UnreadableRowError, match="100.png"):
        dataset[1]


# File; content; what of it the message names.
DAMAGED = [
    *(
        (
            "metadata.jsonl",
            jsonl({"file_name": "a.png", "text": ""}, {"file_name": name, "text": ""}),
            "line 2: file name",
        )
        for name in ("../a.png", "/etc/a.png", "sub/../../a.png", "C:\\a.png", "..\\a.png", "", None, 3)
    ),
    ("metadata.jsonl", '{"file_name": "a.png", "text": "a"}\n{"file_', "line 2"),
    ("metadata.jsonl", "[1]", "line 1"),
    ("metadata.jsonl", "[" * 100_000, "line 1"),
    ("metadata.jsonl", '{"file_name": "a.png", "text": 5}', "line 1: caption is 5"),
    ("metadata.jsonl", '{"file_name": "a.png", "label": 5}', "caption_key"),
    ("metadata.jsonl", '{"image": "a.png"}', "'file_name'"),
    ("metadata.jsonl", '{"file_name": "b.png", "text": ""}', "1 images, and none"),
    ("metadata.jsonl", "\n\n", "no entries"),
    ("metadata.csv", "", "no entries"),
    ("metadata.csv", "file_name,text\na.png,a cat, and a dog\n", "line 2: 3 cells for 2"),
    ("metadata.csv", 'file_name,text\na.png,"' + "a" * 200_000, "line 2"),
    ("metadata.csv", "image,text\na.png,b\n", "line 1: .*'file_name'.*image, text"),
    ("metadata.csv", "a.png,a cat\n", "line 1: .*'file_name'.*file_name,text"),
    ("metadata.csv", "file_name,text\n", "no entries"),
    ("metadata.csv", "PK\3\4abc\0", "binary"),
    ("metadata.parquet", "PAR1", "Parquet"),
]


@pytest.mark.parametrize(("file", "text", "named"), DAMAGED)
def test_damaged_metadata_is_named_with_its_line(tmp_path, file, text, named):
    write(tmp_path, "../a.png, a.png", {file: text})
    with pytest.raises(ValueError, match=f"{file}.*{named}" if "line" in named else named):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("images", "place", "options", "error", "named"),
    [
        ("", "nowhere", {}, FileNotFoundError, "nowhere' does not exist"),
        ("", "", {}, ValueError, r"no image .*\(there are: 1 .*, 1 "),
        ("a.png", "a.png", {}, FileNotFoundError, "a.png' is a file"),
        ("a.png", "", {"caption_key": "text"}, ValueError, "caption_key is 'text'"),
        ("both/a.png", "both", {}, ValueError, "has both"),
    ],
)
def test_wrong_folders(tmp_path, images, place, options, error, named):
    write(tmp_path, images, {"images.zip": "", "b.heic": ""})
    if place == "both":
        write(tmp_path / place, files={"metadata.csv": "file_name,text\na.png,a\n", "metadata.jsonl": "{}"})
    with pytest.raises(error, match=named):
        open_folder(tmp_path / place, **options)


def test_fingerprint_sees_names_captions_resolution_and_images_but_not_the_place(tmp_path):
    def fingerprint(**options):
        return open_folder(tmp_path / "x", **options).fingerprint()

    for place in ("x", "y"):
        write(tmp_path / place, "a.png, b.png")
    seen = [fingerprint(), fingerprint(resolution=4)]
    assert open_folder(tmp_path / "y").fingerprint() == seen[0]
    assert open_folder(tmp_path / "x", resolution=4)[0].image.shape == (4, 4, 3)
    for change in ({"a.txt": "a"}, {"a.png": png(1)}, {"a.png": png(0) + b"\0"}):
        write(tmp_path / "x", files=change)
        seen.append(fingerprint())
    (tmp_path / "x" / "b.png").rename(tmp_path / "x" / "c.png")
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


@given(st.sampled_from([".jsonl", ".csv"]), st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_metadata_give_rows_or_a_message(tmp_path, suffix, content):
    for file in tmp_path.glob("metadata.*"):
        file.unlink()
    start = b'{"file_name": "a.png", "text": "a"}\n' if suffix == ".jsonl" else b"file_name,text\na.png,a\n"
    write(tmp_path, "a.png", {f"metadata{suffix}": start + content})
    captions = captions_or_message(open_folder, tmp_path)
    assert isinstance(captions, str) or captions[0] == ("a",)


GROUPS = {
    "jsonl": ("0.png, 1.png", table({"text": "a", "group": "Ann"}, {"text": "b", "group": 7}), ["Ann", "7"], None),
    "csv_in_other_letters": ("a.png", {"metadata.csv": "file_name,text,Group\na.png,x, Bob \n"}, ["Bob"], None),
    "missing": (
        "0.png, 1.png, 2.png",
        table({"text": "a", "group": "Ann"}, {"text": "b", "group": None}, {"text": "c"}),
        ["Ann", "(none)", "(none)"],
        "2 of 3 images",
    ),
    "no_column": ("a/0.png, b/1.png", {"metadata.csv": "file_name,text\na/0.png,x\nb/1.png,y\n"}, None, None),
    "subfolders": (
        "0.png, 10_red hat/1.png, b/2.png, b/c/3.png",
        {},
        ["(none)", "red hat", "b", "b"],
        "1 of 4 images",
    ),
    "one_subfolder": ("0.png, a/1.png", {}, None, None),
}


@pytest.mark.parametrize("case", GROUPS)
def test_groups_to_ask_about_are_a_column_or_subfolders(tmp_path, caplog, case):
    images, files, expected, warning = GROUPS[case]
    write(tmp_path, images, files)
    dataset = open_folder(tmp_path)
    assert dataset.group_names == expected and dataset.groups is None
    told = [record.message for record in caplog.records if "(none)" in record.message]
    assert len(told) == (warning is not None) and all(warning in message for message in told)


@pytest.mark.parametrize("value", [["Ann"], True, 1.5, {"artist": "Ann"}])
def test_a_group_that_is_no_text_is_refused_with_its_line(tmp_path, value):
    write(tmp_path, "0.png", table({"text": "a", "group": value}))
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 1: group is .*expected a text"):
        open_folder(tmp_path)
