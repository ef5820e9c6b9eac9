"""The core functions lower for GPUs and TPUs, with no call that these lack, and with parameters as arguments.

Nothing is compiled or run, so no accelerator is needed.
"""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.attribution.influence import influence_scores
from attrib_jax.attribution.scores import example_loss, strided_losses
from attrib_jax.attribution.unlearn import by_selected, newton_step, tile_gradient
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import flatten_names, merge_weights, select_weights
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.curvature.ekfac import Factors, eigenvalue_sums, factor_sums, linear_layers, make_ekfac
from attrib_jax.curvature.fisher import sum_squares
from attrib_jax.diffusion.losses import denoising_losses
from attrib_jax.diffusion.samplers import sample
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.jobs.draws import Sample, sample_gradients
from attrib_jax.models.precision import cast_params, matmul_precision
from attrib_jax.models.predictor import predictor
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from attrib_jax.ops import prepare_kernels
from attrib_jax.parallel.mesh import data_mesh, tile_map

PLATFORMS = ("cuda", "tpu")
TILE, STEPS, LENGTH, WIDTH, SIZE = 2, 3, 5, 768, 8
# A program that applies this UNet of one level takes 85,000 to 150,000 bytes. A matrix of its attention takes 147,000
# or more: one that became a constant shows in the size.
PROGRAM_BYTES = 200_000
UNET = UNet2DConditionModel(
    UNetConfig(
        block_out_channels=(192,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
    )
)
SCHEDULE = NoiseSchedule.from_config({})

# Calls that the compiler of a platform knows: shardings on all, and of the kernels those that JAX promises to keep.
SHARDINGS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
KNOWN_CALLS = {"cuda": SHARDINGS | {"cu_threefry2x32_ffi"}, "tpu": SHARDINGS | {"tpu_custom_call"}}
CUDNN_ATTENTION = r"__cudnn\$fmha\w*"


def unknown_calls(module: str, platform: str) -> set[str]:
    """Targets of the custom calls in a StableHLO text that `platform` does not have."""
    targets = set(re.findall(r'custom_call @"?([^"\s(]+)', module))
    targets |= set(re.findall(r'call_target_name = "([^"]+)"', module))
    if platform == "cuda":
        targets = {target for target in targets if not re.fullmatch(CUDNN_ATTENTION, target)}
    return targets - KNOWN_CALLS[platform]


def float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)
LATENTS, TEXT = float32(SIZE, SIZE, 4), float32(LENGTH, WIDTH)


def wrap(key_data):
    return jax.random.wrap_key_data(key_data, impl="threefry2x32")


@functools.cache
def params_shapes(precision):
    init = functools.partial(UNET.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 4)), 0)
    shapes = jax.eval_shape(init, jnp.zeros((1, LENGTH, WIDTH)))["params"]
    return jax.eval_shape(lambda params: cast_params(params, precision), shapes)


def batch_shapes():
    rows = int32(TILE)
    return Batch(float32(TILE, *LATENTS.shape), float32(TILE, *TEXT.shape), rows, rows, rows, float32(TILE))


def strided_losses_tile(precision):
    def tile(shared, batch):
        params, schedule, key, timesteps = shared
        return strided_losses(predictor(UNET, precision), schedule, params, wrap(key), batch, timesteps)

    run = tile_map(data_mesh(jax.devices()[:1]), tile, matmul_precision(precision))
    return run, ((params_shapes(precision), SCHEDULE, KEY, int32(STEPS)), batch_shapes())


def sample_loss(precision, schedule, key):
    def loss_fn(selected, rest, sample):
        latents, text, index, timestep, _ = sample
        noise = jax.random.normal(jax.random.fold_in(wrap(key), index), (1, *latents.shape))
        params, predict = merge_weights(selected, rest), predictor(UNET, precision)
        return denoising_losses(predict, params, schedule, latents, text, noise, timestep[None])[0]

    return loss_fn


def sample_shapes():
    return float32(TILE, *LATENTS.shape), float32(TILE, *TEXT.shape), int32(TILE), int32(TILE), float32(TILE)


