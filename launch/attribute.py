"""Finds the training pictures that made one generated picture possible.

python -m launch.attribute --flagfile=configs/quickstart.cfg
python -m launch.attribute --flagfile=configs/quickstart.cfg --prompt="handshake light skin tone" --seed=3
python -m launch.attribute --flagfile=configs/queries.cfg --queries=queries.jsonl
"""

import dataclasses
import time
from typing import Any

from absl import flags

from attrib_jax.attribute import Attributed, Attributor
from attrib_jax.attribution.projection import PROJECTIONS
from attrib_jax.attribution.scores import FLIP_RULES
from attrib_jax.attribution.unlearn import METHODS as UPDATES
from attrib_jax.core.weights import WEIGHT_SUBSETS
from attrib_jax.curvature.ekfac import RELATIVE_DAMPING
from attrib_jax.data.sources import Dataset
from attrib_jax.diffusion.samplers import SAMPLERS
from attrib_jax.jobs.encode import picture_resolution
from attrib_jax.jobs.queries import read_queries
from attrib_jax.jobs.query import Query, read_stored_query
from attrib_jax.methods.config import CAPTIONS, CURVATURES, METHODS, SCORES, AttributeConfig
from attrib_jax.methods.feature_settings import TOWER_METHODS, FeatureSettings, default_tower
from attrib_jax.methods.gradient_settings import PROJECTED_METHODS, GradientSettings
from attrib_jax.models.precision import PRECISIONS
from attrib_jax.parallel.hosts import is_host0
from attrib_jax.report.outputs import write_outputs
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common

