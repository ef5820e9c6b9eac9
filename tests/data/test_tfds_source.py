"""`tfds:NAME[:SPLIT]`: a small builder, prepared as ArrayRecord and read back without its code."""

import io
import json
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from attrib_jax.data.captions import read_captions
from attrib_jax.data.sources import open_dataset
from attrib_jax.data.tfds_source import TfdsDataset, split_name

F = tfds.features


def png(red: int, size=(6, 5)) -> io.BytesIO:
    file = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(file, "png")
    file.seek(0)
    return file


class CaptionedSquares(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The features of `coco_captions`, among them a text that is no caption."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES = {
        "image": F.Image(encoding_format="png"),
        "image/filename": F.Text(),
        "captions": F.Sequence({"text": np.str_, "id": np.int64}),
        "objects": F.Sequence({"label": F.ClassLabel(names=["cat", "dog"])}),
    }
    SPLITS = {"train": 3, "val": 2}

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(self.FEATURES), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(count) for name, count in self.SPLITS.items()}

    def _generate_examples(self, count):
        for row in range(count):
            yield row, self.example(row)

    def example(self, row):
        captions = [{"text": f"é {row} {number}", "id": number} for number in range(row)]
        return {"image": png(row), "image/filename": f"{row}.png", "captions": captions, "objects": [{"label": 1}]}


class TwoTexts(CaptionedSquares, skip_registration=True):
    FEATURES = {"photo": F.Image(encoding_format="png"), "headline": F.Text(), "body": {"long": F.Text()}}
    SPLITS = {"only": 2}

    def example(self, row):
        return {"photo": png(row), "headline": f"headline {row}", "body": {"long": f"long {row}"}}


class Labelled(CaptionedSquares, skip_registration=True):
    FEATURES = {"left": F.Image(encoding_format="png"), "right": F.Image(encoding_format="png")}
    FEATURES["label"] = F.ClassLabel(names=["cat", "dog"])
    SPLITS = {"a": 1, "b": 2}

    def example(self, row):
        return {"left": png(row), "right": png(row + 100), "label": row}


class NamedFiles(CaptionedSquares, skip_registration=True):
    """The features of `oxford_iiit_pet`, and an address; the second row is unlabelled, the third without objects."""

    FEATURES = {
        "image": F.Image(encoding_format="png"),
        "file_name": F.Text(),
        "flickr_url": F.Text(),
        "label": F.ClassLabel(names=["Abyssinian", "Beagle"]),
        "species": F.ClassLabel(names=["cat", "dog"]),
        "objects": F.Sequence({"label": F.ClassLabel(names=["ear", "tail"])}),
    }
    SPLITS = {"train": 3}

    def example(self, row):
        objects = [{"label": 0}, {"label": -1}] if row < 2 else []
        texts = {"file_name": f"Beagle_{row}.jpg", "flickr_url": f"https://{row}"}
        return {"image": png(row), "label": (1, -1, 0)[row], "species": 1, "objects": objects} | texts


class Prompted(CaptionedSquares, skip_registration=True):
    FEATURES = {"image": F.Image(encoding_format="png"), "model": F.Text(), "Prompt": F.Text(), "notes": F.Text()}
    SPLITS = {"train": 2}

    def example(self, row):
        return {"image": png(row), "model": "m", "Prompt": "ü".encode("cp1252") if row else "é", "notes": " "}


