"""The programs that the commands run, with abstract inputs, for devices that are not there.

Each builder gives the compiled function that a job calls, shapes of all that it is called with, and how many examples
one call has on each device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attrib_jax.attribution.scores import EXAMPLES_PER_TILE
from attrib_jax.attribution.unlearn import DRAWS_PER_TILE, QueryGradient, ascend_program, zero_gradient
from attrib_jax.convert.configs import MSCOCO
from attrib_jax.core.checks import check_choice
from attrib_jax.core.compensated import CompensatedSum
from attrib_jax.core.keys import loss_key
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import select_weights
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.diffusion.flow import FlowSchedule
from attrib_jax.diffusion.samplers import sample
from attrib_jax.diffusion.schedule import NoiseSchedule, strided_timesteps
from attrib_jax.jobs.curvature import fisher_sums
from attrib_jax.jobs.draws import Sample, gradient_form, samples_per_tile, sums_like
from attrib_jax.jobs.encode import IMAGE_TILE, encode_views
from attrib_jax.jobs.linear import linear_scores, linear_scores_of_queries
from attrib_jax.jobs.losses import tile_strided_losses
from attrib_jax.jobs.query_gradient import gradient_sums
from attrib_jax.models.flux import CLASS_NAME as FLUX
from attrib_jax.models.flux import FluxConfig, FluxTransformer2DModel
from attrib_jax.models.predictor import PRECISIONS, as_predictor, cast_params, matmul_precision, predictor
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig, empty_conditioning
from attrib_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from attrib_jax.ops.shards import Shard, is_shard, map_parameters
from attrib_jax.parallel.mesh import batch_spec, mark_shards, mesh_platform, parameter_sharding, shard_spec, tile_map
from attrib_jax.parallel.sums import divided_like
from benchmarks.accelerator_targets import TARGETS
from benchmarks.sizes import SIZES

_WHOLE = PartitionSpec()
_SAMPLER_STEPS, _SAMPLER_BATCH = 50, 8
_NUMBER, _SHARE = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((), np.float32)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model at its real size.

    Attributes:
      unet, vae, scheduler: content of the config files; `unet` is that of the denoiser, FLUX's too, with the latents'
        `sample_size` beside.
      tokens: text states of a caption.
      stride: of the strided losses' timesteps.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    tokens: int = 77
    stride: int = 50


_SD_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
_SD_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
_CROSS = ["CrossAttnDownBlock2D"] * 3, ["CrossAttnUpBlock2D"] * 3
_FLUX_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def _flux(layers: int, single_layers: int) -> dict[str, Any]:
    blocks = {"num_layers": layers, "num_single_layers": single_layers, "guidance_embeds": True}
    return {"_class_name": FLUX, "sample_size": 128, **blocks}


MODELS = {
    "mscoco": Model(MSCOCO.unet, {**_SD_VAE, "sample_size": 128}, MSCOCO.scheduler or {}),
    # METHOD.md section 6 scores Stable Diffusion 1.4 at ten timesteps.
    "sd14": Model(
        {
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": [*_CROSS[0], "DownBlock2D"],
            "up_block_types": ["UpBlock2D", *_CROSS[1]],
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        {**_SD_VAE, "sample_size": 512},
        _SD_SCHEDULER,
        stride=100,
    ),
    "sdxl": Model(
        {
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {**_SD_VAE, "sample_size": 1024},
        _SD_SCHEDULER,
        stride=100,
    ),
    # FLUX.1 dev, with 11.9 billion parameters in 57 blocks; and with 6 and 3 of these, which compile in minutes.
    "flux": Model(_flux(19, 38), {**_SD_VAE, "sample_size": 1024}, _FLUX_SCHEDULER, tokens=512, stride=100),
    "flux-6": Model(_flux(2, 4), {**_SD_VAE, "sample_size": 1024}, _FLUX_SCHEDULER, tokens=512, stride=100),
    "flux-3": Model(_flux(1, 2), {**_SD_VAE, "sample_size": 1024}, _FLUX_SCHEDULER, tokens=512, stride=100),
    # Compiles in seconds: what CI compiles for a TPU.
    "tiny": Model(
        SIZES["tiny"].unet,
        {"block_out_channels": [32], "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8},
        MSCOCO.scheduler or {},
        tokens=8,
        stride=250,
    ),
}


class Program(NamedTuple):
    """What is compiled: `function.lower(*arguments)`; `examples` are those of a call on one device."""

    function: Any
    arguments: tuple[Any, ...]
    examples: int
    precision: str


def _denoiser(model: Model) -> tuple[Any, Any, int, Any]:
    """The denoiser, its schedule, channels of its latents, and shapes of the conditioning of a batch of one."""
    config = {name: value for name, value in model.unet.items() if name != "sample_size"}
    if config.get("_class_name") == FLUX:
        flux = FluxConfig.from_dict(config)
        shapes = {
            name: (1, *(model.tokens if size is None else size for size in shape))
            for name, shape in flux.conditioning.items()
        }
        conditioning = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
        return (
            FluxTransformer2DModel(flux),
            FlowSchedule.from_config(model.scheduler),
            flux.latent_channels,
            conditioning,
        )
    unet = UNet2DConditionModel(UNetConfig.from_dict(model.unet))
    one = jax.eval_shape(lambda: empty_conditioning(unet.config, 1, model.tokens))
    return unet, NoiseSchedule.from_config(model.scheduler), unet.config.in_channels, one


class _Inputs:
    """Abstract parameters and examples of a model on a mesh."""

    def __init__(self, model: Model, mesh: Mesh, precision: str):
        self.model, self.mesh, self.precision = model, mesh, precision
        self.unet, schedule, channels, one = _denoiser(model)
        self.predict = predictor(self.unet, precision)
        self.schedule = self.whole(schedule)
        side = model.unet["sample_size"]
        self.latents = (side, side, channels)
        self.timesteps = strided_timesteps(model.stride, model.scheduler["num_train_timesteps"])
        # Of one example, without the batch axis.
        self.conditioning = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), one)
        latents = jax.ShapeDtypeStruct((1, *self.latents), np.float32)
        timestep = jax.ShapeDtypeStruct((1,), np.int32)
        shapes = jax.eval_shape(self.unet.init, jax.random.key(0), latents, timestep, one)["params"]
        self.params = self.divided(jax.eval_shape(functools.partial(cast_params, precision=precision), shapes))
        self.selected, self.rest = select_weights(self.divided(shapes), "cross-attn-kv")
        # What no query moves is rounded where the precision says so.
        self.rest_cast = select_weights(self.params, "cross-attn-kv")[1]

    def array(self, shape: tuple[int, ...], dtype: Any = np.float32, spec: PartitionSpec = _WHOLE) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def whole(self, tree: Any) -> Any:
        """Shapes of a tree that is on every device."""
        return jax.tree.map(lambda leaf: self.array(leaf.shape, leaf.dtype), jax.eval_shape(lambda: tree))

    def divided(self, tree: Any) -> Any:
        """Shapes of parameters as `place_parameters` puts them on the devices."""

        def shape(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parameter_sharding(self.mesh, leaf))

        return jax.tree.map(shape, jax.eval_shape(lambda: tree))

    def split(self, tree: Any) -> Any:
        """Shapes of what each device has one of, stacked; of a `Shard` each group has one."""

        def shape(node):
            if is_shard(node):
                leaf, count, spec = node.value, self.mesh.shape["data"], shard_spec(node.axis, "data")
                return Shard(self.array((count, *leaf.shape), leaf.dtype, spec), node.axis)
            return self.array((self.mesh.size, *node.shape), node.dtype, batch_spec(self.mesh))

        return map_parameters(shape, tree)

    def batch(self, per_device: int, **fields: Any) -> dict[str, Any]:
        """Shapes of a batch that is split over the devices, from those of an example, in trees."""
        count = per_device * self.mesh.size
        return jax.tree.map(lambda leaf: self.array((count, *leaf.shape), leaf.dtype, batch_spec(self.mesh)), fields)

    def examples(self) -> Batch:
        """A tile of training examples on each device."""
        numbers = dict.fromkeys(("row_id", "flip", "caption"), _NUMBER)
        return Batch(**self.batch(EXAMPLES_PER_TILE, **self.inputs(), **numbers, mask=_SHARE))

    def inputs(self) -> dict[str, Any]:
        """Shapes of an example's latents and conditioning."""
        return {"latents": jax.ShapeDtypeStruct(self.latents, np.float32), "text": self.conditioning}

    def key(self) -> Any:
        return self.whole(jax.eval_shape(lambda: loss_key(0)))


