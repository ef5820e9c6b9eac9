"""What ReportData refuses, and that it says which argument is at fault."""

import numpy as np
import pytest

from attrib_jax.report import Credit, Region


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": np.array([1.0, np.nan, 2.0, np.inf, 3.0])}, r"score has 2 of 5 .* nan at row_id 11"),
        ({"score": np.ones(4)}, r"score has shape \(4,\): expected \(5,\)"),
        ({"row_id": np.array([1, 2, 2, 3, 4])}, r"row_id holds 2 more than once"),
        ({"row_id": np.ones(5)}, r"row_id has shape \(5,\) and dtype float64"),
        ({"row_id": np.zeros(0, int), "score": np.zeros(0), "flip": None}, r"row_id has shape \(0,\)"),
        ({"flip": np.array([0, 1, 2, 0, 0])}, r"flip .* expected \(5,\) integers below 2"),
        ({"loss_before": np.ones((5, 2))}, r"loss_before and loss_after belong together"),
        ({"loss_before": np.ones((5, 2)), "loss_after": np.ones((5, 1))}, r"loss_after \(5, 1\)"),
        ({"loss_before": np.ones((5, 1)), "loss_after": np.ones((5, 1))}, r"integers below 1"),
        ({"top_k": 0}, r"top_k is 0"),
        ({"least_k": -1}, r"least_k is -1"),
        ({"query_image": np.zeros((4, 4, 3))}, r"query_image has shape \(4, 4, 3\) and dtype float64"),
        ({"region": (0, 0, 17, 4)}, r"region is \(0, 0, 17, 4\).* 16 x 16"),
        ({"region_mask": np.ones((8, 16), bool)}, r"region_mask has shape \(8, 16\): expected \(16, 16\)"),
        ({"region_mask": np.zeros((16, 16), bool)}, "some of them True"),
        ({"region": (4, 0, 4, 4)}, r"region is \(4, 0, 4, 4\)"),
        ({"model_credit": Credit("me", "javascript:alert(1)")}, r"model_credit.url is 'javascript"),
        ({"regions": [Region((0.5, 0.0, 0.4, 1.0), ((10, 0, 0.1),))]}, r"regions\[0\] has the box \(0.5, 0.0, 0.4"),
        ({"regions": [Region((0.0, 0.0, 1.0, 1.0), ())]}, r"regions\[0\] .* 0 images"),
    ],
)
def test_bad_fields_are_named(make_report, changes, message):
    with pytest.raises(ValueError, match=message):
        make_report(**changes)
