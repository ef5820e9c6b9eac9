"""Reading pickles as data: what numpy and torch write, and files that try to run something."""

import io
import os
import pickle
import re
import struct
import tracemalloc
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attrib_jax.convert.weights.pickles import read_pickled_dict
from tests.convert.files import ATTACKS, CANARY, Call, altered

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def read(tmp_path, content: bytes):
    path = tmp_path / "file.pkl"
    path.write_bytes(content)
    return read_pickled_dict(path)


def assert_same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_pickle_wrote_is_read(tmp_path, protocol):
    rng = np.random.default_rng(0)
    content = {
        "float32": rng.normal(size=(2, 3)).astype(np.float32),
        "big endian": rng.normal(size=4).astype(">f8"),
        "fortran": np.asfortranarray(rng.normal(size=(3, 2))),
        "int64": np.arange(-3, 300),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 2), np.float16),
        "scalars": [np.float64(0.1), np.int32(-7), 0.5, 3, 2**70, None, True],
        "text": "woman’s hat",
        "bytes": b"\x00\xff",
        "nothing": b"",
        "nested": {"a": (1, 2, 3, 4), 5: [[]]},
    }
    content["again"] = content["int64"]
    found = read(tmp_path, pickle.dumps(content, protocol))
    assert found.keys() == content.keys()
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            assert_same(found[name], value)
        else:
            assert found[name] == value
    assert isinstance(found["scalars"][0], np.float64)


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_both_generations_of_numpy(tmp_path, module):
    values = np.arange(5.0)
    content = re.sub(rb"numpy\._?core", module, pickle.dumps({"a": values}, 2))
    assert module in content
    assert_same(read(tmp_path, content)["a"], values)


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_torch_tensors(tmp_path, protocol, dtype):
    tensor = (10 * torch.rand(4, 6)).to(dtype)
    views = {"a": tensor, "slice": tensor[1:, ::2], "turned": tensor.T, "scalar": tensor[2, 3], "none": tensor[:0]}
    found = read(tmp_path, pickle.dumps(OrderedDict(views), protocol))
    for name, value in views.items():
        if dtype == torch.bfloat16:
            assert found[name].dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(found[name].astype(np.float32), value.float().numpy())
        else:
            assert_same(found[name], value.numpy())


class Hook:
    """Runs a command when its state is set."""

    def __init__(self, command):
        self.command = command

    def __setstate__(self, state):
        os.system(state)

    def __getstate__(self):
        return self.command


def more_attacks() -> dict[str, object]:
    """Attacks on what this reader allows: arrays, tensors and their states."""
    command = f"touch {CANARY}"
    objects = np.empty(2, object)
    objects[:] = [Call(os.system, command), 1]
    module_code = io.BytesIO()
    torch.save({"x": Call(os.system, command)}, module_code, _use_new_zipfile_serialization=False)
    return {
        "object array": objects,
        "object scalar": np.array([Call(os.system, command)], object)[0],
        "__setstate__": Hook(command),
        "torch.load": Call(torch.storage._load_from_bytes, module_code.getvalue()),
        "key": {Call(os.system, command): 1},
        "subclass": Call(np.memmap, CANARY, "u1", "w+", 0, (3,)),
        "numpy's own files": Call(np.save, CANARY, np.arange(3)),
    }


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", [*ATTACKS, *more_attacks()])
def test_nothing_in_a_file_is_run(tmp_path, name, protocol, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack = ATTACKS[name]() if name in ATTACKS else more_attacks()[name]
    content = pickle.dumps({"influence": attack, "rank": [0]}, protocol)
    with pytest.raises(ValueError, match=r"file\.pkl"):
        read(tmp_path, content)
    assert os.listdir(tmp_path) == ["file.pkl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"not a pickle", "truncated"),
        (pickle.dumps({"a": np.arange(3)})[:-20], "truncated"),
        (pickle.dumps([1, 2]), "names"),
        (pickle.dumps({1: 2}), "names"),
        (pickle.dumps({"a": np.array(["x"])}), "'U1'"),
        (pickle.dumps({"a": np.array([object])}), "builtins.object|'O8'"),
        (pickle.dumps({"a": np.zeros(2, "c8")}), "'c8'"),
        (pickle.dumps({"a": np.zeros(2, [("x", "f4")])}), "'V4'"),
        (pickle.dumps({"a": Call(bytes, 10**12)}), "truncated"),
        (pickle.dumps({"a": torch.zeros(2).to_sparse()}), "no data"),
        (b"\x80\x02}X\x01\x00\x00\x00acnumpy\nndarray\ns.", "'a'"),
        (b"\x80\x02}X\x01\x00\x00\x00acnumpy\ndtype\nNbs.", "'numpy.dtype'"),
    ],
    ids=range(13),  # pickles differ between processes, and test names must not
)
def test_other_content_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"file\.pkl.*{message}"):
        read(tmp_path, content)


def claims(numel: int, size: tuple, stride: tuple, raw: bytes) -> bytes:
    """A pickled tensor whose file tells of `numel` values, whatever `raw` holds."""
    inner = io.BytesIO()
    torch.save(torch.zeros(2), inner, _use_new_zipfile_serialization=False)
    stream = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, stream, 2)

    class Persistent(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", numel, None) if value == "here" else None

    Persistent(stream, 2).dump("here")
    pickle.dump(["0"], stream, 2)
    storage = stream.getvalue() + struct.pack("<q", numel) + raw
    load = Call(torch.storage._load_from_bytes, storage)
    return pickle.dumps({"a": Call(torch._utils._rebuild_tensor_v2, load, 0, size, stride, False, OrderedDict())})


def test_no_more_memory_than_a_few_times_the_file(tmp_path):
    raw = struct.pack("<2f", 1, 2)
    np.testing.assert_array_equal(read(tmp_path, claims(2, (2,), (1,), raw))["a"], [1, 2])
    text = "x" * 200_000
    many = pickle.dumps({"a": [Call(__import__("_codecs").encode, text, "latin1") for _ in range(2000)]})
    bombs = [
        claims(2**40, (2**40,), (1,), raw),
        claims(2, (2**40,), (0,), raw),
        claims(2, (2**40,), (1,), raw),
        pickle.dumps({"a": Call(bytes, 2**40)}),
        pickle.dumps({"a": Call(bytearray, 2**40)}),
        b"\x80\x05}\x8c\x01a\x96" + struct.pack("<Q", 2**40) + b"s.",
        b"\x80\x04}\x8c\x01a\x8e" + struct.pack("<Q", 2**40) + b"s.",
        b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
        many,
    ]
    for content in bombs:
        tracemalloc.start()
        try:
            read(tmp_path, content)
        except ValueError as error:
            assert "file.pkl" in str(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 10 * len(content) + 2**20


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_a_message(tmp_path, data):
    value = {"influence": np.arange(4.0), "rank": torch.arange(4), "list": [1, 2.5, "x", None]}
    content = altered(data, pickle.dumps(value, data.draw(st.integers(0, 5))))
    try:
        assert isinstance(read(tmp_path, content), dict)
    except ValueError as error:
        assert "file.pkl" in str(error)