def _losses(inputs: _Inputs) -> Program:
    function = functools.partial(tile_strided_losses, inputs.predict, mesh_platform(inputs.mesh), False)
    shared = (inputs.schedule, inputs.key(), inputs.whole(inputs.timesteps), inputs.params)
    return _tiles(inputs, function, (shared, inputs.examples()), EXAMPLES_PER_TILE)


def _tiles(inputs: _Inputs, function: Callable[..., Any], arguments: tuple[Any, ...], examples: int) -> Program:
    compiled = tile_map(inputs.mesh, function, matmul_precision=None, takes_shards=True)
    return Program(compiled, arguments, examples, inputs.precision)


def _linear(queries: int, inputs: _Inputs) -> Program:
    function = linear_scores if queries == 1 else linear_scores_of_queries
    change = jax.tree.map(
        lambda leaf: inputs.array((*((queries,) if queries > 1 else ()), *leaf.shape)), inputs.selected
    )
    weights = (inputs.selected, inputs.rest_cast, change)
    shared = (inputs.schedule, inputs.key(), inputs.whole(inputs.timesteps), weights)
    function = functools.partial(function, inputs.predict, inputs.precision, False)
    return _tiles(inputs, function, (shared, inputs.examples()), EXAMPLES_PER_TILE)


def _fisher(inputs: _Inputs) -> Program:
    size = samples_per_tile(inputs.mesh)
    batch = Sample(**inputs.batch(size, **inputs.inputs(), index=_NUMBER, timestep=_NUMBER, mask=_SHARE))
    shared = (inputs.selected, inputs.rest, inputs.schedule, inputs.key())
    like = jax.eval_shape(lambda: sums_like(inputs.selected))
    like = (divided_like(inputs.mesh, like), jax.ShapeDtypeStruct((), np.int32))
    sums = CompensatedSum(inputs.split(like), inputs.split(like))
    program = fisher_sums(inputs.predict, inputs.mesh, gradient_form(inputs.selected, inputs.mesh, inputs.latents))
    return Program(program.compiled, (sums, mark_shards(shared), batch), size, "float32")


