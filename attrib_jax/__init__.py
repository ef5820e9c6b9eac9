"""Data attribution for text-to-image models by unlearning, in JAX (Wang et al., NeurIPS 2024).

The names in `__all__` are the library; each is documented where it is defined and loaded when first used, so that
importing this package is fast and starts no device.
"""

import importlib
import sys
import types
from typing import Any

_MODULES = {
    "attribution.influence": ("influence_matrix", "influence_scores"),
    "attribution.scores": ("combine_flips", "combine_scores", "score_dataset", "strided_losses"),
    "attribution.unlearn": ("newton_step", "query_gradient", "scale_by_newton", "sgd_step", "unlearn"),
    "attribution.features": ("image_features", "text_features"),
    "attribution.feature_head": ("load_head",),
    "attribution.kernel": ("kernel_scores",),
    "attribution.projection": ("project",),
    "convert.diffusers_folder": ("save_pipeline",),
    "convert.load": ("ModelSource", "load_model", "load_pipeline", "load_unet"),
    "convert.pipeline": ("Pipeline",),
    "convert.single_file": ("load_single_file", "save_single_file", "uninferable_config", "untold_config"),
    "convert.tower": ("Tower", "load_tower", "save_tower"),
    "core.keys": ("example_noise", "loss_key", "purpose_key"),
    "core.types": ("Batch", "Scores"),
    "core.weights": ("merge_weights", "select_weights"),
    "curvature.diagonal": ("Diagonal",),
    "curvature.ekfac": ("EKFAC", "fisher_ekfac"),
    "curvature.fisher": ("FisherSum", "fisher_diagonal"),
    "data.concat": ("concatenate",),
    "data.latents": ("open_latents",),
    "data.sources": ("ArrayDataset", "open_dataset"),
    "diffusion.losses": ("denoising_loss", "denoising_losses"),
    "diffusion.samplers": ("sample",),
    "diffusion.schedule": ("NoiseSchedule", "strided_timesteps"),
    "models.predictor": ("Predictor", "as_predictor", "predictor"),
    "attribute": ("Attributor", "attribute", "attribute_queries"),
    "jobs.context": ("Run",),
    "jobs.encode": ("EncodeConfig", "encode"),
    "methods": ("METHODS", "method_config"),
    "methods.base": ("Attribution", "MethodConfig"),
    "methods.ensemble": ("EnsembleConfig",),
    "methods.features": ("FeatureConfig", "MappedFeatureConfig", "TextFeatureConfig"),
    "methods.group_unlearn": ("GroupUnlearnConfig",),
    "methods.influence": ("InfluenceConfig",),
    "methods.latents": ("CaptionCentredConfig", "LatentGaussianConfig"),
    "methods.patches": ("PatchesConfig",),
    "methods.pixel": ("PixelConfig",),
    "methods.projected": ("ProjectedConfig",),
    "methods.random": ("RandomConfig",),
    "methods.mirrored": ("MirroredConfig",),
    "methods.residual": ("ResidualConfig",),
    "methods.unlearn": ("UnlearnConfig",),
    "methods.deprecated": ("AttributeConfig", "FeatureSettings", "GradientSettings"),
    "jobs.query_file": ("read_queries",),
    "jobs.query": ("Query",),
    "storage.stage_root": ("StageRoot",),
    "storage.score_files": ("read_scores", "write_scores"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


class _Package(types.ModuleType):
    """This package, in which `attribute` is the function whether or not the module of that name has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets a submodule as an attribute of its package once it is loaded.
        if name == "attribute" and isinstance(value, types.ModuleType):
            value = value.attribute
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'attrib_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"attrib_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
