"""What a single-file checkpoint says of its training target and noise schedule, beside the shapes of its tensors.

Programs write it in four places: the metadata of a safetensors header (ModelSpec's, and those of training scripts),
tensors without content whose name is a mark, a yaml file of the original code beside the checkpoint, and the buffers of
the noise schedule. Two that disagree are an error: a wrong target would make every loss wrong without a sign.
"""

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from attrib_jax.convert.families import check_architecture
from attrib_jax.convert.weights.files import safetensors_layout

_log = logging.getLogger(__name__)

_PREDICTIONS = {
    **dict.fromkeys(("v", "v_prediction", "v_pred", "vpred", "vprediction", "velocity"), "v_prediction"),
    **dict.fromkeys(("epsilon", "eps", "noise", "e"), "epsilon"),
}
_PREDICTION_KEYS = ("prediction_type", "predict_type", "parameterization")
_V_KEYS = ("v_pred", "vpred", "v_prediction", "v_parameterization", "ss_v_parameterization")
_ZERO_SNR_KEYS = (
    "ztsnr",
    "zsnr",
    "zero_snr",
    "use_zero_snr",
    "zero_terminal_snr",
    "ss_zero_terminal_snr",
    "rescale_betas_zero_snr",
)
_EDM_KEYS = ("edm_mean", "edm_std", "edm_vpred", "sigma_max", "sigma_min")
_MARK = re.compile(rf"(.*\.)?(?P<mark>{'|'.join((*_V_KEYS, *_ZERO_SNR_KEYS, *_EDM_KEYS))})")
# Options of a scheduler_config.json that a claim may be about.
TARGET_OPTIONS = (
    "prediction_type",
    "rescale_betas_zero_snr",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "num_train_timesteps",
)
# Scheduler and autoencoder options by their names in the original code's yaml files.
_YAML_NUMBERS = {
    "linear_start": "beta_start",
    "linear_end": "beta_end",
    "timesteps": "num_train_timesteps",
    "scale_factor": "scaling_factor",
}
# Its names of the noise schedules; its "linear" is linear in the square root of beta.
_YAML_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}


class Claim(NamedTuple):
    """What one place says: the value of an option of the scheduler (or `scaling_factor` of the vae)."""

    option: str
    value: Any
    source: str


def read_claims(path: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Claim]:
    """What a weight file says of its target: in its header, by the marks among its tensors, in the yaml beside it.

    Args:
      path: the file.
      shapes: tensor name -> shape.

    Raises ValueError where it names another family of models, or a target that is not supported.
    """
    marks = [name for name, shape in shapes.items() if is_mark(name, shape)]
    return [*_header_claims(read_metadata(path), path), *_mark_claims(marks, path), *_yaml_claims(path)]


def read_metadata(path: str) -> dict[str, Any]:
    """The metadata in the header of a safetensors file; nothing for other kinds of files."""
    with open(path, "rb") as file:
        if file.read(9)[8:] != b"{" or path.endswith(".json"):
            return {}
    metadata = safetensors_layout(path)[0]
    return metadata if isinstance(metadata, dict) else {}


def is_mark(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a mark: one of the known names, at any depth, without content or one number."""
    return math.prod(shape) <= 1 and _MARK.fullmatch(name) is not None


def _mark_claims(names: Iterable[str], path: str) -> list[Claim]:
    """What the marks among the tensor names say; ValueError for those of another family of losses."""
    claims = []
    for name in sorted(names):
        mark = _MARK.fullmatch(name)["mark"]
        if mark in _EDM_KEYS:
            raise ValueError(
                f"{path} has the mark {name!r}: it was trained with the EDM loss, which is not supported; give a model "
                "that predicts epsilon or v"
            )
        claims.append(_switch(mark in _V_KEYS, f"the mark {name!r} in {path}"))
    return claims


def _switch(is_v: bool, source: str) -> Claim:
    return Claim("prediction_type", "v_prediction", source) if is_v else Claim("rescale_betas_zero_snr", True, source)


def _header_claims(metadata: Mapping[str, Any], path: str) -> list[Claim]:
    """What a safetensors header's metadata says; ValueError where it names another family or an unknown target."""
    claims = []
    for key, value in metadata.items():
        source = f"{key}={value!r} in the header of {path}"
        last = str(key).lower().rpartition(".")[2]
        if last.removeprefix("ss_") in _PREDICTION_KEYS:
            claims += _prediction(value, source)
        elif last in (*_V_KEYS, *_ZERO_SNR_KEYS):
            enabled = _truth(value)
            if enabled:
                claims.append(_switch(last in _V_KEYS, source))
            elif enabled is False:
                option, value = ("prediction_type", "epsilon") if last in _V_KEYS else ("rescale_betas_zero_snr", False)
                claims.append(Claim(option, value, source))
        elif last == "architecture":
            check_architecture(value, path)
            version = re.fullmatch(r"stable-diffusion-v2-(?:\d+)(-v)?", str(value).strip().lower())
            if version:
                claims.append(Claim("prediction_type", "v_prediction" if version[1] else "epsilon", source))
        elif last == "ss_base_model_version" and re.fullmatch(r"sd_v[12](_\d+)?_v", str(value).strip().lower()):
            claims.append(Claim("prediction_type", "v_prediction", source))
    return claims


def _prediction(value: Any, source: str) -> list[Claim]:
    text = re.sub(r"[\s-]+", "_", str(value).strip().lower())
    if text in ("", "none", "null"):
        return []
    if text not in _PREDICTIONS:
        raise ValueError(f"{source}: expected epsilon or v; models that predict something else are not supported")
    return [Claim("prediction_type", _PREDICTIONS[text], source)]


def _truth(value: Any) -> bool | None:
    """Whether a text or JSON value switches something on; None where it says neither."""
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "on", ""):
        return True
    return False if text in ("false", "0", "no", "off") else None


