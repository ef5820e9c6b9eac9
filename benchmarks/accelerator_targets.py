"""Accelerators that programs are compiled for without being there: topologies, memory, peak rates, and their sources.

TPUs need the package libtpu, H100 those of `pip install` in benchmarks/accelerators.py.
"""

import dataclasses
import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from attrib_jax.parallel.mesh import data_mesh

# Products of float32 numbers as a TPU takes them: as so many products of bfloat16 numbers (`jax.lax.Precision`).
_TPU_PASSES = {"float32": 6, "tensorfloat32": 3, "bfloat16-products": 1, "bfloat16": 1}
# Text proto of xla.GpuTargetConfigProto; sizes of an H100 SXM5 (NVIDIA H100 white paper, 2022, table 2 and page 39).
_H100_CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of device, and how many.

    Attributes:
      platform: "tpu" or "cuda", as `get_topology_desc` takes it.
      topology: its name there.
      options: further arguments of `get_topology_desc`.
      memory_gib: of one device.
      gbytes_per_s: memory bandwidth of one device.
      tflops: precision -> peak rate of one device in matrix products, dense.
      source: where these numbers are from.
    """

    platform: str
    topology: str
    memory_gib: float
    gbytes_per_s: float
    tflops: dict[str, float]
    source: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def mesh(self, model_parallel: int = 1) -> Mesh:
        """As `data_mesh`, over devices that are not there; RuntimeError where the compiler is missing."""
        # The name of a machine that is no TPU is looked up on the network otherwise.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        found = topologies.get_topology_desc(self.topology, self.platform, **self.options)
        return data_mesh(found.devices, model_parallel)


def _tpu(topology: str, memory_gib: float, gbytes_per_s: float, peak: float, source: str) -> Target:
    rates = {precision: peak / passes for precision, passes in _TPU_PASSES.items()}
    # A single chip is a topology of one, whose bounds have to be told apart from those of a host.
    options = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    return Target("tpu", topology, memory_gib, gbytes_per_s, rates, source, options)


_V5E = (16, 819, 197, "cloud.google.com/tpu/docs/v5e")
TARGETS: dict[str, Target] = {
    "v5e": _tpu("v5e:1x1", *_V5E),
    "v5e:2x2": _tpu("v5e:2x2", *_V5E),
    "v5e:4x4": _tpu("v5e:4x4", *_V5E),
    "v5e:16x16": _tpu("v5e:16x16", *_V5E),
    "v5p": _tpu("v5p:2x2x1", 95, 2765, 459, "cloud.google.com/tpu/docs/v5p"),
    "v6e": _tpu("v6e:2x2", 32, 1640, 918, "cloud.google.com/tpu/docs/v6e"),
    "h100": Target(
        "cuda",
        "1x1x1",
        memory_gib=80,
        gbytes_per_s=3350,
        tflops={"float32": 67, "tensorfloat32": 494, "bfloat16-products": 494, "bfloat16": 989},
        source="NVIDIA H100 SXM5 data sheet, dense",
        options={"topology": "1x1x1", "target_config": _H100_CONFIG},
    ),
}


def versions() -> dict[str, str]:
    """Of what compiles."""
    import importlib.metadata

    found = {"jax": jax.__version__}
    for package in ("libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
