"""Attribution methods by name: one file each, behind the protocol of `attrib_jax.methods.base`.

A new method is a file with a config, `prepare` and `score`, and one entry in `METHODS`.
"""

from collections.abc import Sequence
from typing import Any

from attrib_jax.core.checks import check_choice, check_range
from attrib_jax.core.settings import declared, refuse_unread
from attrib_jax.core.weights import count_weights
from attrib_jax.diffusion.schedule import strided_timesteps
from attrib_jax.jobs.context import Run, dataset_fingerprints
from attrib_jax.jobs.settings import LossSettings, PassSettings, WeightSettings
from attrib_jax.methods import (
    ensemble,
    features,
    group_unlearn,
    influence,
    latents,
    mirrored,
    patches,
    pixel,
    projected,
    random,
    residual,
    unlearn,
)
from attrib_jax.methods.base import Method, MethodConfig, QueryJob, Scored

# Bytes of moved weights that lie on a device in one pass, where the number of queries is not given.
_BYTES_PER_PASS = 2**31
# Queries in one pass of methods that move no weights.
_MAX_QUERIES = 1024

_PROJECTED = (projected.ProjectedConfig, projected.prepare, projected.score)
_FEATURES = (features.prepare, features.score)
_BY_IMAGES = dataset_fingerprints

METHODS: dict[str, Method] = {
    "unlearn": Method(unlearn.UnlearnConfig, unlearn.prepare, unlearn.score, "attribution by unlearning"),
    "mirrored": Method(
        mirrored.MirroredConfig, mirrored.prepare, mirrored.score, "mirrored unlearning, which retains the other images"
    ),
    "group-unlearn": Method(
        group_unlearn.GroupUnlearnConfig,
        group_unlearn.prepare,
        group_unlearn.score,
        "unlearning each named group of training images",
        check=group_unlearn.check,
        inputs=group_unlearn.inputs,
    ),
    "influence": Method(influence.InfluenceConfig, influence.prepare, influence.score, "the influence function"),
    "trak": Method(*_PROJECTED, "TRAK: a kernel of projected loss gradients", check=projected.check),
    "journey-trak": Method(*_PROJECTED, "TRAK with the query's loss at one timestep", check=projected.check),
    "d-trak": Method(*_PROJECTED, "D-TRAK: gradients of the prediction's mean square", check=projected.check),
    "das": Method(*_PROJECTED, "DAS: gradients of the prediction's mean", check=projected.check),
    "residual": Method(
        residual.ResidualConfig,
        residual.prepare,
        residual.score,
        "products of residuals and of captions",
        check=residual.check,
        inputs=_BY_IMAGES,
    ),
    "latent-gaussian": Method(
        latents.LatentGaussianConfig, latents.prepare_gaussian, latents.score_gaussian, "a Gaussian kernel of latents"
    ),
    "caption-centred": Method(
        latents.CaptionCentredConfig,
        latents.prepare_centred,
        latents.score_centred,
        "products of latents, less the mean of the query's caption",
        inputs=_BY_IMAGES,
    ),
    "patches": Method(
        patches.PatchesConfig, patches.prepare, patches.score, "the patches of the training set's optimal denoiser"
    ),
    "pixel": Method(pixel.PixelConfig, pixel.prepare, pixel.score, "similarity of pixels", inputs=_BY_IMAGES),
    "clip": Method(features.FeatureConfig, *_FEATURES, "similarity of CLIP image features", inputs=_BY_IMAGES),
    "clip-text": Method(features.TextFeatureConfig, *_FEATURES, "similarity of CLIP text features", inputs=_BY_IMAGES),
    "dino": Method(features.FeatureConfig, *_FEATURES, "similarity of DINO features", inputs=_BY_IMAGES),
    "dinov2": Method(features.FeatureConfig, *_FEATURES, "similarity of DINOv2 features", inputs=_BY_IMAGES),
    "clip-abc": Method(
        features.MappedFeatureConfig,
        *_FEATURES,
        "similarity of CLIP features under a linear mapping",
        inputs=_BY_IMAGES,
    ),
    "dino-abc": Method(
        features.MappedFeatureConfig,
        *_FEATURES,
        "similarity of DINO features under a linear mapping",
        inputs=_BY_IMAGES,
    ),
    "random": Method(random.RandomConfig, random.prepare, random.score, "uniform scores, the floor"),
}
METHODS[ensemble.NAME] = ensemble.method(METHODS)


