"""What two hosts do together in one process each; the test reads what each prints.

python -m tests.multihost.lockstep FOLDER PORT HOST
"""

import sys
from pathlib import Path

import jax
import numpy as np

import tests.conftest  # noqa: F401 the tests' compilation cache
from attrib_jax.core.compensated import CompensatedSum
from attrib_jax.parallel.hosts import fetch, host0_first, host_index, independent_hosts, run_on_host0
from attrib_jax.parallel.mesh import data_mesh, host_share, replicate, shard_batch, tile_map
from attrib_jax.parallel.sums import DeviceSums
from attrib_jax.storage.files import StorageError
from attrib_jax.storage.skipped import SkippedRows, read_skipped
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import StageMismatchError, lock, open_stage


def raised(block) -> str:
    try:
        block()
    except (ValueError, OSError, StorageError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fail_on(host: int, error: Exception):
    def block():
        with independent_hosts():
            if host_index() == host:
                raise error

    return block


def values(folder: Path) -> None:
    assert run_on_host0(lambda: {"host": host_index(), "rows": [1, 2]}) == {"host": 0, "rows": [1, 2]}
    assert run_on_host0(lambda: None) is None
    for size in (3, 2048, 5000):
        array = run_on_host0(lambda size=size: np.arange(size) if host_index() == 0 else np.zeros(1))
        np.testing.assert_array_equal(array, np.arange(size))
    for value in (3, "text", [1, [2, "x"]], {"a": {"b": 1.5}}):
        assert run_on_host0(lambda value=value: value if host_index() == 0 else None) == value
    arrays = run_on_host0(lambda: {"a": np.ones(3, np.float16), "b": np.array(7)})
    assert arrays["a"].dtype == np.float16 and int(arrays["b"]) == 7
    # Inside, host 0 is alone: what is called there may itself ask for host 0's answer.
    assert run_on_host0(lambda: run_on_host0(lambda: host0_first(lambda: "nested"))) == "nested"
    order = folder / "order"
    seen = host0_first(lambda: order.exists() or order.touch())
    assert bool(seen) == (host_index() == 1)


def errors(folder: Path) -> None:
    def fail(error):
        def fn():
            raise error

        return raised(lambda: run_on_host0(fn))

    assert fail(ValueError("stride is 0")) == "ValueError: stride is 0"
    assert fail(ValueError("a\nb")) == "ValueError: a\nb" and fail(ValueError()) == "ValueError: "
    assert fail(StageMismatchError("other model")) == "StageMismatchError: other model"
    assert fail(type("Local", (RuntimeError,), {})("hm")).endswith("Local: hm")
    assert "No such file" in raised(lambda: run_on_host0(lambda: (folder / "absent").read_text()))
    assert fail(UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")).endswith("bad")
    assert fail(ValueError("no file \udcff.png")).startswith("ValueError: no file ")
    assert len(fail(ValueError("long " * 10000))) > 40000
    own = "" if host_index() == 1 else "host 1: "
    assert raised(fail_on(1, StorageError("disk full"))) == f"StorageError: {own}disk full"
    assert raised(fail_on(1, ValueError("long " * 1000))).startswith(f"ValueError: {own}long long")
    assert raised(fail_on(7, ValueError())) == "nothing"


def arrays() -> None:
    mesh = data_mesh()
    rows = np.arange(8.0, dtype=np.float32)
    share = rows[host_share(mesh, 8)]
    assert share.shape == (4,)
    shared = replicate(mesh, {"w": np.float32(3), "key": jax.random.key(5), "none": None})
    shared = replicate(mesh, shared)
    doubled = tile_map(mesh, lambda shared, batch: shared["w"] * batch)(shared, shard_batch(mesh, share))
    np.testing.assert_array_equal(fetch(doubled), 3 * rows)
    sums = DeviceSums(mesh, lambda shared, batch: CompensatedSum(shared["w"] * batch.sum(), 0 * batch.sum()))
    running = sums.zero(np.zeros((), np.float32))
    for _ in range(2):
        running = sums.add(running, shared, shard_batch(mesh, share))
    assert float(sums.total(running).value()) == 2 * 3 * 28


def stages(folder: Path) -> None:
    with lock(folder):
        assert raised(lambda: lock(folder).__enter__()).startswith("LockedError")
        root = StageRoot(folder)
        root.claim({"model": "a"})
        assert raised(lambda: StageRoot(folder).claim({"model": "b"})).startswith("StageMismatchError")
        differing = {"model": "a", "dataset": f"of host {host_index()}"}
        assert "the dataset of this host and of host 0 differ" in raised(lambda: StageRoot(folder).claim(differing))
        assert not root.is_finished("x", {}, {})
        with root.stage("x", {"seed": 1}, {}) as stage:
            assert not stage.finished
        assert root.is_finished("x", {"seed": 1}, {}) and stage.finished
        assert raised(lambda: open_stage(folder, "x", {"seed": 2}, {})).startswith("StageMismatchError")
        skipped = SkippedRows(folder)
        start = 10 * host_index()
        with independent_hosts():
            skipped.store(slice(start, start + 10), {start + 3: f"host {host_index()}"})
            skipped.store(slice(20, 30), {})
        assert skipped.join() == {3: "host 0", 13: "host 1"}
        # The chunk of host 1 is made anew by host 0, whose image has been repaired.
        again = SkippedRows(folder)
        with independent_hosts():
            if host_index() == 0:
                again.store(slice(10, 20), {})
        assert SkippedRows(folder).join() == {3: "host 0"} == read_skipped(folder)
    with lock(folder):
        pass


def main() -> None:
    folder, port, index = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, cluster_detection_method="deactivate")
    values(folder)
    errors(folder)
    arrays()
    stages(folder)
    print("done", flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
