"""When a command starts itself again with huge pages."""

import subprocess
import sys

import pytest

from launch.process import is_command, with_huge_pages

_MADVISE = "always [madvise] never\n"


@pytest.mark.parametrize(
    ("environment", "setting", "asks"),
    [
        ({"HOME": "/h"}, _MADVISE, True),
        ({"GLIBC_TUNABLES": ""}, _MADVISE, False),
        ({}, "[always] madvise never\n", False),
        ({}, "always madvise [never]\n", False),
        ({}, "", False),
    ],
)
def test_huge_pages_are_asked_for_where_that_has_an_effect(environment, setting, asks):
    wanted = environment | ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if asks else {})
    assert with_huge_pages(environment, setting) == wanted


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["python", "-B", "-P", "-m", "launch.attribute", "--flag"], True),
        (["python", "-m", "benchmarks.throughput"], True),
        (["python", "-m", "pytest", "tests/launch"], False),
        (["python", "script.py"], False),
        (["python", "-m"], False),
    ],
)
def test_commands_and_benchmarks_alone_are_started_again(argv, command):
    assert is_command(argv) == command


def test_importing_the_commands_package_changes_nothing():
    script = "import os, sys; before = os.getpid(), dict(os.environ), set(sys.modules); import launch, launch.process; "
    script += "assert before[:2] == (os.getpid(), dict(os.environ)); "
    script += "assert not {'jax', 'numpy', 'attrib_jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
