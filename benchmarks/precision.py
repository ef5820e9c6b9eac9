"""What lower compute precision does to scores: TensorFloat-32 and bfloat16 against float32.

python -m benchmarks.precision --model=models/openmoji --workdir=runs/precision                 # both models
python -m benchmarks.precision --models=mscoco --workdir=runs/precision --mscoco_rows=1000      # on an accelerator

Two scores of every image: the exact one, its loss under the unlearned weights less that before, both losses in the
precision that is judged; and the linearised one, the derivative of the loss along the weight change. Weights are
unlearned in float32 once for all, so only the scoring differs. `openmoji` is the shipped model, its queries images
that it generates from captions of scored images; `mscoco` the UNet of the paper with random weights, its images
synthetic latents in clusters, its queries further members of them. Prints a markdown table a model. Resumable query by
query and precision by precision; more queries go on from fewer.

A CPU has no TensorFloat-32. There the factors of all products are rounded to its 10 bits, to the nearest and towards
zero, as tensor cores do one or the other, and added in float32 (rounded_products.py); so are they to the 7 bits of
bfloat16 with all else in float32, which is what a TPU does with float32 numbers unless told otherwise.
"""

import functools
import json
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl import flags

from attrib_jax.attribution.scores import strided_losses
from attrib_jax.convert.configs import MSCOCO
from attrib_jax.core.checks import check_choice
from attrib_jax.core.weights import flatten_names, merge_weights, select_weights, unflatten_names
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.curvature import fit_fisher
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.losses import ExampleProgram, dataset_pass
from attrib_jax.jobs.query import PreparedQuery, Query, prepare_query
from attrib_jax.jobs.settings import LossSettings
from attrib_jax.methods.base import QueryJob
from attrib_jax.methods.unlearn import UnlearnConfig, prepare, unlearn_query
from attrib_jax.models.predictor import cast_params, predictor
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from attrib_jax.storage.files import make_folder, write_json
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from benchmarks.rounded_products import BFLOAT16_BITS, TENSORFLOAT32_BITS, round_products
from launch import common

_MODELS = flags.DEFINE_list("models", ["openmoji", "mscoco"], "Models to study.")
_CHOSEN = flags.DEFINE_list("modes", None, "Modes to compare with float32; all if not given.")
_ROWS = flags.DEFINE_integer("rows", 1000, "openmoji: random training images to score.", lower_bound=20)
_QUERIES = flags.DEFINE_integer("queries", 4, "openmoji: queries.", lower_bound=1)
_STRIDE = flags.DEFINE_integer("stride", 100, "openmoji: timesteps of the scores.", lower_bound=1)
_MSCOCO_ROWS = flags.DEFINE_integer("mscoco_rows", 64, "mscoco: synthetic images to score.", lower_bound=20)
_MSCOCO_QUERIES = flags.DEFINE_integer("mscoco_queries", 1, "mscoco: queries.", lower_bound=1)
_MSCOCO_STRIDE = flags.DEFINE_integer("mscoco_stride", 250, "mscoco: timesteps of the scores.", lower_bound=1)

# What a precision has to keep of the float32 scores to be the documented choice.
_SPEARMAN, _OVERLAP = 0.999, 0.98
_TOP = 100

# mscoco: captions as long as SD 2's encoder has them, and the paper's N.
_TEXT_LENGTH, _NUM_EXAMPLES = 77, 118_287
_CLUSTERS = 8
_FISHER_SAMPLES, _QUERY_DRAWS = 256, 160


class Case(NamedTuple):
    """A model and what it scores.

    Attributes:
      unet, params, schedule: the model, float32.
      data: images, of which those at the positions `rows` (N,) are scored.
      rows: positions.
      moved: for each query, the selected weights after unlearning it, float32.
      stride: of the scores' timesteps.
    """

    unet: UNet2DConditionModel
    params: Any
    schedule: NoiseSchedule
    data: EncodedDataset
    rows: np.ndarray
    moved: list[Any]
    stride: int


class Mode(NamedTuple):
    """How losses are computed.

    Attributes:
      precision: of the UNet, one of `PRECISIONS`.
      mantissa_bits: that factors of products are rounded to, to emulate what the device lacks; None for no rounding.
      truncate: rounds towards zero.
    """

    precision: str
    mantissa_bits: int | None = None
    truncate: bool = False

    @property
    def emulated(self) -> bool:
        return self.mantissa_bits is not None


