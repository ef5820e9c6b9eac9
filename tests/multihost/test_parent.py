"""The parent process of a command on several hosts: nothing is left running when it is stopped."""

import signal
import subprocess
import sys
import time

import pytest

from tests.multihost.ports import free_port, is_open


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_parent_takes_its_command_with_it(number, code, tmp_path):
    port = free_port()
    command = [
        *(sys.executable, "-m", "launch.encode", "--model=nowhere", f"--workdir={tmp_path}", "--cpu_devices=1"),
        *("--multihost", f"--coordinator=127.0.0.1:{port}", "--num_hosts=2", "--host_index=0"),
    ]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        # The child listens there, and waits for the other host.
        _wait_until(lambda: is_open(port) or parent.poll() is not None)
        parent.send_signal(number)
        _, errors = parent.communicate(timeout=120)
    finally:
        parent.kill()
    assert parent.returncode == code
    if number != signal.SIGKILL:
        assert errors.strip().splitlines()[-1].startswith(f"stopped by {number.name}: finished chunks are kept")
    _wait_until(lambda: not is_open(port))


def _wait_until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
