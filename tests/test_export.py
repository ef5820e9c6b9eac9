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
from attrib_jax.models.predictor import cast_params, matmul_precision, predictor
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
SHARDINGS = "Sharding|SPMDFullToShardShape|SPMDShardToFullShape"
KNOWN_CALLS = {"cuda": rf"{SHARDINGS}|cu_threefry2x32_ffi|__cudnn\$fmha\w*", "tpu": f"{SHARDINGS}|tpu_custom_call"}


def unknown_calls(module: str, platform: str) -> set[str]:
    """Targets of the custom calls in a StableHLO text that `platform` does not have."""
    targets = re.findall(r'(?:custom_call @"?|call_target_name = ")([^"\s(]+)', module)
    return {target for target in targets if not re.fullmatch(KNOWN_CALLS[platform], target)}


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


def halves(precision):
    return select_weights(params_shapes(precision), "cross-attn-kv")


ROWS, WEIGHTS = int32(TILE), float32(TILE)
BATCH = Batch(float32(TILE, *LATENTS.shape), float32(TILE, *TEXT.shape), ROWS, ROWS, ROWS, WEIGHTS)
SAMPLES = Sample(BATCH.latents, BATCH.text, ROWS, ROWS, WEIGHTS)


def strided_losses_tile(precision):
    def tile(shared, batch):
        params, schedule, key, timesteps = shared
        return strided_losses(predictor(UNET, precision), schedule, params, wrap(key), batch, timesteps)

    run = tile_map(data_mesh(jax.devices()[:1]), tile, matmul_precision(precision))
    return run, ((params_shapes(precision), SCHEDULE, KEY, int32(STEPS)), BATCH)


def fisher_tile(precision):
    def tile(selected, rest, schedule, key, samples):
        gradients = sample_gradients(predictor(UNET, precision), schedule, wrap(key))
        inputs = samples, jnp.swapaxes(samples[1], -1, -2)
        return sum_squares(gradients, selected, rest, inputs, mask=samples[-1], microbatch=1)

    return tile, (*halves(precision), SCHEDULE, KEY, SAMPLES)


def sample_loss(schedule, key):
    def loss_fn(selected, rest, sample):
        latents, text, index, timestep, _ = sample
        noise = jax.random.normal(jax.random.fold_in(wrap(key), index), (1, *latents.shape))
        params = merge_weights(selected, rest)
        return denoising_losses(predictor(UNET), params, schedule, latents, text, noise, timestep[None])[0]

    return loss_fn


@functools.cache
def ekfac_layers():
    """The layers of the keys and values, and the shapes of their bases."""
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), SAMPLES)
    layers = linear_layers(sample_loss(SCHEDULE, np.zeros(2, np.uint32)), *halves("float32"), example)
    sides = {name: leaf.shape for name, leaf in flatten_names(halves("float32")[0]).items()}
    assert {layer.name for layer in layers} == sides.keys()
    # Read by all of them: the text.
    (text,) = {layer.input for layer in layers}
    return layers, Factors({text: float32(WIDTH, WIDTH)}, {name: float32(out, out) for name, (_, out) in sides.items()})


def ekfac_factors_tile(precision):
    layers, _ = ekfac_layers()

    def tile(selected, rest, schedule, key, samples):
        return factor_sums(sample_loss(schedule, key), layers, selected, rest, samples, samples[-1])

    return tile, (*halves(precision), SCHEDULE, KEY, SAMPLES)


def ekfac_eigenvalues_tile(precision):
    layers, bases = ekfac_layers()

    def tile(selected, rest, schedule, key, bases, samples):
        loss_fn = sample_loss(schedule, key)
        return eigenvalue_sums(loss_fn, layers, bases, selected, rest, samples, samples[-1], microbatch=1)

    return tile, (*halves(precision), SCHEDULE, KEY, bases, SAMPLES)


def query_gradient_tile(precision):
    def tile(selected, rest, schedule, latents, text, key, mask, indices, draws):
        predict = predictor(UNET, precision)
        weights = predict.project_text(selected, text)
        total = tile_gradient(predict, schedule, weights, rest, latents, text, wrap(key), mask, indices, draws)
        return by_selected(total, selected, text)

    return tile, (*halves(precision), SCHEDULE, LATENTS, TEXT, KEY, float32(SIZE, SIZE), ROWS, int32())


def newton(precision, curvature=Diagonal):
    def step(selected, gradient, curvature, step_size):
        return newton_step(selected, gradient, curvature, step_size, 1000, 1e-8)

    selected, _ = halves(precision)
    return step, (selected, selected, curvature(selected), float32())


def ekfac_newton(precision):
    layers, bases = ekfac_layers()
    return newton(precision, lambda selected: make_ekfac(Diagonal(selected), bases, layers))