class WithoutCaption(CaptionedSquares, skip_registration=True):
    FEATURES = {"image": F.Image(encoding_format="png"), "image/filename": F.Text(), "image_id": F.Text()}
    SPLITS = {"train": 1}

    def example(self, row):
        return {"image": png(row), "image/filename": "0.png", "image_id": "0"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (CaptionedSquares, TwoTexts, Labelled, NamedFiles, Prompted, WithoutCaption):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def contents(dataset) -> list[tuple]:
    rows = [dataset[index] for index in range(len(dataset))]
    assert [row.captions for row in rows] == [dataset.captions(index) for index in range(len(dataset))]
    assert [row.row_id for row in rows] == dataset.row_ids.tolist() == list(range(len(dataset)))
    return [(int(row.image[0, 0, 0]), row.captions) for row in rows]


ROWS = [(0, ("",)), (1, ("é 1 0",)), (2, ("é 2 0", "é 2 1"))]


def test_captions_are_found_among_other_texts(data_dir):
    dataset = open_dataset("tfds:captioned_squares", data_dir)
    assert contents(dataset) == ROWS
    assert dataset.row_ids.dtype == np.int32 and dataset[0].image.shape == (5, 6, 3)
    assert dataset.name == "tfds:captioned_squares"
    assert "tensorflow" not in sys.modules


def test_splits_and_versions(data_dir):
    assert contents(open_dataset("tfds:captioned_squares:val", data_dir)) == ROWS[:2]
    assert contents(open_dataset("tfds:captioned_squares", data_dir, split="val")) == ROWS[:2]
    assert contents(open_dataset("tfds:captioned_squares:1.0.0:train[:2]", data_dir)) == ROWS[:2]
    assert contents(open_dataset("tfds:captioned_squares:train[2:]", data_dir)) == [ROWS[2]]
    with pytest.raises(ValueError, match="split is 'trian'.*Should be one of .*'train', 'val'"):
        open_dataset("tfds:captioned_squares:trian", data_dir)
    with pytest.raises(ValueError, match="split is 'val', but the data set's name says 'train'"):
        open_dataset("tfds:captioned_squares:train", data_dir, split="val")
    with pytest.raises(ValueError, match="no split 'train', but a, b; name one"):
        open_dataset("tfds:labelled", data_dir, image_key="left")


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


def test_features_can_be_named(data_dir):
    dataset = open_dataset("tfds:two_texts", data_dir, caption_key="body/long")
    assert contents(dataset) == [(0, ("long 0",)), (1, ("long 1",))]
    with pytest.raises(ValueError, match="several features that could be the caption.*headline.*caption_key"):
        open_dataset("tfds:two_texts", data_dir)
    with pytest.raises(ValueError, match="no caption feature 'subline' .*there are: .*headline.*caption_key"):
        open_dataset("tfds:two_texts", data_dir, caption_key="subline")
    with pytest.raises(ValueError, match="no image feature 'headline' .*there are: photo"):
        open_dataset("tfds:two_texts", data_dir, image_key="headline", caption_key="headline")


def test_class_names_are_captions_where_there_is_no_text(data_dir):
    dataset = open_dataset("tfds:labelled:b", data_dir, image_key="right")
    assert contents(dataset) == [(100, ("cat",)), (101, ("dog",))]
    with pytest.raises(ValueError, match="several features that could be the image .*left, right.*image_key"):
        open_dataset("tfds:labelled:b", data_dir)


def test_file_names_and_addresses_are_no_captions_unless_asked_for(data_dir):
    assert open_dataset("tfds:named_files", data_dir).captions(0) == ("Beagle",)
    assert open_dataset("tfds:named_files", data_dir, caption_key="file_name").captions(0) == ("Beagle_0.jpg",)
    with pytest.raises(ValueError, match="no caption feature .*all features: image, image/filename, image_id.*key"):
        open_dataset("tfds:without_caption", data_dir)


def test_a_usual_name_is_found_among_other_texts_and_rows_without_captions_are_counted(data_dir, caplog):
    dataset = open_dataset("tfds:prompted", data_dir)
    assert contents(dataset) == [(0, ("é",)), (1, ("ü",))]
    assert read_captions(dataset) == [("é",), ("ü",)] and not caplog.records
    read_captions(open_dataset("tfds:prompted", data_dir, caption_key="notes"))
    assert "2 of 2 rows of tfds:prompted have no caption (0, 1); fields that are there: " in caplog.text


def test_an_unlabelled_row_has_an_empty_caption(data_dir):
    dataset = open_dataset("tfds:named_files", data_dir, caption_key="label")
    assert contents(dataset) == [(0, ("Beagle",)), (1, ("",)), (2, ("Abyssinian",))]
    objects = open_dataset("tfds:named_files", data_dir, caption_key="objects/label")
    assert [objects.captions(row) for row in range(3)] == [("ear",), ("ear",), ("",)]


def test_resolution_pickling_and_fingerprint(data_dir):
    dataset = TfdsDataset("captioned_squares", data_dir)
    assert contents(pickle.loads(pickle.dumps(dataset))) == ROWS
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
    with pytest.raises(FileNotFoundError, match="'coco_captions' is not prepared in .*tfds build coco_captions"):
        open_dataset("tfds:coco_captions", tmp_path)
    with pytest.raises(FileNotFoundError, match="Did you mean 'captioned_squares'"):
        open_dataset("tfds:captioned_square", data_dir)


def test_prepared_without_random_access(data_dir, tmp_path):
    # Writing TFRecord needs TensorFlow; what says so is the record of the format, which is read first.
    builder = TwoTexts(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    record = builder.data_path / "dataset_info.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="as tfrecord, without random access; expected array_record.*convert_format"):
        open_dataset("tfds:two_texts", tmp_path, caption_key="headline")
