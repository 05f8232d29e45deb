"""One distribution, two import packages: megatron_mopd (the plugin) and mopd_kernels (torch, triton and numpy only)."""

from pathlib import Path

from setuptools import find_packages, setup

# What a training run needs on any machine, a CPU-only one included.
TRAIN = [
    "megatron-core>=0.19,<0.20",
    "einops>=0.8",  # mcore's Mamba mixer
    "psutil>=5.9",  # mcore's distributed checkpoint writers
    "transformers>=5.3",  # tokenizers, Hugging Face checkpoints, NemotronH as an oracle in tests
    "tokenizers>=0.22",
    "jinja2>=3.1",  # chat templates
    "safetensors>=0.6",
    "reasoning-gym>=0.1.25",  # tasks with verifiers
    "pydantic>=2.11",
    "pyyaml>=6.0",
    "rich>=14.0",
    "tensorboard>=2.19",
    "matplotlib>=3.10",
]

# Need a CUDA toolchain to build. NVIDIA's apex is not on PyPI (the package of that name there is another project):
# `python -m megatron_mopd.doctor` detects it, CONTRIBUTING.md says how to build it.
GPU = [
    "transformer-engine[pytorch]>=2.8",
    "mamba-ssm>=2.2.6.post3",
    "causal-conv1d>=1.5.3.post1",
]

# Peers that the benchmarks compare with, beyond what `train` already holds.
BENCH = [
    "psutil>=5.9",
    "rich>=14.0",
    "transformers>=5.3",
    "matplotlib>=3.10",
    "liger-kernel>=0.8.5",
]

DEV = [
    "liger-kernel>=0.8.5",  # its torch forms are oracles in tests
    # NVFP4 as other ecosystems write it: byte for byte oracles of mopd_kernels.nvfp4
    "torchao>=0.18",
    "nvidia-modelopt>=0.47",
    "requests>=2.32",  # modelopt imports it without saying so
    "compressed-tensors>=0.20",
    "setuptools>=77",  # `pip install --no-build-isolation -e .` builds with the locked one
    "pytest>=8.4",
    "hypothesis>=6.140",
    "ruff>=0.14",
    "pyright[nodejs]>=1.1.405",  # with Node from the package index, so that linting needs no other download
    "pre-commit>=4.3",
    "codespell>=2.4",
]

setup(
    name="megatron-mopd",
    version="0.1.0",
    description="Multi-teacher on-policy distillation for Megatron-Core",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # Bare find_packages() would ship tests and tools; a package `kernels` would shadow Hugging Face's.
    packages=find_packages(include=["megatron_mopd*"]) + find_packages("kernels", include=["mopd_kernels*"]),
    package_dir={"megatron_mopd": "megatron_mopd", "mopd_kernels": "kernels/mopd_kernels"},
    python_requires=">=3.12",
    # Kernels alone stay light: whoever only wants mopd_kernels installs no more than this.
    install_requires=["torch>=2.11,<2.16", "triton>=3.6", "numpy>=1.26"],
    extras_require={"train": TRAIN, "gpu": GPU, "bench": BENCH, "dev": DEV},
)