def _gradient(inputs: _Inputs) -> Program:
    text = inputs.whole(inputs.conditioning)
    weights = jax.eval_shape(as_predictor(inputs.predict).project_text, inputs.selected, text)
    weights = weights._replace(others=inputs.divided(weights.others), projections=inputs.whole(weights.projections))
    fixed = (inputs.rest, inputs.schedule, inputs.array(inputs.latents), text, None)
    shared = (fixed, (weights, inputs.key(), inputs.array((), np.int32)))
    like = jax.eval_shape(zero_gradient, weights)
    others = divided_like(inputs.mesh, like.gradient.others)
    like = like._replace(gradient=like.gradient._replace(others=others))
    sums = CompensatedSum(inputs.split(like), inputs.split(like))
    program = gradient_sums(inputs.predict, inputs.mesh)
    shared = mark_shards(shared)
    return Program(
        program.compiled, (sums, shared, inputs.split(jax.ShapeDtypeStruct((), np.int32))), DRAWS_PER_TILE, "float32"
    )


def _newton(inputs: _Inputs) -> Program:
    total = QueryGradient(inputs.array(()), inputs.selected)
    curvature = Diagonal(inputs.selected)
    numbers = (inputs.array(()),) * 4
    return Program(ascend_program, (inputs.selected, total, curvature, None, *numbers), 1, "float32")


