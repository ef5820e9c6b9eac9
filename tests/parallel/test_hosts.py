"""With one host everything is a plain call; what several do together is in tests/multihost."""

import jax
import numpy as np
import pytest

from attrib_jax.parallel import hosts
from attrib_jax.parallel.hosts import barrier, fetch, host0_first, independent_hosts, run_on_host0
from attrib_jax.parallel.mesh import data_mesh, shard_batch
from attrib_jax.storage.files import DamagedFileError, StorageError


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


@pytest.mark.parametrize(
    "value",
    [None, 3, "text", [1, [2, "x"]], {"a": {"b": 1.5}}, np.arange(6).reshape(2, 3), {"x": np.ones(2, np.float16)}],
)
def test_messages_hold_what_they_are_given(value):
    received = hosts._decode(hosts._encode(value))
    if isinstance(value, dict):
        assert received.keys() == value.keys()
        for key in value:
            np.testing.assert_array_equal(received[key], value[key])
    elif isinstance(value, np.ndarray):
        np.testing.assert_array_equal(received, value)
    else:
        assert received == value


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("a\nb"), ValueError, "a\nb"),
        (DamagedFileError("cut"), DamagedFileError, "cut"),
        (FileNotFoundError(2, "No such file", "x"), FileNotFoundError, "[Errno 2] No such file: 'x'"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), RuntimeError, "UnicodeDecodeError: "),
        (type("Local", (Exception,), {})("hm"), RuntimeError, "Local: hm"),
        (ValueError(), ValueError, ""),
    ],
)
def test_errors_of_another_host_keep_their_class(error, kind, message):
    with pytest.raises(Exception) as caught:  # noqa: B017 the class is what is checked
        hosts._decode(hosts._encode_error(error))
    assert type(caught.value) is kind and str(caught.value).startswith(message)
    # A message that was cut to fit still says which error it was.
    cut = hosts._error_parts(hosts._encode_error(ValueError("é" * 3000))[: hosts._SHORT])
    assert cut[:2] == ("builtins", "ValueError") and len(cut[2]) > 900
