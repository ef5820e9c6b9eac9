"""With one host everything is a plain call; what several do together is in tests/multihost."""

import jax
import numpy as np
import pytest

from attrib_jax.parallel import hosts
from attrib_jax.parallel.hosts import barrier, fetch, host0_first, independent_hosts, run_on_host0
from attrib_jax.parallel.mesh import data_mesh, shard_batch
from attrib_jax.storage.files import StorageError


def test_one_host_is_the_first_and_only_one():
    assert (hosts.host_index(), hosts.num_hosts(), hosts.is_host0()) == (0, 1, True)
    barrier("alone")
    result = object()
    assert run_on_host0(lambda: result) is result
    assert host0_first(lambda: result) is result
    rows = np.arange(8)
    np.testing.assert_array_equal(fetch(shard_batch(data_mesh(), rows)), rows)
    np.testing.assert_array_equal(fetch(jax.numpy.arange(3)), np.arange(3))


@pytest.mark.parametrize("call", [run_on_host0, host0_first])
def test_errors_come_out_as_they_are(call):
    error = StorageError("disk full")

    def fail():
        raise error

    with pytest.raises(StorageError) as caught:
        call(fail)
    assert caught.value is error
    with pytest.raises(StorageError) as caught, independent_hosts():
        fail()
    assert caught.value is error
