"""Write tests/data/golden/: a small random checkpoint, and what diffusers and transformers compute with it.

    python tests/parity/make_goldens.py        (needs the extra `parity`; 10 seconds; the same bytes each time)

The checkpoint is in the Diffusers layout, so that tests on it go through our converter, and in bf16, which is half as
large; the results are those of the same numbers in float32. Its tokenizers are those of tests/tokenizer_data.py.
"""

import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]  # as pytest.ini does for the tests

import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import CLIPTokenizerFast  # noqa: E402

import cases  # noqa: E402
import theirs  # noqa: E402
from golden_data import GOLDEN, TOKENIZERS, fingerprint  # noqa: E402
from random_weights import randomise  # noqa: E402
from small_diffusers import (  # noqa: E402
    build_clip,
    build_qwen,
    build_transformer,
    build_vae,
    load_qwen_tokenizer,
    name_standard_tokenizer,
)
from tokenizer_data import tokenizer_folder  # noqa: E402
from weights_convert import from_diffusers  # noqa: E402

# Nearly all bytes are the two vocabularies' embeddings: 151,680 × 16 and 49,408 × 12 numbers.
QWEN = dict(
    hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 0]},
)  # fmt: skip
CLIP_DIM = 12
# What comes out of these goes into a norm. It is made small, so that the norm's epsilon can be seen in the result.
BEFORE_NORMS = (
    "to_query", "to_key", "text_embeddings.in_layer", "visual_embeddings.in_layer", "conv1.conv",
    "embed_tokens", "token_embedding", "position_embedding",
)  # fmt: skip
SMALL = 1 / 64
LIBRARIES = ("diffusers", "transformers", "torch", "tokenizers", "safetensors", "numpy", "pillow")


def main() -> None:
    torch.set_num_threads(1)  # the last bits of sums depend on it
    with tempfile.TemporaryDirectory(prefix=".golden-", dir=GOLDEN.parent) as folder:
        source = Path(folder) / "diffusers"
        build_pipeline().to(torch.bfloat16).save_pretrained(source)
        name_standard_tokenizer(source)
        results, about = compute_results(source)

        for name in TOKENIZERS:
            shutil.rmtree(source / name)
        # One key, as safetensors writes several in any order.
        save_file(results, source / "results.safetensors", {"about": json.dumps(about)})
        (source / "results.safetensors").chmod(0o644)
        shutil.copy(GOLDEN / "README.md", source)
        shutil.rmtree(GOLDEN)
        source.rename(GOLDEN)
    sizes = {path: path.stat().st_size for path in sorted(GOLDEN.rglob("*")) if path.is_file()}
    for path, size in sizes.items():
        print(f"{size:>10,}  {path.relative_to(GOLDEN)}")
    print(f"{sum(sizes.values()):>10,}  in all; at most 10 MB")


def build_pipeline() -> Kandinsky5T2VPipeline:
    models = {
        "transformer": build_transformer(text_dim=QWEN["hidden_size"], pooled_dim=CLIP_DIM),
        "vae": build_vae(channels=(8, 16, 16, 24), groups=4),
        "text_encoder": build_qwen(**QWEN),
        "text_encoder_2": build_clip(CLIP_DIM),
    }
    for seed, model in enumerate(models.values()):
        randomise(model, seed)
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0].endswith(BEFORE_NORMS):
                parameter.data *= SMALL
    return Kandinsky5T2VPipeline(
        **models,
        tokenizer=load_qwen_tokenizer(),
        tokenizer_2=CLIPTokenizerFast.from_pretrained(tokenizer_folder("clip-vit-large-patch14")),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def compute_results(source: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every case's result from the references in float32; and with which versions, from which inputs."""
    config = from_diffusers(source, source.with_name("native"), progress=False)
    inputs = cases.build_inputs(config)
    parts = theirs.load_components(source, torch.float32)
    with pytest.MonkeyPatch.context() as monkeypatch:
        theirs.make_comparable(monkeypatch)
        results = {name: theirs.compute(name, parts, inputs[name]).contiguous() for name in cases.OURS}
    for name, result in results.items():
        assert result.isfinite().all() and result.std() > 1e-3, (name, "a constant would prove nothing")
        print(f"{name:18} {str(tuple(result.shape)):24} std {result.std():.3f}")
    return results, {library: version(library) for library in LIBRARIES} | {"inputs": fingerprint(inputs)}


if __name__ == "__main__":
    main()
