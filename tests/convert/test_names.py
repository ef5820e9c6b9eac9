"""The renaming between PyTorch and Flax parameters."""

import numpy as np
import pytest
import torch

from attrib_jax.convert.weights.names import from_torch, name_table, text_encoder_names, to_torch, torch_name, vae_names
from attrib_jax.convert.weights.tensors import LazyTensor

UNREAD = LazyTensor((2, 2), np.float32, lambda: pytest.fail("read"))


TRANSFORMER = "down_blocks.0.attentions.10.transformer_blocks.0"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("down_blocks_0/attentions_10/transformer_blocks_0/attn2/to_k/kernel", f"{TRANSFORMER}.attn2.to_k.weight"),
        ("mid_block/attentions_0/to_out_0/bias", "mid_block.attentions.0.to_out.0.bias"),
        ("time_embedding/linear_1/kernel", "time_embedding.linear_1.weight"),
        ("down_blocks_1/resnets_0/norm1/scale", "down_blocks.1.resnets.0.norm1.weight"),
        ("text_model/embeddings/token_embedding/embedding", "text_model.embeddings.token_embedding.weight"),
        ("text_model/encoder/layers_11/layer_norm2/scale", "text_model.encoder.layers.11.layer_norm2.weight"),
        ("ff/net_0/proj/kernel", "ff.net.0.proj.weight"),
    ],
)
def test_torch_name(path, name):
    *modules, leaf = path.split("/")
    tree = {leaf: np.zeros(1)}
    for module in reversed(modules):
        tree = {module: tree}
    assert torch_name(path) == name and name_table(tree) == {name: path}


def test_transposed_kernels_compute_what_torch_computes():
    rng = np.random.default_rng(0)
    inputs, kernel = rng.normal(size=(2, 3)), rng.normal(size=(3, 5))
    linear = torch.nn.functional.linear(torch.from_numpy(inputs), torch.from_numpy(to_torch("fc1/kernel", kernel)))
    np.testing.assert_allclose(linear.numpy(), inputs @ kernel, rtol=1e-12)

    image, filters = rng.normal(size=(1, 2, 4, 3)), rng.normal(size=(2, 3, 3, 5))  # NHWC, HWIO
    weight = torch.from_numpy(to_torch("conv_in/kernel", filters))
    convolved = torch.nn.functional.conv2d(torch.from_numpy(image.transpose(0, 3, 1, 2)), weight).numpy()
    expected = [np.einsum("hwi,hwio->o", image[0, :, column : column + 3], filters) for column in range(2)]
    np.testing.assert_allclose(convolved[0, :, 0].T, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("path", "shape"), [("a/kernel", (2, 3)), ("a/kernel", (3, 2, 4, 5)), ("a/embedding", (4, 2)), ("a/scale", (3,))]
)
def test_from_torch_inverts_to_torch(path, shape):
    array = np.random.default_rng(0).normal(size=shape)
    stored = to_torch(path, array)
    assert stored.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(from_torch(path, stored), array)
    if path == "a/embedding":
        assert stored.shape == shape


def test_text_encoder_names_accept_both_layouts():
    old = {"text_model.embeddings.position_ids": 0, "text_model.final_layer_norm.weight": UNREAD}
    new = {"embeddings.position_ids": 0, "final_layer_norm.weight": UNREAD}
    assert text_encoder_names(old) == text_encoder_names(new) == {"text_model.final_layer_norm.weight": UNREAD}


def test_vae_names_accept_the_old_attention():
    attention = "encoder.mid_block.attentions.0"
    renames = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    old = {f"{attention}.{name}.weight": name for name in renames} | {f"{attention}.query.bias": UNREAD}
    kept = {f"{attention}.group_norm.weight": 0, "decoder.mid_block.attentions.0.to_out.0.bias": 1}
    new = {f"{attention}.{new}.weight": name for name, new in renames.items()} | {f"{attention}.to_q.bias": UNREAD}
    assert vae_names(old | kept) == kept | new
