"""What tests of data sets share: images of one colour, and reading a data set as whoever uses it does."""

import io
import pickle

import numpy as np
from PIL import Image


def png(red: int, size: tuple[int, int] = (6, 5)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (red, 100, 200)).save(file, "png")
    return file.getvalue()


def contents(dataset) -> list[tuple]:
    """(red value, *captions) of every row, as the copy in a worker process reads them; row ids count from 0."""
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.fingerprint() == dataset.fingerprint() and copy.row_ids.dtype == np.int32
    rows = [copy[index] for index in range(len(copy))]
    assert [row.captions for row in rows] == [dataset.captions(index) for index in range(len(dataset))]
    assert [row.row_id for row in rows] == dataset.row_ids.tolist() == list(range(len(dataset)))
    assert all(row.image.dtype == np.uint8 and row.image.shape[2] == 3 for row in rows)
    return [(int(row.image[0, 0, 0]), *row.captions) for row in rows]


def captions_or_message(open_dataset, path) -> list[tuple[str, ...]] | str:
    """The captions of each row, or what was said of the path in the error that reading damaged files gave."""
    try:
        dataset = open_dataset(path)
    except ValueError as error:
        assert str(path) in str(error)
        return str(error)
    captions = [dataset.captions(index) for index in range(len(dataset))]
    assert captions and all(isinstance(caption, str) for row in captions for caption in row)
    return captions
