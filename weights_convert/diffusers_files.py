"""The small files of a Diffusers folder, for checkpoints that go back there."""

from pathlib import Path

from kandinsky5.files import read_json, write_json

TASKS = {"Kandinsky5T2VPipeline": "t2v", "Kandinsky5I2VPipeline": "i2v"}
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
# Only where the native folder's tokenizers came without any: what their savers would have written.
TOKENIZER_CONFIGS: dict[str, dict[str, dict]] = {
    "qwen": {
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "unk_token": None,
            "bos_token": None,
            "model_max_length": 131072,
        },
    },
    "clip": {
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "pad_token": "<|endoftext|>",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "model_max_length": 77,
        },
    },
}


def write_model_index(tasks: tuple[str, ...], path: Path, base: str | Path | None = None) -> None:
    """Which class each subfolder is for; with `base`, as that folder says."""
    pipelines = [name for name, task in TASKS.items() if task in tasks]
    components = read_json(Path(base) / "model_index.json") if base else COMPONENTS
    write_json(path, {**components, "_class_name": pipelines[0]})


def write_scheduler(shift: float, path: Path) -> None:
    """The scheduler_config.json of a flow model; of what it says only the shift differs between checkpoints."""
    write_json(path, {"_class_name": SCHEDULER, "num_train_timesteps": 1000, "shift": shift})


def write_tokenizer_configs(model: str, folder: Path) -> None:
    """TOKENIZER_CONFIGS of "qwen" or "clip", as far as `folder` has no such files of its own."""
    for file, content in TOKENIZER_CONFIGS[model].items():
        if not (folder / file).exists():
            write_json(folder / file, content)


def read_shift(path: Path) -> float:
    """The schedule's shift in scheduler_config.json; ValueError unless it is positive, and the scheduler is ours."""
    config = read_json(path)
    for key, ours in {"_class_name": SCHEDULER, "num_train_timesteps": 1000, **SCHEDULE}.items():
        if (value := config.get(key)) not in (None, ours):
            remedy = "with --preset NAME this file is not read"
            raise ValueError(f"{path} says {key} = {value!r:.100}; this code computes only {ours!r}: {remedy}")
    shift = config.get("shift", 1.0)  # the scheduler's own default
    if type(shift) not in (int, float) or not 0 < shift < float("inf"):
        raise ValueError(f"{path} says shift = {shift!r:.100}; a shift is a positive number")
    return float(shift)


# What else would change the times of the steps, and the value that does not.
SCHEDULE = {
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}
