"""The Fisher information as a file: ours, and dicts by PyTorch names."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attrib_jax.core.weights import flatten_names, select_weights
from attrib_jax.curvature import Diagonal
from attrib_jax.curvature.diagonal import GRADIENT_SCALE
from attrib_jax.curvature.fisher_files import read_fisher_file, write_fisher
from attrib_jax.jobs.curvature import fisher_file, load_fisher
from attrib_jax.storage.files import DamagedFileError, StorageError, write_arrays

SHAPES = {
    "down.0.attn1.to_q": (4, 4),
    "down.0.attn2.to_q": (4, 4),
    "down.0.attn2.to_k": (4, 6),
    "down.0.attn2.to_v": (4, 6),
    "down.0.attn2.to_out.0": (4, 4),
    "conv_in": (4, 2, 3, 3),
}
KV = ("down.0.attn2.to_k.weight", "down.0.attn2.to_v.weight")


def torch_fisher() -> dict[str, torch.Tensor]:
    """A published file: float64, by names of a whole UNet, values far below what float32 holds."""
    torch.manual_seed(0)
    fisher = {}
    for name, shape in SHAPES.items():
        fisher[f"{name}.weight"] = 10.0 ** (-60 * torch.rand(shape, dtype=torch.float64))
        fisher[f"{name}.bias"] = 1e-20 * torch.rand(shape[0], dtype=torch.float64)
    fisher[KV[0]][0, 0] = 0
    return fisher


def model_params():
    """The model's weights, in Flax layout."""
    tree = {}
    for name, shape in SHAPES.items():
        *modules, last = name.replace("down.0", "down_0").replace("to_out.0", "to_out_0").split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        axes = (1, 0) if len(shape) == 2 else (2, 3, 1, 0)
        node[last] = {"kernel": jnp.zeros([shape[axis] for axis in axes]), "bias": jnp.zeros(shape[0])}
    return tree


def selected(subset: str):
    params = model_params()
    for name in ("to_k", "to_v"):
        del params["down_0"]["attn2"][name]["bias"]
    return select_weights(params, subset)[0]


def published(with_kv_biases: bool = False) -> dict[str, torch.Tensor]:
    skipped = () if with_kv_biases else ("down.0.attn2.to_k.bias", "down.0.attn2.to_v.bias")
    return {name: x for name, x in torch_fisher().items() if name not in skipped}


SAVERS = {
    "fisher_info.pt": torch.save,
    "older.pt": lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False),
    "fisher_info.safetensors": safetensors.torch.save_file,
}


@pytest.mark.parametrize("name", SAVERS)
@pytest.mark.parametrize("subset", ["cross-attn-kv", "cross-attn", "attn", "all"])
def test_published_file_gives_the_selected_subset(tmp_path, name, subset):
    SAVERS[name](published(), tmp_path / name)
    fisher = load_fisher(tmp_path / name, selected(subset))
    assert fisher.gradient_scale == GRADIENT_SCALE
    assert jax.tree.structure(fisher.tree) == jax.tree.structure(selected(subset))
    expected = published()
    for path, found in fisher.to_flat().items():
        torch_path = path.replace("down_0", "down.0").replace("to_out_0", "to_out.0").replace("/", ".")
        values = expected[torch_path.replace("kernel", "weight")].numpy()
        values = values.transpose(2, 3, 1, 0) if values.ndim == 4 else values.T
        # Relative error of float32's rounding, also at 1e-57.
        large = values > 1e-57
        np.testing.assert_allclose(found[large], values[large], rtol=6e-8, atol=0)
        np.testing.assert_array_equal(found[values == 0], 0)


def test_file_of_the_key_and_value_weights_alone(tmp_path):
    torch.save({name: torch_fisher()[name] for name in KV}, tmp_path / "kv.pt")
    tree = load_fisher(tmp_path / "kv.pt", selected("cross-attn-kv")).tree
    assert flatten_names(tree).keys() == flatten_names(selected("cross-attn-kv")).keys()


def test_values_that_float32_cannot_hold_are_counted(tmp_path, caplog):
    fisher = {name: torch.full((4, 6), 1e-20, dtype=torch.float64) for name in KV}
    fisher[KV[1]][0, :3] = 1e-70
    torch.save(fisher, tmp_path / "x.pt")
    load_fisher(tmp_path / "x.pt", selected("cross-attn-kv"))
    assert f"3 of 24 values of {KV[1]} " in caplog.text and KV[0] not in caplog.text


def test_other_weights_are_an_error_that_lists_both_sides(tmp_path):
    fisher = published()
    fisher[KV[0]] = torch.zeros(4, 7, dtype=torch.float64)
    fisher["up.0.attn2.to_k.weight"] = fisher.pop(KV[1])
    torch.save(fisher, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="does not fit the selected weights") as error:
        load_fisher(tmp_path / "x.pt", selected("cross-attn-kv"))
    for part in (
        "x.pt",
        "1 missing: down_0/attn2/to_v/kernel",
        "1 unexpected: up.0.attn2.to_k.weight",
        "down_0/attn2/to_k/kernel (7, 4), not (6, 4)",
    ):
        assert part in str(error.value)
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "y.pt")
    with pytest.raises(ValueError, match=r"2 missing: .*; 1 unexpected: layer\.weight"):
        load_fisher(tmp_path / "y.pt", selected("cross-attn-kv"))
    # A bias that the model does not have is of another model.
    torch.save(published(with_kv_biases=True), tmp_path / "z.pt")
    with pytest.raises(ValueError, match=r"1 unexpected: down\.0\.attn2\.to_v\.bias"):
        load_fisher(tmp_path / "z.pt", selected("cross-attn-kv"))


