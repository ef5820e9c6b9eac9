"""The model in the repository: PyTorch's StableDiffusionPipeline draws the same images from the same noise."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from attrib_jax.convert.load import load_pipeline
from attrib_jax.data.sources import open_dataset
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.losses import loss_program
from attrib_jax.jobs.query import Query, decode, generate, initial_noise
from attrib_jax.methods import method_config
from attrib_jax.models.predictor import predictor
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import load_stage

FOLDER = Path(__file__).parents[2] / "models" / "openmoji"
PROMPTS = ["fire engine", "red apple"]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(str(FOLDER))


def test_torch_diffusers_draws_the_same_images(pipeline):
    query = Query(prompt="", sampler_steps=20, guidance_scale=5.0)
    latents = generate(pipeline, predictor(pipeline.unet), PROMPTS, [3, 4], query)
    ours = decode(pipeline, latents)

    torch_pipeline = diffusers.StableDiffusionPipeline.from_pretrained(str(FOLDER), torch_dtype=torch.float32)
    torch_pipeline.set_progress_bar_config(disable=True)
    assert isinstance(torch_pipeline.scheduler, diffusers.DDIMScheduler)
    start = torch.from_numpy(np.stack([initial_noise(pipeline, seed) for seed in (3, 4)]).transpose(0, 3, 1, 2).copy())
    arguments = {"latents": start, "num_inference_steps": 20, "guidance_scale": 5.0}
    with torch.no_grad():
        their_latents = torch_pipeline(PROMPTS, output_type="latent", **arguments).images
        decoded = torch_pipeline.vae.decode(their_latents / torch_pipeline.vae.config.scaling_factor).sample
    theirs = (decoded / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)
    their_latents = their_latents.numpy().transpose(0, 2, 3, 1)
    assert np.abs(latents - their_latents).max() <= 2e-3 * np.abs(their_latents).max()
    difference = np.abs(ours.astype(int) - np.round(theirs * 255).astype(int))
    assert difference.max() <= 2 and (difference > 0).mean() < 0.02


def test_folder_is_small_and_whole():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 50 * 2**20
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert "CC BY-SA 4.0" in (FOLDER / "CREDIT").read_text()


def test_shipped_stages_fit_the_model_and_recomputing_gives_the_same_losses(pipeline, openmoji_dir, tmp_path):
    dataset = open_dataset("openmoji", openmoji_dir)
    config = method_config()
    run = Run(pipeline, dataset, StageRoot(tmp_path / "work", FOLDER / "stages"))
    for name in (
        "latents",
        f"fisher/{config.weights}-{config.fisher_samples}-seed0",
        "losses/stride100-first-flips2-seed0",
    ):
        stage = load_stage(FOLDER / "stages", name)
        assert stage.finished and stage.inputs == run.inputs
    stored = ChunkStore(
        FOLDER / "stages" / "losses" / "stride100-first-flips2-seed0", {"loss": ((2,), np.float64)}, 3953, 512, "losses"
    )
    rows = np.array([5, 1000, 3952])
    program = loss_program(run, config)
    again = program(program.place(pipeline.params["unet"]), run.data, rows)
    np.testing.assert_allclose(again, stored.read_all()["loss"][rows], rtol=1e-6)