def _modes() -> dict[str, Mode]:
    """Name -> mode, float32 first; ValueError for a name in --modes that there is not."""
    if jax.default_backend() == "cpu":
        products = {
            "tensorfloat32-rounded": Mode("float32", TENSORFLOAT32_BITS),
            "tensorfloat32-truncated": Mode("float32", TENSORFLOAT32_BITS, truncate=True),
            "bfloat16-products": Mode("float32", BFLOAT16_BITS),
        }
    else:
        products = {name: Mode(name) for name in ("tensorfloat32", "bfloat16-products")}
    modes = {**products, "bfloat16": Mode("bfloat16")}
    for name in _CHOSEN.value or ():
        check_choice("modes", name, modes)
    chosen = {name: mode for name, mode in modes.items() if _CHOSEN.value is None or name in _CHOSEN.value}
    return {"float32": Mode("float32"), **chosen}


class Scored(NamedTuple):
    """Scores (queries, N), and images a second of a pass over the data; None where no pass was timed."""

    scores: np.ndarray
    rate: float | None


def main():
    common.require(workdir=common.WORKDIR.value)
    studies = {"openmoji": _study_openmoji, "mscoco": _study_mscoco}
    for name in _MODELS.value:
        check_choice("models", name, studies)
    _modes()  # a wrong name before any work
    print(f"device: {len(jax.devices())} x {jax.devices()[0].device_kind}")
    for name in _MODELS.value:
        workdir = Path(common.WORKDIR.value) / name
        with lock(workdir):
            studies[name](workdir)


def _study_openmoji(workdir: Path) -> None:
    pipeline, dataset = common.load_model(), common.load_dataset()
    root = StageRoot(workdir, common.shipped_stages())
    run, config = Run(pipeline, dataset, root), UnlearnConfig(stride=_STRIDE.value)
    rows = np.random.default_rng(0).permutation(len(dataset))[: _ROWS.value]
    settings = {"rows": len(rows), **config.settings()}
    with root.stage("precision", settings, run.inputs) as stage:
        curvature, moved = prepare(run, config), []
        for index, row in enumerate(rows[: _QUERIES.value]):
            query = Query(prompt=dataset.captions(int(row))[0], seed=index, guidance_scale=2.0)
            folder = make_folder(stage.path / f"query{index}")
            job = QueryJob(folder.name, {}, prepare_query(pipeline, run.predict, query), folder)
            moved.append(unlearn_query(run, job, config, curvature)[0])
        params, schedule = pipeline.params["unet"], pipeline.schedule
        case = Case(pipeline.unet, params, schedule, run.data, np.sort(rows), moved, config.stride)
        _study("openmoji", stage.path, case)


def _study_mscoco(workdir: Path) -> None:
    unet = UNet2DConditionModel(UNetConfig.from_dict(MSCOCO.unet))
    schedule = NoiseSchedule.from_config(MSCOCO.scheduler)
    params = _random_params(unet, seed=0)
    count, size = _MSCOCO_ROWS.value + _MSCOCO_QUERIES.value, unet.config.sample_size
    latents = _clustered(count, (size, size, unet.config.in_channels), (0.0, 0.8, 0.6), seed=1)
    text = _clustered(count, (_TEXT_LENGTH, unet.config.cross_attention_dim), (0.7, 0.6, 0.4), seed=2)
    scored, queries = slice(_MSCOCO_ROWS.value), slice(_MSCOCO_ROWS.value, None)
    both = np.stack([latents[scored], latents[scored, :, ::-1]], axis=1)
    ids = np.arange(_MSCOCO_ROWS.value, dtype=np.int32)
    data = EncodedDataset(ids, both, text[scored], np.arange(len(ids) + 1))
    config = UnlearnConfig(
        query_draws=_QUERY_DRAWS,
        fisher_samples=_FISHER_SAMPLES,
        stride=_MSCOCO_STRIDE.value,
        num_examples=_NUM_EXAMPLES,
    )

    settings = {"rows": len(ids), **config.settings()}
    with StageRoot(workdir).stage("precision", settings, {}) as stage:
        predict = predictor(unet)
        selected, rest = select_weights(params, config.weights)
        fisher = fit_fisher(stage.path, predict, schedule, selected, rest, data, _FISHER_SAMPLES, config.loss_seed)
        # A run's model and data without its data set, which would be images and captions.
        pipeline = types.SimpleNamespace(unet=unet, params={"unet": params}, schedule=schedule)
        run = types.SimpleNamespace(
            predict=predict, data=data, pipeline=pipeline, select=functools.partial(select_weights, params)
        )
        moved = []
        for index, (query_latents, query_text) in enumerate(zip(latents[queries], text[queries])):
            folder = make_folder(stage.path / f"query{index}")
            prepared = PreparedQuery(np.zeros((1, 1, 3), np.uint8), query_latents, query_text, ())
            moved.append(unlearn_query(run, QueryJob(folder.name, {}, prepared, folder), config, fisher)[0])
        case = Case(unet, params, schedule, data, ids, moved, config.stride)
        _study("mscoco", stage.path, case)


