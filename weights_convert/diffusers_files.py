"""A Diffusers folder: its places, and its small files (model_index.json, scheduler, tokenizers) read and written."""

import shutil
import sys
from pathlib import Path

from kandinsky5.config import QwenVisionConfig
from kandinsky5.config_file import load_config
from kandinsky5.files import check_inside, read_json, write_json
from kandinsky5.qwen_vision import MEAN, MERGED, PATCH, STD
from kandinsky5.tokenizer import Tokenizer, find_files
from weights_convert.sizes import PREPROCESSOR

# Subfolder and file name of each model in the Diffusers layout.
FOLDERS = {"dit": "transformer", "vae": "vae", "qwen": "text_encoder", "clip": "text_encoder_2"}
STEMS = {"dit": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "qwen": "model", "clip": "model"}
TOKENIZERS = {"qwen": "tokenizer", "clip": "tokenizer_2"}

TASKS = {
    "Kandinsky5T2VPipeline": "t2v",
    "Kandinsky5I2VPipeline": "i2v",
    "Kandinsky5T2IPipeline": "t2i",
    "Kandinsky5I2IPipeline": "i2i",
}
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
COMPONENTS = {
    "scheduler": ["diffusers", SCHEDULER],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "text_encoder_2": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],  # not Qwen2VLProcessor, which needs torchvision for its images
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "Kandinsky5Transformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
}
NATIVE_CONFIG = "kandinsky5.json"  # our config.json, kept in the folders that `to_diffusers` writes
# For native folders whose tokenizers have none: what their savers would have written.
TOKENIZER_CONFIGS: dict[str, dict[str, str | int | None]] = {
    "qwen": {"tokenizer_class": "Qwen2Tokenizer", "unk_token": None, "bos_token": None, "eos_token": "<|im_end|>"},
    "clip": {
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
    },
}
LENGTHS = {"qwen": 131072, "clip": 77}


def write_model_index(tasks: tuple[str, ...], path: Path, base: str | Path | None = None) -> None:
    """Which class each subfolder is for; with `base`, as in that folder."""
    pipelines = [name for name, task in TASKS.items() if task in tasks]
    own = COMPONENTS | ({"vae": ["diffusers", "AutoencoderKL"]} if "t2i" in tasks or "i2i" in tasks else {})
    own |= {"tokenizer": ["transformers", "Qwen2VLProcessor"]} if "i2i" in tasks else {}  # which sees the image
    components = read_json(Path(base) / "model_index.json") if base else own
    write_json(path, {**components, "_class_name": pipelines[0]})


def write_scheduler(shift: float, path: Path) -> None:
    """The scheduler_config.json of a flow model; only the shift differs between checkpoints."""
    write_json(path, {"_class_name": SCHEDULER, "num_train_timesteps": 1000, "shift": shift})


def write_tokenizer_config(model: str, folder: Path) -> None:
    """TOKENIZER_CONFIGS of "qwen" or "clip", if `folder` has no such file of its own."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        common = {"pad_token": "<|endoftext|>", "model_max_length": LENGTHS[model]}
        write_json(path, TOKENIZER_CONFIGS[model] | common)


def write_preprocessor_config(sizes: QwenVisionConfig, folder: Path) -> None:
    """How Qwen's images are prepared, unless `folder` has a file that says it; Qwen2VLProcessor requires one."""
    if any((folder / name).exists() for name in IMAGE_CONFIGS):
        return
    patches = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGED}
    limits = {name: getattr(sizes, name) for name in PREPROCESSOR}
    common = {"image_processor_type": "Qwen2VLImageProcessor", "image_mean": MEAN, "image_std": STD}
    write_json(folder / IMAGE_CONFIGS[0], common | patches | limits)


# What else these files may say, as our code prepares images in no other way; 3 is Pillow's number of bicubic.
PREPARATION: dict[str, object] = {
    "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGED, "image_mean": [*MEAN], "image_std": [*STD],
    "rescale_factor": 1 / 255, "resample": 3, "do_resize": True, "do_rescale": True, "do_normalize": True,
    "do_convert_rgb": True,
}  # fmt: skip
IMAGE_CONFIGS = ("preprocessor_config.json", "processor_config.json")
# What diffusers wants next to the files of a tokenizer.
PROCESSOR_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    *IMAGE_CONFIGS,
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def copy_tokenizer(src: Path, dst: Path) -> None:
    """Copy a tokenizer's files; ValueError if it cannot be read, or if one of them is a link that leaves the folder."""
    Tokenizer.load(src)
    dst.mkdir()
    others = [src / file for file in PROCESSOR_FILES if (src / file).is_file()]
    for path in (*find_files(src), *others):
        shutil.copyfile(check_inside(path, src), dst / path.name)


def read_pixel_limits(folder: Path) -> dict:
    """min_pixels and max_pixels of Qwen's image processor, as far as the folder of its tokenizer says them.

    Older savers write preprocessor_config.json with these keys, newer ones a size of two "edges" that are areas too,
    or processor_config.json with all that in a table. ValueError for images that are prepared otherwise than here.
    """
    given: dict = {}
    for name in IMAGE_CONFIGS:
        if (folder / name).is_file() and not given:
            found = read_json(folder / name)
            tables = [found, found.get("image_processor"), found.get("size")]
            tables += [table.get("size") for table in tables[1:2] if isinstance(table, dict)]
            for table in [table for table in tables if isinstance(table, dict)]:
                for key, ours in PREPARATION.items():
                    if table.get(key) not in (None, ours):
                        said = f"{key} = {table[key]!r:.100}"
                        raise ValueError(f"{folder / name} says {said}; this code prepares images only with {ours}")
                edges = {"min_pixels": table.get("shortest_edge"), "max_pixels": table.get("longest_edge")}
                limits = {key: table.get(key, edge) for key, edge in edges.items()}
                given |= {key: value for key, value in limits.items() if value is not None}
    return given


def read_tasks(src: Path) -> tuple[str, ...]:
    """The task as ("t2v",), by the pipeline class in model_index.json; ValueError for another class.

    Both if our own config lies next to it and has both: model_index.json names one.
    """
    class_name = read_json(src / "model_index.json").get("_class_name")
    if not isinstance(class_name, str) or class_name not in TASKS:
        raise ValueError(f"{src / 'model_index.json'} is for {class_name!r}; this code knows {' and '.join(TASKS)}")
    task = TASKS[class_name]
    ours = load_config(src / NATIVE_CONFIG).tasks if (src / NATIVE_CONFIG).is_file() else ()
    return ours if task in ours else (task,)


def read_shift(path: Path) -> float:
    """The schedule's shift in scheduler_config.json; ValueError unless it is positive, and the scheduler is ours."""
    config = read_json(path)
    for key, ours in {"_class_name": SCHEDULER, "num_train_timesteps": 1000, **SCHEDULE}.items():
        if (value := config.get(key)) not in (None, ours):
            remedy = "with --preset NAME this file is not read"
            raise ValueError(f"{path} says {key} = {value!r:.100}; this code computes only {ours!r}: {remedy}")
    shift = config.get("shift", 1.0)  # the scheduler's own default
    if type(shift) not in (int, float) or not 0 < shift <= sys.float_info.max:
        raise ValueError(f"{path} says shift = {shift!r:.100}; a shift is a positive number")
    return float(shift)


# What else would change the times of the steps, and the value that changes nothing.
SCHEDULE = {
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}
