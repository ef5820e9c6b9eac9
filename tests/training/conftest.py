"""The tiny pipeline of the jobs' tests."""

from tests.jobs.conftest import pipeline  # noqa: F401