def _random_params(unet: UNet2DConditionModel, seed: int) -> Any:
    """Parameters that keep the size of activations: matrices of variance 1 / fan-in, norms near the identity."""
    generator = np.random.default_rng(seed)
    size, config = unet.config.sample_size, unet.config
    latents, text = (1, size, size, config.in_channels), (1, _TEXT_LENGTH, config.cross_attention_dim)
    shapes = jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros(latents), 0, jnp.zeros(text))["params"]
    params = {}
    for name, leaf in flatten_names(shapes).items():
        noise = generator.standard_normal(leaf.shape, np.float32)
        if name.endswith("/kernel"):
            params[name] = noise / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        else:
            params[name] = np.float32(0.1) * noise + np.float32(name.endswith("/scale"))
    return unflatten_names(params)


def _clustered(count: int, shape: tuple[int, ...], parts: tuple[float, float, float], seed: int) -> np.ndarray:
    """(count, *shape) float32: `parts` of what all share, what a cluster shares and what each has alone.

    More are the same first ones, and others.
    """
    generator = np.random.default_rng(seed)
    shared, of_cluster, own = (generator.standard_normal((n, *shape), np.float32) for n in (1, _CLUSTERS, count))
    of_all, of_some, of_one = (np.float32(part) for part in parts)
    return of_all * shared + of_some * of_cluster[np.arange(count) % _CLUSTERS] + of_one * own


