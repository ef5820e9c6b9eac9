"""A tiny index of each kind, made once."""

import pytest

from attrib_jax.jobs.context import Run
from attrib_jax.methods import method_config
from attrib_jax.retrieval.build import build_index
from attrib_jax.retrieval.features import StudentFeatureConfig
from attrib_jax.retrieval.index import write_residual_index
from attrib_jax.retrieval.student import StudentConfig
from attrib_jax.retrieval.teacher import TeacherQueryConfig
from attrib_jax.storage.stage_root import StageRoot
from tests.towers import save_torch_tower

QUERIES = TeacherQueryConfig(teacher_queries=6, query_holdout=0.34, compositions=0.5, sampler_steps=1)
STUDENT = StudentConfig(student_dim=8, student_width=8, student_epochs=12, student_batch=2, student_top=5)
RESIDUAL = method_config("residual", stride=250, residual_start=500, flips="none")


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """The folder of a tiny CLIP."""
    path = tmp_path_factory.mktemp("tower") / "clip"
    save_torch_tower("clip", path)
    return str(path)


@pytest.fixture(scope="session")
def teacher():
    """The config of a cheap teacher."""
    return method_config("pixel")


@pytest.fixture(scope="session")
def run(pipeline, dataset, tmp_path_factory):
    """The tiny model and its data set."""
    return Run(pipeline, dataset, StageRoot(tmp_path_factory.mktemp("retrieval")))


@pytest.fixture(scope="session")
def features(tower):
    """The config of the features."""
    return StudentFeatureConfig(tower=tower, student_features=("image", "text", "latents"))


@pytest.fixture(scope="session")
def student_index(run, teacher, features, tmp_path_factory):
    """An index of kind student."""
    return build_index(tmp_path_factory.mktemp("index") / "student", run, teacher, QUERIES, features, STUDENT)


@pytest.fixture(scope="session")
def residual_index(run, tmp_path_factory):
    """An index of kind residual."""
    return write_residual_index(tmp_path_factory.mktemp("index") / "residual", run, RESIDUAL, {})
