"""Several hosts in one run: their flags, and the small parent process that reports when one of them dies.

When a host is lost, JAX's distributed runtime ends the processes of the others at once. So with --multihost each host
runs its command in a child process, and the parent, which holds no device, prints one line and the exit code.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any, NoReturn

import jax
from absl import flags
from absl import logging as absl_logging

from attrib_jax.parallel import hosts
from launch.process import with_huge_pages

# Exit code of a run that lost a host (EX_TEMPFAIL of sysexits.h), by which a scheduler can tell it from a mistake.
LOST_HOST = 75
_PARENT = "ATTRIB_JAX_PARENT"
_GRACE_SECONDS = 10

MULTIHOST = flags.DEFINE_boolean(
    "multihost",
    False,
    "Run on several hosts, each started with this command; SLURM, TPU pods and Kubernetes are detected. See "
    "docs/MULTIHOST.md.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of host 0, where no cluster is detected.")
_NUM_HOSTS = flags.DEFINE_integer("num_hosts", None, "Number of hosts, with --coordinator.")
_HOST_INDEX = flags.DEFINE_integer("host_index", None, "Index of this host, from 0, with --coordinator.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 30, "Seconds after which a silent host counts as lost.", lower_bound=2
)

# Flags whose values differ between hosts.
OWN_FLAGS = {"coordinator", "host_index"}

_link: socket.socket | None = None


class LostHostError(RuntimeError):
    """Another host is gone."""


def check_flags(one_host: bool = False) -> None:
    """Raises ValueError where the flags contradict each other, or are given to a command that runs on one host."""
    given = {"coordinator": _COORDINATOR.value, "num_hosts": _NUM_HOSTS.value, "host_index": _HOST_INDEX.value}
    present = [f"--{name}" for name, value in given.items() if value is not None]
    if present and not MULTIHOST.value:
        raise ValueError(f"{', '.join(present)} given without --multihost; give both or neither")
    if MULTIHOST.value and one_host:
        raise ValueError("this command runs on one host: leave out --multihost (encode, fisher and attribute take it)")
    if not present:
        return
    absent = [f"--{name}" for name, value in given.items() if value is None]
    if absent:
        raise ValueError(f"{', '.join(present)} given without {', '.join(absent)}; give all three, or none to detect")
    name, _, port = _COORDINATOR.value.rpartition(":")
    if not name or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"coordinator is {_COORDINATOR.value!r}; expected HOST:PORT, as in 10.0.0.1:8476")
    if _NUM_HOSTS.value < 1:
        raise ValueError(f"num_hosts is {_NUM_HOSTS.value}; expected at least 1")
    if not 0 <= _HOST_INDEX.value < _NUM_HOSTS.value:
        raise ValueError(f"host_index is {_HOST_INDEX.value}; expected 0 to {_NUM_HOSTS.value - 1}")


def is_parent() -> bool:
    """Whether this process starts the command in a child process and does not run it itself."""
    return MULTIHOST.value and _PARENT not in os.environ


def supervise() -> int:
    """Runs this command in a child process -> its exit code, or `LOST_HOST` after a line that reports what happened."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, *sys.orig_argv[1:]]
    environment = {**with_huge_pages(os.environ), _PARENT: str(theirs.fileno())}
    # A session of its own, so that a signal reaches the child once, and its own children can be ended with it.
    child = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    stopped = []

    def forward(number: int, frame: object) -> None:
        stopped.append(number)
        child.send_signal(number)
        # A child that waits for another host in compiled code does not handle signals.
        signal.signal(signal.SIGALRM, lambda *_: child.kill())
        signal.alarm(_GRACE_SECONDS)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    code = child.wait()
    signal.alarm(0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    message = _final_message(ours)
    if stopped:
        name = signal.Signals(stopped[0]).name
        print(f"stopped by {name}: finished chunks are kept, the same command on all hosts goes on", file=sys.stderr)
        return 128 + stopped[0]
    if message is not None and message["lost"] is None:
        return message["code"]
    if message is not None:
        what = message["lost"]
    elif code == -signal.SIGABRT:
        what = "JAX's distributed runtime ended the run: most likely another host died (the lines above tell)"
    elif code < 0:
        what = f"this host's process was ended by {signal.Signals(-code).name} (SIGKILL: often too little memory)"
    else:
        what = f"this host's process ended with code {code} before it could say why"
    print(
        f"error: {what}. Finished chunks are kept: start the same command on all hosts again to go on from them.",
        file=sys.stderr,
    )
    return LOST_HOST


def _final_message(link: socket.socket) -> dict | None:
    """The message that the child sent when it ended; None if it was killed."""
    with link, link.makefile("rb") as stream, contextlib.suppress(OSError, ValueError):
        return json.loads(stream.readline())
    return None


def attach() -> None:
    """Makes this process the child that `supervise` waits for; it ends when its parent does."""
    global _link
    _link = socket.socket(fileno=int(os.environ.pop(_PARENT)))
    threading.Thread(target=_die_with_parent, args=(_link,), daemon=True).start()


def connect() -> None:
    """Joins the other hosts; call it before anything uses a device.

    Raises ValueError where no hosts are found or they have different numbers of devices, LostHostError where they do
    not connect.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    explicit: dict[str, Any] = {}
    if _COORDINATOR.value is not None:
        explicit = {
            "coordinator_address": _COORDINATOR.value,
            "num_processes": _NUM_HOSTS.value,
            "process_id": _HOST_INDEX.value,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(**explicit, heartbeat_timeout_seconds=_HEARTBEAT.value)
    except ValueError as error:
        raise ValueError(
            f"no SLURM, TPU pod, Kubernetes or MPI run was detected ({error}); give --coordinator=HOST:PORT, "
            "--num_hosts and --host_index"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise LostHostError(f"cannot connect to the other hosts ({_first_line(error)})") from error
    # JAX's runtime treats SIGTERM as a notice of preemption, which nothing here waits for: chunks are stored when they
    # are finished.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    counts = {host: 0 for host in range(hosts.num_hosts())}
    for device in jax.devices():
        counts[device.process_index] += 1
    if len(set(counts.values())) > 1:
        raise ValueError(f"hosts have different numbers of devices ({counts}); give --cpu_devices, or equal hosts")
    hosts.warm_up_collectives()
    if not hosts.is_host0():
        # Host 0 prints the results; warnings and errors of the others name their host.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        formatter = logging.Formatter(f"%(levelname)s (host {hosts.host_index()}): %(message)s")
        absl_logging.get_absl_handler().setFormatter(formatter)


def check_connection(error: BaseException) -> None:
    """Raises LostHostError for a device's error, where there are several hosts and memory is not what it lacks."""
    text = str(error)
    if hosts.num_hosts() > 1 and not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text:
        raise LostHostError(_lost(error)) from error


def leave(code: int, lost: str | None = None) -> NoReturn:
    """Ends the child with an exit code; `lost` is the runtime's message where another host is gone."""
    if code == 0 and lost is None:
        try:
            # Host 0 may still be writing files alone.
            hosts.barrier("end")
            jax.distributed.shutdown()
        except jax.errors.JaxRuntimeError as error:
            code, lost = LOST_HOST, _lost(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if _link is not None:
        _link.sendall(json.dumps({"code": code, "lost": lost}).encode() + b"\n")
    # At once: a normal exit would wait minutes for hosts that are gone.
    os._exit(code)


def _lost(error: BaseException) -> str:
    return f"lost contact with another host ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _die_with_parent(link: socket.socket) -> None:
    """Ends this process and those that it started when the parent is gone; it never sends."""
    with contextlib.suppress(OSError):
        link.recv(1)
    os.killpg(0, signal.SIGKILL)
