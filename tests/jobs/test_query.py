"""The query: how an image is drawn, read or taken from arrays, what decides it, and which part of it counts."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from attrib_jax.attribution import region_mask
from attrib_jax.jobs.query import (
    PreparedQuery,
    Query,
    check_query_name,
    generate,
    prepare_query,
    query_mask,
    query_name,
    query_settings,
    read_region_mask,
    read_stored_query,
)
from attrib_jax.methods import method_config
from attrib_jax.models.predictor import predictor

QUERY = Query(prompt="red heart", seed=3, sampler_steps=3)
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
LATENTS, TEXT = np.ones((8, 8, 4), np.float32), np.ones((8, 32), np.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": None}, "prompt is None"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, f"seed is {2**32}"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"sampler": "dpm"}, "sampler 'dpm': did you mean 'ddpm'"),
        ({"sampler_steps": 0}, "sampler_steps is 0"),
        ({"image": IMAGE, "latents": LATENTS}, "image and latents"),
        ({"text": TEXT}, "text states but no image or latents"),
    ],
)
def test_a_query_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Query(**{"prompt": "hat"} | settings)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_generated_image_depends_on_its_own_prompt_and_seed_alone(pipeline, sampler):
    settings = Query(prompt="", sampler=sampler, sampler_steps=3, guidance_scale=2.0)
    predict = predictor(pipeline.unet)
    together = generate(pipeline, predict, ["hat", "flag", "flag"], [3, 4, 5], settings)
    alone = generate(pipeline, predict, ["flag"], [4], settings)
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-4, atol=1e-5 * np.abs(alone).max())
    assert min(np.abs(together[1] - together[other]).max() for other in (0, 2)) > 0.1


def test_an_image_is_given_as_an_array_or_a_file(pipeline, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "hat.png")
    array, file = (
        prepare_query(pipeline, None, Query(prompt="hat", image=each)) for each in (IMAGE, tmp_path / "hat.png")
    )
    np.testing.assert_array_equal(file.image, IMAGE)
    np.testing.assert_array_equal(file.latents, array.latents)
    assert array.latents.shape == (8, 8, 4) and array.text.shape == (8, 32)


def test_latents_and_text_states_of_numpy_files(pipeline, tmp_path):
    rng = np.random.default_rng(1)
    latents, text = rng.normal(size=(2, 4, 8, 8)), rng.normal(size=(2, 3, 8, 32))
    np.save(tmp_path / "l.npy", latents.astype(np.float32))
    np.save(tmp_path / "t.npy", text.astype(np.float32))
    query = Query(prompt="", **read_stored_query(tmp_path / "l.npy", tmp_path / "t.npy", 1))
    prepared = prepare_query(pipeline, None, query)
    np.testing.assert_array_equal(prepared.latents, latents[1].transpose(1, 2, 0).astype(np.float32))
    np.testing.assert_array_equal(prepared.text, text[1, 0].astype(np.float32))
    assert prepared.image.shape == (16, 16, 3)
    np.save(tmp_path / "flat.npy", latents[0])
    for arguments, message in (
        ((tmp_path / "l.npy", None, 2), "query_index is 2"),
        ((tmp_path / "flat.npy", None, 0), r"latents have shape \(4, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            read_stored_query(*arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latents": LATENTS[:4]}, r"latents have shape \(4, 8, 4\).*\(8, 8, 4\)"),
        ({"latents": LATENTS * np.nan}, "latents has values that are NaN"),
        ({"latents": LATENTS, "text": TEXT[:, :31]}, r"text have shape \(8, 31\).*32"),
        ({"image": IMAGE[:8]}, r"shape \(8, 16, 3\).*\(16, 16, 3\)"),
        ({"image": IMAGE.astype(np.float32)}, "float32; expected .* uint8"),
    ],
)
def test_arrays_that_do_not_fit_the_model_are_refused(pipeline, given, message):
    with pytest.raises(ValueError, match=message):
        prepare_query(pipeline, None, Query(prompt="hat", **given))


def test_settings_hold_what_decides_a_query(tmp_path):
    assert query_settings(QUERY) == {
        "prompt": "red heart", "seed": 3, "guidance_scale": 7.5, "sampler": "ddim", "sampler_steps": 3
    }  # fmt: skip
    for name in ("a.png", "b.png"):
        Image.fromarray(IMAGE).save(tmp_path / name)
    first, moved = (query_settings(Query(prompt="hat", image=tmp_path / name, seed=9)) for name in ("a.png", "b.png"))
    assert first == moved and first.keys() == {"prompt", "image"}
    arrays = [query_settings(Query(prompt="hat", latents=scale * LATENTS, text=TEXT)) for scale in (1, 2)]
    assert arrays[0] != arrays[1] and arrays[0].keys() == {"prompt", "latents", "text"}
    with pytest.raises(FileNotFoundError, match="nowhere"):
        query_settings(Query(prompt="hat", image="nowhere.png"))


def test_names_tell_prompts_seeds_and_settings_apart():
    plain = query_settings(QUERY)
    names = [
        query_name(QUERY, plain),
        query_name(QUERY, {**plain, "step_size": 0.02}),
        query_name(Query(prompt="Red  heart!", seed=4), plain),
    ]
    assert len({*names}) == 3 and all(name.startswith("red-heart-seed") for name in names)
    assert query_name(Query(prompt="❤ 狗", image=IMAGE), plain).startswith("heavy-black-heart-狗-image-")
    assert query_name(Query(prompt="", latents=LATENTS), plain).startswith("empty-prompt-latents-")


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "é" * 101, None])
def test_names_that_no_folder_can_have_are_refused(name):
    with pytest.raises(ValueError, match="query_name is "):
        check_query_name(name)


# The region that counts.

PREPARED = PreparedQuery(np.zeros((16, 16, 3), np.uint8), np.zeros((8, 8, 4), np.float32), np.zeros((3, 4)), ())
MARKED = np.zeros((16, 16), bool)
MARKED[2:7, 4:16] = True


def save(path, mode: str):
    """A mask of MARKED in a mode of Pillow's, with the least value that counts."""
    if mode == "I;16":
        image = Image.fromarray(MARKED.astype(np.uint16))
    elif mode == "1":
        image = Image.fromarray(MARKED)
    elif mode == "P":
        image = Image.fromarray(MARKED.astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 0, 0, 9])
    elif mode == "RGBA":
        pixels = np.full((16, 16, 4), 255, np.uint8)
        pixels[..., 3] = MARKED
        # Opaque black does not count.
        pixels[0] = 0, 0, 0, 255
        image = Image.fromarray(pixels)
    else:
        values = MARKED.astype(np.uint8)
        image = Image.fromarray(values if mode == "L" else np.stack([0 * values, values, 0 * values], axis=-1))
    image.save(path)
    return path


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "P", "RGB", "RGBA"])
def test_pixels_count_that_are_neither_black_nor_transparent(tmp_path, mode):
    np.testing.assert_array_equal(read_region_mask(save(tmp_path / "mask.png", mode), (16, 16)), MARKED)


