"""A small report with a known ranking and recognisable images."""

import numpy as np
import pytest

from attrib_jax.report import Credit, ReportData, Timing


def image_of(row_id: int) -> np.ndarray:
    """(8, 8, 3) uint8, different for each row and unlike its own mirror image."""
    return np.random.default_rng(row_id).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture
def make_report():
    """ReportData of five images, ranked 14, 12, 10, 13, 11; keyword arguments replace fields."""

    def make(**changes) -> ReportData:
        fields = {
            "query_image": np.random.default_rng(99).integers(0, 256, (16, 16, 3), dtype=np.uint8),
            "query_name": "red-apple-7",
            "prompt": "red apple",
            "query_settings": {"sampler": "DDIM, 50 steps", "guidance": "7.5", "seed": "7"},
            "method": "unlearn",
            "method_settings": {"step size": "0.01"},
            "model_name": "tiny model",
            "dataset_name": "five images",
            "row_id": np.array([10, 11, 12, 13, 14]),
            "score": np.array([2e-5, -3e-5, 4e-5, 1e-5, 8e-5]),
            "flip": np.array([0, 0, 1, 0, 1]),
            "captions": lambda row_id: [f"image {row_id}", f"also {row_id}"],
            "image": image_of,
            "top_k": 3,
            "least_k": 2,
            "timings": {"fisher": Timing(62.0, reused=True), "losses after": Timing(3.25)},
            "dataset_credit": Credit("Drawings, CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/"),
        }
        return ReportData(**(fields | changes))

    return make
