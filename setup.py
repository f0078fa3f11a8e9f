"""Packaging. The README's commands install with `-c constraints.txt`, the versions that CI runs with."""

import re
import tempfile
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "kandinsky5" / "__init__.py").read_text(encoding="utf-8"))[1]
# `pip install .` would leave build/ in the checkout, a second copy of the package that editors and pytest find.
BUILD = tempfile.TemporaryDirectory(prefix="kandinsky5-build-")
TEST = ["pytest>=8", "ruff>=0.15", "mypy>=2.4"]

setup(
    name="kandinsky5",
    version=VERSION,
    description="Kandinsky 5.0 Video in plain PyTorch, written to be read",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The authors of this repository",
    license="MIT",
    project_urls={
        "Kandinsky 5.0 (authors)": "https://github.com/kandinskylab/kandinsky-5",
        "Weights": "https://huggingface.co/kandinskylab",
        "Paper": "https://arxiv.org/abs/2511.14993",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Video",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    options={"build": {"build_base": BUILD.name}},
    entry_points={"console_scripts": ["kandinsky5 = kandinsky5.cli:main"]},
    python_requires=">=3.11",
    packages=find_packages(include=["kandinsky5*", "weights_convert*"]),
    package_data={
        "kandinsky5": ["py.typed", "**/*.json", "**/*.safetensors", "**/*.md", "**/*.txt"],
        "weights_convert": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11",
        "einops>=0.8",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tokenizers>=0.21",
        "numpy>=1.26",
        "av>=18.1",  # videos
        "pillow>=11.3",  # images: the first version whose wheels read AVIF
        "tqdm>=4.66",
    ],
    extras_require={
        "test": TEST,
        "dev": [*TEST, "pre-commit>=4"],
        # Only tests import these: they are the references that the parity suite compares with.
        "parity": [*TEST, "diffusers==0.42.1", "transformers==5.23.0", "accelerate>=1.0", "peft==0.21.2"],
        "train": ["matplotlib>=3.9"],  # only the curves of a run need it
        "notebooks": [
            "matplotlib>=3.9",
            "jupytext>=1.16",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6",
            "ipywidgets>=8",
        ],
    },
)
