"""Adapters that are trained again without images: what is compared, what is reused, and the page that shows it."""

import dataclasses

import jax
import numpy as np
import pytest

from attrib_jax.core.types import Scores
from attrib_jax.evaluation import trainers
from attrib_jax.evaluation import verify as module
from attrib_jax.evaluation.retrain import Retrainer
from attrib_jax.evaluation.trainers import LoraTrainer, UNetTrainer
from attrib_jax.evaluation.verify import ALL, RANDOM, TOP, Verified, VerifyConfig, best_positions, verify
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query, prepare_query
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.report.verify import write_verify_page
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.training.draws import Training
from attrib_jax.training.lora import LoraConfig
from tests.evaluation.conftest import RECIPE

LORA = LoraConfig(rank=2, target_modules=("to_v",), steps=2, batch_size=16, learning_rate=1e-2, checkpoint_every=2)
CONFIG = VerifyConfig(num_removed=5, num_seeds=2, measure_stride=500)
QUERY = Query(prompt="red heart", seed=3, sampler_steps=2)


@pytest.fixture(scope="module")
def run(pipeline, dataset, tmp_path_factory):
    return Run(pipeline, dataset, StageRoot(tmp_path_factory.mktemp("work")))


@pytest.fixture(scope="module")
def query(run):
    return prepare_query(run.pipeline, run.predict, QUERY)


def scores_of(run, best):
    score = np.zeros(len(run.data))
    score[best] = np.arange(len(best), 0, -1)
    return Scores(run.data.row_ids, score)


def test_adapters_are_compared_within_a_seed_and_trained_once(run, query, tmp_path, capsys, monkeypatch):
    best = np.array([7, 3, 20, 11, 30])
    result = verify(tmp_path, LoraTrainer(run, LORA), QUERY, query, scores_of(run, best), CONFIG)
    assert "6 of 6 adapters to train, 2 steps each at" in capsys.readouterr().out
    np.testing.assert_array_equal(result.removed, best)
    assert result.seeds == (0, 1)
    losses = np.stack([result.losses[variant] for variant in (ALL, TOP, RANDOM)])
    assert losses.shape == (3, 2) and len(np.unique(losses)) == 6
    assert all(images.shape == (2, 16, 16, 3) for images in result.images.values())
    change = result.losses[TOP] - result.losses[ALL]
    assert result.change(TOP) == pytest.approx((change.mean(), abs(change[1] - change[0]) / 2))

    # What is stored is not trained again, and gives the same numbers; another order of the same images is the same set.
    monkeypatch.setattr(trainers, "train_factors", None)
    again = verify(tmp_path, LoraTrainer(run, LORA), QUERY, query, scores_of(run, best[::-1]), CONFIG)
    assert "all 6 adapters are there" in capsys.readouterr().out
    for variant in (ALL, TOP, RANDOM):
        np.testing.assert_array_equal(again.losses[variant], result.losses[variant])
        np.testing.assert_array_equal(again.images[variant], result.images[variant])


def test_the_unet_of_a_small_model_is_trained_again(tiny_model, tiny_dataset, tmp_path, capsys, monkeypatch):
    run = Run(tiny_model, tiny_dataset, StageRoot(tmp_path / "work"))
    prompt = Query(prompt="digit one", seed=1, sampler_steps=2)
    prepared = prepare_query(tiny_model, run.predict, prompt)
    config = dataclasses.replace(CONFIG, num_seeds=1)
    best = np.array([4, 9, 0, 12, 2])

    def verified():
        trainer = UNetTrainer(run, RECIPE, 3)
        return verify(tmp_path / "models", trainer, prompt, prepared, scores_of(run, best), config)

    result = verified()
    assert "3 of 3 models to train, 6 steps each at" in capsys.readouterr().out
    assert result.seeds == (3,) and len({losses[0] for losses in result.losses.values()}) == 3
    retrainer = Retrainer(tiny_model, run.data, RECIPE, mesh=data_mesh(jax.local_devices()[:1]))
    weights = jax.tree.map(lambda leaf: leaf[0], retrainer.train([Training(best, 3)]))
    alone = dataclasses.replace(tiny_model, params=tiny_model.params | {"unet": weights})
    assert module.query_loss(alone, prompt, prepared, 500) == pytest.approx(result.losses[TOP][0], rel=1e-6)
    monkeypatch.setattr(Retrainer, "train", None)
    again = verified()
    assert "all 3 models are there" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, again.losses, result.losses)


@pytest.mark.parametrize(
    ("rows", "count", "message"),
    [([1, 4, 5], 2, "scores has row 5, which the data set lacks"), ([1], 2, "scores has 1 rows.*at least 2 images")],
)
def test_scores_of_another_data_set(rows, count, message):
    scores = Scores(np.array(rows), np.arange(float(len(rows))))
    with pytest.raises(ValueError, match=message):
        best_positions(scores, np.array([1, 4, 7]), count)


def test_as_many_images_as_there_are_cannot_go(run, query, tmp_path):
    config = dataclasses.replace(CONFIG, num_removed=len(run.data))
    with pytest.raises(ValueError, match="num_removed is 37"):
        verify(tmp_path, LoraTrainer(run, LORA), QUERY, query, scores_of(run, np.arange(5)), config)


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_page_has_every_image_and_number(tmp_path, seeds):
    rng = np.random.default_rng(0)
    losses = {ALL: np.full(seeds, 0.5), TOP: np.linspace(0.61, 0.65, seeds), RANDOM: np.full(seeds, 0.51)}
    images = {variant: rng.integers(0, 256, (seeds, 8, 8, 3), dtype=np.uint8) for variant in losses}
    verified = Verified(tuple(range(seeds)), np.array([4, 2]), losses, images)
    removed = [(images[ALL][0], "a <hat>"), (None, "gone")]
    write_verify_page(tmp_path / "page.html", "red & blue", images[TOP][0], verified, removed)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 2 + 3 * seeds
    assert "red &amp; blue" in page and "a &lt;hat&gt;" in page and "without the top 2" in page
    assert f"{losses[TOP].mean() - 0.5:.5f}" in page and ("0.02000" in page) == (seeds == 2) and "nan" not in page
