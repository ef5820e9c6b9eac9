"""Stage 4: unlearning one query, kept in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.attribution.unlearn import unlearn
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.weights import flatten_names, unflatten_names
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.runtime.files import DamagedFileError, read_arrays, write_arrays
from attrib_jax.runtime.progress import progress
from attrib_jax.stages.config import AttributeConfig
from attrib_jax.stages.gradient import GradientProgram
from attrib_jax.stages.query import PreparedQuery

_FILE = "unlearned.safetensors"


def unlearn_query(
    path: Path,
    gradient_program: GradientProgram,
    schedule: NoiseSchedule,
    selected: Any,
    rest: Any,
    query: PreparedQuery,
    config: AttributeConfig,
    curvature: Diagonal | None,
    num_examples: int | None,
    mask: np.ndarray | None,
) -> tuple[Any, tuple[float, ...]]:
    """The selected weights after unlearning a query, and the query's loss before each step; stored in `path`.

    Args:
      path: the query's folder; what it holds is returned.
      gradient_program: of the model.
      schedule: noise levels and prediction type.
      selected, rest: the two halves of the UNet's parameters.
      query: its latents and text states.
      config: step size, steps, draws and rule.
      curvature: F, for Newton steps.
      num_examples: N of the Newton step.
      mask: (h, w) weights of the query's latent pixels; None for all.
    """
    file = path / _FILE
    try:
        arrays, losses = read_arrays(file)
        return unflatten_names(arrays), tuple(losses)
    except (FileNotFoundError, DamagedFileError):
        pass
    with progress(config.steps * config.query_draws, "unlearn the query", "draw") as bar:
        result = unlearn(
            gradient_program.predict,
            schedule,
            selected,
            rest,
            query.latents,
            query.text,
            purpose_key(config.loss_seed, "query"),
            draws=config.query_draws,
            step_size=config.step_size,
            method=config.update,
            curvature=curvature,
            num_examples=num_examples,
            steps=config.steps,
            damping=config.damping,
            keep_ewc_gradient=config.keep_ewc_gradient,
            mask=mask,
            progress=lambda done: bar.update(done - bar.n),
            sum_draws=gradient_program.bind(rest, query.latents, query.text, config.query_draws, mask),
        )
    losses = tuple(float(loss) for loss in result.query_loss)
    write_arrays(file, {key: np.asarray(value) for key, value in flatten_names(result.selected).items()}, list(losses))
    return result.selected, losses