def _yaml_claims(path: str) -> list[Claim]:
    """What the original code's yaml beside a checkpoint says, named like it; nothing where there is none.

    One that cannot be read is left out with a warning.
    """
    stems = (os.path.splitext(path)[0], path)
    names = (stem + end for stem in stems for end in (".yaml", ".yml"))
    file = next((name for name in names if os.path.isfile(name)), None)
    if file is None:
        return []
    import yaml  # not needed without such a file

    try:
        with open(file, encoding="utf-8-sig") as opened:
            content = yaml.safe_load(opened)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        _log.warning("%s is not valid YAML (%s): it is left out", file, str(error).splitlines()[0])
        return []
    # The options lie in `model.params`, in files written by hand also above it.
    model = content.get("model") if isinstance(content, dict) else None
    levels = [content, model, content.get("params") if isinstance(content, dict) else None]
    levels.append(model.get("params") if isinstance(model, dict) else None)
    claims, has_target = [], False
    for level in levels:
        if not isinstance(level, dict):
            continue
        for key, value in level.items():
            source, name = f"{key}: {value!r} in {file}", str(key).lower()
            if name in _PREDICTION_KEYS:
                claims += _prediction(value, source)
            elif name in _V_KEYS and _truth(value):
                claims.append(_switch(True, source))
            elif name in _ZERO_SNR_KEYS and _truth(value) is not None:
                claims.append(Claim("rescale_betas_zero_snr", bool(_truth(value)), source))
            elif name in _YAML_NUMBERS:
                number = _number(value, source)
                claims.append(Claim(_YAML_NUMBERS[name], int(number) if name == "timesteps" else number, source))
            elif name == "beta_schedule":
                if value not in _YAML_SCHEDULES:
                    raise ValueError(f"{source}: expected one of {', '.join(_YAML_SCHEDULES)}")
                claims.append(Claim("beta_schedule", _YAML_SCHEDULES[value], source))
            has_target |= name in ("linear_start", "unet_config")
    if not isinstance(content, dict):
        _log.warning("%s holds no options of a model: it is left out", file)
    for scaling in re.findall(r"\b(V|Eps|EDM)Scaling\w*", str(content)):  # of the generative-models code
        claims += _prediction({"V": "v", "Eps": "epsilon"}.get(scaling, "edm"), f"{scaling}Scaling in {file}")
    if has_target and not any(claim.option == "prediction_type" for claim in claims):
        claims.append(Claim("prediction_type", "epsilon", f"no parameterization, which means epsilon, in {file}"))
    return claims


def _number(value: Any, source: str) -> float:
    # YAML 1.1 takes 1e-4, without a point, for a text.
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{source}: expected a finite number greater than 0")
    return number


def merge_claims(claims: Iterable[Claim]) -> dict[str, Any]:
    """Option -> value; raises ValueError, naming both places, where two say different things."""
    found: dict[str, Claim] = {}
    for claim in claims:
        first = found.setdefault(claim.option, claim)
        equal = first.value == claim.value
        if isinstance(claim.value, float) and isinstance(first.value, int | float):
            equal = math.isclose(first.value, claim.value, rel_tol=1e-3)  # a number may be stored in half precision
        if not equal:
            raise ValueError(
                f"{claim.option} is {first.value!r} by {first.source}, but {claim.value!r} by {claim.source}; correct "
                "or remove the wrong one"
            )
    return {option: claim.value for option, claim in found.items()}
