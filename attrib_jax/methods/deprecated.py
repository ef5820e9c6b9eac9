"""Deprecated names of one release: the flat config of all methods, and its two nested records."""

import warnings
from typing import Any

from attrib_jax.methods import method_config
from attrib_jax.methods.base import MethodConfig


def AttributeConfig(  # noqa: N802 a class before
    method: str = "unlearn",
    *,
    gradients: dict[str, Any] | None = None,
    features: dict[str, Any] | None = None,
    **settings: Any,
) -> MethodConfig:
    """Deprecated: the config of a method; write `UnlearnConfig(...)`, ... or `method_config(method, ...)`."""
    _warn("AttributeConfig", "the config of the method, such as UnlearnConfig, or method_config")
    return method_config(method, **settings, **(gradients or {}), **(features or {}))


def GradientSettings(**settings: Any) -> dict[str, Any]:  # noqa: N802
    """Deprecated: fields of `ProjectedConfig`."""
    _warn("GradientSettings", "ProjectedConfig")
    return settings


def FeatureSettings(tower: str | None = None, head: str | None = None) -> dict[str, Any]:  # noqa: N802
    """Deprecated: `tower` and `feature_head` of the configs of feature similarity."""
    _warn("FeatureSettings", "FeatureConfig")
    return {"tower": tower} | ({} if head is None else {"feature_head": head})


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is deprecated: use {new}", DeprecationWarning, stacklevel=3)
