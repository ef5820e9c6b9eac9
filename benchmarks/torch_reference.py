"""The method in plain PyTorch, as a user of diffusers would write it from the paper: what throughput.py compares with.

Strided losses run every (latents, caption) pair, repeated over the timesteps, through the model in batches; Fisher
information is `vmap(grad)` over the weights; the query's gradient a backward pass with only the cross-attention keys
and values requiring one (METHOD.md sections 2 and 3). Latents are channels first, as diffusers takes them.
"""

import re
import time
import warnings
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sizes import Size

KEYS_AND_VALUES = re.compile(r".+\.attn2\.to_[kv]\.weight")

# Batch sizes to try, by device and part, in ascending order, as the memory of a trial is the most of those so far. The
# published code has 100 and 80.
_BATCHES = {
    "cpu": {"losses": (100,), "fisher": (4, 8, 16), "fisher-kv": (4, 8, 16), "gradient": (16, 80)},
    "cuda": {"losses": (100, 400, 1600), "fisher": (4, 8, 16), "fisher-kv": (16, 64), "gradient": (80, 400)},
}


def build_unet(config: dict[str, Any], seed: int) -> diffusers.UNet2DConditionModel:
    """A UNet in evaluation mode with random weights, none of them at the 0 or 1 that PyTorch starts some at."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel.from_config(config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return unet.eval().requires_grad_(False)


def add_noise(
    alphas_cumprod: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """sqrt(abar_t) x + sqrt(1 - abar_t) eps; latents and noise (B, c, h, w), timesteps (B,)."""
    level = alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    return level.sqrt() * latents + (1 - level).sqrt() * noise


def prediction_losses(
    unet: torch.nn.Module,
    alphas_cumprod: torch.Tensor,
    latents: torch.Tensor,
    text: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """The epsilon loss of each row, one timestep each -> (B,) float32; latents (B, c, h, w), text (B, L, d) float32."""
    noisy = add_noise(alphas_cumprod, latents, noise, timesteps)
    prediction = unet(noisy.to(unet.dtype), timesteps, text.to(unet.dtype)).sample
    return (prediction.float() - noise).square().mean(dim=(1, 2, 3))


@torch.no_grad()
def strided_losses(
    unet: torch.nn.Module,
    alphas_cumprod: torch.Tensor,
    latents: torch.Tensor,
    text: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    batch: int,
) -> torch.Tensor:
    """The mean over S timesteps of each example's loss -> (B,).

    Args:
      latents, text: (B, c, h, w) and (B, L, d).
      noise: (B, S, c, h, w).
      timesteps: (S,).
      batch: rows that the model takes at once.
    """
    count, steps = noise.shape[:2]
    rows = torch.arange(count, device=latents.device).repeat_interleave(steps)
    noise, timesteps = noise.flatten(0, 1), timesteps.repeat(count)
    losses = [
        prediction_losses(unet, alphas_cumprod, latents[part], text[part], noise[at], timesteps[at])
        for part, at in zip(rows.split(batch), torch.arange(len(rows), device=rows.device).split(batch))
    ]
    return torch.cat(losses).reshape(count, steps).mean(dim=1)


def squared_gradients(
    unet: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    alphas_cumprod: torch.Tensor,
    latents: torch.Tensor,
    text: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    batch: int,
) -> dict[str, torch.Tensor]:
    """The sum over B samples of the squared gradient of each one's loss by `weights`, some or all of the UNet's."""

    def loss(weights, *sample):
        latents, text, noise, timestep = (value[None] for value in sample)
        noisy = add_noise(alphas_cumprod, latents, noise, timestep)
        prediction = functional_call(unet, weights, (noisy, timestep, text)).sample
        return (prediction - noise).square().mean()

    gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for sample in zip(*(values.split(batch) for values in (latents, text, noise, timesteps))):
        for name, gradient in gradients(weights, *sample).items():
            total[name] += gradient.square().sum(dim=0)
    return total


def query_gradient(
    unet: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    alphas_cumprod: torch.Tensor,
    latents: torch.Tensor,
    text: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    batch: int,
) -> dict[str, torch.Tensor]:
    """The sum over D draws of the gradient of one query's loss by `weights`, which must be the UNet's own tensors.

    Args:
      latents, text: (1, c, h, w) and (1, L, d).
      noise, timesteps: (D, c, h, w) and (D,).
    """
    for weight in weights.values():
        weight.requires_grad_(True)
        weight.grad = None
    for part_noise, part_timesteps in zip(noise.split(batch), timesteps.split(batch)):
        count = len(part_noise)
        repeated = latents.repeat(count, 1, 1, 1), text.repeat(count, 1, 1)
        prediction_losses(unet, alphas_cumprod, *repeated, part_noise, part_timesteps).sum().backward()
    gradients = {name: weight.grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(False)
        weight.grad = None
    return gradients


class TorchSide:
    """PyTorch's half of throughput.py, to live in a process of its own; `our_side.OurSide` has the same methods.

    A unit of a part is a forward at one timestep ("losses"), a Fisher sample ("fisher", and "fisher-kv" with keys and
    values only) or a draw of the query's gradient ("gradient").
    """

    def __init__(self, size: Size, weights_file: str, device: str, precision: str, threads: int):
        """Builds a UNet, writes its weights to a safetensors file for the other side, and goes to the device.

        Args:
          size: of model and text.
          weights_file: to write.
          device: "cpu" or "cuda".
          precision: one of `attrib_jax.models.predictor.PRECISIONS`.
          threads: of the CPU.
        """
        torch.set_num_threads(threads)
        # That attention under vmap runs example by example, which it says, is part of what is measured.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        # PyTorch has no products of float32 numbers in bfloat16.
        allow = precision in ("tensorfloat32", "bfloat16-products")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._device, self._size = device, size
        self._unet = build_unet(size.unet, size.seed)
        save_file({name: weight.contiguous() for name, weight in self._unet.state_dict().items()}, weights_file)
        self._unet.to(device)
        if self._dtype != torch.float32:
            self._unet.to(self._dtype)
        weights = dict(self._unet.named_parameters())
        kept = {name: weight for name, weight in weights.items() if KEYS_AND_VALUES.fullmatch(name)}
        self._weights = {"fisher": weights, "fisher-kv": kept, "gradient": kept}

    def check(self, part: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the other side computed of `inputs`: the losses, or sums by the PyTorch names of keys and values."""
        inputs = {name: torch.from_numpy(value).to(self._device) for name, value in inputs.items()}
        results = self._run(part, inputs, _BATCHES[self._device][part][0])
        if part == "losses":
            return {"losses": results.cpu().numpy()}
        return {name: value.cpu().numpy() for name, value in results.items() if KEYS_AND_VALUES.fullmatch(name)}

    def batches(self, part: str) -> tuple[int, ...]:
        """The batch sizes to try."""
        return _BATCHES[self._device][part]

    def trial(self, part: str, batch: int) -> float:
        """Units a second in batches of this size, 0 where the GPU's memory does not hold one: the median of three."""
        self.prepare(part, self.batches(part)[-1], batch)
        try:
            # The first maps the memory that the others find.
            turns = [self.turn(part) for _ in range(4)]
        except torch.OutOfMemoryError:
            return 0.0
        return float(np.median([done / seconds for done, seconds in turns[1:]]))

    def prepare(self, part: str, units: int, batch: int) -> None:
        """Makes the inputs of a turn of at least `units`, in batches of this size."""
        self._batch = batch
        self._inputs = self._random_inputs(part, -(-units // batch) * batch)

    def turn(self, part: str) -> tuple[int, float]:
        """Runs once -> (units done, seconds)."""
        began = time.perf_counter()
        self._run(part, self._inputs, self._batch)
        self._wait()
        noise = self._inputs["noise"]
        return noise.shape[: 2 if part == "losses" else 1].numel(), time.perf_counter() - began

    def flops(self, part: str) -> float:
        """FLOPs of a unit: PyTorch's count of matrix products and convolutions, attention as matrix products."""
        inputs = self._random_inputs("fisher", 1)
        weights = list(self._weights.get(part, {}).values())
        for weight in weights:
            weight.requires_grad_(True)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss = prediction_losses(self._unet, **inputs).sum()
            if weights:
                torch.autograd.grad(loss, weights)
        for weight in weights:
            weight.requires_grad_(False)
        return float(counter.get_total_flops())

    def matmul_rate(self) -> float:
        """FLOP/s of the product of two large matrices in the model's precision."""
        size = 8192 if self._device == "cuda" else 2048
        left, right = torch.randn(2, size, size, device=self._device, dtype=self._dtype)
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            torch.mm(left, right)
            self._wait()
            seconds.append(time.perf_counter() - began)
        return 2 * size**3 / float(np.median(seconds[1:]))

    def device_memory(self, peak: bool) -> int:
        """Bytes in use on the GPU now, or the most so far."""
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()

    def _run(self, part: str, inputs: dict[str, torch.Tensor], batch: int) -> Any:
        if part == "losses":
            return strided_losses(self._unet, **inputs, batch=batch)
        run = query_gradient if part == "gradient" else squared_gradients
        return run(self._unet, self._weights[part], **inputs, batch=batch)

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _random_inputs(self, part: str, units: int) -> dict[str, torch.Tensor]:
        size, generator = self._size, torch.Generator().manual_seed(self._size.seed)
        steps = -(-size.num_train_timesteps // size.stride)
        examples = -(-units // steps) if part == "losses" else units
        images = 1 if part == "gradient" else examples

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(self._device)

        latents = size.unet["in_channels"], size.unet["sample_size"], size.unet["sample_size"]
        timesteps = torch.randint(size.num_train_timesteps, (examples,), generator=generator)
        if part == "losses":
            timesteps = torch.arange(0, size.num_train_timesteps, size.stride)
        return {
            "alphas_cumprod": torch.linspace(0.999, 0.005, size.num_train_timesteps, device=self._device),
            "latents": normal(images, *latents),
            "text": normal(images, size.length, size.unet["cross_attention_dim"]),
            "noise": normal(examples, *((steps,) if part == "losses" else ()), *latents),
            "timesteps": timesteps.to(self._device),
        }
