"""The page of `launch.verify`: what a fine-tune draws with and without the images that a method named."""

import math
import os
from collections.abc import Sequence

import numpy as np

from attrib_jax.evaluation.verify import ALL, RANDOM, TOP, Verified
from attrib_jax.report.page import environment
from attrib_jax.storage.files import write_bytes


def write_verify_page(
    path_html: str | os.PathLike,
    prompt: str,
    query_image: np.ndarray,
    verified: Verified,
    removed: Sequence[tuple[np.ndarray | None, str]],
) -> None:
    """Writes one UTF-8 HTML file without scripts that loads nothing from elsewhere.

    Args:
      path_html: the file.
      prompt, query_image: the query, (H, W, 3) uint8.
      verified: what the adapters showed.
      removed: image, None where there is none, and caption of each of the best-scored images.
    """
    count = len(removed)
    names = {ALL: ALL, TOP: f"{TOP} {count}", RANDOM: f"{RANDOM} {count}"}
    rows = []
    for variant, name in names.items():
        change = None if variant == ALL else verified.change(variant)
        rows.append(
            {
                "variant": name,
                "loss": verified.losses[variant].mean(),
                "change": None if change is None else change.mean,
                "error": None if change is None or math.isnan(change.error) else change.error,
                "images": verified.images[variant],
            }
        )
    page = environment().get_template("verify.html.j2")
    text = page.render(
        prompt=prompt,
        query_image=query_image,
        rows=rows,
        seeds=verified.seeds,
        over_random=verified.over_random(),
        removed=removed,
    )
    write_bytes(path_html, text.encode("utf-8"))
