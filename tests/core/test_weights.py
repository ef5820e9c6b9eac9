"""Weight subsets: which leaves each one holds, and that splitting and merging lose nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.core.weights import count_weights, flatten_names, merge_weights, select_weights, unflatten_names
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


def named_tree(*names):
    return unflatten_names({name: np.zeros((2, 2), np.float32) for name in names})


TEXT_KV = ("attn/add_k_proj/kernel", "attn/add_k_proj/bias", "attn/add_v_proj/kernel", "attn/add_v_proj/bias")
JOINT = (*TEXT_KV, "attn/add_q_proj/kernel", "attn/norm_added_q/scale", "attn/to_q/kernel", "attn/to_k/kernel")


def test_subsets_of_stable_diffusion_3_take_no_self_attention_and_nothing_without_effect():
    first = [f"transformer_blocks_0/{name}" for name in (*JOINT, "attn/to_add_out/kernel")]
    image = [f"transformer_blocks_0/attn2/{name}" for name in ("to_k/kernel", "to_k/bias", "to_v/kernel")]
    last = [f"transformer_blocks_1/{name}" for name in JOINT]
    unused = {f"transformer_blocks_1/attn/{name}" for name in ("add_q_proj/kernel", "norm_added_q/scale")}
    others = [f"transformer_blocks_0/{name}/net_2/kernel" for name in ("ff", "ff_context")]
    params = named_tree(*first, *image, *last, *others, "pos_embed/pos_embed")
    chosen = {subset: {*flatten_names(select_weights(params, subset)[0])} for subset in EXPECTED}
    assert chosen["cross-attn-kv"] == {f"transformer_blocks_{block}/{name}" for block in (0, 1) for name in TEXT_KV}
    assert chosen["cross-attn"] == {*first, *last} - unused
    assert chosen["attn"] == {*first, *image, *last} - unused
    assert chosen["mlp"] == {*others}
    assert chosen["all"] == {*first, *image, *last, *others} - unused


def test_subsets_of_flux_take_shared_matrices_as_attention_alone():
    double = [f"transformer_blocks_0/{name}" for name in (*JOINT, "attn/to_add_out/kernel")]
    single = [f"single_transformer_blocks_{block}/attn/to_{name}/kernel" for block in (0, 1) for name in "qkv"]
    params = named_tree(*double, *single, "single_transformer_blocks_1/proj_out/kernel")
    assert {*flatten_names(select_weights(params, "cross-attn-kv")[0])} == {
        *(n for n in double if "add_k" in n or "add_v" in n)
    }
    assert {*flatten_names(select_weights(params, "cross-attn")[0])} == {*double}
    assert {*flatten_names(select_weights(params, "attn")[0])} == {*double, *single}
    assert not flatten_names(select_weights(params, "all")[1])


def test_a_bias_of_all_keys_of_a_softmax_is_in_no_subset():
    leaves = ("to_k/kernel", "to_k/bias", "to_v/kernel", "to_v/bias")
    params = named_tree(*(f"transformer_blocks_0/attn{layer}/{leaf}" for layer in (1, 2) for leaf in leaves))
    for subset in EXPECTED.keys() - {"mlp"}:
        selected, rest = (flatten_names(half) for half in select_weights(params, subset))
        assert not any("to_k/bias" in name for name in selected)
        assert "transformer_blocks_0/attn2/to_v/bias" in selected


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
        ({"attn2": {"to_k": {"kernel": np.zeros((2, 2))}}}, "cross-attn-kv", "keys without values.*attn2/to_k/kernel"),
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
