"""The trained family as checkpoint folders that `Pipeline.load` reads.

python -m kandinsky5.nano.export --runs runs --vae runs/vae --text runs/text --to runs/checkpoints
"""

import argparse
from pathlib import Path

import torch

from kandinsky5.checkpoint import save_checkpoint
from kandinsky5.dit import DiT
from kandinsky5.nano import presets
from kandinsky5.nano.train_text import load_text_encoder
from kandinsky5.nano.train_vae import load_vae
from kandinsky5.train import load_average

RUNS = {"nano": "dit", "nano-nocfg": "nocfg", "nano-distilled16steps": "distilled", "nano-10s": "long"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs dit, nocfg, distilled and long")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the run that trained the VAE")
    parser.add_argument("--text", type=Path, required=True, help="folder of the run that trained the text encoders")
    parser.add_argument("--to", type=Path, required=True, help="new folders of the models' names are made in it")
    arguments = parser.parse_args()
    for name, run in RUNS.items():
        if (arguments.runs / run / "state.pt").is_file():
            export(name, arguments.runs / run, arguments.vae, arguments.text, arguments.to / name)


def export(name: str, run: Path, vae_run: Path, text_run: Path, folder: Path) -> None:
    """Write what `run` has trained so far, with the VAE and the text encoders, in bf16."""
    config = presets.PRESETS[name]
    text_encoder = load_text_encoder(text_run)
    models = {
        "dit": load_average(DiT(config.dit), run),
        "vae": load_vae(vae_run),
        "qwen": text_encoder.qwen,
        "clip": text_encoder.clip,
    }
    models = {key: model.to(torch.bfloat16) for key, model in models.items()}
    tokenizers = {key: text_run / f"{key}_tokenizer" for key in ("qwen", "clip")}
    save_checkpoint(folder, config, models, tokenizers)


if __name__ == "__main__":
    main()
