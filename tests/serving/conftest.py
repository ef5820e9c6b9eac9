"""The page on a tiny model, served in this process."""

import contextlib
import threading
import time

import pytest

from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.retrieval.build import build_index
from attrib_jax.retrieval.features import StudentFeatureConfig
from attrib_jax.retrieval.student import StudentConfig
from attrib_jax.retrieval.teacher import TeacherQueryConfig
from attrib_jax.serving.address import listen
from attrib_jax.storage.stage_root import StageRoot
from tests.evaluation.conftest import make_dataset, make_model
from tests.towers import save_torch_tower

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")

QUERIES = TeacherQueryConfig(teacher_queries=5, query_holdout=0.4, compositions=0, sampler_steps=1)
STUDENT = StudentConfig(student_dim=8, student_width=8, student_epochs=2, student_batch=2, student_top=5)
EXACT = method_config("unlearn", query_draws=16, fisher_samples=16, stride=500, flips="none")


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """Engine of a tiny model and its index."""
    from attrib_jax.serving.engine import Engine

    folder = tmp_path_factory.mktemp("page")
    save_torch_tower("clip", folder / "tower")
    run = Run(make_model(), make_dataset(), StageRoot(folder / "work"))
    features = StudentFeatureConfig(tower=str(folder / "tower"))
    index = build_index(folder / "index", run, method_config("pixel"), QUERIES, features, STUDENT)
    return Engine(run, index, EXACT, Query(prompt="", sampler_steps=1), "tiny", None)


@contextlib.contextmanager
def serve(engine, worker):
    """The address of the page."""
    from attrib_jax.serving.app import make_app

    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(engine, worker, ["127.0.0.1"]), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def page(engine):
    """The address of the page, and its worker."""
    from attrib_jax.serving.worker import Worker

    worker = Worker()
    with serve(engine, worker) as address:
        yield address, worker
