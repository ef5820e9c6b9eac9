"""Weight subsets: which leaves each one holds, and that splitting and merging lose nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.core.weights import count_weights, flatten_names, merge_weights, select_weights
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig

BLOCK = "down_blocks_0/attentions_0/transformer_blocks_0"
CROSS = {f"{BLOCK}/attn2/{name}" for name in ("to_q/kernel", "to_out_0/kernel", "to_out_0/bias")}
CROSS_KV = {f"{BLOCK}/attn2/{name}" for name in ("to_k/kernel", "to_v/kernel")}
SELF = {
    f"{BLOCK}/attn1/{name}"
    for name in ("to_q/kernel", "to_k/kernel", "to_v/kernel", "to_out_0/kernel", "to_out_0/bias")
}
OTHER = {
    "conv_in/kernel",
    "conv_in/bias",
    "down_blocks_0/attentions_0/proj_in/kernel",
    "down_blocks_0/attentions_0/proj_out/bias",
    f"{BLOCK}/norm1/scale",
    f"{BLOCK}/norm2/bias",
    f"{BLOCK}/ff/net_0/proj/kernel",
    # Names that a loose pattern would take for attention weights.
    "extra_attn2/to_k/kernel",
    f"{BLOCK}/attn2_norm/to_k/kernel",
    "attn2",
}
EXPECTED = {
    "cross-attn-kv": CROSS_KV,
    "cross-attn": CROSS_KV | CROSS,
    "attn": CROSS_KV | CROSS | SELF,
    "mlp": {f"{BLOCK}/ff/net_0/proj/kernel"},
    "all": CROSS_KV | CROSS | SELF | OTHER,
}


def small_tree():
    params = {}
    for index, name in enumerate(sorted(CROSS_KV | CROSS | SELF | OTHER)):
        *parents, last = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.full((2, 3) if last == "kernel" else (3,), index, np.float32)
    return params


@pytest.mark.parametrize("subset", EXPECTED)
def test_subset_holds_exactly_its_leaves(subset):
    params = small_tree()
    selected, rest = select_weights(params, subset)
    assert set(flatten_names(selected)) == EXPECTED[subset]
    assert set(flatten_names(rest)) == EXPECTED["all"] - EXPECTED[subset]
    merged = merge_weights(selected, rest)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True))


def test_merge_works_under_jit_and_grad():
    selected, rest = select_weights(small_tree(), "cross-attn-kv")

    @jax.jit
    @jax.grad
    def gradient(selected, rest):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(merge_weights(selected, rest)))

    for got, leaf in zip(jax.tree.leaves(gradient(selected, rest)), jax.tree.leaves(selected), strict=True):
        np.testing.assert_array_equal(got, 2 * leaf)


@pytest.mark.parametrize(
    ("params", "subset", "named"),
    [
        (small_tree(), "cross-attn-vk", "weights 'cross-attn-vk'.*'cross-attn-kv'"),
        ({"conv_in": {"kernel": np.zeros((2, 2))}}, "attn", "weights='attn'.*conv_in/kernel"),
    ],
)
def test_a_subset_of_nothing_is_refused(params, subset, named):
    with pytest.raises(ValueError, match=named):
        select_weights(params, subset)


def test_halves_that_overlap_are_refused():
    selected, rest = select_weights(small_tree(), "attn")
    with pytest.raises(ValueError, match="2 parameters.*attn2/to_k/kernel"):
        merge_weights(select_weights(small_tree(), "cross-attn-kv")[0], selected)
    assert merge_weights({}, rest) == rest


def test_mscoco_unet_has_32_matrices_of_7_million_values():
    """METHOD.md section 6: KV weights of the MSCOCO model, 32 matrices, 7.08 M values."""
    config = UNetConfig(
        sample_size=16, block_out_channels=(128, 256, 256, 256), cross_attention_dim=1024, attention_head_dim=8
    )
    inputs = jnp.zeros((1, 16, 16, 4)), jnp.zeros((1,), jnp.int32), jnp.zeros((1, 77, 1024))
    shapes = jax.eval_shape(UNet2DConditionModel(config).init, jax.random.key(0), *inputs)["params"]
    assert count_weights(shapes).values == pytest.approx(57.4e6, rel=1e-3)
    selected, rest = select_weights(shapes, "cross-attn-kv")
    assert count_weights(selected) == (32, 7_077_888)
    attention, others = select_weights(shapes, "attn")
    # Each of the 16 attention layers of a kind has to_q, to_k, to_v and to_out kernels and one bias, and no more.
    assert len(flatten_names(attention)) == 2 * 16 * 5
    assert len(flatten_names(select_weights(shapes, "cross-attn")[0])) == 16 * 5
    assert not any("attn" in name for name in flatten_names(others))
    assert count_weights(selected).values + count_weights(rest).values == count_weights(shapes).values
