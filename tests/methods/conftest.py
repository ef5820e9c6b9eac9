"""The tiny pipeline and data set of the tests of jobs."""

from tests.jobs.conftest import dataset, pipeline

__all__ = ["dataset", "pipeline"]
