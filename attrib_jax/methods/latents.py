"""Methods `latent-gaussian` and `caption-centred`: similarities of latents, without any model (METHOD.md section 7).

Both know only the training set as the autoencoder encodes it. A method that uses the model has to be better than these.
"""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from attrib_jax.attribution.scores import make_scores
from attrib_jax.attribution.similarity import (
    centred_products,
    gaussian_similarities,
    median_distance,
    same_caption,
    sampled,
)
from attrib_jax.core.settings import setting
from attrib_jax.jobs.context import Run, check_images
from attrib_jax.jobs.encoded_dataset import caption_rows, caption_texts
from attrib_jax.jobs.settings import CaptionSettings, FlipSettings
from attrib_jax.methods.base import MethodConfig, QueryJob, Scored

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentGaussianConfig(MethodConfig, FlipSettings):
    """Settings of the Gaussian kernel of latents."""

    method: str = setting("latent-gaussian", "Attribution method.", choices=("latent-gaussian",))
    latent_width: float = setting(
        0.3, "Width of the Gaussian kernel of latents, as a share of the training images' median distance.", above=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionCentredConfig(MethodConfig, FlipSettings, CaptionSettings):
    """Settings of products of latents within one caption."""

    method: str = setting("caption-centred", "Attribution method.", choices=("caption-centred",))


def prepare_gaussian(run: Run, config: LatentGaussianConfig) -> float:
    """The median distance of two training images' latents."""
    data = run.data
    return median_distance(np.asarray(data.latents[data.positions[sampled(len(data))]])[:, 0])


def score_gaussian(run: Run, queries: Sequence[QueryJob], config: LatentGaussianConfig) -> list[Scored]:
    """exp(-d^2 / (2 s^2)) for the distance d of an image's latents from the query's, s = latent_width x the median."""
    width = config.latent_width * prepare_gaussian(run, config)
    data = run.data
    with run.timed("similarities"):
        values = [
            gaussian_similarities(data.latents, data.positions, config.num_flips, query.prepared.latents, width)
            for query in queries
        ]
    return [Scored(make_scores(data.row_ids, each, None, config.flips)) for each in values]


def prepare_centred(run: Run, config: CaptionCentredConfig) -> list[str]:
    """The captions that count, one image's after another's."""
    check_images(run.dataset, config.method)
    return caption_texts(run.dataset, run.data, caption_rows(run.data, config.captions))


def score_centred(run: Run, queries: Sequence[QueryJob], config: CaptionCentredConfig) -> list[Scored]:
    """(x_hat - m) . (x - m) among the images with the query's caption, m their mean; 0 for all others.

    Where no image has the query's caption, all images are compared, and m is the mean of all.
    """
    texts, data = prepare_centred(run, config), run.data
    image, scored = caption_rows(data, config.captions).image, []
    with run.timed("similarities"):
        for query in queries:
            members = np.zeros(len(data), bool)
            members[image[same_caption(query.prepared.prompt, texts) > 0]] = True
            if not members.any():
                _log.warning("%s: no training image has its caption, so all are compared", query.name)
                members[:] = True
            values = centred_products(data.latents, data.positions, config.num_flips, query.prepared.latents, members)
            scored.append(Scored(make_scores(data.row_ids, values, None, config.flips)))
    return scored