def test_a_mask_weighs_latents_as_the_box_does(tmp_path):
    config = method_config(region_mask=str(save(tmp_path / "mask.png", "L")))
    expected = region_mask((4, 2, 16, 7), (16, 16), (8, 8))
    np.testing.assert_allclose(query_mask(PREPARED, config), expected, atol=1e-6)
    np.testing.assert_array_equal(query_mask(PREPARED, method_config(region=(4, 2, 16, 7))), expected)
    assert query_mask(PREPARED, method_config()) is None


def test_settings_hold_the_content_of_a_mask(tmp_path):
    first, second = save(tmp_path / "a.png", "L"), save(tmp_path / "b.png", "L")
    config = method_config(region_mask=str(first))
    assert config.describe() == dataclasses.replace(config, region_mask=str(second)).describe()
    save(second, "RGB")
    assert config.describe() != dataclasses.replace(config, region_mask=str(second)).describe()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"region": (0, 0, 1, 1), "region_mask": "mask.png"}, "region_mask is 'mask.png'"),
        ({"region": (0, 0, 1)}, r"region is \(0, 0, 1\)"),
        ({"region": (0, 0, 1.5, 2)}, "region is 1.5"),
        ({"region": (4, 4, 4, 8)}, r"region.*\(4, 4, 4, 8\)"),
        ({"region": (0, 0, 17, 8)}, r"region.*\(0, 0, 17, 8\)"),
    ],
)
def test_wrong_regions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        query_mask(PREPARED, method_config(**settings))


def test_wrong_masks_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        read_region_mask("nowhere.png", (16, 16))
    whole, file = save(tmp_path / "whole.png", "L").read_bytes(), tmp_path / "mask.png"
    for write, message in (
        (lambda: Image.new("L", (16, 8), 255).save(file), "16 x 8 pixels.* 16 x 16"),
        (lambda: Image.new("L", (16, 16)).save(file), "marks no pixel"),
        (lambda: Image.new("L", (16, 16), 255).save(file, format="JPEG"), "cannot be read"),
        (lambda: file.write_bytes(whole[:45]), "cannot be read"),
    ):
        write()
        with pytest.raises(ValueError, match=message):
            read_region_mask(file, (16, 16))
