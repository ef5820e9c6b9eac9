"""Our half of benchmarks/throughput.py: the production stages on random inputs, in a process of its own."""

import tempfile
import time
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.attribution.scores import EXAMPLES_PER_TILE
from attrib_jax.attribution.unlearn import DRAWS_PER_TILE, query_draws
from attrib_jax.convert.load import load_unet
from attrib_jax.convert.weights.names import name_table, to_torch
from attrib_jax.core.keys import example_noise, loss_key, purpose_key
from attrib_jax.core.weights import flatten_names, merge_weights, select_weights
from attrib_jax.diffusion.losses import denoising_losses
from attrib_jax.diffusion.schedule import NoiseSchedule, strided_timesteps
from attrib_jax.jobs.curvature import fit_fisher
from attrib_jax.jobs.draws import fisher_draws, samples_per_tile
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.losses import loss_program
from attrib_jax.jobs.query_gradient import GradientProgram
from attrib_jax.jobs.settings import LossSettings
from attrib_jax.models.predictor import cast_params, compute_dtype, matmul_precision, predictor
from attrib_jax.parallel.compilation_cache import enable_compilation_cache
from attrib_jax.parallel.mesh import data_mesh, replicate, shard_batch, tile_map
from benchmarks.sizes import Size

_SEED = 0


