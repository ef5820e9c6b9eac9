"""Random keys: every random number of the library is a pure function of a seed and of what it is for.

The noise of a loss depends on (loss seed, row id, flip, caption, timestep) and on nothing else, so that a score never
depends on batch size, order, subset, padding, device count or host count (METHOD.md section 2).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.core.fingerprint import name_hash

_IMPL = "threefry2x32"
_MAX_ROW_ID = 2**31 - 1
_MAX_SEED = 2**32 - 1
_INTEGERS = "expected integers, so that two examples never share their noise"


def loss_key(seed: int) -> jax.Array:
    """The key that `example_noise` starts from: one typed threefry key, for a seed from 0 to 2^32 - 1.

    Raises:
        ValueError: `seed` is not an integer in that range. (A larger one would lose its upper half, or not, according
            to whether 64-bit types are enabled.)
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"seed is {seed!r}; expected an integer from 0 to {_MAX_SEED}")
    return jax.random.key(int(seed), impl=_IMPL)


def purpose_key(seed: int, purpose: str) -> jax.Array:
    """A key for one named purpose ("fisher", "query", "sample", "train"), independent of the other purposes' keys.

    The name is hashed to a fold of 2^31 or more, which no row id reaches: for equal seeds the streams of a purpose
    and of `example_noise` do not meet.

    Raises:
        ValueError: a bad `seed`, as in `loss_key`, or an empty `purpose`.
    """
    if not purpose:
        raise ValueError("purpose is empty; expected a name such as 'fisher', so that streams stay apart")
    return jax.random.fold_in(loss_key(seed), name_hash(purpose) | 2**31)


def example_noise(
    key: jax.Array,
    row_id: jax.Array | int,
    flip: jax.Array | int,
    caption: jax.Array | int,
    timesteps: jax.Array | Sequence[int],
    shape: tuple[int, ...],
) -> jax.Array:
    """Standard normal noise of one example at S timesteps -> (S, *shape) float32.

    Pure, jit-able and vmappable over every array argument. The noise of one timestep is the same whichever other
    timesteps are drawn beside it. XLA may fuse the last operations with what uses the noise, which can change the
    last bit of a loss: losses to be subtracted must come from one compiled function.

    Args:
        key: a scalar threefry key, see `loss_key`.
        row_id: () integer from 0 to 2^31 - 1, the example's id in its data set (not its place in a batch).
        flip: () 1 for the mirror image, else 0.
        caption: () integer, which of the example's captions.
        timesteps: (S,) integers.
        shape: of one latent, (h, w, c).

    Raises:
        TypeError: `key` is not a typed threefry2x32 key (other generators give other numbers under vmap), or an index
            is not an integer.
        ValueError: a `row_id` given as a Python integer or in numpy is out of range (a traced one cannot be checked).
    """
    check_key(key)
    if isinstance(row_id, (int, np.integer, np.ndarray)):
        check_row_ids(row_id)
    timesteps = jnp.asarray(timesteps)
    for name, value in (("row_id", row_id), ("flip", flip), ("caption", caption), ("timesteps", timesteps)):
        dtype = jnp.result_type(value)
        if not (jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_):
            raise TypeError(f"{name} has dtype {dtype}; {_INTEGERS}")
    for index in (row_id, flip, caption):
        key = jax.random.fold_in(key, index)

    def draw(timestep):
        return jax.random.normal(jax.random.fold_in(key, timestep), shape, jnp.float32)

    return jax.vmap(draw)(timesteps)


def shared_noise(key: jax.Array, timesteps: jax.Array | Sequence[int], shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise of S timesteps, the same for every image -> (S, *shape) float32.

    Args:
        key: a scalar threefry key, such as `shared_noise_key(seed)`.
        timesteps: (S,) integers; the noise of one does not depend on the others.
        shape: shape of one latent, (h, w, c).
    """
    check_key(key)

    def draw(timestep):
        return jax.random.normal(jax.random.fold_in(key, timestep), shape, jnp.float32)

    return jax.vmap(draw)(jnp.asarray(timesteps))


def shared_noise_key(seed: int) -> jax.Array:
    """The key of `shared_noise`; ValueError for a bad `seed`, as in `loss_key`."""
    return purpose_key(seed, "shared noise")


def check_row_ids(row_id: np.ndarray | int) -> None:
    """Raises TypeError for ids that are not integers, ValueError where one is below 0 or above 2^31 - 1.

    Cast to the 32 bits that a key takes, two images could get one noise.
    """
    ids = np.asarray(row_id)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"row_id has dtype {ids.dtype}; {_INTEGERS}")
    wrong = ids[(ids < 0) | (ids > _MAX_ROW_ID)]
    if wrong.size:
        raise ValueError(f"row_id is {wrong.flat[0]}; expected an integer from 0 to {_MAX_ROW_ID}")


def check_key(key) -> None:
    """Raises TypeError unless `key` is a typed threefry key: others' numbers depend on what they are drawn beside."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(f"key is {key!r}; expected a typed key, such as loss_key(seed)")
    if str(jax.random.key_impl(key)) != _IMPL:
        raise TypeError(f"key has the generator {jax.random.key_impl(key)}; expected {_IMPL}, such as loss_key(seed)")