_PROMPT = flags.DEFINE_string("prompt", None, "The query's caption.")
_QUERY = flags.DEFINE_string("query", None, "A picture to attribute, with --prompt; generated if not given.")
_QUERY_LATENTS = flags.DEFINE_string("query_latents", None, "Numpy file of queries as latents (Q, c, h, w).")
_QUERY_TEXT = flags.DEFINE_string("query_text", None, "Numpy file of their text states (Q, captions, tokens, width).")
_QUERY_INDEX = flags.DEFINE_integer("query_index", 0, "Which query of these files.", lower_bound=0)
_QUERIES = flags.DEFINE_string(
    "queries", None, "JSON Lines file of many queries: prompt, and maybe seed, image, name and guidance_scale."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the generated query.")
_GUIDANCE = flags.DEFINE_float("guidance_scale", 7.5, "Classifier-free guidance of the generated query.")
_SAMPLER = flags.DEFINE_string("sampler", "ddim", f"One of {', '.join(SAMPLERS)}.")
_SAMPLER_STEPS = flags.DEFINE_integer("sampler_steps", 50, "Sampling steps of the generated query.")

_METHOD = flags.DEFINE_string("method", "unlearn", f"One of {', '.join(METHODS)}.")
_WEIGHTS = flags.DEFINE_string("weights", "cross-attn-kv", f"Weights that move: {', '.join(WEIGHT_SUBSETS)}.")
_UPDATE = flags.DEFINE_string("update", "newton", f"Unlearning rule: {', '.join(UPDATES)}.")
_STEP_SIZE = flags.DEFINE_float("step_size", 0.01, "alpha of an unlearning step.")
_STEPS = flags.DEFINE_integer("steps", 1, "Unlearning steps.")
_DRAWS = flags.DEFINE_integer("query_draws", 2048, "(t, noise) draws averaged into the gradient of each step.")
_CURVATURE = flags.DEFINE_string("curvature", "diagonal", f"F of the Newton step: {', '.join(CURVATURES)}.")
_EKFAC_DAMPING = flags.DEFINE_float(
    "ekfac_damping", RELATIVE_DAMPING, "With --curvature=ekfac: share of a layer's mean eigenvalue added to all."
)
_DAMPING = flags.DEFINE_float("damping", 0.0, "Added to the Fisher information.")
_KEEP_EWC = flags.DEFINE_boolean("keep_ewc_gradient", False, "Keep the pull towards the first weights.")
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", None, "N of the Newton step; the data set's size if not given.")
_FISHER_SAMPLES = flags.DEFINE_integer("fisher_samples", 16384, "Samples that the Fisher information is fitted on.")
_FISHER = flags.DEFINE_string("fisher", None, "File or stage folder of a Fisher information fitted elsewhere.")

_SCORE = flags.DEFINE_string(
    "score", "exact", f"Loss difference, or derivative along the weight change: {', '.join(SCORES)}."
)
_STRIDE = flags.DEFINE_integer("stride", 100, "Timesteps of the score: 0, stride, 2 stride, ...")
_CAPTIONS = flags.DEFINE_string("captions", "first", f"Captions of a training picture: {', '.join(CAPTIONS)}.")
_FLIPS = flags.DEFINE_string("flips", "max", f"Over a picture and its mirror image: {', '.join(FLIP_RULES)}.")
_LOSS_SEED = flags.DEFINE_integer("loss_seed", 0, "Seeds the noise of losses, Fisher information and unlearning.")
_REGION = flags.DEFINE_list(
    "region", None, "x0,y0,x1,y1 in pixels of the query as the model sees it (query.png): attribute this box only."
)
_REGION_MASK = flags.DEFINE_string(
    "region_mask", None, "PNG file of that size: attribute the pixels that are not black, instead of a box."
)
_PRECISION = flags.DEFINE_string("precision", "float32", f"Of the scores' losses: {', '.join(PRECISIONS)}.")
_CASCADE = flags.DEFINE_float("cascade", 0.0, "Share of the pictures scored at the full setting, by coarse scores.")
_CASCADE_STRIDE = flags.DEFINE_integer("cascade_stride", 250, "Timesteps of the coarse scores.")
_CASCADE_MIN = flags.DEFINE_integer("cascade_min", 1000, "Least number of pictures scored at the full setting.")
_PROJECTION = flags.DEFINE_string(
    "projection", "sparse", f"Of gradients, in trak and its kin: {', '.join(PROJECTIONS)}."
)
_PROJECTION_DIM = flags.DEFINE_integer("projection_dim", 2048, "Numbers kept of each gradient.")
_PROJECTION_SEED = flags.DEFINE_integer("projection_seed", 0, "Seed of the random projection.")
_REGULARISATION = flags.DEFINE_float("regularisation", 0.1, "lambda, in units of the kernel's mean eigenvalue.")
_JOURNEY_TIMESTEP = flags.DEFINE_integer("journey_timestep", 400, "Timestep of the query's loss in journey-trak.")
_DAS_LEVERAGE = flags.DEFINE_boolean("das_leverage", False, "das: divide by 1 - leverage of each training example.")
_ENSEMBLE = flags.DEFINE_list(
    "ensemble", [], "Folders of further models whose scores are averaged, in trak and its kin."
)
_TOP_K = flags.DEFINE_integer("top_k", 24, "Pictures shown in the report and rows of top.csv.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Examples in flight; changes speed and memory only.")
_QUERIES_PER_PASS = flags.DEFINE_integer("queries_per_pass", 0, "Changes memory and speed only; 0 is automatic.")
_NAME = flags.DEFINE_string("query_name", None, "Folder name of the result; made from the prompt if not given.")
_TOWER = flags.DEFINE_string(
    "tower", None, "Of the similarity methods: transformers folder or Hugging Face id; the shipped one for OpenMoji."
)
_HEAD = flags.DEFINE_string("feature_head", None, "File of the linear mapping of clip-abc and dino-abc.")
_SHIPPED = flags.DEFINE_boolean("use_shipped_stages", True, "Reuse the finished stages that came with the model.")


def main():
    began = time.monotonic()
    common.require(model=common.MODEL.value, workdir=common.WORKDIR.value)
    queries, names = _read_queries()
    config = AttributeConfig(
        method=_METHOD.value,
        weights=_WEIGHTS.value,
        update=_UPDATE.value,
        step_size=_STEP_SIZE.value,
        steps=_STEPS.value,
        query_draws=_DRAWS.value,
        curvature=_CURVATURE.value,
        damping=_DAMPING.value,
        ekfac_damping=_EKFAC_DAMPING.value,
        keep_ewc_gradient=_KEEP_EWC.value,
        num_examples=_NUM_EXAMPLES.value,
        fisher_samples=_FISHER_SAMPLES.value,
        fisher=_FISHER.value,
        score=_SCORE.value,
        stride=_STRIDE.value,
        captions=_CAPTIONS.value,
        flips=_FLIPS.value,
        loss_seed=_LOSS_SEED.value,
        region=_region(),
        region_mask=_REGION_MASK.value,
        precision=_PRECISION.value,
        cascade=_CASCADE.value,
        cascade_stride=_CASCADE_STRIDE.value,
        # Every picture that is shown has its full score.
        cascade_min=max(_CASCADE_MIN.value, _TOP_K.value) if _CASCADE_MIN.value > 0 else _CASCADE_MIN.value,
        gradients=_gradients(),
        batch_size=_BATCH_SIZE.value,
        queries_per_pass=_QUERIES_PER_PASS.value,
        features=_features(),
    )
    pipeline = common.load_model()
    if not common.LATENTS_SCALED.value:
        scale = pipeline.vae.config.scaling_factor
        queries = [
            query if query.latents is None else dataclasses.replace(query, latents=query.latents * scale)
            for query in queries
        ]
    dataset = common.load_dataset(picture_resolution(pipeline))
    root = StageRoot(common.WORKDIR.value, common.shipped_stages() if _SHIPPED.value else None)
    with lock(common.WORKDIR.value):
        attributor = Attributor(pipeline, dataset, root, common.encode_config())
        results = attributor.attribute_many(queries, config, names)
        for query, result in zip(queries, results):
            write_outputs(
                result,
                dataset,
                query,
                config,
                model_name=common.MODEL.value,
                model_credit=common.model_credit(),
                top_k=_TOP_K.value,
                record={"flags": common.own_flags("launch.attribute"), "seconds": time.monotonic() - began},
            )
    if is_host0():
        for query, result in zip(queries, results):
            _print(query, result, dataset, named=len(results) > 1)


def _print(query: Query, result: Attributed, dataset: Dataset, named: bool) -> None:
    if named:
        print(f"{query.prompt} ({result.name})")
    top = result.scores.top(min(5, _TOP_K.value))
    for rank, (row, score) in enumerate(zip(top.row_id, top.score), start=1):
        position = int((dataset.row_ids == row).argmax())
        print(f"{rank:3d}  row {row:5d}  {score: .3e}  {dataset.captions(position)[0]}")
    print(f"report: {result.folder / 'report.html'}")


def _read_queries() -> tuple[list[Query], list[str | None]]:
    """The queries of the flags, and their names."""
    settings = {
        "seed": _SEED.value,
        "guidance_scale": _GUIDANCE.value,
        "sampler": _SAMPLER.value,
        "sampler_steps": _SAMPLER_STEPS.value,
    }
    if _QUERIES.value is not None:
        single = {"prompt": _PROMPT, "query": _QUERY, "query_latents": _QUERY_LATENTS, "query_text": _QUERY_TEXT}
        given = [f"--{name}" for name, flag in {**single, "query_name": _NAME}.items() if flag.value]
        if given:
            raise ValueError(
                f"{', '.join(given)} given beside --queries, whose lines have prompts, pictures and names of their "
                "own; leave them out (--prompt= takes back that of a flagfile)"
            )
        return read_queries(_QUERIES.value, Query(prompt="", **settings))
    if _QUERY_INDEX.value and _QUERY_LATENTS.value is None:
        raise ValueError(f"query_index is {_QUERY_INDEX.value}, but there are no --query_latents to choose from")
    if _QUERY_TEXT.value is None and _PROMPT.value is None:
        common.require(prompt=None)
    if not (_PROMPT.value or _QUERY.value or _QUERY_LATENTS.value):
        # An own picture may have an empty prompt; a generated one would be of nothing.
        raise ValueError(
            "prompt is empty, and there is no picture; give --prompt, --query, --query_latents or --queries"
        )
    return [Query(prompt=_PROMPT.value or "", image=_QUERY.value, **_stored_query(), **settings)], [_NAME.value]


def _stored_query() -> dict[str, Any]:
    if _QUERY_LATENTS.value is None:
        if _QUERY_TEXT.value is not None:
            raise ValueError(f"query_text is {_QUERY_TEXT.value!r} but query_latents is not given; give both")
        return {}
    return read_stored_query(_QUERY_LATENTS.value, _QUERY_TEXT.value, _QUERY_INDEX.value)


def _gradients() -> GradientSettings:
    given = {
        "projection": _PROJECTION,
        "projection_dim": _PROJECTION_DIM,
        "projection_seed": _PROJECTION_SEED,
        "regularisation": _REGULARISATION,
        "journey_timestep": _JOURNEY_TIMESTEP,
        "das_leverage": _DAS_LEVERAGE,
        "ensemble": _ENSEMBLE,
    }
    if _METHOD.value not in PROJECTED_METHODS:
        changed = [f"--{name}" for name, flag in given.items() if flag.value != flag.default]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} given with --method={_METHOD.value}; expected one of "
                f"{', '.join(PROJECTED_METHODS)}. Leave out the flags, or change the method."
            )
    return GradientSettings(**{name: flag.value for name, flag in given.items()})


def _features() -> FeatureSettings:
    method = TOWER_METHODS.get(_METHOD.value)
    unused = {"tower": method is None and _TOWER.value, "feature_head": not (method and method.mapped) and _HEAD.value}
    given = [f"--{name}" for name, value in unused.items() if value]
    if given:
        raise ValueError(f"{' and '.join(given)} given, which method {_METHOD.value!r} does not use; leave out")
    return FeatureSettings(_TOWER.value or default_tower(_METHOD.value, common.DATASET.value), _HEAD.value)


def _region() -> tuple[int, int, int, int] | None:
    if not _REGION.value:
        return None
    try:
        x0, y0, x1, y1 = map(int, _REGION.value)
    except ValueError as error:
        raise ValueError(f"region is {','.join(_REGION.value)!r}; expected four whole numbers x0,y0,x1,y1") from error
    return x0, y0, x1, y1


if __name__ == "__main__":
    common.run(main)
