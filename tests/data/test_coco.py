"""`coco:PATH`: COCO's caption annotations."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attrib_jax.data.coco import open_coco
from attrib_jax.data.images import UnreadableRowError
from tests.data.rows import captions_or_message, contents, png

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
    (root / split).mkdir(exist_ok=True)
    for image in images if present is None else present:
        (root / split / image["file_name"]).write_bytes(png(image["id"]))
    return file


def test_rows_are_in_the_order_of_the_json(tmp_path):
    write_coco(tmp_path)
    dataset = open_coco(tmp_path)
    # The first five captions in the file, though their own ids run the other way.
    captions = tuple(f"caption {number}" for number in range(5))
    assert contents(dataset) == [(9, "a plate"), (139, ""), (25, *captions)]
    assert open_coco(tmp_path, resolution=4)[0].image.shape == (4, 4, 3)
    assert dataset.credit is None
    write_coco(tmp_path, info={"url": "http://cocodataset.org", "year": 2017})
    official = open_coco(tmp_path)
    assert "CC BY 4.0" in official.credit and official.credit_url.startswith("https://cocodataset.org")


def test_which_split(tmp_path):
    file = write_coco(tmp_path, IMAGES[:1], split="val2017")
    assert len(open_coco(tmp_path)) == 1  # the only one there
    assert len(open_coco(file)) == 1
    write_coco(tmp_path, split="train2017")
    assert len(open_coco(tmp_path)) == 3
    assert len(open_coco(tmp_path, split="val2017")) == 1
    with pytest.raises(FileNotFoundError, match="captions_test.*captions_train2017.json, captions_val2017.json"):
        open_coco(tmp_path, split="test")
    with pytest.raises(ValueError, match="split is 'train2017'.*captions_val2017.json"):
        open_coco(file, split="train2017")


def test_missing_images_and_captions_of_others_are_counted_and_rows_kept(tmp_path, caplog):
    write_coco(tmp_path, annotations=[*ANNOTATIONS, {"image_id": 4, "caption": "whose?"}], present=IMAGES[::2])
    dataset = open_coco(tmp_path)
    assert "1 of 3 images" in caplog.text and "139.jpg" in caplog.text
    assert "1 of 9 captions" in caplog.text and "'whose?' of 4" in caplog.text
    assert dataset.captions(0) == ("a plate",) and dataset[2].captions[0] == "caption 0"
    with pytest.raises(UnreadableRowError, match="139.jpg'"):
        dataset[1]
    before = dataset.fingerprint()
    (tmp_path / "train2017" / "139.jpg").write_bytes(png(0))
    assert open_coco(tmp_path).fingerprint() != before


def test_wrong_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="annotations"):
        open_coco(tmp_path)
    write_coco(tmp_path, present=[])
    with pytest.raises(ValueError, match="3 images, and none"):
        open_coco(tmp_path)
    (tmp_path / "train2017").rmdir()
    with pytest.raises(FileNotFoundError, match="train2017"):
        open_coco(tmp_path)


ONE = '{"images": [{"id": 1, "file_name": "a"}], "annotations": [%s]}'


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "JSON"),
        ('{"images": [{"id": 1, "file_na', "JSON"),
        ("[" * 100_000, "JSON"),
        ("\0" * 9, "JSON.*binary data"),
        ("[]", "'images'"),
        ('{"images": []}', "no images"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}]}', "'annotations'"),
        ('{"images": [{"id": "1", "file_name": "a.jpg"}]}', r"images\[0\]: id is '1'"),
        ('{"images": [7]}', r"images\[0\]: id is None"),
        ('{"images": [{"id": 1, "file_name": "../a.jpg"}]}', r"images\[0\]: file name '../a.jpg'"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}', r"images\[1\]: id 1 "),
        (ONE % '{"image_id": 1, "caption": 5}', r"annotations\[0\]: caption is 5"),
        (ONE % '{"image_id": 1, "bbox": []}', r"annotations\[0\]: caption is absent .*image_id, bbox"),
    ],
)
def test_damaged_annotations_are_named(tmp_path, content, named):
    write_coco(tmp_path).write_text(content)
    with pytest.raises(ValueError, match=f"captions_train2017.json.*{named}"):
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
    content = {"images": IMAGES, "annotations": [{"image_id": 9, "caption": "eine Tür"}]}
    write_coco(tmp_path).write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
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
    assert captions_or_message(open_coco, tmp_path)
