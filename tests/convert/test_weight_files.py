"""Weight files: every kind that is opened, what is written, and damaged files."""

import io
import json
import os
import re
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attrib_jax.convert.weights.files import open_weights, write_weights
from attrib_jax.convert.weights.tensors import LazyTensor
from tests.convert.files import altered

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {name: (4 * torch.randn(3, 5, generator=generator)).to(getattr(torch, name)) for name in DTYPES}
    return made | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.arange(3, dtype=torch.int8)}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same(opened: dict[str, LazyTensor], expected: dict[str, torch.Tensor]) -> None:
    assert opened.keys() == expected.keys()
    for name, tensor in expected.items():
        array = as_numpy(tensor)
        assert (opened[name].shape, opened[name].dtype) == (array.shape, array.dtype), name
        for _ in range(2):  # a tensor may be read again
            read = opened[name].read()
            assert read.flags.c_contiguous and read.flags.writeable
            np.testing.assert_array_equal(read, array, err_msg=name)
            read[...] = 0


def write(path, kind: str, state: dict[str, torch.Tensor]) -> None:
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_the_kind_is_told_by_the_content(tmp_path, kind, name):
    path = tmp_path / name
    write(path, kind, tensors())
    assert_same(open_weights(path), tensors())


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_float8_is_read(tmp_path, kind, name):
    state = {"x": torch.tensor([[1.0, -0.5], [3.0, 8.0]]).to(getattr(torch, name))}
    write(tmp_path / "x", kind, state)
    read = open_weights(tmp_path / "x")["x"].read()
    assert read.dtype == np.dtype(getattr(ml_dtypes, name))
    np.testing.assert_array_equal(read.astype(np.float32), state["x"].float().numpy())


def sharded(folder, kind: str) -> tuple[str, dict[str, torch.Tensor]]:
    state = {f"layer.{i}": torch.full((2, 3), float(i)) for i in range(5)}
    weight_map = {name: f"model-{i % 2}.{kind}" for i, name in enumerate(state)}
    for shard in set(weight_map.values()):
        write(folder / shard, kind, {name: state[name] for name in state if weight_map[name] == shard})
    index = folder / f"model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 120}, "weight_map": weight_map}))
    return str(index), state


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_shards_are_joined(tmp_path, kind):
    index, state = sharded(tmp_path, kind)
    assert_same(open_weights(index), state)


def test_missing_shards_and_tensors_are_all_listed(tmp_path):
    index, state = sharded(tmp_path, "safetensors")
    write(tmp_path / "model-0.safetensors", "safetensors", {"layer.0": state["layer.0"]})
    with pytest.raises(ValueError, match=r"layer\.2 .*model-0.*layer\.4 .*model-0"):
        open_weights(index)
    for file in tmp_path.glob("model-*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model-0\.safetensors.*model-1\.safetensors"):
        open_weights(index)


SHARDS = ("/etc/passwd", "../x.bin", "..", "", "a/b.bin", "a\\b.bin", "C:x", 3, "x.index.json")


@pytest.mark.parametrize("shard", SHARDS)
def test_shards_elsewhere_are_refused(tmp_path, shard):
    path = tmp_path / "x.index.json"
    path.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=re.escape(f"the file of 'a' is {shard!r}")):
        open_weights(path)


def test_a_file_cut_after_it_was_opened_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, "safetensors", {"a": torch.zeros(100_000)})
    opened = open_weights(path)["a"]
    os.truncate(path, 200_000)
    with pytest.raises(ValueError, match="it has become shorter since it was opened"):
        opened.read()


def entry(dtype="F32", shape=(2,), data_offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets, **more}


