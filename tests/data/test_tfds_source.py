"""`tfds:NAME[:SPLIT]`: small builders, prepared as ArrayRecord and read back without their code."""

import io
import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from attrib_jax.data.captions import read_captions
from attrib_jax.data.sources import open_dataset
from attrib_jax.data.tfds_source import TfdsDataset, split_name
from tests.data.rows import contents, png

F = tfds.features


def builder(name: str, features: dict, example, **splits: int) -> type:
    """A builder of these features, whose splits have the rows `example(0)`, `example(1)` ..."""

    def info(self):
        made = {key: F.Image(encoding_format="png") if kind == "image" else kind for key, kind in features.items()}
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(made), disable_shuffling=True)

    def split_generators(self, dl_manager):
        return {split: ((row, example(row)) for row in range(count)) for split, count in splits.items()}

    members = {"VERSION": tfds.core.Version("1.0.0"), "_info": info, "_split_generators": split_generators}
    members["_generate_examples"] = None
    return type(name, (tfds.core.GeneratorBasedBuilder,), members, skip_registration=True)


def image(row: int) -> io.BytesIO:
    return io.BytesIO(png(row))


CAPTIONED = builder(  # the features of `coco_captions`, among them a text that is no caption
    "CaptionedSquares",
    {
        "image": "image",
        "image/filename": F.Text(),
        "captions": F.Sequence({"text": np.str_, "id": np.int64}),
        "objects": F.Sequence({"label": F.ClassLabel(names=["cat", "dog"])}),
    },
    lambda row: {
        "image": image(row),
        "image/filename": f"{row}.png",
        "captions": [{"text": f"é {row} {number}", "id": number} for number in range(row)],
        "objects": [{"label": 1}],
    },
    train=3,
    val=2,
)
TWO_TEXTS = builder(
    "TwoTexts",
    {"photo": "image", "headline": F.Text(), "body": {"long": F.Text()}},
    lambda row: {"photo": image(row), "headline": f"headline {row}", "body": {"long": f"long {row}"}},
    only=2,
)
LABELLED = builder(
    "Labelled",
    {"left": "image", "right": "image", "label": F.ClassLabel(names=["cat", "dog"])},
    lambda row: {"left": image(row), "right": image(row + 100), "label": row},
    a=1,
    b=2,
)
NAMED_FILES = builder(  # the features of `oxford_iiit_pet`, and an address
    "NamedFiles",
    {
        "image": "image",
        "file_name": F.Text(),
        "flickr_url": F.Text(),
        "label": F.ClassLabel(names=["Abyssinian", "Beagle"]),
        "species": F.ClassLabel(names=["cat", "dog"]),
        "objects": F.Sequence({"label": F.ClassLabel(names=["ear", "tail"])}),
    },
    lambda row: {
        "image": image(row),
        "file_name": f"Beagle_{row}.jpg",
        "flickr_url": f"https://{row}",
        "label": (1, -1, 0)[row],  # the second row is unlabelled
        "species": 1,
        "objects": [{"label": 0}, {"label": -1}] if row < 2 else [],
    },
    train=3,
)
PROMPTED = builder(
    "Prompted",
    {"image": "image", "model": F.Text(), "Prompt": F.Text(), "notes": F.Text()},
    lambda row: {"image": image(row), "model": "m", "Prompt": "ü".encode("cp1252") if row else "é", "notes": " "},
    train=2,
)
WITHOUT_CAPTION = builder(
    "WithoutCaption",
    {"image": "image", "image/filename": F.Text(), "image_id": F.Text()},
    lambda row: {"image": image(row), "image/filename": "0.png", "image_id": "0"},
    train=1,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for each in (CAPTIONED, TWO_TEXTS, LABELLED, NAMED_FILES, PROMPTED, WITHOUT_CAPTION):
        each(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


ROWS = [(0, ""), (1, "é 1 0"), (2, "é 2 0", "é 2 1")]


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("captioned_squares", {}, ROWS),  # found among other texts
        ("captioned_squares:val", {}, ROWS[:2]),
        ("captioned_squares", {"split": "val"}, ROWS[:2]),
        ("captioned_squares:1.0.0:train[:2]", {}, ROWS[:2]),
        ("captioned_squares:train[2:]", {}, ROWS[2:]),
        ("two_texts", {"caption_key": "body/long"}, [(0, "long 0"), (1, "long 1")]),
        # Class names are captions where there is no text, and an unlabelled row has an empty one.
        ("labelled:b", {"image_key": "right"}, [(100, "cat"), (101, "dog")]),
        ("named_files", {"caption_key": "label"}, [(0, "Beagle"), (1, ""), (2, "Abyssinian")]),
        ("named_files", {"caption_key": "objects/label"}, [(0, "ear"), (1, "ear"), (2, "")]),
        # File names and addresses are no captions unless asked for.
        ("named_files", {}, [(0, "Beagle"), (1, ""), (2, "Abyssinian")]),
        ("named_files:train[:1]", {"caption_key": "file_name"}, [(0, "Beagle_0.jpg")]),
        ("prompted", {}, [(0, "é"), (1, "ü")]),
    ],
)
def test_rows_captions_and_splits(data_dir, name, options, rows):
    dataset = open_dataset(f"tfds:{name}", data_dir, **options)
    assert dataset.name == f"tfds:{name}" or "split" in options
    assert contents(dataset) == rows
    assert read_captions(dataset) == [row[1:] for row in rows]
    assert "tensorflow" not in sys.modules


