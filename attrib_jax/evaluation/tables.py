"""Tables and plots of the protocols: the same rows as csv, as markdown, and drawn."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.evaluation.metrics import RemovalCurve
from attrib_jax.storage.files import write_bytes


def write_table(folder: str | os.PathLike, name: str, rows: Sequence[Mapping[str, Any]], finished: bool = True) -> str:
    """Writes `<name>.csv` with all digits and `<name>.md` with four -> the markdown.

    While a study runs, what it has so far is `<name>-unfinished`, beside the table of an earlier run; the whole
    table takes the place of both.

    Args:
      folder: that exists.
      name: of the files.
      rows: at least one, all with the same keys, which head the columns.
      finished: whether these are all rows.
    """
    unfinished = f"{name}-unfinished"
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    markdown = markdown_table(rows)
    for ending, content in ((".csv", text.getvalue()), (".md", markdown + "\n")):
        write_bytes(Path(folder) / f"{name if finished else unfinished}{ending}", content.encode())
        if finished:
            (Path(folder) / f"{unfinished}{ending}").unlink(missing_ok=True)
    return markdown


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A markdown table with four digits; at least one row, all with the same keys, which head the columns."""
    return "\n".join(
        [
            "| " + " | ".join(rows[0]) + " |",
            "|" + "---|" * len(rows[0]),
            *("| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows),
        ]
    )


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if value == np.inf:
        return "more"  # than what was measured; see `RemovalCurve.equivalent`
    return "-" if np.isnan(value) else f"{value:.4g}"


def bar_plot(file: str | os.PathLike, title: str, label: str, bars: Mapping[str, tuple[float, float, float]]) -> None:
    """Horizontal bars, name -> (value, low, high end of its interval), the best on top, as a PNG."""
    figure, axes = _figure(0.35 * len(bars) + 1.2)
    ordered = sorted(bars.items(), key=lambda item: item[1][0])
    values, low, high = np.array([value for _, value in ordered]).T
    axes.barh([name for name, _ in ordered], values, xerr=[values - low, high - values], color="#4477aa", capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    figure.suptitle(title, fontsize=10)
    axes.set_xlabel(label)
    _save(figure, file)


def curve_plot(
    file: str | os.PathLike,
    title: str,
    curve: RemovalCurve,
    methods: Mapping[str, Sequence[tuple[int, float, float]]],
) -> None:
    """The effect of removing random images over their number, and methods as (K, effect, error) points, as a PNG."""
    figure, axes = _figure(4.2)
    axes.plot(curve.counts, curve.effects, color="black", linewidth=1, label="random images")
    markers = "osD^v<>pPX*h"
    for place, (name, points) in enumerate(methods.items()):
        counts, effects, errors = np.array(points, np.float64).T
        # Beside each other where several have the same K.
        shift = 1 + 0.02 * (place - len(methods) / 2)
        marker = markers[place % len(markers)]
        axes.errorbar(counts * shift, effects, errors, fmt=marker, markersize=4, linewidth=0.8, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("images removed")
    axes.set_ylabel("loss change of the query")
    figure.suptitle(title, fontsize=10)
    axes.legend(fontsize=7, ncols=2)
    _save(figure, file)


def image_grid(file: str | os.PathLike, title: str, rows: Sequence[str], columns: Mapping[str, np.ndarray]) -> None:
    """Images, column name -> (rows, H, W, 3) uint8, side by side as a PNG."""
    figure, axes = _figure(1.0 * len(rows) + 0.8)
    axes.remove()
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for column, (name, images) in enumerate(columns.items()):
        grid[0, column].set_title(name, fontsize=6)
        for row, image in enumerate(images):
            grid[row, column].imshow(image, interpolation="nearest")
            grid[row, column].set_xticks([])
            grid[row, column].set_yticks([])
    for row, name in enumerate(rows):
        grid[row, 0].set_ylabel(name, fontsize=5)
    figure.suptitle(title, fontsize=9)
    _save(figure, file)


def _figure(height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without a global state of figures
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure, file: str | os.PathLike) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_bytes(file, content.getvalue())
