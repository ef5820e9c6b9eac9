"""How many images the scores are of: all of them, or those that a cascade scored at the full setting."""

import numpy as np
import pytest

from attrib_jax.report.page import render_report
from attrib_jax.report.sheet import draw_contact_sheet


def test_all_images_and_some_of_them(make_report):
    assert make_report().scored == make_report(num_images=5).scored == "5 images scored"
    some = make_report(num_images=3953)
    assert some.scored == "5 of 3,953 images scored at the full setting"
    assert f"five images, {some.scored}" in render_report(some)
    assert np.any(np.asarray(draw_contact_sheet(some)) != np.asarray(draw_contact_sheet(make_report())))


def test_scores_without_losses_have_no_columns_of_them(make_report):
    page = render_report(make_report(loss_before=None, loss_after=None))
    assert "loss before" not in page


def test_fewer_images_than_scores_are_refused(make_report):
    with pytest.raises(ValueError, match="num_images is 4: expected at least 5"):
        make_report(num_images=4)