class OurSide:
    """The stages as the commands run them; methods and units are those of `torch_reference.TorchSide`."""

    def __init__(self, size: Size, weights_file: str, device: str, precision: str, devices: int):
        """Loads the weights that the other side wrote.

        Args:
          size, precision: as there.
          weights_file: to read, with PyTorch's names.
          device: "cpu" or "cuda".
          devices: that a CPU is split into.
        """
        jax.config.update("jax_platforms", device)
        jax.config.update("jax_num_cpu_devices", devices)
        enable_compilation_cache()
        self._size, self._precision, self.mesh = size, precision, data_mesh()
        unet, params = load_unet(weights_file, config={"unet": size.unet, "scheduler": size.scheduler})
        self._schedule = NoiseSchedule.from_config(size.scheduler)
        self._predict = predictor(unet, precision)
        self._pipeline = types.SimpleNamespace(unet=unet, schedule=self._schedule)
        self._timesteps = strided_timesteps(size.stride, size.num_train_timesteps)
        self._params = cast_params(params, precision)
        self._selected, self._rest = select_weights(params, "cross-attn-kv")
        self._torch_names = {path: name for name, path in name_table(params).items()}
        jax.block_until_ready(self._params)

    def prepare(self, part: str, units: int) -> int:
        """Makes the inputs of a turn of at least `units`, compiles, and returns what one device takes at once."""
        tile = {"losses": EXAMPLES_PER_TILE, "fisher": samples_per_tile(self.mesh), "gradient": DRAWS_PER_TILE}[part]
        in_tile = len(self._timesteps) if part == "losses" else 1
        all_devices = tile * self.mesh.size
        self._count = -(-units // (all_devices * in_tile)) * all_devices
        # The Fisher information draws images again and again, as in a real run.
        self._data = self._random_data(all_devices if part == "fisher" else self._count)
        if part == "losses":
            settings = LossSettings(loss_seed=_SEED, stride=self._size.stride, precision=self._precision)
            self._program = loss_program(types.SimpleNamespace(pipeline=self._pipeline), settings)
            self._weights = self._program.place(self._params)
        elif part == "gradient":
            program = GradientProgram(self._predict, self._schedule, self.mesh)
            latents, text = self._data.inputs(0, 0, 0)
            self._sum_draws = program.bind(self._rest, latents[0], text[0], self._count)
        self.turn(part)
        return tile * in_tile

    def turn(self, part: str) -> tuple[int, float]:
        """Runs once -> (units done, seconds)."""
        if part == "fisher":
            # Fitting compiles first, so the time starts at its second tile.
            tile = samples_per_tile(self.mesh) * self.mesh.size
            data = _StopwatchDataset.of(self._data)
            self._fit(data, self._count + tile)
            return self._count, time.perf_counter() - data.began
        began = time.perf_counter()
        if part == "losses":
            self._losses(np.arange(len(self._data)))
            return self._count * len(self._timesteps), time.perf_counter() - began
        jax.block_until_ready(self._sum_draws(self._selected, self._query_key(), lambda done: None))
        return self._count, time.perf_counter() - began

    def check(self, part: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """A little work of `part`, prepared before -> (its inputs as PyTorch takes them, its results)."""
        levels = {"alphas_cumprod": np.asarray(self._schedule.alphas_cumprod)}
        if part == "losses":
            rows, flips = np.arange(4) // 2, np.arange(4) % 2
            key = loss_key(_SEED)
            noise = [
                example_noise(key, row, flip, 0, self._timesteps, self._data.latent_shape)
                for row, flip in zip(rows, flips)
            ]
            inputs = self._torch_inputs(rows, flips, jnp.stack(noise), self._timesteps)
            return levels | inputs, {"losses": self._losses(np.arange(2)).ravel()}
        shape, count = self._data.latent_shape, 8
        if part == "fisher":
            draws = fisher_draws(_SEED, count, self._data.num_captions, self._size.num_train_timesteps)
            key = purpose_key(_SEED, "fisher")
            noise = [jax.random.normal(jax.random.fold_in(key, index), (1, *shape))[0] for index in draws.index]
            inputs = self._torch_inputs(draws.row, draws.flip, jnp.stack(noise), draws.timestep)
            fisher = self._fit(self._data, count)
            sums = jax.tree.map(
                lambda leaf: np.asarray(leaf, np.float64) / fisher.gradient_scale**2 * count, fisher.tree
            )
            return levels | inputs, self._named(sums)
        timesteps, noise = query_draws(
            self._query_key(), jnp.arange(self._count, dtype=jnp.int32), self._size.num_train_timesteps, shape
        )
        total = self._sum_draws(self._selected, self._query_key(), lambda done: None)
        zero = np.zeros(1, np.int32)
        return levels | self._torch_inputs(zero, zero, noise, timesteps), self._named(total.gradient)

    def flops(self, part: str) -> float:
        """FLOPs of a unit by XLA's cost analysis, before optimisation, of a plain forward or gradient."""
        count = {"losses": len(self._timesteps), "fisher": 1, "gradient": DRAWS_PER_TILE}[part]
        latents, text = self._data.inputs(0, 0, 0)
        noise = jnp.zeros((count, *latents.shape[1:]), latents.dtype)
        timesteps = jnp.zeros(count, jnp.int32)

        def loss(selected):
            params = merge_weights(selected, self._rest)
            losses = denoising_losses(self._predict, params, self._schedule, latents[0], text[0], noise, timesteps)
            return jnp.sum(losses)

        function = loss if part == "losses" else jax.grad(loss)
        return jax.jit(function).lower(self._selected).cost_analysis()["flops"] / count

    def matmul_rate(self) -> float:
        """FLOP/s of the product of two large matrices on every device, in the model's precision."""
        size = 2048 if self.mesh.devices.flat[0].platform == "cpu" else 8192
        dtype = compute_dtype(self._precision) or jnp.float32
        right = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), dtype)
        left = np.broadcast_to(np.asarray(right), (self.mesh.size, size, size))
        run = tile_map(self.mesh, lambda right, left: left @ right, matmul_precision(self._precision))
        right, left = replicate(self.mesh, right), shard_batch(self.mesh, left)
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            jax.block_until_ready(run(right, left))
            seconds.append(time.perf_counter() - began)
        return 2 * size**3 * self.mesh.size / float(np.median(seconds[1:]))

    def device_memory(self, peak: bool) -> int:
        """Bytes in use on the GPU now, or the most so far."""
        return self.mesh.devices.flat[0].memory_stats()["peak_bytes_in_use" if peak else "bytes_in_use"]

    def _losses(self, rows: np.ndarray) -> np.ndarray:
        return self._program(self._weights, self._data, rows)

    def _fit(self, data: EncodedDataset, samples: int) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "fisher"
            return fit_fisher(
                path, self._predict, self._schedule, self._selected, self._rest, data, samples, _SEED, self.mesh
            )

    def _query_key(self) -> jax.Array:
        return purpose_key(_SEED, "query")

    def _random_data(self, examples: int) -> EncodedDataset:
        images, config = max(2, -(-examples // 2)), self._size.unet
        rng = np.random.default_rng(self._size.seed)
        side = config["sample_size"]
        latents = rng.standard_normal((images, 2, side, side, config["in_channels"]), np.float32)
        text = rng.standard_normal((images, self._size.length, config["cross_attention_dim"]), np.float32)
        return EncodedDataset(np.arange(images, dtype=np.int32), latents, text, np.arange(images + 1))

    def _torch_inputs(self, rows: Any, flips: Any, noise: Any, timesteps: Any) -> dict[str, np.ndarray]:
        latents, text = self._data.inputs(rows, flips, 0)
        latents, noise = (np.moveaxis(np.asarray(array), -1, -3).copy() for array in (latents, noise))
        return {"latents": latents, "text": text, "noise": noise, "timesteps": np.asarray(timesteps, np.int64)}

    def _named(self, tree: Any) -> dict[str, np.ndarray]:
        flat = flatten_names(tree)
        return {
            self._torch_names[path]: np.ascontiguousarray(to_torch(path, np.asarray(v))) for path, v in flat.items()
        }


class _StopwatchDataset(EncodedDataset):
    """A data set that notes when its second batch is asked for, once the devices have done the first."""

    began: float = 0.0

    @classmethod
    def of(cls, data: EncodedDataset) -> "_StopwatchDataset":
        return cls(data.row_ids, data.latents, data.text, data.first_caption)

    def inputs(self, row, flip, caption):
        calls = getattr(self, "_calls", 0) + 1
        object.__setattr__(self, "_calls", calls)
        if calls == 2:
            jax.block_until_ready(jax.live_arrays())
            object.__setattr__(self, "began", time.perf_counter())
        return super().inputs(row, flip, caption)
