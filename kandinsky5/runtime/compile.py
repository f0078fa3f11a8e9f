"""torch.compile where it pays: the blocks of the DiT, and of the VAE decoder norm and SiLU where it works in pieces.

A block is compiled once for all blocks of its kind and for all sizes. Only what is 1 is never taken for the same as
what is more: a batch of one, and with NABLA a single frame, row or column of tiles. It is one graph: attention is a
single operation in it (`attention.py`), which takes the same kernel as without, and has no gradient: for sampling.

The decoder is not compiled whole: it loops over frames, for each length others, and the kernels of its convolutions
hang on size and threads. What is compiled is `GroupNorm.activate`, which large frames go through (`vae.PIECE`).
"""

import os
import shutil
import warnings
from typing import Any

import torch
from torch import nn

from kandinsky5.dit import DiT
from kandinsky5.vae import VAE, GroupNorm


def compile_models(dit: DiT, vae: VAE, backend: str = "inductor") -> None:
    """Compile in place; the work is done when a block first runs. ValueError where there is no C++ compiler."""
    _check_compiler()
    # It leaves RoPE's complex product as it is, which costs little and is nothing to warn users of.
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
    how: dict[str, Any] = {"dynamic": True, "backend": backend, "recompile_limit": 32}
    for block in [*_plainly(dit.text_blocks), *_plainly(dit.visual_blocks)]:
        block.compile(fullgraph=True, **how)
    for module in vae.decoder.modules():
        if isinstance(module, GroupNorm):  # a graph for each width, and for single frames
            vars(module)["activate"] = torch.compile(module.activate, fullgraph=True, **how)


def _plainly(blocks: nn.ModuleList) -> list[nn.Module]:
    """The blocks as they are: going through a list of streamed ones would fetch them."""
    return list(nn.ModuleList.__iter__(blocks))


def _check_compiler() -> None:
    name = os.environ.get("CXX", "g++")  # PyTorch's choice
    if shutil.which(name) is None:
        raise ValueError(
            f"compile: PyTorch needs a C++ compiler, and there is no {name} here: install one (apt install g++), name "
            "yours in the environment variable CXX, or do without (--no-compile)"
        )
