"""The forms in which adapters keep a change of one weight: LoRA, LoHa and LoKr, with Tucker cores, and DoRA over them.

Everything is in PyTorch's layout: a weight is (out, in) or (out, in, kh, kw). Formulas, with r the rank:
  LoRA (Hu et al. 2021): up (out, r) @ down (r, in kh kw); with a core mid (r, r, kh, kw), down is (r, in) and the
    change is sum_ij mid[i, j] up[:, i] down[j, :] (LoCon of LyCORIS);
  LoHa (Hyeon-Woo et al. 2021): (w1_a @ w1_b) * (w2_a @ w2_b), element by element; with cores t1 and t2 each factor is
    sum_ij t[i, j] w_a[i, :] w_b[j, :], where w_a is (r, out);
  LoKr (Yeh et al. 2023): the Kronecker product of w1 and w2, each whole or a product w_a @ w_b, w2 perhaps with t2;
  DoRA (Liu et al. 2024, eq. 5): m (W + D) / ||W + D||, the norm over all axes but the one that the magnitude m has.
"""

import math
from collections.abc import Mapping, Set

import numpy as np

_LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_LOHA_CORES = frozenset({"hada_t1", "hada_t2"})
# Magnitudes of DoRA: PEFT's, which go with the outputs, and that of kohya and LyCORIS, whose shape says with what.
MAGNITUDES = ("lora_magnitude_vector", "dora_scale")

Shape = tuple[int, ...]


def is_complete(roles: Set[str]) -> bool:
    """Whether tensors of these roles, such as {"down", "up"}, make one change."""
    rest = roles - set(MAGNITUDES)
    if "down" in rest:
        return rest in ({"down", "up"}, {"down", "up", "mid"})
    if rest & _LOHA:
        return rest in (_LOHA, _LOHA | _LOHA_CORES)
    first = rest & {"lokr_w1", "lokr_w1_a", "lokr_w1_b"}
    second = rest - first
    return first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}) and second in (
        {"lokr_w2"},
        {"lokr_w2_a", "lokr_w2_b"},
        {"lokr_w2_a", "lokr_w2_b", "lokr_t2"},
    )


def rank(shapes: Mapping[str, Shape]) -> int | None:
    """The rank that alpha is divided by; None for a LoKr of two whole factors, which has none."""
    for role in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if role in shapes:
            return shapes[role][0]
    return None


