"""Flags of several hosts: contradictions are one clear line, before anything is started."""

import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from launch import encode, multihost  # noqa: F401 encode defines the command's flags
from tests.multihost.ports import free_port

_TWO = ("--multihost", "--num_hosts=2", "--host_index=0")


def check(arguments, **options):
    with flagsaver.flagsaver():
        flags.FLAGS(["encode", *arguments])
        multihost.check_flags(**options)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--coordinator=a:1"], "--coordinator .*--multihost"),
        (["--num_hosts=2", "--host_index=0"], "--num_hosts, --host_index .*--multihost"),
        (["--multihost", "--coordinator=a:1"], "--coordinator .*--num_hosts, --host_index"),
        (["--multihost", "--num_hosts=2"], "--num_hosts .*--coordinator, --host_index"),
        ([*_TWO, "--coordinator=a"], "coordinator is 'a'"),
        ([*_TWO, "--coordinator=a:b"], "coordinator is 'a:b'"),
        ([*_TWO, "--coordinator=a:99999"], "coordinator is 'a:99999'"),
        ([*_TWO, "--coordinator=a:1", "--num_hosts=0"], "num_hosts is 0"),
        ([*_TWO, "--coordinator=a:1", "--host_index=2"], "host_index is 2"),
        ([*_TWO, "--coordinator=a:1", "--host_index=-1"], "host_index is -1"),
    ],
)
def test_contradictions_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        check(arguments)


def test_what_goes_together_passes_and_commands_of_one_host_say_so():
    for arguments in ([], ["--multihost"], [*_TWO, "--coordinator=[::1]:80"]):
        check(arguments)
    check([], one_host=True)
    with pytest.raises(ValueError, match="--multihost"):
        check(["--multihost"], one_host=True)


def test_nothing_detected_is_one_clear_line(tmp_path):
    command = [sys.executable, "-m", "launch.encode", "--multihost", "--model=nowhere", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no SLURM, TPU pod, Kubernetes or MPI run was detected" in done.stderr.strip().splitlines()[-1]


def test_hosts_with_other_flags_all_say_so(tmp_path):
    shared = [sys.executable, "-m", "launch.encode", "--multihost", f"--coordinator=127.0.0.1:{free_port()}"]
    shared += ["--num_hosts=2", "--model=nowhere", f"--workdir={tmp_path}", "--cpu_devices=1"]
    hosts = [
        subprocess.Popen([*shared, f"--host_index={host}", f"--encode_seed={host}"], stderr=subprocess.PIPE, text=True)
        for host in range(2)
    ]
    errors = [host.communicate(timeout=120)[1].strip().splitlines()[-1] for host in hosts]
    assert [host.returncode for host in hosts] == [1, 1]
    message = "encode_seed is 1 on this host and 0 on host 0; start every host with the same flags"
    assert errors == [f"error: host 1: {message}", f"error: {message}"]
