"""Small models trained from scratch."""

import dataclasses

import pytest

from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.evaluation.small_models import SmallUNet, train_small
from attrib_jax.storage.stages import StageMismatchError
from tests.evaluation.conftest import RECIPE


def test_a_small_model_is_trained_anew_for_another_schedule(tmp_path, tiny_model, tiny_dataset):
    untrained = dataclasses.replace(tiny_model, params=tiny_model.params | {"unet": {}})
    recipe = dataclasses.replace(RECIPE, steps=2)
    train_small(tmp_path, tiny_dataset, untrained, recipe)
    config = untrained.schedule.to_config() | {"prediction_type": "epsilon"}
    other = dataclasses.replace(untrained, schedule=NoiseSchedule.from_config(config))
    with pytest.raises(StageMismatchError, match="inputs.model"):
        train_small(tmp_path, tiny_dataset, other, recipe)


@pytest.mark.parametrize("channels", [(0,), (8, -8)])
def test_wrong_channels_are_named(channels):
    with pytest.raises(ValueError, match=f"unet_channels is {min(channels)}"):
        SmallUNet(channels)
