"""`coco:PATH`: COCO's caption annotations."""

import json
import pickle
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from attrib_jax.data.coco import open_coco
from attrib_jax.data.images import UnreadableRowError

IMAGES = [
    {"id": 9, "file_name": "000000000009.jpg"},
    {"id": 139, "file_name": "139.jpg"},
    {"id": 25, "file_name": "25.jpg"},
]
ANNOTATIONS = [
    *({"id": 100 - number, "image_id": 25, "caption": f"caption {number}"} for number in range(7)),
    {"id": 1, "image_id": 9, "caption": "a plate"},
]


def write_coco(root, images=IMAGES, annotations=ANNOTATIONS, split="train2017", present=None, **more):
    file = root / "annotations" / f"captions_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, **more}))
    folder = root / split
    folder.mkdir(exist_ok=True)
    for image in images if present is None else present:
        Image.new("RGB", (8, 6), (image["id"], 0, 0)).save(folder / image["file_name"], "png")
    return file


def test_rows_are_in_the_order_of_the_json(tmp_path):
    write_coco(tmp_path)
    dataset = open_coco(tmp_path)
    assert len(dataset) == 3 and dataset.row_ids.tolist() == [0, 1, 2]
    assert [int(dataset[index].image[0, 0, 0]) for index in range(3)] == [9, 139, 25]
    assert dataset.captions(0) == ("a plate",)
    # The first five in the file, though their own ids run the other way.
    assert dataset.captions(2) == tuple(f"caption {number}" for number in range(5))
    assert dataset.captions(1) == dataset[1].captions == ("",)
    assert dataset[0].image.shape == (6, 8, 3)
    assert open_coco(tmp_path, resolution=4)[0].image.shape == (4, 4, 3)
    assert dataset.credit is None
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[1].captions == dataset[1].captions and copy.fingerprint() == dataset.fingerprint()


def test_the_official_files_carry_their_licence(tmp_path):
    write_coco(tmp_path, info={"url": "http://cocodataset.org", "year": 2017})
    dataset = open_coco(tmp_path)
    assert "CC BY 4.0" in dataset.credit and dataset.credit_url.startswith("https://cocodataset.org")


def test_which_split(tmp_path):
    file = write_coco(tmp_path, IMAGES[:1], split="val2017")
    assert len(open_coco(tmp_path)) == 1  # the only one there
    assert len(open_coco(file)) == 1
    write_coco(tmp_path, split="train2017")
    assert len(open_coco(tmp_path)) == 3
    assert len(open_coco(tmp_path, split="val2017")) == 1
    with pytest.raises(FileNotFoundError, match="captions_test.*there: captions_train2017.json, captions_val2017.json"):
        open_coco(tmp_path, split="test")
    with pytest.raises(ValueError, match="split is 'train2017', but .*captions_val2017.json was given"):
        open_coco(file, split="train2017")


def test_missing_images_are_counted_and_keep_their_row(tmp_path, caplog):
    write_coco(tmp_path, present=IMAGES[::2])
    dataset = open_coco(tmp_path)
    assert "1 of 3 images" in caplog.text and "139.jpg" in caplog.text
    assert dataset[2].captions[0] == "caption 0"
    with pytest.raises(UnreadableRowError, match="139.jpg' does not exist"):
        dataset[1]
    before = dataset.fingerprint()
    Image.new("RGB", (8, 6)).save(tmp_path / "train2017" / "139.jpg")
    assert open_coco(tmp_path).fingerprint() != before


def test_captions_of_unlisted_images_are_counted(tmp_path, caplog):
    write_coco(tmp_path, annotations=[*ANNOTATIONS, {"id": 7, "image_id": 4, "caption": "whose?"}])
    assert open_coco(tmp_path).captions(0) == ("a plate",)
    assert "1 of 9 captions" in caplog.text and "'whose?' of 4" in caplog.text


def test_wrong_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected COCO's annotations folder"):
        open_coco(tmp_path)
    write_coco(tmp_path, present=[])
    with pytest.raises(ValueError, match="names 3 images, and none of them exists"):
        open_coco(tmp_path)
    (tmp_path / "train2017").rmdir()
    with pytest.raises(FileNotFoundError, match="no folder of images; expected .*train2017"):
        open_coco(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged or not valid JSON"),
        ('{"images": [{"id": 1, "file_na', "damaged or not valid JSON"),
        ("[" * 100_000, "damaged or not valid JSON"),
        ("[]", "no list 'images'"),
        ('{"images": []}', "has no images"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}]}', "no list 'annotations'"),
        ('{"images": [{"id": "1", "file_name": "a.jpg"}]}', r"images\[0\]: id is '1'; expected a whole number"),
        ('{"images": [7]}', r"images\[0\]: id is None"),
        ('{"images": [{"id": 1, "file_name": "../a.jpg"}]}', r"images\[0\]: file name '../a.jpg'"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}', r"images\[1\]: id 1 comes twice"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "caption": 5}]}',
            r"annotations\[0\]: caption is 5; expected a text",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}',
            r"annotations\[0\]: caption is absent \(fields: image_id, bbox\)",
        ),
        ("\0" * 9, "damaged or not valid JSON.*binary data"),
    ],
)
def test_damaged_annotations_are_named(tmp_path, content, message):
    write_coco(tmp_path).write_text(content)
    with pytest.raises(ValueError, match=f"captions_train2017.json.*{message}"):
        open_coco(tmp_path)


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        ([], r"3 of 3 rows .*\(000000000009.jpg, 139.jpg, 25.jpg\); .*: images/id, images/file_name; .*'annotations'"),
        ([{"image_id": 9, "caption": "a"}, {"image_id": 25, "caption": None}], r"2 of 3 rows .*annotations/caption"),
        ([{"image_id": row["id"], "Caption": "a"} for row in IMAGES], None),
    ],
)
def test_rows_without_a_caption_are_counted(tmp_path, caplog, annotations, said):
    write_coco(tmp_path, annotations=annotations)
    dataset = open_coco(tmp_path)
    assert len(caplog.records) == (said is not None) and re.search(said or "", caplog.text)
    assert all(isinstance(dataset.captions(row)[0], str) for row in range(3))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "cp1252"])
def test_annotations_in_other_encodings(tmp_path, encoding):
    file = write_coco(tmp_path)
    content = {"images": IMAGES, "annotations": [{"image_id": 9, "caption": "eine Tür"}]}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    assert open_coco(tmp_path).captions(0) == ("eine Tür",)


SCALAR = st.none() | st.booleans() | st.integers(0, 3) | st.text(max_size=3) | st.just("a.jpg")
ENTRY = st.dictionaries(st.sampled_from(["id", "image_id", "file_name", "caption"]), SCALAR)
LIST = st.lists(ENTRY, max_size=3) | SCALAR


@given(st.fixed_dictionaries({"images": LIST, "annotations": LIST, "info": SCALAR}))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_gives_rows_or_a_message(tmp_path, content):
    file = write_coco(tmp_path, present=[])
    (tmp_path / "train2017" / "a.jpg").write_bytes(b"")
    file.write_text(json.dumps(content))
    try:
        dataset = open_coco(tmp_path)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert len(dataset) and all(isinstance(dataset.captions(index)[0], str) for index in range(len(dataset)))
