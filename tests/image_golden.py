"""The golden image checkpoints, their folders, and the references' results on them.

data/golden_images/ holds a DiT for each task and a VAE, small, random, in bf16; the text encoders are those of
data/golden/. Made by tests/parity/make_image_goldens.py.
"""

import functools
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

import image_cases
from golden_data import GOLDEN, TOKENIZERS
from kandinsky5 import Pipeline
from tokenizer_data import tokenizer_folder
from weights_convert import from_diffusers

IMAGES = GOLDEN.with_name("golden_images")
CLASSES = {"t2i": "Kandinsky5T2IPipeline", "i2i": "Kandinsky5I2IPipeline"}


def assemble(task: str, folder: Path) -> Path:
    """A whole Diffusers folder of a task's golden checkpoint, which is returned."""
    folder.mkdir()
    parts = {"transformer": IMAGES / task, "vae": IMAGES / "vae"}
    parts |= {name: GOLDEN / name for name in ("text_encoder_2", "scheduler")}
    for name, place in parts.items():
        (folder / name).symlink_to(place)
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "model.safetensors").symlink_to(GOLDEN / "text_encoder" / "model.safetensors")
    config = json.loads((GOLDEN / "text_encoder" / "config.json").read_text())
    config["text_config"]["rope_parameters"]["mrope_section"] = [2, 0, 0]  # as our Qwen splits heads of so few channels
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    for name, vocabulary in TOKENIZERS.items():
        shutil.copytree(tokenizer_folder(vocabulary), folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": CLASSES[task]}))
    return folder


@functools.cache  # once per process, into a folder of its own
def convert(task: str) -> tempfile.TemporaryDirectory:
    """Holds the checkpoint in our layout as `native`."""
    folder = tempfile.TemporaryDirectory(prefix="kandinsky5-golden-")  # removed when the process ends
    from_diffusers(assemble(task, Path(folder.name) / "theirs"), Path(folder.name) / "native", progress=False)
    return folder


def load_pipeline(task: str) -> Pipeline:
    """The golden checkpoint through our converter and our loader, in float32; new models at each call."""
    return Pipeline.load(Path(convert(task).name) / "native", device="cpu", dtype="float32")


@functools.cache
def load_results(task: str) -> dict[str, Tensor]:
    """case → what the references compute, float32."""
    return load_file(IMAGES / f"{task}.safetensors")


def measure_error(name: str, pipe: Pipeline) -> float:
    """How far our result of a case is from the stored one (image_cases.measure_error)."""
    computed = image_cases.compute(name, pipe, image_cases.build_inputs(pipe.config)[name])
    return image_cases.measure_error(name, computed, load_results(pipe.config.tasks[0])[name])


def bfl_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's tensors as FLUX.1's `ae.safetensors` spells them."""
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up_blocks."))
    words = {
        "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "conv_shortcut": "nin_shortcut",
        "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_out.0": "proj_out", "to_q": "q", "to_k": "k",
        "to_v": "v", "conv_norm_out": "norm_out", "down_blocks": "down", "up_blocks": "up", "resnets": "block",
        "downsamplers.0": "downsample", "upsamplers.0": "upsample",
    }  # fmt: skip
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, bfl in words.items():
            name = name.replace(theirs, bfl)
        parts = name.split(".")
        if parts[1] == "up":
            parts[2] = str(last - int(parts[2]))
        is_conv = parts[2] == "attn_1" and tensor.ndim == 2
        renamed[".".join(parts)] = tensor[:, :, None, None].clone() if is_conv else tensor
    return renamed