def fisher_tile(precision):
    def tile(selected, rest, schedule, key, samples):
        gradients = sample_gradients(predictor(UNET, precision), schedule, wrap(key))
        inputs = Sample(*samples), jnp.swapaxes(samples[1], -1, -2)
        return sum_squares(gradients, selected, rest, inputs, mask=samples[-1], microbatch=1)

    return tile, (*select_weights(params_shapes(precision), "cross-attn-kv"), SCHEDULE, KEY, sample_shapes())


def ekfac_layers(precision):
    """The layers of the keys and values, and the shapes of their bases."""
    halves = select_weights(params_shapes(precision), "cross-attn-kv")
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), sample_shapes())
    layers = linear_layers(sample_loss(precision, SCHEDULE, np.zeros(2, np.uint32)), *halves, example)
    sides = {name: leaf.shape for name, leaf in flatten_names(halves[0]).items()}
    assert {layer.name for layer in layers} == sides.keys()
    # Read by all of them: the text.
    inputs = {layer.input: float32(WIDTH, WIDTH) for layer in layers}
    assert len(inputs) == 1
    return layers, Factors(inputs, {name: float32(out, out) for name, (_, out) in sides.items()})


def ekfac_factors_tile(precision):
    layers, _ = ekfac_layers(precision)

    def tile(selected, rest, schedule, key, samples):
        return factor_sums(sample_loss(precision, schedule, key), layers, selected, rest, samples, samples[-1])

    return tile, (*select_weights(params_shapes(precision), "cross-attn-kv"), SCHEDULE, KEY, sample_shapes())


def ekfac_eigenvalues_tile(precision):
    layers, bases = ekfac_layers(precision)

    def tile(selected, rest, schedule, key, bases, samples):
        loss_fn = sample_loss(precision, schedule, key)
        return eigenvalue_sums(loss_fn, layers, bases, selected, rest, samples, samples[-1], microbatch=1)

    return tile, (*select_weights(params_shapes(precision), "cross-attn-kv"), SCHEDULE, KEY, bases, sample_shapes())


def ekfac_newton(precision):
    layers, bases = ekfac_layers(precision)

    def step(selected, gradient, curvature, step_size):
        return newton_step(selected, gradient, curvature, step_size, 1000, 1e-8)

    selected, _ = select_weights(params_shapes(precision), "cross-attn-kv")
    return step, (selected, selected, make_ekfac(Diagonal(selected), bases, layers), float32())


def query_gradient_tile(precision):
    def tile(selected, rest, schedule, latents, text, key, mask, indices, draws):
        predict = predictor(UNET, precision)
        weights = predict.project_text(selected, text)
        total = tile_gradient(predict, schedule, weights, rest, latents, text, wrap(key), mask, indices, draws)
        return by_selected(total, selected, text)

    halves = select_weights(params_shapes(precision), "cross-attn-kv")
    return tile, (*halves, SCHEDULE, LATENTS, TEXT, KEY, float32(SIZE, SIZE), int32(TILE), int32())


def newton(precision):
    def step(selected, gradient, fisher, step_size):
        return newton_step(selected, gradient, Diagonal(fisher), step_size, 1000, 1e-8)

    selected, _ = select_weights(params_shapes(precision), "cross-attn-kv")
    return step, (selected, selected, selected, float32())


def linearised_tile(precision):
    def tile(selected, rest, schedule, key, timesteps, change, batch):
        def loss_fn(selected, rest, example):
            params = merge_weights(selected, rest)
            return example_loss(predictor(UNET, precision), schedule, params, wrap(key), example, timesteps)

        return influence_scores(loss_fn, selected, rest, batch, change, batch.mask)

    selected, rest = select_weights(params_shapes(precision), "cross-attn-kv")
    return tile, (selected, rest, SCHEDULE, KEY, int32(STEPS), selected, batch_shapes())


def sampler(precision):
    def draw(params, schedule, text, negative_text, latents, guidance_scale, key):
        options = {"sampler": "ddpm", "key": wrap(key)}
        predict = predictor(UNET, precision)
        return sample(predict, params, schedule, text, negative_text, latents, STEPS, guidance_scale, **options)

    latents, text = float32(TILE, *LATENTS.shape), float32(TILE, *TEXT.shape)
    return draw, (params_shapes(precision), SCHEDULE, text, TEXT, latents, float32(), KEY)


