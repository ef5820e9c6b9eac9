"""PyTorch files: what torch.save writes is read back, and nothing in a file is ever executed."""

import collections
import os
import sys
import types
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attrib_jax.convert.weights.torch_files import open_torch
from tests.convert.files import ATTACKS, CANARY, Call, altered

CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"
KINDS = {"Best": object, "Dict": dict}


def as_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return np.asarray(tensor.detach().resolve_conj())


def test_tensors_of_every_kind(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = OrderedDict(
        whole=base,
        shared=base[1:3],
        transposed=base.T,
        strided=base[:, ::2],
        parameter=torch.nn.Parameter(base + 1),
        double=base.double(),
        half=base.bfloat16(),
        half_row=base.bfloat16()[1:2, 3:],
        ids=torch.tensor([1, 2]),
        scalar=torch.tensor(3.5),
        half_scalar=torch.tensor(1.5, dtype=torch.bfloat16),
        empty=torch.zeros(0, 3),
        repeated=torch.ones(1).expand(5),
        conjugate=torch.tensor([1 + 2j]).conj(),
    )
    torch.save(state, tmp_path / "x.bin")
    tensors, plain = open_torch(tmp_path / "x.bin")
    assert list(tensors) == list(state) and plain == {}
    for name, tensor in state.items():
        expected = as_numpy(tensor)
        assert (tensors[name].shape, tensors[name].dtype) == (expected.shape, expected.dtype)
        for _ in range(2):
            read = tensors[name].read()
            assert read.dtype == expected.dtype and read.flags.c_contiguous
            np.testing.assert_array_equal(read, expected, err_msg=name)
            read[...] = 0  # a copy: neither the file nor a tensor that shares its storage changes


def save_with_foreign_objects(path, wrap) -> None:
    """Writes a checkpoint with objects of a module that is not there when it is loaded."""
    names = CALLBACK.split(".")
    modules = {".".join(names[: i + 1]): types.ModuleType(names[i]) for i in range(len(names))}
    callback, hparams = (type(name, (kind,), {"__module__": CALLBACK}) for name, kind in KINDS.items())
    modules[CALLBACK].Best, modules[CALLBACK].Dict = callback, hparams
    monitor = callback()
    monitor.best = 1.5
    content = {
        "epoch": 3,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {callback: {"best_model_score": np.float64(0.5), "monitor": monitor}},
        "hyper_parameters": hparams(lr=1e-4, betas=(0.9, 0.999)),
        "metrics": collections.defaultdict(list, loss=[1.0]),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
    }
    sys.modules.update(modules)
    try:
        torch.save(content | wrap(OrderedDict(weight=torch.arange(3.0), bias=torch.ones(2).half())), path)
    finally:
        for name in modules:
            del sys.modules[name]


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_training_checkpoint_loads_without_its_framework(tmp_path, key):
    save_with_foreign_objects(tmp_path / "x.ckpt", lambda state: {key: state})
    with pytest.raises(Exception, match="pytorch_lightning"):
        torch.load(tmp_path / "x.ckpt", weights_only=True)
    trusted = set(torch.serialization.get_safe_globals())
    tensors, plain = open_torch(tmp_path / "x.ckpt")
    assert plain == {"epoch": 3, "global_step": 470000, "pytorch-lightning_version": "1.4.2"}
    assert {name: x.read().tolist() for name, x in tensors.items()} == {"weight": [0, 1, 2], "bias": [1, 1]}
    assert CALLBACK not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == trusted


def test_wrapped_twice_and_nested(tmp_path):
    shared = {"x": torch.ones(1)}
    state = {"unet": {"a.weight": torch.zeros(2)}, "token": {"<new1>": torch.ones(3)}, "one": shared, "two": shared}
    state["loop"] = state
    torch.save({"state_dict": {"model": state, "lr": 0.5}, "step": 7}, tmp_path / "x.bin")
    tensors, plain = open_torch(tmp_path / "x.bin")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "unet.a.weight": (2,),
        "token.<new1>": (3,),
        "one.x": (1,),
    }
    assert plain == {"lr": 0.5, "step": 7}