def with_header(header: bytes, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    """A safetensors file, which may claim another length of its header."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def torch_file() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, stream)
    return stream.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
WHOLE = safetensors.torch.save(tensors())
DAMAGED = {
    "index: empty": ("x.index.json", b"", "JSON"),
    "index: list": ("x.index.json", b"[1]", "list"),
    "index: no map": ("x.index.json", b"{}", "index"),
    "index: map a list": ("x.index.json", b'{"weight_map": []}', "index"),
    "index: map empty": ("x.index.json", b'{"weight_map": {}}', "index"),
    "index: deep": ("x.index.json", b"[" * 100_000, "JSON"),
    "pointer, safetensors": ("x.safetensors", POINTER, "Git LFS"),
    "pointer, bin": ("x.bin", POINTER, "Git LFS"),
    "empty": ("x.bin", b"", "truncated"),
    "web page": ("x.bin", b"<!DOCTYPE html><html>", "truncated"),
    "zeros": ("x.bin", b"\0" * 64, "truncated"),
    "PyTorch": ("x.safetensors", torch_file(), "PyTorch"),
    **{f"cut at {i}": ("x.safetensors", WHOLE[:i], "truncated") for i in (0, 7, 8, 20, -1)},
    "header: open": ("x.safetensors", with_header(b"{", b""), "header"),
    "header: not UTF-8": ("x.safetensors", with_header(b"\xff" * 9, b""), "header"),
    "header: deep": ("x.safetensors", with_header(b"{" + b'"a":{' * 50_000, b""), "header"),
    "header: long number": ("x.safetensors", with_header(b'{"a":' + b"9" * 5000 + b"}", b""), "header"),
    **{
        f"header of {n} bytes": ("x.safetensors", with_header(b"{}", b" " * 100, n), f"{n} bytes")
        for n in (2**63 - 1, 10**9, 1000)
    },
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_and_other_files_are_named(tmp_path, case):
    name, content, reason = DAMAGED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} .*{reason}"):
        open_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ([], "JSON object"),
        ({"a": 1}, "data_offsets"),
        ({"a": entry(more=1)}, "data_offsets"),
        ({"a": entry(dtype="F3")}, "'F3'"),
        ({"a": entry(dtype=["F32"])}, "F32"),
        ({"a": entry(shape=[-2])}, r"shape \[-2\]"),
        ({"a": entry(shape=[True, 2])}, r"shape \[True, 2\]"),
        ({"a": entry(shape=["2"])}, "shape"),
        ({"a": entry(shape=[2**70])}, "shape"),
        ({"a": entry(shape=[1] * 33)}, "33 axes"),
        ({"a": entry(shape=[2**40, 2**40])}, "8 bytes"),
        ({"a": entry(shape=[3])}, "8 bytes"),
        ({"a": entry(data_offsets=[0])}, "data_offsets"),
        ({"a": entry(data_offsets=[8, 0])}, "-8 bytes"),
        ({"a": entry(data_offsets=[4, 12])}, "byte 4"),
        ({"a": entry(), "b": entry()}, "byte 0"),
        ({"a": entry(shape=[2**40], data_offsets=[0, 2**42])}, "end at byte"),
        ({"a": entry(shape=[1], data_offsets=[0, 4])}, "end at byte"),
    ],
)
def test_false_headers_are_refused(tmp_path, header, reason):
    (tmp_path / "x.safetensors").write_bytes(with_header(json.dumps(header).encode()))
    with pytest.raises(ValueError, match=rf"x\.safetensors.*{reason}"):
        open_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_altered_bytes_give_tensors_or_a_message(tmp_path, kind, data):
    path = tmp_path / "x.weights"
    write(path, kind, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)})
    path.write_bytes(altered(data, path.read_bytes()))
    size = path.stat().st_size
    try:
        opened = open_weights(path)
    except ValueError as error:
        assert "x.weights" in str(error)
        return
    assert sum(tensor.read().nbytes for tensor in opened.values()) <= 3 * size


@pytest.mark.parametrize("source", ["arrays", "file"])
def test_what_is_written_opens_everywhere(tmp_path, source):
    path = tmp_path / "x.safetensors"
    arrays = {name: as_numpy(tensor) for name, tensor in tensors().items()}
    safetensors.torch.save_file(tensors(), path)
    write_weights(open_weights(path) if source == "file" else arrays, path)  # the file itself is replaced
    assert_same(open_weights(path), tensors())
    theirs = safetensors.torch.load_file(path)
    for name, tensor in tensors().items():
        assert theirs[name].dtype == tensor.dtype and torch.equal(theirs[name], tensor), name
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    del arrays["bfloat16"]  # which numpy does not know
    write_weights(arrays, path)
    for name, array in safetensors.numpy.load_file(path).items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_floats_are_cast_and_integers_are_not(tmp_path, dtype):
    state = {"x": np.array([1.001, 300.3], np.float64), "ids": np.array([[70000]], np.int64)}
    write_weights(state, tmp_path / "x.safetensors", dtype)
    opened = open_weights(tmp_path / "x.safetensors")
    assert opened["x"].dtype == dtype and opened["ids"].dtype == np.int64
    np.testing.assert_array_equal(opened["x"].read(), state["x"].astype(dtype))
    np.testing.assert_array_equal(opened["ids"].read(), state["ids"])


def test_tensors_are_aligned_and_the_header_padded(tmp_path):
    path = tmp_path / "x.safetensors"
    write_weights({"a": np.zeros(3, np.int8), "b": np.zeros(1, np.float64), "c": np.zeros(1, np.float16)}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert [header[name]["data_offsets"] for name in "bca"] == [[0, 8], [8, 10], [10, 13]]


def test_an_empty_file_and_names_of_any_script(tmp_path):
    write_weights({}, tmp_path / "x.safetensors")
    assert open_weights(tmp_path / "x.safetensors") == {} == safetensors.numpy.load_file(tmp_path / "x.safetensors")
    write_weights({"<neu-ü>\n": np.ones(1)}, tmp_path / "x.safetensors")
    assert list(safetensors.numpy.load_file(tmp_path / "x.safetensors")) == ["<neu-ü>\n"]


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        (np.array([0, np.nan]), None),
        (np.array([-np.inf]), None),
        (np.array([1e5]), np.float16),
        (np.zeros(1, np.complex128), None),
        (np.array(["x"]), None),
    ],
)
def test_a_failed_write_leaves_the_earlier_file(tmp_path, bad, dtype):
    path = tmp_path / "x.safetensors"
    write_weights({"good": np.ones(2, np.float32)}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"tensor bad\.weight "):
        write_weights({"a": np.ones(9), "bad.weight": bad}, path, dtype)
    with pytest.raises(ValueError, match="tensor __metadata__ "):
        write_weights({"__metadata__": np.ones(1)}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


def test_absent_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        open_weights(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="absent"):
        write_weights({}, tmp_path / "absent" / "x.safetensors")


def test_only_one_tensor_is_in_memory_while_writing(tmp_path):
    state = {f"t{i:02d}": LazyTensor((10**6,), np.float32, lambda i=i: np.full(10**6, i, np.float32)) for i in range(9)}
    tracemalloc.start()
    write_weights(state, tmp_path / "x.safetensors", np.float16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 4e6
    assert open_weights(tmp_path / "x.safetensors")["t07"].read()[0] == 7


def test_safetensors_need_no_pytorch(tmp_path, monkeypatch):
    safetensors.numpy.save_file({"a": np.arange(3.0)}, tmp_path / "x.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    write_weights(open_weights(tmp_path / "x.safetensors"), tmp_path / "y.safetensors")
    assert open_weights(tmp_path / "y.safetensors")["a"].read().sum() == 3
    with pytest.raises(ValueError, match=r"x\.bin needs PyTorch"):
        open_weights(tmp_path / "x.bin")