PROGRAMS = {
    program.__name__: program
    for program in (
        strided_losses_tile,
        fisher_tile,
        ekfac_factors_tile,
        ekfac_eigenvalues_tile,
        query_gradient_tile,
        newton,
        ekfac_newton,
        linearised_tile,
        sampler,
    )
}


def export(run, arguments, platform, **options):
    """Lowered for `platform` on this machine, whatever its devices: no code may depend on them."""
    run = run if hasattr(run, "lower") else jax.jit(run)
    arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    return jax.export.export(run, platforms=(platform,), **options)(*arguments)


# As EKFAC is, whatever the scores' precision.
FLOAT32_ALONE = {"ekfac_factors_tile", "ekfac_eigenvalues_tile", "ekfac_newton"}
CASES = [(name, "float32") for name in PROGRAMS]
CASES += [(name, "bfloat16") for name in PROGRAMS if name not in FLOAT32_ALONE]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_lowers_for_accelerators(name, precision, platform):
    run, arguments = PROGRAMS[name](precision)
    exported = export(run, arguments, platform)
    module = exported.mlir_module()
    assert exported.platforms == (platform,)
    assert unknown_calls(module, platform) == set()
    assert len(exported.in_avals) == len(jax.tree.leaves(arguments))
    assert len(exported.mlir_module_serialized) < PROGRAM_BYTES
    if name == "strided_losses_tile":
        # The compilers there choose the algorithm of a convolution themselves.
        kernels = [leaf for leaf in jax.tree.leaves(arguments[0][0]) if leaf.ndim == 4 and leaf.shape[0] > 1]
        assert len(kernels) > 10
        assert module.count("stablehlo.convolution") == len(kernels)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_form_for_cpus_is_in_the_program_of_an_accelerator(platform):
    """Not even where the kernels come prepared for a CPU."""
    run, (selected, rest, *others) = fisher_tile("float32")
    prepared = jax.eval_shape(lambda rest: prepare_kernels(rest, "cpu"), rest)
    assert len(jax.tree.leaves(prepared)) > len(jax.tree.leaves(rest))
    plain, ours = (export(run, (selected, half, *others), platform).mlir_module() for half in (rest, prepared))
    operations = ("stablehlo.convolution", "stablehlo.dot_general", "stablehlo.concatenate")
    assert [ours.count(name) for name in operations] == [plain.count(name) for name in operations]
    # On a CPU it would be products in their place.
    on_cpu = export(run, (selected, prepared, *others), "cpu").mlir_module()
    assert on_cpu.count("stablehlo.convolution") == 0 < plain.count("stablehlo.convolution")
    assert "optimization_barrier" in on_cpu and "optimization_barrier" not in plain + ours


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_call_that_only_cpus_have_is_found(platform):
    def run(x):
        return jax.ffi.ffi_call("lapack_sgetrf_ffi", jax.ShapeDtypeStruct(x.shape, x.dtype))(x) + 1

    unchecked = [jax.export.DisabledSafetyCheck.custom_call("lapack_sgetrf_ffi")]
    exported = export(run, (float32(3, 3),), platform, disabled_checks=unchecked)
    assert unknown_calls(exported.mlir_module(), platform) == {"lapack_sgetrf_ffi"}


def test_cudnn_attention_is_known_to_gpus_only():
    module = (
        'stablehlo.custom_call @__cudnn$fmhaSoftmax(%0) : x\n"stablehlo.custom_call"() <{call_target_name = "other"}>'
    )
    assert unknown_calls(module, "cuda") == {"other"}
    assert unknown_calls(module, "tpu") == {"other", "__cudnn$fmhaSoftmax"}


def test_one_matrix_that_is_closed_over_shows_in_the_size():
    halves = select_weights(params_shapes("float32"), "cross-attn-kv")
    (first, *others), tree = jax.tree.flatten(halves)
    constant = np.random.default_rng(0).standard_normal(first.shape, np.float32)

    def closed(others, latents, text):
        params = merge_weights(*jax.tree.unflatten(tree, [constant, *others]))
        return predictor(UNET)(params, latents, 3, text)

    assert len(export(closed, (others, LATENTS, TEXT), "cuda").mlir_module_serialized) > PROGRAM_BYTES
