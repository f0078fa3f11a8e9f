"""The golden checkpoint in our layout, the references' results on it, and how far ours are from them.

Where they come from: data/golden/README.md.
"""

import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import cases
from kandinsky5 import Pipeline
from kandinsky5.config import PipelineConfig
from kandinsky5.runtime import fast, kernels
from random_weights import relative_error
from tokenizer_data import tokenizer_folder
from weights_convert import from_diffusers

GOLDEN = Path(__file__).parent / "data" / "golden"
TOKENIZERS = {"tokenizer": "qwen2.5", "tokenizer_2": "clip-vit-large-patch14"}


def load_golden_pipeline(dtype: torch.dtype = torch.float32, plain: bool = False) -> Pipeline:
    """The golden checkpoint through our converter and our loader; new models at each call.

    plain: without fast forms and kernels, so that the definitions run.
    """
    pipe = Pipeline.load(Path(convert_golden().name) / "native", device="cpu", dtype=dtype)
    if plain:
        make_plain(pipe)
    return pipe


def make_plain(pipe: Pipeline) -> None:
    """Undo `make_fast`, in place."""
    fast.remove(pipe.dit, pipe.vae)
    kernels.remove(pipe.dit)
    kernels.remove(pipe.text_encoder)


def make_fast(pipe: Pipeline) -> None:
    """Install the forms and kernels that Pipeline.load installs, in place."""
    fast.install(pipe.dit, pipe.vae)
    kernels.install(pipe.dit, "auto")
    kernels.install(pipe.text_encoder, "auto")


@functools.cache  # once per process, into a folder of its own
def convert_golden() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="kandinsky5-golden-")  # removed when the process ends
    source = Path(folder.name) / "diffusers"
    source.mkdir()
    for path in GOLDEN.iterdir():
        (source / path.name).symlink_to(path)
    for name, vocabulary in TOKENIZERS.items():
        shutil.copytree(tokenizer_folder(vocabulary), source / name)  # a copy, as links that leave a folder are refused
    from_diffusers(source, Path(folder.name) / "native", progress=False)
    return folder


@functools.cache
def load_results() -> dict[str, Tensor]:
    """case → what the references compute, float32."""
    return load_file(GOLDEN / "results.safetensors")


def load_about() -> dict[str, str]:
    """Versions of the libraries that computed the results, and the fingerprint of what they computed them from."""
    with safe_open(GOLDEN / "results.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["about"])


def fingerprint(inputs: dict[str, dict[str, Tensor]]) -> str:
    """SHA-256 of the bytes of all cases' inputs."""
    found = hashlib.sha256()
    for values in inputs.values():
        for value in values.values():
            found.update(value.numpy().tobytes())
    return found.hexdigest()


build_inputs_once = functools.cache(cases.build_inputs)  # for a hundred mistakes, each of which needs one case's


def clone_inputs(name: str, config: PipelineConfig) -> dict[str, Tensor]:
    """The inputs of a case, which may be written to."""
    return {key: value.clone() for key, value in build_inputs_once(config)[name].items()}


def measure_error(name: str, pipe: Pipeline) -> float:
    """How far our result of a case is from the stored one: relative, or for frames the largest difference."""
    ours, theirs = cases.compute(name, pipe, clone_inputs(name, pipe.config)), load_results()[name]
    if name not in cases.FRAME_CASES:
        return relative_error(ours, theirs)
    error = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
    return error if error == error else float("inf")
