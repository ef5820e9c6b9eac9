"""The model-free similarities of latents through the main job."""

import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.storage.stage_root import StageRoot

CAPTIONS = [["hat"], ["flag", "A  Hat"], ["flag"], ["hat", "cap"], ["cap", "hat"], ["flag"]]


@pytest.fixture(scope="module")
def small():
    images = np.random.default_rng(5).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    return ArrayDataset(images, CAPTIONS, row_ids=np.arange(6) * 2 + 5)


@pytest.fixture(scope="module")
def run(pipeline, small, tmp_path_factory):
    return Run(pipeline, small, StageRoot(tmp_path_factory.mktemp("latents")))


@pytest.fixture(scope="module")
def latents(run):
    return np.asarray(run.data.latents, np.float64).reshape(6, 2, -1)


def attribute(run, queries, method, **settings):
    return attribute_queries(run, queries, method_config(method, **settings))


@pytest.mark.parametrize("flips", ["max", "mean", "none"])
def test_latent_gaussian(run, small, latents, flips):
    queries = [Query("hat", image=small[4].image), Query("", image=np.ascontiguousarray(small[1].image[:, ::-1]))]
    results = attribute(run, queries, "latent-gaussian", flips=flips, latent_width=0.5)
    pairs = np.linalg.norm(latents[:, None, 0] - latents[None, :, 0], axis=-1)[np.triu_indices(6, 1)]
    for result in results:
        own = result.query.latents.astype(np.float64).ravel()
        both = np.exp(-np.square(latents - own).sum(axis=-1) / (2 * (0.5 * np.median(pairs)) ** 2))
        expected = {"max": both.max(axis=1), "mean": both.mean(axis=1), "none": both[:, 0]}[flips]
        np.testing.assert_allclose(result.scores.score, expected, rtol=1e-6)
    assert results[0].scores.rank_of(small.row_ids[4]) == 1
    if flips == "max":
        assert results[1].scores.rank_of(small.row_ids[1]) == 1 and results[1].scores.flip[1] == 1


@pytest.mark.parametrize(
    ("prompt", "captions", "members"),
    [("hat", "first", [0, 3]), (" HAT", "all", [0, 3, 4]), ("a hat", "all", [1]), ("volcano", "first", range(6))],
)
def test_caption_centred(run, small, latents, caplog, prompt, captions, members):
    (result,) = attribute(
        run, [Query(prompt, image=small[2].image)], "caption-centred", captions=captions, flips="none"
    )
    members, own = [*members], result.query.latents.astype(np.float64).ravel()
    inside = latents[members, 0]
    expected = (inside - inside.mean(axis=0)) @ (own - inside.mean(axis=0))
    np.testing.assert_allclose(result.scores.score[members], expected, atol=1e-6)
    assert not np.delete(result.scores.score, members).any()
    assert ("all are compared" in caplog.text) == (prompt == "volcano")


def test_the_width_has_to_be_above_0():
    with pytest.raises(ValueError, match="latent_width is 0"):
        method_config("latent-gaussian", latent_width=0)
