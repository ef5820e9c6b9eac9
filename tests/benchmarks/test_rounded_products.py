"""benchmarks/rounded_products.py: each factor of a product rounded, nothing else, before and after differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.ops import conv2d, upsample_conv2d
from benchmarks.rounded_products import BFLOAT16_BITS, TENSORFLOAT32_BITS, round_products


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def keep_bits(x, bits, truncate):
    """By float64: what rounding to `bits` stored digits of the mantissa is."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    scaled = mantissa * 2.0 ** (bits + 1)
    return jnp.float32(np.ldexp((np.trunc if truncate else np.round)(scaled) / 2.0 ** (bits + 1), exponent))


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("bits", [TENSORFLOAT32_BITS, BFLOAT16_BITS])
def test_factors_keep_so_many_bits(bits, truncate):
    a, b = normal(0, 5, 7), normal(1, 7, 3)
    found = jax.jit(round_products(jnp.matmul, bits, truncate))(a, b)
    expected = keep_bits(a, bits, truncate) @ keep_bits(b, bits, truncate)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(found - a @ b).max() > 1e-4


def test_bfloat16_bits_are_those_of_the_type():
    a, b = normal(0, 5, 7), normal(1, 7, 3)
    found = round_products(jnp.matmul, BFLOAT16_BITS)(a, b)
    expected = jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def doubled(x, kernel):
    return conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel)


def ours(x, kernel):
    return conv2d(x, kernel, padding=((1, 1), (1, 1)))


@pytest.mark.parametrize("form, direct", [(ours, conv), (upsample_conv2d, doubled)])
def test_the_factors_of_convolutions_and_their_gradients_are_rounded(form, direct):
    x, kernel = normal(0, 2, 8, 8, 32), normal(1, 3, 3, 32, 32)

    def gradients(form):
        def run(x, kernel):
            y, transpose = jax.vjp(form, x, kernel)
            return y, *transpose(jnp.sin(y))

        return run

    found = jax.jit(round_products(gradients(form), BFLOAT16_BITS))(x, kernel)
    expected = jax.jit(round_products(gradients(direct), BFLOAT16_BITS))(x, kernel)
    for one, other, exact in zip(found, expected, jax.jit(gradients(direct))(x, kernel), strict=True):
        # The sums before a factor's rounding differ in their last bits, which few factors notice.
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-2)
        assert np.abs(one - exact).max() > 1e-2


def test_tangents_are_rounded_as_primals_are():
    a, b, tangent = normal(0, 5, 7), normal(1, 7, 3), normal(2, 5, 7)

    def derivative(a, b, tangent):
        return jax.jvp(lambda a: jnp.sin(a @ b), (a,), (tangent,))[1]

    found = round_products(derivative, BFLOAT16_BITS)(a, b, tangent)
    a, b, tangent = (keep_bits(x, BFLOAT16_BITS, False) for x in (a, b, tangent))
    np.testing.assert_allclose(found, jnp.cos(a @ b) * (tangent @ b), rtol=1e-5, atol=1e-5)


def test_products_inside_of_calls_scans_and_checkpoints():
    a, xs = normal(0, 5, 5), normal(1, 4, 5)

    def fn(a, xs):
        step = jax.checkpoint(jax.jit(lambda carry, x: (jax.nn.silu(a @ carry) + x, carry)))
        return jax.lax.scan(step, xs[0], xs[1:])

    found = jax.jit(round_products(fn, BFLOAT16_BITS))(a, xs)
    rounded, carry, carries = keep_bits(a, BFLOAT16_BITS, False), xs[0], []
    for x in xs[1:]:
        carries.append(carry)
        carry = jax.nn.silu(rounded @ keep_bits(carry, BFLOAT16_BITS, False)) + x
    jax.tree.map(
        lambda mine, theirs: np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5),
        found,
        (carry, jnp.stack(carries)),
    )


def test_only_products_are_touched():
    def fn(x, key):
        return {"sum": jnp.sum(jnp.exp(x)), "noise": jax.random.normal(key, (3,))}

    x, key = normal(0, 5, 7), jax.random.key(3)
    found, expected = jax.jit(round_products(fn, BFLOAT16_BITS))(x, key), jax.jit(fn)(x, key)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_other_dtypes_stay():
    a = normal(0, 4, 4).astype(jnp.bfloat16)
    np.testing.assert_array_equal(round_products(jnp.matmul, 3)(a, a), a @ a)


def test_products_inside_of_loops_and_branches():
    def fn(a, x):
        x = jax.lax.fori_loop(0, 3, lambda i, x: a @ x, x)
        _, x = jax.lax.while_loop(lambda state: state[0] < 2, lambda state: (state[0] + 1, a @ state[1]), (0, x))
        return jax.lax.cond(x[0] < jnp.inf, lambda x: a @ x, lambda x: x, x)

    a, x = normal(0, 4, 4), normal(1, 4)
    found = jax.jit(round_products(fn, BFLOAT16_BITS))(a, x)
    for _ in range(6):
        x = keep_bits(a, BFLOAT16_BITS, False) @ keep_bits(x, BFLOAT16_BITS, False)
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-5)


def test_products_that_it_cannot_reach_are_refused():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    spec = jax.sharding.PartitionSpec()
    fn = jax.shard_map(lambda a: a @ a, mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(TypeError, match="inside of shard_map"):
        round_products(fn, BFLOAT16_BITS)(normal(0, 4, 4))