def ensemble_parts(method: str, ensemble_methods: Sequence[str] = ()) -> tuple[str, ...]:
    """The methods of an ensemble, none for another method; ValueError for a name that is not known."""
    check_choice("method", method, METHODS)
    return ensemble.check_methods(ensemble_methods, METHODS) if method == ensemble.NAME else ()


def method_readers(method: str, ensemble_methods: Sequence[str] = ()) -> dict[str, tuple[type[MethodConfig], ...]]:
    """The config classes whose settings each method reads, by "method 'NAME'", where `method` is the chosen one.

    An ensemble reads those of its methods too.
    """
    parts = tuple(METHODS[name].config for name in ensemble_parts(method, ensemble_methods))
    readers = {f"method {name!r}": (entry.config,) for name, entry in METHODS.items()}
    return readers | {f"method {method!r}": (METHODS[method].config, *parts)}


def settings_of(method: str, ensemble_methods: Sequence[str] = ()) -> set[str]:
    """Names of the settings that a method reads; of an ensemble those of its methods too."""
    configs = method_readers(method, ensemble_methods)[f"method {method!r}"]
    return {name for config in configs for name in declared(config)}


def method_config(method: str = "unlearn", **settings: Any) -> MethodConfig:
    """The config of a method; ValueError for a name that is not known, or a setting that the method does not read.

    Each method of an ensemble gets those of the settings that it reads.
    """
    names = settings.get("ensemble_methods", ())
    readers = method_readers(method, names)
    read = {owner: {name for each in configs for name in declared(each)} for owner, configs in readers.items()}
    refuse_unread(settings, f"method {method!r}", read)

    def build(name: str, **parts: Any) -> MethodConfig:
        config = METHODS[name].config
        own = {field: value for field, value in settings.items() if field in declared(config)}
        return config(method=name, **own, **parts)

    parts = tuple(build(name) for name in ensemble_parts(method, names))
    return build(method, **({"parts": parts} if parts else {}))


def check_method(run: Run, config: MethodConfig, method: Method | None = None) -> None:
    """Raises ValueError where a config does not fit the model's schedule or the method's own demands.

    `method` is the entry of a method that is not in the registry.
    """
    for part in config.parts:
        check_method(run, part)
    steps = run.pipeline.schedule.num_train_timesteps
    if isinstance(config, LossSettings):
        strided_timesteps(config.stride, steps)
    if isinstance(config, PassSettings) and config.cascade:
        check_range("cascade_stride", config.cascade_stride, 1, steps, integer=True)
    check = (method or METHODS[config.method]).check
    if check is not None:
        check(run, config)


def method_inputs(run: Run, config: MethodConfig, method: Method | None = None) -> dict[str, str]:
    """Fingerprints of all that decides a method's scores, but for its settings and the query."""
    own = (method or METHODS[config.method]).inputs
    found = run.inputs if own is None else {**run.inputs, **own(run)}
    for part in config.parts:
        found = found | method_inputs(run, part)
    return found


def queries_per_pass(run: Run, config: MethodConfig) -> int:
    """How many queries to score in one pass over the data set: as asked, or as the weights that move fit in memory."""
    if config.parts:
        return min(queries_per_pass(run, part) for part in config.parts)
    given = getattr(config, "queries_per_pass", 0)
    if given or not isinstance(config, WeightSettings):
        return given or _MAX_QUERIES
    selected, _ = run.select(config.weights)
    # Moved weights are never below float32.
    return max(1, _BYTES_PER_PASS // (4 * count_weights(selected).values))


__all__ = [
    "METHODS",
    "Method",
    "MethodConfig",
    "QueryJob",
    "Scored",
    "check_method",
    "ensemble_parts",
    "method_config",
    "method_inputs",
    "method_readers",
    "queries_per_pass",
    "settings_of",
]