def changed_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the weight that a change of these tensors is for, as a matrix (out, in kh kw); None where they do
    not fit each other."""
    if any(len(shape) < 2 or 0 in shape for role, shape in shapes.items() if role not in MAGNITUDES):
        return None
    if "down" in shapes:
        return _product_shape(shapes["up"], shapes["down"], shapes.get("mid"))
    if "hada_w1_a" in shapes:
        first, second = (
            _factor_shape(shapes[f"hada_w{i}_a"], shapes[f"hada_w{i}_b"], shapes.get(f"hada_t{i}")) for i in (1, 2)
        )
        return first if first == second else None
    first, second = (_lokr_factor_shape(shapes, i) for i in (1, 2))
    if first is None or second is None:
        return None
    return first[0] * second[0], first[1] * second[1]


def fits(shapes: Mapping[str, Shape], shape: Shape) -> bool:
    """Whether a change of these tensors, and their DoRA magnitude, are for a weight of this shape."""
    if changed_shape(shapes) != (shape[0], math.prod(shape[1:])):
        return False
    kernel = _kernel(shape)
    if "down" in shapes:
        # `up` follows as a linear layer or 1x1 convolution; the kernel is that of `down`, or of the core.
        core = shapes.get("mid")
        if _kernel(shapes["up"]) or _kernel(shapes["down" if core is None else "mid"]) != kernel:
            return False
    if any(role in shapes and _kernel(shapes[role]) != kernel for role in ("hada_t1", "hada_t2", "lokr_t2")):
        return False
    if len(shapes.get("lokr_w2", ())) > 2 and _kernel(shapes["lokr_w2"]) != kernel:
        return False
    if "down" not in shapes and "hada_w1_a" not in shapes and shape[1] % _lokr_factor_shape(shapes, 1)[1]:
        return False
    return all(_magnitude_axis(role, shapes[role], shape) is not None for role in MAGNITUDES if role in shapes)


def change(tensors: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
    """The change of a weight of this shape by tensors that `fits` found right, unscaled -> float64."""
    arrays = {role: np.asarray(array, np.float64) for role, array in tensors.items()}
    if "down" in arrays:
        return _product(arrays["up"], arrays["down"], arrays.get("mid")).reshape(shape)
    if "hada_w1_a" in arrays:
        first, second = (
            _factor(arrays[f"hada_w{i}_a"], arrays[f"hada_w{i}_b"], arrays.get(f"hada_t{i}")) for i in (1, 2)
        )
        return (first * second).reshape(shape)
    first, second = (_lokr_factor(arrays, i) for i in (1, 2))
    # The Kronecker product over outputs and inputs; a kernel stays the last axis.
    second = second.reshape(len(second), shape[1] // first.shape[1], -1)
    return np.einsum("pq,stk->psqtk", first, second).reshape(shape)


def with_magnitude(weight: np.ndarray, role: str, magnitude: np.ndarray) -> np.ndarray:
    """DoRA: `weight` (W + D, float64) with its norms replaced by the magnitude."""
    axis = _magnitude_axis(role, magnitude.shape, weight.shape)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    norm = np.sqrt(np.sum(np.square(weight), axis=others, keepdims=True))
    return weight * (np.asarray(magnitude, np.float64).reshape(norm.shape) / norm)


def _magnitude_axis(role: str, found: Shape, shape: Shape) -> int | None:
    """The axis of the weight that a magnitude goes with; None where it does not fit."""
    if math.prod(found) != max(found, default=0):
        return None
    if role == "lora_magnitude_vector" or found[0] == shape[0]:
        return 0 if math.prod(found) == shape[0] else None
    return 1 if len(found) > 1 and found[1] == shape[1] else None


def _kernel(shape: Shape) -> Shape:
    """The spatial size of a convolution's weight; nothing for 1x1, which is a linear layer."""
    return shape[2:] if any(size != 1 for size in shape[2:]) else ()


def _columns(shape: Shape) -> int:
    return math.prod(shape[1:])


def _product_shape(up: Shape, down: Shape, core: Shape | None) -> Shape | None:
    if core is None:
        return (up[0], _columns(down)) if _columns(up) == down[0] else None
    if core[:2] != (_columns(up), down[0]):
        return None
    return up[0], _columns(down) * math.prod(core[2:])


def _product(up: np.ndarray, down: np.ndarray, core: np.ndarray | None) -> np.ndarray:
    up, down = up.reshape(len(up), -1), down.reshape(len(down), -1)
    return up @ down if core is None else _tucker(up.T, down, core)


def _factor_shape(a: Shape, b: Shape, core: Shape | None) -> Shape | None:
    if core is None:
        return _product_shape(a, b, None)
    if core[:2] != (a[0], b[0]):
        return None
    return _columns(a), _columns(b) * math.prod(core[2:])


def _factor(a: np.ndarray, b: np.ndarray, core: np.ndarray | None) -> np.ndarray:
    return _product(a, b, None) if core is None else _tucker(a.reshape(len(a), -1), b.reshape(len(b), -1), core)


def _tucker(a: np.ndarray, b: np.ndarray, core: np.ndarray) -> np.ndarray:
    """sum_ij core[i, j, k] a[i, o] b[j, c] -> (o, c k)."""
    core = core.reshape(*core.shape[:2], -1)
    return np.einsum("ijk,io,jc->ock", core, a, b, optimize=True).reshape(a.shape[1], -1)


def _lokr_factor_shape(shapes: Mapping[str, Shape], i: int) -> Shape | None:
    whole = shapes.get(f"lokr_w{i}")
    if whole is not None:
        return whole[0], _columns(whole)
    return _factor_shape(shapes[f"lokr_w{i}_a"], shapes[f"lokr_w{i}_b"], shapes.get(f"lokr_t{i}"))


def _lokr_factor(arrays: Mapping[str, np.ndarray], i: int) -> np.ndarray:
    whole = arrays.get(f"lokr_w{i}")
    if whole is not None:
        return whole.reshape(len(whole), -1)
    return _factor(arrays[f"lokr_w{i}_a"], arrays[f"lokr_w{i}_b"], arrays.get(f"lokr_t{i}"))
