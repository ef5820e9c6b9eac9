"""Counts in the text of an XLA program: floating-point operations, bytes of memory traffic, collectives, custom calls.

XLA's own `cost_analysis` counts the body of a loop once, and a GPU's compiler has none. Operations are counted in the
program before optimisation, which has every product as written; traffic in the compiled one, which says what is fused
and, on a TPU, what stays on the chip.
"""

import collections
import functools
import math
import re
from typing import Any, NamedTuple

_BITS = {
    **{"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64},
    **{"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128},
}
# Nothing is read or written: names for what is there already, and constants.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("copy-done", "async-done", "slice-done", "opt-barrier", "domain"),
}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_NAME = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")


class Array(NamedTuple):
    """A shape as HLO prints it, and whether it lies in a memory on the chip."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> float:
        """Bytes in main memory; 0 on the chip, and for tokens and other types without values."""
        return 0.0 if self.on_chip else math.prod(self.shape) * _BITS.get(self.dtype, 0) / 8


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    arrays: tuple[Array, ...]
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


class Module(NamedTuple):
    """Computations by name, each its instructions by name; and the name of the entry."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


class Traffic(NamedTuple):
    """Of one run of a compiled program.

    Attributes:
      bytes: read from and written to main memory by the instructions of the entry and of its loops; what a fusion only
        slices counts as the slice.
      copied: of these, by copies and transpositions alone.
      collectives: kind -> bytes that they give out.
      calls: target of a custom call -> number of runs.
      unknown_loops: loops whose number of turns the text does not tell; they count once.
    """

    bytes: float
    copied: float
    collectives: dict[str, float]
    calls: dict[str, int]
    unknown_loops: int


def parse(text: str) -> Module:
    """Parses `compiled.as_text()` or `lowered.as_text(dialect="hlo")`; ValueError where there is no entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (named := _NAME.match(line)):
            instruction = _instruction(named[2], line[named.end() :], bool(named[1]))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation; expected that of an HLO module")
    return Module(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    arrays = tuple(
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))), "S(" in layout)
        for dtype, dims, layout in _ARRAY.findall(rest[:end])
    )
    opening = rest.index("(", end)
    op, closing = rest[end:opening].strip(), _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    # A constant's value is no name.
    operands = () if op in ("constant", "parameter") else tuple(re.findall(r"%?([\w.\-]+)(?=,|$)", inside))
    attributes = rest[closing + 1 :]
    return Instruction(
        name, arrays, op, (inside,) if op in ("constant", "parameter") else operands, attributes, is_root
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` is closed."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def count_flops(module: Module) -> float:
    """Operations of all matrix products and convolutions in one run, two for a multiplication and addition."""

    @functools.cache
    def of(name: str) -> float:
        body, total = module.computations[name], 0.0
        for instruction in body.values():
            if instruction.op == "dot":
                left = body[instruction.operands[0]].arrays[0].shape
                contracted = _integers(instruction.attributes, "lhs_contracting_dims")
                total += 2 * math.prod(instruction.arrays[0].shape) * math.prod(left[axis] for axis in contracted)
            elif instruction.op == "convolution":
                kernel = body[instruction.operands[1]].arrays[0].shape
                labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
                outputs = kernel[labels[1].index("o")] if labels else 1
                total += 2 * math.prod(instruction.arrays[0].shape) * math.prod(kernel) / outputs
            else:
                total += sum(turns * of(callee) for callee, turns in _callees(module, instruction))
        return total

    return of(module.entry)


def count_traffic(module: Module) -> Traffic:
    """What one run of a compiled program moves."""
    collectives: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, int] = collections.defaultdict(int)
    totals = {"bytes": 0.0, "copied": 0.0, "unknown": 0}

    def run(name: str, times: float) -> None:
        body = module.computations[name]
        for instruction in body.values():
            op = instruction.op.removesuffix("-start")
            if op in ("while", "call", "conditional"):
                for callee, turns in _callees(module, instruction):
                    run(callee, times * turns)
                totals["unknown"] += op == "while" and _known_turns(module, instruction) is None
                continue
            if instruction.op in _FREE:
                continue
            moved = times * _moved(module, body, instruction)
            totals["bytes"] += moved
            totals["copied"] += moved if op in ("copy", "transpose") else 0
            if op in COLLECTIVES:
                collectives[op] += times * sum(array.size for array in instruction.arrays)
            if op == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
                calls[target[1] if target else "unknown"] += round(times)

    run(module.entry, 1)
    return Traffic(totals["bytes"], totals["copied"], dict(collectives), dict(calls), int(totals["unknown"]))


def _moved(module: Module, body: dict[str, Instruction], instruction: Instruction) -> float:
    """Bytes that an instruction reads and writes in main memory."""
    inputs = [body[name] for name in instruction.operands if name in body]
    if instruction.op in ("copy-start", "slice-start"):
        # (destination, source, context): a copy to or from the chip moves the one of them that is not there.
        return sum(array.size for array in instruction.arrays[:2])
    if instruction.op in ("dynamic-slice", "gather", "slice"):
        return 2 * sum(array.size for array in instruction.arrays)
    if instruction.op == "dynamic-update-slice":
        return 2 * sum(array.size for array in inputs[1].arrays)
    written = sum(array.size for array in instruction.arrays)
    read = [sum(array.size for array in each.arrays) for each in inputs]
    callee = re.search(r"calls=%?([\w.\-]+)", instruction.attributes)
    if instruction.op == "fusion" and callee:
        fused = module.computations[callee[1]]
        for each in fused.values():
            if each.op == "parameter" and int(each.operands[0]) < len(read):
                uses = [use for use in fused.values() if each.name in use.operands]
                sliced = [use for use in uses if use.op in ("dynamic-slice", "gather", "slice")]
                in_place = [use for use in uses if use.op == "dynamic-update-slice" and use.operands[0] == each.name]
                if uses and len(sliced) == len(uses):
                    smaller = sum(array.size for use in sliced for array in use.arrays)
                    read[int(each.operands[0])] = min(read[int(each.operands[0])], smaller)
                elif uses and len(in_place) == len(uses):
                    updates = [fused[use.operands[1]] for use in in_place]
                    written -= read[int(each.operands[0])]
                    written += sum(array.size for update in updates for array in update.arrays)
                    read[int(each.operands[0])] = 0.0
    return max(written, 0.0) + sum(read)


def _callees(module: Module, instruction: Instruction) -> list[tuple[str, float]]:
    """The computations that an instruction runs, and how often; of a conditional the first branch."""
    if instruction.op == "while":
        names = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", instruction.attributes))
        turns = _known_turns(module, instruction)
        return [(names["body"], 1 if turns is None else turns)]
    found = re.findall(
        r"(?:to_apply|calls|true_computation|branch_computations)=\{?%?([\w.\-]+)", instruction.attributes
    )
    # What a reduction applies to every pair is no product.
    return [(name, 1) for name in found if instruction.op in ("call", "fusion", "conditional", "async-start")]


def _known_turns(module: Module, instruction: Instruction) -> int | None:
    """How often a loop runs: as the compiler says, or the bound that its counter from 0 is compared with."""
    told = re.search(r'known_trip_count"?[=:]\{"?n"?[=:]"?(\d+)', instruction.attributes)
    if told:
        return int(told[1])
    name = re.search(r"condition=%?([\w.\-]+)", instruction.attributes)
    condition: dict[str, Any] = module.computations[name[1]] if name else {}
    compared = next((each for each in condition.values() if each.op == "compare"), None)
    if compared is None or "direction=LT" not in compared.attributes:
        return None
    bounds = [condition[each].operands[0] for each in compared.operands if condition[each].op == "constant"]
    return int(bounds[0]) if bounds and bounds[0].isdigit() else None


def _integers(attributes: str, name: str) -> list[int]:
    found = re.search(rf"{name}=\{{([\d,]*)\}}", attributes)
    return [int(each) for each in found[1].split(",") if each] if found else []