def linearised_tile(precision):
    def tile(selected, rest, schedule, key, timesteps, change, batch):
        def loss_fn(selected, rest, example):
            params = merge_weights(selected, rest)
            return example_loss(predictor(UNET, precision), schedule, params, wrap(key), example, timesteps)

        return influence_scores(loss_fn, selected, rest, batch, change, batch.mask)

    selected, rest = halves(precision)
    return tile, (selected, rest, SCHEDULE, KEY, int32(STEPS), selected, BATCH)


def sampler(precision):
    def draw(params, schedule, text, negative_text, latents, guidance_scale, key):
        options = {"sampler": "ddpm", "key": wrap(key)}
        predict = predictor(UNET, precision)
        return sample(predict, params, schedule, text, negative_text, latents, STEPS, guidance_scale, **options)

    latents, text = float32(TILE, *LATENTS.shape), float32(TILE, *TEXT.shape)
    return draw, (params_shapes(precision), SCHEDULE, text, TEXT, latents, float32(), KEY)


# EKFAC is in float32, whatever the scores' precision.
EKFAC = (ekfac_factors_tile, ekfac_eigenvalues_tile, ekfac_newton)
PROGRAMS = (strided_losses_tile, fisher_tile, query_gradient_tile, newton, linearised_tile, sampler)
CASES = [(program, "float32") for program in PROGRAMS + EKFAC] + [(program, "bfloat16") for program in PROGRAMS]


def export(run, arguments, platform, **options):
    """Lowered for `platform` on this machine, whatever its devices: no code may depend on them."""
    arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    return jax.export.export(run, platforms=(platform,), **options)(*arguments)


@pytest.mark.parametrize(("program", "precision"), CASES)
def test_lowers_for_accelerators(program, precision):
    run, arguments = program(precision)
    # One function for all platforms: it is traced once.
    run = run if hasattr(run, "lower") else jax.jit(run)
    for platform in PLATFORMS:
        exported = export(run, arguments, platform)
        module = exported.mlir_module()
        assert exported.platforms == (platform,)
        assert unknown_calls(module, platform) == set()
        assert len(exported.in_avals) == len(jax.tree.leaves(arguments))
        assert len(exported.mlir_module_serialized) < PROGRAM_BYTES
        if program is strided_losses_tile:
            # The compilers there choose the algorithm of a convolution themselves.
            kernels = [leaf for leaf in jax.tree.leaves(arguments[0][0]) if leaf.ndim == 4 and leaf.shape[0] > 1]
            assert len(kernels) > 10
            assert module.count("stablehlo.convolution") == len(kernels)


def test_no_form_for_cpus_is_in_the_program_of_an_accelerator():
    """Not even where the kernels come prepared for a CPU."""
    run, (selected, rest, *others) = fisher_tile("float32")
    run, prepared = jax.jit(run), jax.eval_shape(lambda rest: prepare_kernels(rest, "cpu"), rest)
    assert len(jax.tree.leaves(prepared)) > len(jax.tree.leaves(rest))
    on_cpu = export(run, (selected, prepared, *others), "cpu").mlir_module()
    operations = ("stablehlo.convolution", "stablehlo.dot_general", "stablehlo.concatenate")
    for platform in PLATFORMS:
        plain, ours = (export(run, (selected, half, *others), platform).mlir_module() for half in (rest, prepared))
        assert [ours.count(name) for name in operations] == [plain.count(name) for name in operations]
        # On a CPU it would be products in their place.
        assert on_cpu.count("stablehlo.convolution") == 0 < plain.count("stablehlo.convolution")
        assert "optimization_barrier" in on_cpu and "optimization_barrier" not in plain + ours


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_call_that_only_cpus_have_is_found(platform):
    def run(x):
        return jax.ffi.ffi_call("lapack_sgetrf_ffi", jax.ShapeDtypeStruct(x.shape, x.dtype))(x) + 1

    unchecked = [jax.export.DisabledSafetyCheck.custom_call("lapack_sgetrf_ffi")]
    exported = export(jax.jit(run), (float32(3, 3),), platform, disabled_checks=unchecked)
    assert unknown_calls(exported.mlir_module(), platform) == {"lapack_sgetrf_ffi"}
    # cuDNN's attention is known to GPUs only.
    module = 'custom_call @__cudnn$fmhaSoftmax(%0) : x\n"stablehlo.custom_call"() <{call_target_name = "other"}>'
    assert unknown_calls(module, platform) == {"other"} | ({"__cudnn$fmhaSoftmax"} if platform == "tpu" else set())


def test_one_matrix_that_is_closed_over_shows_in_the_size():
    (first, *others), tree = jax.tree.flatten(halves("float32"))
    constant = np.random.default_rng(0).standard_normal(first.shape, np.float32)

    @jax.jit
    def closed(others, latents, text):
        params = merge_weights(*jax.tree.unflatten(tree, [constant, *others]))
        return predictor(UNET)(params, latents, 3, text)

    assert len(export(closed, (others, LATENTS, TEXT), "cuda").mlir_module_serialized) > PROGRAM_BYTES
