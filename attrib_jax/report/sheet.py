"""The contact sheet: query and top K as one PNG, for a paper, a chat or a README."""

import functools
import io
import math
import os
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from attrib_jax.report.cards import Card, ScoreScale, score_scale, top_cards
from attrib_jax.report.data import ReportData
from attrib_jax.report.images import region_overlay
from attrib_jax.storage.files import write_bytes

_MARGIN, _GAP = 36, 16
_QUERY, _CELL, _CELL_TEXT = 384, 128, 66
_MAX_COLUMNS = 12
# Three lines of prompt and five facts of two lines each.
_QUERY_TEXT = 18 + 3 * 32 + 6 + 5 * 2 * 20
_PAPER, _MAT, _INK, _SOFT, _LINE, _ACCENT = "#f6f3ec", "#ffffff", "#211e1a", "#655e54", "#ddd6c8", "#b23a1e"
_MAT_BORDER = 8
_MIRRORED = "⇄"


def write_contact_sheet(path_png: str | os.PathLike, report: ReportData) -> None:
    """Writes the query and the top cards of `report` to `path_png` as an RGB PNG of `sheet_size` pixels.

    Raises:
      ValueError: if an image that `report.image` returns is not (H, W, 3) uint8.
      StorageError: if the file cannot be written; an earlier file of that name is then left as it was.
    """
    buffer = io.BytesIO()
    draw_contact_sheet(report).save(buffer, format="PNG", optimize=True)
    write_bytes(path_png, buffer.getvalue())


def grid_shape(count: int) -> tuple[int, int]:
    """(columns, rows) for `count` cards: about three columns to two rows, at most 12 columns."""
    columns = min(math.ceil(math.sqrt(1.5 * count)), _MAX_COLUMNS)
    return columns, math.ceil(count / columns)


def sheet_size(count: int) -> tuple[int, int]:
    """(width, height) in pixels of a sheet with `count` cards."""
    columns, rows = grid_shape(count)
    grid_width = columns * (_CELL + _GAP) - _GAP
    grid_height = rows * (_CELL + _CELL_TEXT + _GAP) - _GAP
    return 3 * _MARGIN + _QUERY + grid_width, 2 * _MARGIN + max(grid_height, _QUERY + _QUERY_TEXT)


