"""Filling a store: rows that give NaN are named, and worker processes leave nothing behind."""

import subprocess
import sys

import numpy as np
import pytest

from attrib_jax.jobs.encode_to_store import encode_to_store, make_store
from attrib_jax.jobs.encoded_dataset import EncodedDataset

COUNT = 11


def encode_tile(shared, batch):
    return batch * shared


def filled(path, values, scale=1.0, dtype="float32", **options):
    store = make_store(path, "values", values.shape[1:], dtype, len(values))
    return encode_to_store(
        store, encode_tile, np.float32(scale), lambda rows: (values[rows], {}), 2, "encode", "image", **options
    )


def values_with(*broken):
    values = np.ones((COUNT, 2, 3), np.float32)
    for row, value in broken:
        values[row, 1, 2] = value
    return values


@pytest.mark.parametrize(
    ("broken", "options", "message"),
    [
        ([(7, np.nan)], {}, "encode: image at position 7 gives NaN or infinity as float32; take that image out"),
        ([(0, np.inf), (9, np.nan)], {}, "image at position 0 and 1 more gives"),
        ([(3, 7e4)], {"dtype": "float16"}, "image at position 3 gives .* as float16; keep float32"),
        ([(10, np.nan)], {"name_row": lambda row, value: f"row {row + 100} of {value.shape}"}, r"row 110 of \(2, 3\)"),
        ([], {"scale": np.nan}, "every image from position 0 to 10 gives NaN .*damaged model"),
    ],
)
def test_rows_that_give_nan_are_named_and_not_stored(tmp_path, broken, options, message):
    with pytest.raises(ValueError, match=message):
        filled(tmp_path, values_with(*broken), **options)
    assert make_store(tmp_path, "values", (2, 3), options.get("dtype", "float32"), COUNT).pending_chunks()


def test_an_unreadable_row_is_zero_whatever_the_model_makes_of_it(tmp_path):
    store = make_store(tmp_path, "values", (1,), "float32", 2)
    stored = encode_to_store(
        store, encode_tile, np.nan, lambda rows: (np.ones((len(rows), 1)), {0: "", 1: ""}), 2, "encode", "x"
    )
    assert np.asarray(stored["values"]).tolist() == [[0], [0]]


@pytest.mark.parametrize(
    ("field", "flip", "caption", "message"),
    [
        ("latents", 0, 0, r"row 13 of cats has latents \(the image as it is\)"),
        ("latents", 1, 0, r"row 13 of cats has latents \(its mirror image\)"),
        ("text", 0, 1, r"row 13 of cats has text states \(caption 1\)"),
    ],
)
def test_nan_is_named_where_it_is_read(field, flip, caption, message):
    arrays = {"latents": np.zeros((5, 2, 4, 4, 1), np.float16), "text": np.zeros((10, 3, 6), np.float32)}
    arrays[field][{"latents": (3, flip), "text": (2 * 3 + caption, 0)}[field]] = np.nan
    positions = np.array([0, 2, 3, 4])  # stored row 1 was left out
    data = EncodedDataset(
        np.array([10, 12, 13, 14]), **arrays, first_caption=np.arange(6) * 2, positions=positions, source="cats"
    )
    data.inputs(np.array([0, 1, 3]), flip, caption)
    with pytest.raises(ValueError, match=message):
        data.inputs(np.array([0, 2, 3]), flip, caption)


SCRIPT = """
import sys
import numpy as np
from attrib_jax.jobs.encode_to_store import encode_to_store, make_store

def read(rows):
    return np.ones((len(rows), 100), np.float32) * rows[:, None], {}

def encode_tile(shared, batch):
    if sys.argv[2] == "fail":
        raise RuntimeError("as asked for")
    return batch

store = make_store(sys.argv[1], "values", (100,), "float32", 9)
stored = encode_to_store(store, encode_tile, (), read, 2, "encode", "image", workers=2)
print(np.asarray(stored["values"])[:, 0].astype(int).tolist())
"""


@pytest.mark.parametrize("ending", ["succeed", "fail"])
def test_worker_processes_leave_nothing_behind(tmp_path, ending):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), ending], capture_output=True, text=True, timeout=300, check=False
    )
    assert "leaked" not in done.stderr and "Exception ignored" not in done.stderr
    if ending == "fail":
        assert done.returncode == 1 and "as asked for" in done.stderr
    else:
        assert done.stdout.strip() == str(list(range(9)))