PLACES = {
    "top": lambda attack: attack,
    "value": lambda attack: {"weight": torch.ones(2), "x": attack},
    "key": lambda attack: {"weight": torch.ones(2), attack: 1},
    "nested": lambda attack: {"state_dict": {"weight": torch.ones(2), "x": [{"y": (attack,)}]}},
    "wrapper": lambda attack: {"state_dict": attack, "weight": torch.ones(2)},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_executed(tmp_path, monkeypatch, attack, place, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save(PLACES[place](ATTACKS[attack]()), "x.ckpt", _use_new_zipfile_serialization=zipped)
    try:
        tensors, _ = open_torch("x.ckpt")
    except ValueError as error:
        assert "x.ckpt" in str(error) and "weights_only=False" not in str(error)
    else:
        assert {name: tensor.read().tolist() for name, tensor in tensors.items()} == {"weight": [1, 1]}
    assert not os.path.exists(CANARY)


@pytest.mark.parametrize("attack", ["os.system", "eval", "exec", "open", "makedirs", "map"])
def test_the_attacks_are_real(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    torch.save(ATTACKS[attack](), "x.ckpt")
    torch.load("x.ckpt", weights_only=False)
    assert os.path.exists(CANARY)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
        ({}, "no tensors by name.*none"),
        ({"step": 1, "x": [torch.ones(1)]}, "no tensors by name.*'step', 'x'"),
        ({"a": torch.eye(3).to_sparse()}, "tensor a .*sparse_coo"),
        ({"a": torch.empty(3, device="meta")}, "tensor a .*meta"),
        ({"a": torch.ones(1).expand(10**13)}, r"tensor a of shape \(10000000000000,\)"),
        ({"a": torch.ones(1), "x": Call(bytearray, 10**15)}, "damaged"),
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear.*state_dict"),
        ({"model": torch.nn.Linear(2, 2), "step": 1}, r"torch\.nn\.modules\.linear\.Linear.*state_dict"),
        (torch.jit.script(torch.nn.Linear(2, 2)), "TorchScript"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, reason):
    save = torch.jit.save if isinstance(content, torch.jit.ScriptModule) else torch.save
    save(content, str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match=rf"x\.pt.*{reason}"):
        open_torch(tmp_path / "x.pt")


def test_an_absent_file_and_an_old_pytorch_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"x\.bin"):
        open_torch(tmp_path / "x.bin")
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    monkeypatch.delattr(torch.serialization, "get_unsafe_globals_in_checkpoint")
    with pytest.raises(ValueError, match=r"PyTorch 2\.6"):
        open_torch(tmp_path / "x.bin")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_are_named(tmp_path, zipped):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(10_000)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for size in (1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"x\.bin is damaged"):
            open_torch(path)


def rewritten(path, change, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_altered_pickles_give_tensors_or_a_message(tmp_path, data):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.arange(6.0).reshape(2, 3)[:, :2], "b": torch.nn.Parameter(torch.ones(2).half())}, path)
    # With the checksum of the altered pickle, so that it is read.
    rewritten(path, lambda content: altered(data, content))
    try:
        tensors, _ = open_torch(path)
    except ValueError as error:
        assert "x.bin" in str(error)
        return
    assert sum(tensor.read().nbytes for tensor in tensors.values()) <= 2 * path.stat().st_size


@pytest.mark.parametrize(
    ("change", "compression", "reason"),
    [
        (lambda content: content, zipfile.ZIP_DEFLATED, "compressed"),
        (lambda content: content.replace(b"K\xc8", b"J\xff\xff\xff\x7f"), zipfile.ZIP_STORED, "damaged"),
    ],
    ids=["compressed", "200 numbers said to be 2**31 - 1"],
)
def test_other_archives_are_refused(tmp_path, change, compression, reason):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(200)}, path)
    rewritten(path, change, compression)
    with pytest.raises(ValueError, match=rf"x\.bin.*{reason}"):
        open_torch(path)
