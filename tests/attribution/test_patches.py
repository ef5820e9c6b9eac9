"""Patch attribution against dense references in float64, and against the optimal denoiser."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.attribution.patches import (
    make_grids,
    make_offsets,
    make_readout,
    median_patch_distances,
    patch_evidence,
    region_map,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(7, 5, 4, 2)).astype(np.float32)
QUERY = RNG.normal(size=(5, 4, 2)).astype(np.float32)


def weights_of(query, images, grids, sigmas, offsets):
    """Normalised over all images: (N, M) float64."""
    evidence = np.asarray(patch_evidence(query, images, grids, jnp.asarray(sigmas), offsets), np.float64)
    return np.exp(evidence - np.logaddexp.reduce(evidence, axis=0))


def dense_weights(query, images, size, starts, sigma, reach):
    """Loops over patches, images and places, as the definition has it."""
    height, width = query.shape[:2]
    found = []
    for top, left in starts:
        patch = query[top : top + size[0], left : left + size[1]].astype(np.float64)
        each = np.zeros(len(images))
        for down, across in itertools.product(range(-reach[0], reach[0] + 1), range(-reach[1], reach[1] + 1)):
            y, x = top + down, left + across
            if 0 <= y <= height - size[0] and 0 <= x <= width - size[1]:
                other = images[:, y : y + size[0], x : x + size[1]].astype(np.float64)
                each += np.exp(-np.square(other - patch).sum(axis=(1, 2, 3)) / (2 * sigma**2))
        found.append(each / each.sum())
    return np.stack(found, axis=1)


@pytest.mark.parametrize("reach", [0.0, 0.4, 1.0])
def test_weights_are_those_of_a_loop_over_patches_images_and_places(reach):
    grids, offsets = make_grids(QUERY.shape, (0.5, 1.0, 0.2)), make_offsets(QUERY.shape, reach)
    sigmas = np.array([[3.0, 5.0], [1.5, 2.0], [0.8, 1.0]], np.float32)
    found = weights_of(QUERY, IMAGES, grids, sigmas, offsets)
    pixels = {0.0: (0, 0), 0.4: (2, 2), 1.0: (4, 3)}[reach]
    # Sizes 5x4, 2x2 and 1x1, largest first, at distances of half a patch.
    places = {(5, 4): [(0, 0)], (2, 2): [*np.ndindex(4, 3)], (1, 1): [*np.ndindex(5, 4)]}
    expected = [
        dense_weights(QUERY, IMAGES, size, starts, sigma, pixels)
        for (size, starts), levels in zip(places.items(), sigmas)
        for sigma in levels
    ]
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), rtol=2e-4, atol=1e-7)


def test_one_patch_as_large_as_the_image_is_the_optimal_denoiser():
    """Tweedie's formula: sum_i w_i y_i = x + sigma^2 grad log p_sigma(x), p_sigma the training set under noise."""
    grids = make_grids(QUERY.shape, (1.0,))
    weights = weights_of(QUERY, IMAGES, grids, np.array([[2.5]], np.float32), make_offsets(QUERY.shape, 0.0))[:, 0]
    flat = np.square(IMAGES.astype(np.float64) - QUERY).sum(axis=(1, 2, 3)) / (2 * 2.5**2)
    np.testing.assert_allclose(weights, np.exp(-flat) / np.exp(-flat).sum(), rtol=1e-5)

    def log_density(x):
        return jax.nn.logsumexp(-jnp.square(IMAGES - x).sum(axis=(1, 2, 3)) / (2 * 2.5**2))

    denoised = QUERY + 2.5**2 * np.asarray(jax.grad(log_density)(QUERY))
    np.testing.assert_allclose(np.tensordot(weights, IMAGES, 1), denoised, atol=1e-5)


def test_noise_decides_between_the_nearest_image_and_all_of_them():
    grids, offsets = make_grids(QUERY.shape, (1.0, 0.4)), make_offsets(QUERY.shape, 0.0)
    sigmas = np.array([[1e-2, 1e4]] * 2, np.float32)
    found = weights_of(IMAGES[3], IMAGES, grids, sigmas, offsets)
    sharp = np.concatenate([found[:, :1], found[:, 2 : 2 + grids[1].num_patches]], axis=1)
    np.testing.assert_array_equal(sharp, np.eye(7)[:, [3] * sharp.shape[1]])
    np.testing.assert_allclose(found[:, [1, -1]], 1 / 7, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 4), (8, 8), (2, 2), (7, 3), (64, 48)])
@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 1.0])
def test_regions_cover_the_image_and_the_scores_average_all_patches(shape, share):
    grids = make_grids(shape, (1.0, share))
    matrix, boxes = make_readout(grids, 3)
    np.testing.assert_allclose(matrix.sum(axis=0), 1, rtol=1e-4)
    for grid, part in zip(grids, np.split(matrix[:, 0], [3 * grids[0].num_patches] if len(grids) > 1 else [])):
        np.testing.assert_allclose(part, 1 / (len(grids) * 3 * grid.num_patches), rtol=1e-6)
    covered = np.zeros(shape, int)
    for x0, y0, x1, y1 in boxes * np.array([shape[1], shape[0]] * 2):
        covered[round(y0) : round(y1), round(x0) : round(x1)] += 1
    assert covered.min() == 1 and len(boxes) <= 25


def test_median_distances_are_those_of_pairs_at_one_place():
    latents, rows = RNG.normal(size=(40, 2, 5, 4, 2)).astype(np.float32), np.arange(0, 40, 2)
    grids = make_grids((5, 4, 2), (1.0, 0.5))
    found = median_patch_distances(latents, rows, grids)
    own = latents[rows, 0].astype(np.float64)
    expected = []
    for size, places in (((5, 4), [(0, 0)]), ((2, 2), np.ndindex(4, 3))):
        patches = [own[:, y : y + size[0], x : x + size[1]].reshape(20, -1) for y, x in places]
        pairs = [np.linalg.norm(each[i] - each[j]) for each in patches for i in range(20) for j in range(i)]
        expected.append(np.median(pairs))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Images that are all alike have no distance.
    np.testing.assert_array_equal(median_patch_distances(np.ones_like(latents), rows, grids), 1)


def test_a_region_names_the_better_one_of_an_image_and_its_mirror_image():
    weights = np.array([[[0.1], [0.4]], [[0.2], [0.0]], [[0.2], [0.1]]])
    found = region_map(np.array([[0, 0, 1, 1.0]]), weights, np.array([9, 7, 5]), 2)
    assert found.row_id.tolist() == [[9, 5]] and found.flip.tolist() == [[1, 0]]
    assert found.weight.tolist() == [[0.4, 0.2]]