def _encode(inputs: _Inputs) -> Program:
    vae = AutoencoderKL(AutoencoderKLConfig.from_dict(inputs.model.vae))
    side = inputs.model.vae["sample_size"]
    params = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
    images = (inputs.array((IMAGE_TILE * inputs.mesh.size, side, side, 3), np.uint8, batch_spec(inputs.mesh)),)
    rows = (inputs.array((IMAGE_TILE * inputs.mesh.size,), np.int32, batch_spec(inputs.mesh)),)
    shared = (inputs.whole(params), inputs.key())
    function = tile_map(inputs.mesh, functools.partial(encode_views, vae, "mean"))
    return Program(function, (shared, (*images, *rows)), IMAGE_TILE, "float32")


def _sampler(inputs: _Inputs) -> Program:
    def draw(params, schedule, text, empty, initial):
        return sample(inputs.predict, params, schedule, text, empty, initial, _SAMPLER_STEPS, 7.5)

    text = jax.tree.map(lambda leaf: inputs.array((_SAMPLER_BATCH, *leaf.shape)), inputs.conditioning)
    initial = inputs.array((_SAMPLER_BATCH, *inputs.latents))
    schedule = NoiseSchedule.from_config(inputs.model.scheduler)
    function = jax.jit(functools.partial(draw, schedule=schedule))
    arguments = (inputs.params,)
    keywords = {"text": text, "empty": inputs.whole(inputs.conditioning), "initial": initial}
    return Program(_Keywords(function, keywords), arguments, _SAMPLER_BATCH, inputs.precision)


@dataclasses.dataclass(frozen=True)
class _Keywords:
    """`lower` of a function with abstract keyword arguments."""

    function: Any
    keywords: dict[str, Any]

    def lower(self, *arguments: Any) -> Any:
        return self.function.lower(*arguments, **self.keywords)


PROGRAMS: dict[str, Callable[[_Inputs], Program]] = {
    "losses": _losses,
    "fisher": _fisher,
    "gradient": _gradient,
    "newton": _newton,
    "linear-1": functools.partial(_linear, 1),
    "linear-64": functools.partial(_linear, 64),
    "encode": _encode,
    "sampler": _sampler,
}


# Programs whose arrays and products follow --precision; all else is float32.
SCORED_PRECISIONS = ("losses", "linear-1", "linear-64", "sampler")


def build(model: str, mesh: Mesh, program: str, precision: str) -> Program:
    """A program of a model at its real size; only those of `SCORED_PRECISIONS` depend on the precision."""
    return PROGRAMS[program](_Inputs(MODELS[model], mesh, precision))


def lower(program: Program) -> Any:
    """The program lowered for the devices of its arguments, with its precision of products."""
    with jax.default_matmul_precision(matmul_precision(program.precision)):
        return program.function.lower(*program.arguments)


def planned(targets: list[str], models: list[str], programs: list[str], precisions: list[str]) -> list[tuple[str, ...]]:
    """What is compiled: (model, target, program, precision); ValueError for a name that is not known."""
    for name, values, known in (
        ("target", targets, TARGETS),
        ("model", models, MODELS),
        ("program", programs, PROGRAMS),
        ("precision", precisions, PRECISIONS),
    ):
        for value in values:
            check_choice(name, value, known)
    return [
        (model, target, program, precision)
        for model in models
        for target in targets
        for program in programs
        for precision in (precisions if program in SCORED_PRECISIONS else ["float32"])
    ]
