"""Programs that benchmarks/accelerators.py compiles, lowered for this machine: their inputs are those of the jobs."""

import pytest

from attrib_jax.parallel.mesh import data_mesh
from benchmarks.accelerator_programs import MODELS, PROGRAMS, build, lower, planned
from benchmarks.accelerator_targets import TARGETS
from benchmarks.hlo_counts import count_flops, parse


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_take_the_inputs_that_are_described(program):
    built = build("tiny", data_mesh(), program, "float32")
    flops = count_flops(parse(lower(built).as_text(dialect="hlo")))
    # A Newton step is element by element.
    assert built.examples >= 1 and (flops > 0) == (program != "newton")


def test_only_scoring_programs_follow_the_precision():
    plan = planned(["v5e", "h100"], ["tiny"], ["losses", "fisher"], ["float32", "bfloat16"])
    assert len(plan) == 6 and ("tiny", "h100", "fisher", "float32") in plan
    assert ("tiny", "h100", "fisher", "bfloat16") not in plan


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((["tpu"], ["tiny"], ["losses"], ["float32"]), "unknown target 'tpu'.*v5e"),
        ((["v5e"], ["tiny"], ["loss"], ["float32"]), "'loss': did you mean 'losses'"),
        ((["v5e"], ["tiny"], ["losses"], ["float16"]), "'float16'"),
    ],
)
def test_unknown_names_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        planned(*arguments)


def test_every_target_says_where_its_numbers_are_from():
    assert all(target.source and target.memory_gib > 0 and target.gbytes_per_s > 0 for target in TARGETS.values())
    assert all(
        set(target.tflops) == {"float32", "tensorfloat32", "bfloat16-products", "bfloat16"}
        for target in TARGETS.values()
    )
    assert {"mscoco", "sd14", "sdxl"} <= MODELS.keys()