@pytest.mark.parametrize("value", [-1e-30, np.nan, np.inf])
def test_impossible_values_name_the_tensor(tmp_path, value):
    fisher = published()
    fisher[KV[1]][2, 3] = value
    torch.save(fisher, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: tensor {KV[1]} has 1 of 24 values that are negative, NaN or inf"):
        load_fisher(tmp_path / "x.pt", selected("cross-attn-kv"))
    with pytest.raises(ValueError, match=f"{KV[1]} has 1 of 24"):
        write_fisher(read_fisher_file(tmp_path / "x.pt"), tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()
    fisher[KV[1]] = torch.zeros(4, 6, dtype=torch.int64)
    torch.save(fisher, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: tensor {KV[1]} has type int64"):
        load_fisher(tmp_path / "x.pt", selected("cross-attn-kv"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("subset", ["cross-attn-kv", "all"])
def test_ours_goes_out_and_comes_back_to_the_bit(tmp_path, suffix, subset):
    like = selected(subset)
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: jnp.asarray(10.0 ** rng.uniform(-37, 37, x.shape), jnp.float32), like)
    ours = Diagonal(tree, GRADIENT_SCALE)
    write_arrays(tmp_path / "fisher.safetensors", ours.to_flat(), {"samples": 3})
    stage = load_fisher(fisher_file(tmp_path), like)
    count = write_fisher(read_fisher_file(fisher_file(tmp_path)), tmp_path / f"out{suffix}")
    assert count == len(jax.tree.leaves(tree))
    write_fisher(ours, tmp_path / f"direct{suffix}")
    for found in (stage, *(load_fisher(tmp_path / f"{name}{suffix}", like) for name in ("out", "direct"))):
        assert jax.tree.structure(found) == jax.tree.structure(ours)
        jax.tree.map(np.testing.assert_array_equal, found.tree, ours.tree)
    read = torch.load if suffix == ".pt" else safetensors.torch.load_file
    stored = read(tmp_path / f"out{suffix}")
    key = stored["down.0.attn2.to_k.weight"]
    assert key.dtype == torch.float64
    np.testing.assert_array_equal(key.numpy().T, ours.to_flat()["down_0/attn2/to_k/kernel"])


def test_one_form_of_published_file_to_the_other(tmp_path):
    torch.save(published(), tmp_path / "a.pt")
    write_fisher(read_fisher_file(tmp_path / "a.pt"), tmp_path / "b.safetensors")
    write_fisher(read_fisher_file(tmp_path / "b.safetensors"), tmp_path / "c.pt")
    found = torch.load(tmp_path / "c.pt")
    assert found.keys() == published().keys()
    assert all(torch.equal(found[name], x) for name, x in published().items())


def test_damaged_files_are_named(tmp_path):
    write_arrays(tmp_path / "ours.safetensors", {"attn2/to_k/kernel": np.ones((2, 2))}, {})
    torch.save(published(), tmp_path / "theirs.pt")
    safetensors.torch.save_file(published(), tmp_path / "theirs.safetensors")
    for path in list(tmp_path.iterdir()):
        content = path.read_bytes()
        for size in (0, 5, 40, len(content) - 8):
            path.write_bytes(content[:size])
            with pytest.raises((ValueError, StorageError), match=path.name):
                load_fisher(path, selected("cross-attn-kv"))
    # Whoever fits F again when its file is damaged tells by this error.
    with pytest.raises(DamagedFileError):
        load_fisher(tmp_path / "ours.safetensors", selected("cross-attn-kv"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_fisher_file(tmp_path / "nowhere.pt")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_damage_gives_a_message(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x.pt"
    name = data.draw(st.sampled_from(sorted(SAVERS)))
    SAVERS[name]({name: torch_fisher()[name] for name in KV}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        load_fisher(path, selected("cross-attn-kv"))
    except (ValueError, StorageError) as error:
        assert "x.pt" in str(error)


def test_without_pytorch_safetensors_still_work(tmp_path, monkeypatch):
    torch.save(published(), tmp_path / "x.pt")
    safetensors.torch.save_file(published(), tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    fisher = load_fisher(tmp_path / "x.safetensors", selected("cross-attn-kv"))
    write_fisher(fisher, tmp_path / "y.safetensors")
    for call in (
        lambda: load_fisher(tmp_path / "x.pt", selected("cross-attn-kv")),
        lambda: write_fisher(fisher, tmp_path / "y.pt"),
    ):
        with pytest.raises(ValueError, match="needs PyTorch: pip install torch"):
            call()
    with pytest.raises(ValueError, match=r"'\.npz'.*\.safetensors, \.pt"):
        write_fisher(fisher, tmp_path / "y.npz")
