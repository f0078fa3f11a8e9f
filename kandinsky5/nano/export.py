"""The trained family as checkpoint folders that `Pipeline.load` reads, all in bf16.

python -m kandinsky5.nano.export --runs runs --vae runs/vae --text runs/text --to kandinsky5/nano/weights

`nano` is complete. The others hold a DiT, and name `nano` as the base that VAE, encoders and tokenizers come from.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

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
    parser.add_argument("--to", type=Path, required=True, help="a folder of each model's name is written into it")
    arguments = parser.parse_args()
    for name, run in RUNS.items():
        if (arguments.runs / run / "state.pt").is_file():
            folder = arguments.to / name
            export(name, arguments.runs / run, arguments.vae, arguments.text, folder)
            print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*')) / 1e6:.2f} MB")


def export(name: str, run: Path, vae_run: Path, text_run: Path, folder: Path) -> None:
    """Write what `run` has trained so far; a model card that is there already stays."""
    config = presets.PRESETS[name]
    models: dict[str, nn.Module] = {"dit": load_average(DiT(config.dit), run)}
    tokenizers = {}
    if name == "nano":
        text_encoder = load_text_encoder(text_run)
        models |= {"vae": load_vae(vae_run), "qwen": text_encoder.qwen, "clip": text_encoder.clip}
        tokenizers = {key: text_run / f"{key}_tokenizer" for key in ("qwen", "clip")}
    else:
        config = replace(config, base="../nano")
    for model in models.values():
        for parameter in model.parameters():  # the float32 islands too: they are computed in float32 from bf16 weights
            parameter.data = parameter.data.to(torch.bfloat16)
    card = (folder / "README.md").read_text() if (folder / "README.md").is_file() else None
    shutil.rmtree(folder, ignore_errors=True)
    save_checkpoint(folder, config, models, tokenizers)
    if card:
        (folder / "README.md").write_text(card)


if __name__ == "__main__":
    main()
