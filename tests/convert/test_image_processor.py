"""Image processors against transformers' own, in today's and older config files."""

import json

import numpy as np
import pytest
import transformers

from attrib_jax.convert.image_processor import ImageProcessor, load_image_processor, save_image_processor

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS = {
    "clip": transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
    "dino": transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=3, **IMAGENET),
    "dinov2": transformers.BitImageProcessorPil(size={"shortest_edge": 37}, crop_size=32, **IMAGENET),
}


def assert_same_pixels(processor, reference, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = reference(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    fitted = processor.fit(image)
    assert fitted.shape == (processor.side, processor.side, 3) and fitted.dtype == np.uint8
    np.testing.assert_allclose(processor.normalise(fitted), expected.transpose(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_transformers(tmp_path, name):
    PROCESSORS[name].save_pretrained(tmp_path)
    processor = load_image_processor(str(tmp_path))
    assert processor.side == 32
    for size in ((64, 64), (32, 32), (20, 20), (61, 43), (40, 75)):
        assert_same_pixels(processor, PROCESSORS[name], *size)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSORS[name].to_dict()}))
    (tmp_path / "preprocessor_config.json").unlink()
    assert load_image_processor(str(tmp_path)) == processor


def test_normalise_by_hand():
    processor = ImageProcessor(2, square=True, mean=(0.5, 0.0, 0.2), std=(0.5, 1.0, 0.1))
    np.testing.assert_allclose(processor.normalise(np.array([255, 51, 51], np.uint8)), [1.0, 0.2, 0.0], atol=1e-6)


MEAN_STD = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}
SIZE = {"do_normalize": True, "do_resize": True, "resample": 3, "size": 224}
# openai/clip-vit-base-patch32 and facebook/dino-vitb16, as they were published.
CLIP = {"crop_size": 224, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor"} | MEAN_STD | SIZE
DINO = {"feature_extractor_type": "ViTFeatureExtractor"} | MEAN_STD | SIZE


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CLIP, ImageProcessor(224, False, 224, 3, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))),
        (DINO, ImageProcessor(224, True, None, 3, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))),
        ({"image_processor_type": "ViTImageProcessorFast"}, ImageProcessor(224, True, None, 2)),
    ],
)
def test_older_configs(config, expected):
    assert ImageProcessor.from_dict(config) == expected


@pytest.mark.parametrize("processor", [ImageProcessor(9, crop=8, resample=2), ImageProcessor(8, square=True)])
def test_round_trip_through_a_folder(tmp_path, processor):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        load_image_processor(str(tmp_path))
    save_image_processor(processor, str(tmp_path))
    assert load_image_processor(str(tmp_path)) == processor
    assert_same_pixels(processor, transformers.CLIPImageProcessorPil.from_pretrained(tmp_path), 30, 17)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "image_processor_type 'ConvNext"),
        ({"do_resize": False}, "do_resize=false"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0"),
        ({"crop_size": {"height": 8, "width": 9}}, "crop_size="),
        ({"size": 10, "crop_size": 12}, "10 .*12"),
        ({"image_std": [0.1, 0, 0.1]}, "image_std"),
    ],
)
def test_what_cannot_be_done_alike_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor.from_dict(config)
