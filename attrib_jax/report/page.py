"""The report as one HTML file that needs nothing else: style, images and histogram are inside."""

import functools
import math
import os

import jinja2
import numpy as np

from attrib_jax.report.cards import ScoreScale, distinct_cards, least_cards, region_cells, score_scale, top_cards
from attrib_jax.report.data import ReportData
from attrib_jax.report.histogram import lay_out
from attrib_jax.report.images import card_uri, overlay_uri, query_uri, thumb_uri
from attrib_jax.storage.files import write_bytes

# Text in an SVG shrinks with it, so narrow screens get a drawing of their own.
_HISTOGRAM_SIZES = {"wide": (1040, 330), "narrow": (400, 300)}

# Two rows on a wide screen.
_NUM_DISTINCT = 12

_EXPLANATIONS = {
    "unlearn": (
        "The model was nudged to unlearn this image, and a training image's score is how much its own loss "
        "rose because of that. Images that the model needed for this query come first; unrelated ones stay near zero."
    ),
    "group-unlearn": (
        "The model unlearned each group of training images, such as those of one artist, while the others were "
        "retained, and a group's score is how much the loss of this image rose because of that. A training image has "
        "an even share of its group's score: images of one group are not told apart."
    ),
    "influence": (
        "A training image's score says how fast its own loss begins to rise as the model starts to unlearn this "
        "image, steps being measured by the curvature of the training loss. Images that the model needed for this "
        "query come first; unrelated ones stay near zero."
    ),
    "patches": (
        "Every patch of this image was compared with the patches of all training images, and the closest of them share "
        "it among themselves. A training image's score is its share, on average over patches of several sizes; what "
        "the model learned is not asked."
    ),
    "index": (
        "These scores were looked up in an index, in milliseconds: it holds what a slow method found for other "
        "queries, condensed into one vector for each training image. Larger is more influential; the order of the "
        "first images is what it was made for."
    ),
    "random": "These scores are drawn at random. They are what a method that knows nothing would answer.",
}
_OTHER_EXPLANATION = (
    "The method gives every training image a score for its part in this image, and larger means more "
    "influential. The scores of one method compare with each other, not with those of another method."
)


def write_report(path_html: str | os.PathLike, report: ReportData) -> None:
    """Writes `report` to `path_html`, one UTF-8 HTML file without scripts that loads nothing from elsewhere.

    Raises:
      ValueError: if an image that `report.image` returns is not (H, W, 3) uint8.
      StorageError: if the file cannot be written; an earlier file of that name is then left as it was.
    """
    write_bytes(path_html, render_report(report).encode("utf-8"))


def render_report(report: ReportData) -> str:
    """The text of the page that `write_report` writes."""
    scores = np.asarray(report.score, np.float64)
    scale = score_scale(scores)
    top = top_cards(report)
    num_duplicates = sum(card.duplicate_of is not None for card in top)
    template = environment().get_template("report.html.j2")
    return template.render(
        report=report,
        scale=scale,
        top=top,
        least=least_cards(report),
        num_rows=len(scores),
        num_duplicates=num_duplicates,
        distinct=distinct_cards(report, _NUM_DISTINCT) if num_duplicates else [],
        num_mirrored=sum(card.mirrored for card in top),
        explanation=report.explanation or _EXPLANATIONS.get(report.method, _OTHER_EXPLANATION),
        quantiles=_quantiles(scores, scale),
        region_rows=region_cells(report),
        region_percent=_region_percent(report),
        histograms={name: lay_out(scores, top, scale, *size) for name, size in _HISTOGRAM_SIZES.items()},
    )


@functools.cache
def environment() -> jinja2.Environment:
    """The templates of pages, with the filters that they use."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attrib_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (card_uri, query_uri, overlay_uri, thumb_uri)
    environment.filters.update({each.__name__: each for each in filters}, duration=_duration, percent=_percent)
    return environment


def _quantiles(scores: np.ndarray, scale: ScoreScale) -> dict[str, str]:
    shares = {"lowest": 0.0, "median": 0.5, "99th percentile": 0.99, "highest": 1.0}
    return {name: scale.with_unit(float(np.quantile(scores, share))) for name, share in shares.items()}


def _region_percent(report: ReportData) -> dict[str, float] | None:
    if report.region is None:
        return None
    height, width = report.query_image.shape[:2]
    x0, y0, x1, y1 = report.region
    sides = {"left": x0 / width, "top": y0 / height, "width": (x1 - x0) / width, "height": (y1 - y0) / height}
    return {side: round(100.0 * share, 4) for side, share in sides.items()}


def _percent(share: float) -> str:
    """12.3 %; a dash where there is no share."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else "–"


def _duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s or 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
