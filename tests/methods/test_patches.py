"""Patch attribution through the main job: its weights, its invariances, and its map in the report."""

import dataclasses

import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries, attribute_to_files
from attrib_jax.attribution.patches import make_grids, median_patch_distances
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config, patches
from attrib_jax.storage.stage_root import StageRoot


@pytest.fixture(scope="module")
def small():
    images = np.random.default_rng(5).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)
    return ArrayDataset(images, [[f"hat {i}"] for i in range(11)], row_ids=np.arange(11) * 2 + 5)


@pytest.fixture(scope="module")
def run(pipeline, small, tmp_path_factory):
    return Run(pipeline, small, StageRoot(tmp_path_factory.mktemp("patches")))


@pytest.fixture(scope="module")
def queries(small):
    images = [small[4].image, np.ascontiguousarray(small[1].image[:, ::-1])]
    return [Query("hat", image=image) for image in images]


def scores(run, queries, **settings):
    return [each.scores for each in attribute_queries(run, queries, method_config("patches", **settings))]


@pytest.mark.parametrize("flips", ["mean", "none"])
def test_the_weights_of_all_images_add_up_to_one(run, queries, flips):
    for each in scores(run, queries, flips=flips, patch_widths=(0.3, 0.6), patch_reach=0.2):
        assert each.score.min() >= 0
        np.testing.assert_allclose(each.score.sum(), 0.5 if flips == "mean" else 1, rtol=1e-5)


def test_whole_images_are_weighted_as_the_optimal_denoiser_does(run, queries):
    found = scores(run, queries, flips="none", patch_sizes=(1.0,), patch_widths=(0.5,))
    latents = np.asarray(run.data.latents, np.float64)[:, 0]
    sigma = 0.5 * median_patch_distances(run.data.latents, np.arange(11), make_grids(latents.shape[1:], (1.0,)))[0]
    for query, each in zip(queries, found):
        own = attribute_queries(run, [query], method_config("random"))[0].query.latents
        exponents = -np.square(latents - own).sum(axis=(1, 2, 3)) / (2 * sigma**2)
        expected = np.exp(exponents - np.logaddexp.reduce(exponents))
        np.testing.assert_allclose(each.score, expected, rtol=1e-4, atol=1e-9)


def test_an_image_finds_itself_and_its_mirror_image(run, small, queries):
    first, second = scores(run, queries)
    assert first.rank_of(small.row_ids[4]) == 1 and first.flip[4] == 0
    assert second.rank_of(small.row_ids[1]) == 1 and second.flip[1] == 1


def test_scores_depend_neither_on_the_tile_nor_on_other_queries(pipeline, small, run, queries, tmp_path, monkeypatch):
    together = scores(run, queries, patch_widths=(0.4,))
    monkeypatch.setattr(patches, "_MAX_TILE", 2)
    for place, query in enumerate(queries):
        alone = Run(pipeline, small, StageRoot(tmp_path / str(place)))
        (found,) = scores(alone, [query], patch_widths=(0.4,))
        np.testing.assert_allclose(found.score, together[place].score, rtol=1e-4, atol=1e-9)


def test_the_report_shows_what_each_region_owes_to_whom(pipeline, small, queries, tmp_path):
    config = method_config("patches", patch_widths=(0.1,))
    (result,) = attribute_to_files(
        pipeline, small, queries[:1], config, StageRoot(tmp_path), names=["own"], model_name="tiny", top_k=3
    )
    stored = patches.read_region_map(result.folder)
    # Latents of 8 x 8 pixels: 16 regions of 2 x 2, each the image's own.
    assert stored["boxes"].shape == (16, 4)
    np.testing.assert_array_equal(stored["row_id"][:, 0], small.row_ids[4])
    assert (stored["weight"][:, 0] > 0.5).all()
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert page.count('<div class="cell">') == 16 and "hat 4" in page


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"patch_sizes": ()}, r"patch_sizes is \(\): expected one or more"),
        ({"patch_sizes": (0.5, 0.5)}, "patch_sizes is .*each once"),
        ({"patch_sizes": (1.5,)}, "patch_sizes is 1.5"),
        ({"patch_widths": (0.0,)}, "patch_widths is 0.0"),
        ({"patch_reach": -0.1}, "patch_reach is -0.1"),
    ],
)
def test_refusals_name_the_setting_and_its_value(settings, match):
    with pytest.raises(ValueError, match=match):
        method_config("patches", **settings)


def test_latents_that_are_not_finite_are_refused_by_their_row(run, queries):
    latents = np.array(run.data.latents)
    latents[6, 1, 0, 0, 0] = np.nan
    data = dataclasses.replace(run.data, latents=latents)
    jobs = [patches.QueryJob("q", {}, attribute_queries(run, queries[:1], method_config("random"))[0].query, None)]
    broken = type("Broken", (), {"data": data, "timed": run.timed})()
    with pytest.raises(ValueError, match="row 17 .*latents .*mirror"):
        patches.score(broken, jobs, method_config("patches"))
