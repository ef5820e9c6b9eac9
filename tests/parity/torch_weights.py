"""Random PyTorch weights, and their Flax tree, for parity tests. Kept apart from the converter, which is tested too."""

import math

import numpy as np
import torch


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Draws every parameter anew, norms and biases included, so that none hides behind a default of 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                value = noise / math.sqrt(parameter[0].numel())
            else:
                value = 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(value)


def flax_tree(state_dict: dict[str, torch.Tensor]) -> dict:
    """Convolutions and linear layers as `kernel`, norms as `scale`; 'blocks.0.conv.weight' at blocks_0/conv/kernel."""
    tree = {}
    for name, tensor in state_dict.items():
        *path, leaf = name.split(".")
        levels = []
        for part in path:
            if part.isdigit():
                levels[-1] += f"_{part}"
            else:
                levels.append(part)
        value = tensor.detach().numpy()
        if leaf == "weight" and value.ndim == 1:
            leaf = "scale"
        elif leaf == "weight":
            leaf = "kernel"
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        node = tree
        for part in levels:
            node = node.setdefault(part, {})
        node[leaf] = np.array(value)
    return tree
