"""The worker: order, positions, cancelling, failures, forgetting."""

import threading

import pytest

from attrib_jax.parallel.progress import progress
from attrib_jax.serving.worker import BusyError, Worker


@pytest.fixture
def worker():
    worker = Worker(max_waiting=3)
    yield worker
    worker.close()


def test_requests_are_done_one_after_another_and_know_how_many_are_before_them(worker):
    order, gate = [], threading.Event()
    first = worker.submit(lambda: (gate.wait(10), order.append(0)))
    while first.state == "waiting":
        pass
    others = [worker.submit(lambda number=number: order.append(number)) for number in (1, 2, 3)]
    assert [worker.position(each) for each in (first, *others)] == [0, 1, 2, 3]
    with pytest.raises(BusyError, match="3 requests wait already"):
        worker.submit(lambda: None)
    worker.cancel(others[1])
    gate.set()
    assert others[2].done.wait(10)
    assert order == [0, 1, 3] and [each.state for each in others] == ["done", "cancelled", "done"]


def test_a_running_request_shows_its_progress_and_ends_when_it_is_cancelled(worker):
    seen, steps = threading.Event(), []

    def work():
        with progress(1000, "count", "step") as bar:
            for step in range(1000):
                steps.append(step)
                bar.update()
                seen.wait(10)

    request = worker.submit(work)
    while request.progress[1] == 0:
        pass
    assert request.progress == ("count", 0.001)
    worker.cancel(request)
    seen.set()
    assert request.done.wait(10) and request.state == "cancelled" and len(steps) < 4


def test_failures_become_messages_and_the_next_request_goes_on(worker):
    def fails(error):
        raise error

    wrong, broken, fine = (
        worker.submit(work)
        for work in (lambda: fails(ValueError("box is 3")), lambda: fails(RuntimeError("secret")), lambda: 5)
    )
    assert fine.done.wait(10) and fine.result == 5
    assert (wrong.state, wrong.error, wrong.internal) == ("failed", "box is 3", False)
    assert broken.internal and "secret" not in broken.error


def test_old_results_are_forgotten():
    now = [0.0]
    worker = Worker(clock=lambda: now[0])
    request = worker.submit(lambda: 1)
    assert request.done.wait(10) and worker.find(request.name) is request
    now[0] = 1000.0
    assert worker.find(request.name) is None
    worker.close()


def test_loops_over_an_iterable_are_observed():
    from attrib_jax.parallel.progress import observed

    seen = []
    with observed(lambda *state: seen.append(state)):
        assert list(progress([4, 5], "loop")) == [4, 5]
    assert seen == [("loop", 1, 2), ("loop", 2, 2)]
