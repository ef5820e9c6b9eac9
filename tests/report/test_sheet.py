"""The contact sheet: its size, and that the right images are at the right places."""

import numpy as np
import pytest
from PIL import Image

from attrib_jax.report import write_contact_sheet
from attrib_jax.report.sheet import _font, _wrap, draw_contact_sheet, grid_shape, sheet_size

# From the layout: margin 36, query 384, cells 128 wide with 66 of text below and 16 between, mats of 8.
_FIRST_X, _STEP_X, _FIRST_Y, _STEP_Y = 36 + 384 + 36, 128 + 16, 36, 128 + 66 + 16


def flat(colour):
    return np.full((8, 8, 3), colour, np.uint8)


@pytest.mark.parametrize(("count", "shape"), [(1, (2, 1)), (5, (3, 2)), (24, (6, 4)), (100, (12, 9))])
def test_grid_shape(count, shape):
    assert grid_shape(count) == shape
    assert shape[0] * shape[1] >= count > shape[0] * (shape[1] - 1)


def test_the_file_is_a_png_of_the_size_told(make_report, tmp_path):
    path = tmp_path / "sheet.png"
    write_contact_sheet(path, make_report(top_k=24))
    with Image.open(path) as sheet:
        assert (sheet.format, sheet.mode, sheet.size) == ("PNG", "RGB", sheet_size(5))
    assert list(tmp_path.iterdir()) == [path]
    columns, rows = grid_shape(24)
    assert sheet_size(24) == (3 * 36 + 384 + columns * 144 - 16, 2 * 36 + rows * 210 - 16)


def test_each_card_has_its_own_image_mirrored_where_that_won(make_report):
    colours = {14: (200, 30, 30), 12: (30, 200, 30), 10: (30, 30, 200), 13: (200, 200, 30), 11: (30, 200, 200)}

    def left_half(row_id):
        image = flat((255, 255, 255))
        image[:, :4] = colours[row_id]
        return image

    report = make_report(image=left_half, top_k=5, query_image=flat((90, 10, 120)))
    sheet = np.asarray(draw_contact_sheet(report))
    assert tuple(sheet[36 + 192, 36 + 192]) == (90, 10, 120)
    for index, row_id in enumerate([14, 12, 10, 13, 11]):
        row, column = divmod(index, 3)
        y, x = _FIRST_Y + row * _STEP_Y + 64, _FIRST_X + column * _STEP_X
        halves = [tuple(sheet[y, x + 24]), tuple(sheet[y, x + 104])]
        mirrored = row_id in (12, 14)
        assert halves[mirrored] == colours[row_id] and halves[1 - mirrored] == (255, 255, 255)


def test_region_is_outlined_on_the_query(make_report):
    plain = np.asarray(draw_contact_sheet(make_report(query_image=flat((90, 10, 120)))))
    boxed = np.asarray(draw_contact_sheet(make_report(query_image=flat((90, 10, 120)), region=(2, 4, 6, 8))))
    changed = np.argwhere((plain != boxed).any(axis=-1))
    # 368 pixels of image inside the mat: 46 for each pixel of the query.
    assert changed.min(axis=0).tolist() == [36 + 8 + 4 * 46, 36 + 8 + 2 * 46]
    assert changed.max(axis=0).tolist() == [36 + 8 + 8 * 46 - 1, 36 + 8 + 6 * 46 - 1]


def test_a_region_of_any_shape_is_outlined_and_all_else_veiled(make_report):
    mask = np.zeros((16, 16), bool)
    mask[4:12, 2:6] = mask[8:12, 2:14] = True
    image = np.full((16, 16, 3), (90, 10, 120), np.uint8)
    sheet = np.asarray(draw_contact_sheet(make_report(query_image=image, region_mask=mask)))
    # 368 pixels of image inside the mat: 23 for each pixel of the query.
    at = [tuple(sheet[44 + int(23 * y), 44 + int(23 * x)]) for y, x in ((6, 4), (10, 12), (4.1, 4), (6, 10))]
    inside, also_inside, edge, outside = at
    assert inside == also_inside == (90, 10, 120) and edge == (178, 58, 30)
    assert min(outside) > 100


@pytest.mark.parametrize(
    "changes",
    [
        {"image": None, "captions": {row: ["ü" * 300] for row in range(10, 15)}},
        {"captions": {row: [] for row in range(10, 15)}},
        {"row_id": np.array([10]), "score": np.array([-1e-9]), "flip": None},
        {"score": np.zeros(5), "prompt": "long words " * 99},
    ],
)
def test_odd_reports_keep_the_size_and_the_margins_clean(make_report, changes):
    report = make_report(**changes)
    sheet = draw_contact_sheet(report)
    assert sheet.size == sheet_size(min(len(report.score), report.top_k))
    pixels, paper = np.asarray(sheet), np.asarray(sheet)[0, 0]
    for margin in (pixels[:30], pixels[-30:], pixels[:, :30], pixels[:, -30:]):
        assert (margin == paper).all()


def test_wrapped_lines_fit_and_lose_nothing_but_what_is_cut():
    font = _font(14)
    text = "a few words and onewordthatisfartoolongforanylineatall then more"
    lines = _wrap(text, font, 120, max_lines=20)
    assert max(font.getlength(line) for line in lines) <= 120
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = _wrap(text, font, 120, max_lines=2)
    assert len(cut) == 2 and cut[0] == lines[0] and cut[1].endswith("…") and font.getlength(cut[1]) <= 120
    assert _wrap("", font, 120, max_lines=2) == []