def draw_contact_sheet(report: ReportData) -> Image.Image:
    """The image that `write_contact_sheet` writes."""
    cards, scale = top_cards(report), score_scale(np.asarray(report.score, np.float64))
    sheet = Image.new("RGB", sheet_size(len(cards)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_query(sheet, draw, report, scale, any(card.mirrored for card in cards))
    columns, _ = grid_shape(len(cards))
    for index, card in enumerate(cards):
        row, column = divmod(index, columns)
        x = 2 * _MARGIN + _QUERY + column * (_CELL + _GAP)
        _draw_card(sheet, draw, card, scale, x, _MARGIN + row * (_CELL + _CELL_TEXT + _GAP))
    return sheet


def _draw_query(sheet, draw, report: ReportData, scale: ScoreScale, any_mirrored: bool) -> None:
    box = _paste(sheet, draw, report.query_image, _MARGIN, _MARGIN, _QUERY)
    if report.region is not None:
        height, width = report.query_image.shape[:2]
        across, down = (box[2] - box[0]) / width, (box[3] - box[1]) / height
        x0, y0, x1, y1 = report.region
        corners = (box[0] + x0 * across, box[1] + y0 * down, box[0] + x1 * across - 1, box[1] + y1 * down - 1)
        draw.rectangle(corners, outline=_ACCENT, width=3)
    if report.region_mask is not None:
        overlay = region_overlay(report.region_mask, box[2] - box[0], box[3] - box[1])
        sheet.paste(overlay, box[:2], overlay)
    y = _MARGIN + _QUERY + 18
    for line in _wrap(report.prompt or report.query_name, _font(24, "Serif"), _QUERY, max_lines=3):
        draw.text((_MARGIN, y), line, _INK, _font(24, "Serif"))
        y += 32
    facts = [", ".join(f"{name} {value}" for name, value in report.query_settings.items())]
    facts += [f"{report.method}: {report.scored}", f"scores {scale.unit}" if scale.unit else ""]
    facts += [f"{_MIRRORED} the mirror image scored higher, and is shown"] if any_mirrored else []
    facts += [f"Images: {report.dataset_credit.text}"] if report.dataset_credit else []
    for fact in facts:
        for line in _wrap(fact, _font(14), _QUERY, max_lines=2):
            draw.text((_MARGIN, y + 6), line, _SOFT, _font(14))
            y += 20


def _draw_card(sheet, draw, card: Card, scale: ScoreScale, x: int, y: int) -> None:
    if card.image is None:
        draw.rectangle((x, y, x + _CELL - 1, y + _CELL - 1), outline=_LINE)
        for line_number, line in enumerate(_wrap(card.captions[0], _font(14, "Serif"), _CELL - 16, max_lines=6)):
            draw.text((x + 8, y + 10 + 18 * line_number), line, _INK, _font(14, "Serif"))
    else:
        _paste(sheet, draw, card.image, x, y, _CELL)
    if card.relative is not None:
        draw.rectangle((x, y + _CELL + 3, x + _CELL - 1, y + _CELL + 5), _LINE)
        # A share of nothing draws nothing: PIL's rectangles hold at least one pixel.
        if filled := round(card.relative * _CELL):
            draw.rectangle((x, y + _CELL + 3, x + filled - 1, y + _CELL + 5), _ACCENT)
    rank = f"{card.rank}."
    draw.text((x, y + _CELL + 11), rank, _ACCENT if card.rank == 1 else _SOFT, _font(15))
    score_x = x + draw.textlength(rank, _font(15)) + 6
    draw.text((score_x, y + _CELL + 11), scale.number(card.score), _INK, _font(15, "Sans-Bold"))
    if card.mirrored:
        draw.text((x + _CELL, y + _CELL + 11), _MIRRORED, _SOFT, _font(15), anchor="ra")
    if card.image is not None:
        for line_number, line in enumerate(_wrap(card.captions[0], _font(12), _CELL, max_lines=2)):
            draw.text((x, y + _CELL + 32 + 16 * line_number), line, _SOFT, _font(12))


def _paste(sheet, draw, image: np.ndarray, x: int, y: int, size: int) -> tuple[int, int, int, int]:
    """Pastes (H, W, 3) uint8 centred on a white mat of `size` pixels; the image's box (x0, y0, x1, y1)."""
    height, width = image.shape[:2]
    room = size - 2 * _MAT_BORDER
    shape = max(1, round(room * width / max(height, width))), max(1, round(room * height / max(height, width)))
    draw.rectangle((x, y, x + size - 1, y + size - 1), _MAT, _LINE)
    left, top = x + (size - shape[0]) // 2, y + (size - shape[1]) // 2
    sheet.paste(Image.fromarray(np.ascontiguousarray(image)).resize(shape, Image.Resampling.BICUBIC), (left, top))
    return left, top, left + shape[0], top + shape[1]


@functools.cache
def _font(size: int, family: str = "Sans") -> ImageFont.FreeTypeFont:
    # DejaVu comes with matplotlib and, unlike Pillow's own font, has accents, signs and superscripts.
    name = {"Sans": "DejaVuSans", "Sans-Bold": "DejaVuSans-Bold", "Serif": "DejaVuSerif"}[family]
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Greedy lines of at most `width` pixels; words too long are broken, and what does not fit ends in an ellipsis."""
    lines, line = [], ""
    for word in text.split():
        while word:
            joined = f"{line} {word}" if line else word
            if font.getlength(joined) <= width:
                line, word = joined, ""
            elif line:
                lines.append(line)
                line = ""
            else:
                fitting = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
                lines.append(word[:fitting])
                word = word[fitting:]
    lines += [line] if line else []
    if len(lines) > max_lines:
        lines[max_lines - 1 :] = [" ".join(lines[max_lines - 1 :])]
        while font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + "…"
    return lines