def test_rows_without_captions_are_counted(data_dir, caplog):
    read_captions(open_dataset("tfds:prompted", data_dir, caption_key="notes"))
    assert "2 of 2 rows of tfds:prompted have no caption (0, 1); fields that are there: " in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("captioned_squares:trian", {}, "split is 'trian'.*'train', 'val'"),
        ("captioned_squares:train", {"split": "val"}, "split is 'val'.*'train'"),
        ("labelled", {"image_key": "left"}, "'train'.* a, b"),
        ("labelled:b", {}, "left, right.*image_key"),
        ("two_texts", {}, "headline.*caption_key"),
        ("two_texts", {"caption_key": "subline"}, "'subline' .*headline.*caption_key"),
        ("two_texts", {"image_key": "headline", "caption_key": "headline"}, "'headline' .*photo"),
        ("without_caption", {}, "image, image/filename, image_id.*key"),
    ],
)
def test_wrong_splits_and_features_are_named(data_dir, name, options, named):
    with pytest.raises(ValueError, match=named):
        open_dataset(f"tfds:{name}", data_dir, **options)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("coco_captions", ("coco_captions", None)),
        ("coco_captions:val", ("coco_captions", "val")),
        ("coco_captions/2014:1.1.0", ("coco_captions/2014:1.1.0", None)),
        ("coco_captions/2014:1.1.0:train[:10%]+val", ("coco_captions/2014:1.1.0", "train[:10%]+val")),
    ],
)
def test_names_with_colons(name, parts):
    assert split_name(name) == parts


def test_resolution_and_fingerprint(data_dir):
    dataset = TfdsDataset("captioned_squares", data_dir)
    others = [
        TfdsDataset("captioned_squares", data_dir, resolution=4),
        TfdsDataset("captioned_squares:train[:2]", data_dir),
        TfdsDataset("captioned_squares:val", data_dir),
        TfdsDataset("captioned_squares", data_dir, caption_key="image/filename"),
    ]
    assert others[0][2].image.shape == (4, 4, 3) and others[3].captions(2) == ("2.png",)
    assert len({other.fingerprint() for other in others} | {dataset.fingerprint()}) == 5
    assert TfdsDataset("captioned_squares:train", data_dir).fingerprint() == dataset.fingerprint()


def test_not_prepared(data_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="'coco_captions' .*tfds build coco_captions"):
        open_dataset("tfds:coco_captions", tmp_path)
    with pytest.raises(FileNotFoundError, match="'captioned_squares'"):
        open_dataset("tfds:captioned_square", data_dir)
    # Writing TFRecord needs TensorFlow; what says so is the record of the format, which is read first.
    two_texts = TWO_TEXTS(data_dir=tmp_path, file_format="array_record")
    two_texts.download_and_prepare()
    record = two_texts.data_path / "dataset_info.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="tfrecord.*array_record.*convert_format"):
        open_dataset("tfds:two_texts", tmp_path, caption_key="headline")