def _study(name: str, path: Path, case: Case) -> None:
    """Scores in every precision, kept in `path`, and their comparison, printed."""
    modes = _modes()
    exact = {name: _exact_scores(path, case, name, mode) for name, mode in modes.items()}
    linear = {name: _linear_scores(path, case, name, mode) for name, mode in modes.items()}
    top = min(_TOP, len(case.rows) // 10)
    print(f"\n{name}: {len(case.rows)} images, {len(case.moved)} queries, stride {case.stride}, K = {top}.")
    print("Means over the queries, the worst in brackets; error: root mean square, over the scores' deviation.\n")
    print(f"| score | precision | against | Spearman | overlap@{top} | error | images/s | passes |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, scored in (("exact", exact), ("linearised", linear)):
        for name in modes:
            _print_row(kind, name, f"{kind}, float32", scored[name], scored["float32"].scores, top)
    for name in modes:
        _print_row("linearised", name, "exact, float32", linear[name], exact["float32"].scores, top)
    for kind, scored in (("exact", exact), ("linearised", linear)):
        reference = scored["float32"].scores
        passing = [n for n in modes if n != "float32" and _passes(*_agreement(scored[n].scores, reference, top)[:2])]
        print(f"\n{kind} score, Spearman >= {_SPEARMAN} and overlap >= {_OVERLAP}: {', '.join(passing) or 'none'}")


def _print_row(kind: str, mode: str, against: str, scored: Scored, reference: np.ndarray, top: int) -> None:
    spearman, overlap, error = _agreement(scored.scores, reference, top)
    rate = "" if scored.rate is None else f"{scored.rate:.3g}"
    cells = [f"{spearman.mean():.5f} ({spearman.min():.5f})", f"{overlap.mean():.3f} ({overlap.min():.2f})"]
    cells += [f"{error.mean():.2g}", rate, "yes" if _passes(spearman, overlap) else "no"]
    print(f"| {kind} | {mode} | {against} | {' | '.join(cells)} |", flush=True)


def _agreement(scores: np.ndarray, reference: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spearman correlation, overlap of the `top` best and relative error of each query's scores, each (queries,)."""
    spearman = [scipy.stats.spearmanr(mine, theirs).statistic for mine, theirs in zip(scores, reference)]
    best, expected = (np.argsort(-array, axis=1, kind="stable")[:, :top] for array in (scores, reference))
    overlap = [len(np.intersect1d(mine, theirs)) / top for mine, theirs in zip(best, expected)]
    error = np.sqrt(np.mean((scores - reference) ** 2, axis=1)) / reference.std(axis=1)
    return np.array(spearman), np.array(overlap), error


def _passes(spearman: np.ndarray, overlap: np.ndarray) -> bool:
    return bool(spearman.mean() >= _SPEARMAN and overlap.mean() >= _OVERLAP)


def _exact_scores(path: Path, case: Case, name: str, mode: Mode) -> Scored:
    """Losses under each query's unlearned weights less those before, all in `mode`."""
    program = _program(_losses, case, mode)
    selected, rest = select_weights(case.params, "cross-attn-kv")
    losses, rates = [], []
    for index, tree in enumerate([selected, *case.moved]):
        folder = path / f"exact-{name}" / (f"query{index - 1}" if index else "before")
        values, rate = _pass(folder, program, cast_params(merge_weights(tree, rest), mode.precision), case)
        losses.append(values)
        rates.append(rate)
    return Scored(np.stack(losses[1:]) - losses[0], None if mode.emulated else _best(rates))


def _linear_scores(path: Path, case: Case, name: str, mode: Mode) -> Scored:
    """The derivatives of the losses along each query's weight change, in `mode`; the change is float32's."""
    program = _program(_derivatives, case, mode)
    params = cast_params(case.params, mode.precision)
    before, _ = select_weights(case.params, "cross-attn-kv")
    selected, rest = select_weights(params, "cross-attn-kv")
    scores, rates = [], []
    for index, tree in enumerate(case.moved):
        change = jax.tree.map(lambda new, old, like: jnp.asarray(new - old, like.dtype), tree, before, selected)
        folder = path / f"linear-{name}" / f"query{index}"
        values, rate = _pass(folder, program, (selected, rest, change), case)
        scores.append(values)
        rates.append(rate)
    return Scored(np.stack(scores), None if mode.emulated else _best(rates))


def _program(function: Callable[..., jax.Array], case: Case, mode: Mode) -> ExampleProgram:
    function = functools.partial(function, predictor(case.unet, mode.precision))
    if mode.emulated:
        function = round_products(function, mode.mantissa_bits, mode.truncate)
    config = LossSettings(stride=case.stride, precision=mode.precision, flips="none")
    return ExampleProgram(function, case.schedule, config)


def _losses(predict, shared, batch) -> jax.Array:
    schedule, key, timesteps, params = shared
    return strided_losses(predict, schedule, params, key, batch, timesteps)


def _derivatives(predict, shared, batch) -> jax.Array:
    schedule, key, timesteps, (selected, rest, change) = shared

    def losses(selected):
        return strided_losses(predict, schedule, merge_weights(selected, rest), key, batch, timesteps)

    return jax.jvp(losses, (selected,), (change,))[1]


def _pass(folder: Path, program: ExampleProgram, weights: Any, case: Case) -> tuple[np.ndarray, float | None]:
    """One pass over the images, kept in `folder` -> their values (N,), and images a second if not resumed."""
    timing, fresh = folder / "timing.json", not folder.exists()
    weights = program.place(weights)
    if fresh:
        # Compiles, which is not to be timed.
        program(weights, case.data, case.rows[:1])
    began = time.perf_counter()
    description = f"{folder.parent.name} {folder.name}"
    run = types.SimpleNamespace(data=case.data)
    values = dataset_pass(run, [folder], program, [weights], description, case.rows, check_device=False)[0]
    if fresh:
        write_json(timing, {"images_per_second": len(case.rows) / (time.perf_counter() - began)})
    return values[:, 0], _read_rate(timing)


def _read_rate(timing: Path) -> float | None:
    return json.loads(timing.read_bytes())["images_per_second"] if timing.exists() else None


def _best(rates: list[float | None]) -> float | None:
    return max((rate for rate in rates if rate is not None), default=None)


if __name__ == "__main__":
    common.run(main)
