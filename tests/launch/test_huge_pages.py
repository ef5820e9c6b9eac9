"""When a command starts itself again with huge pages."""

import pytest

from launch import huge_pages

_MADVISE = "always [madvise] never\n"


def test_commands_and_benchmarks_are_started_again_with_the_rest_of_the_environment():
    for module in ("launch.attribute", "benchmarks.throughput"):
        found = huge_pages(["python", "-B", "-m", module, "--flag"], {"HOME": "/h"}, _MADVISE)
        assert found == {"HOME": "/h", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize(
    "argv, environment, setting",
    [
        (["python", "-m", "launch.attribute"], {"GLIBC_TUNABLES": ""}, _MADVISE),
        (["python", "-m", "launch.attribute"], {}, "[always] madvise never\n"),
        (["python", "-m", "launch.attribute"], {}, "always madvise [never]\n"),
        (["python", "-m", "pytest", "tests/launch"], {}, _MADVISE),
        (["python", "script.py"], {}, _MADVISE),
        (["python", "-m"], {}, _MADVISE),
    ],
)
def test_anything_else_goes_on_as_it_is(argv, environment, setting):
    assert huge_pages(argv, environment, setting) is None
