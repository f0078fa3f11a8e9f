"""Write tests/data/golden_images/: small random image models, and what diffusers computes with them.

    python tests/parity/make_image_goldens.py        (needs the extra `parity`; 10 seconds; the same bytes each time)

Text encoders and tokenizers are those of tests/data/golden (make_goldens.py).
"""

import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]  # as pytest.ini does for the tests

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import image_golden  # noqa: E402
import image_theirs  # noqa: E402
from make_goldens import CLIP_DIM, QWEN  # noqa: E402
from random_weights import randomise  # noqa: E402
from small_diffusers import build_image_vae, build_transformer  # noqa: E402
from weights_convert import from_diffusers  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)  # the last bits of sums depend on it
    place = image_golden.IMAGES
    shutil.rmtree(place, ignore_errors=True)
    randomise(build_image_vae(channels=(8, 16, 16, 24), groups=4), 5).bfloat16().save_pretrained(place / "vae")
    for seed, task in enumerate(image_golden.CLASSES):
        model = build_transformer(text_dim=QWEN["hidden_size"], pooled_dim=CLIP_DIM, visual_cond=task == "i2i")
        randomise(model, seed).bfloat16().save_pretrained(place / task)
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            source = image_golden.assemble(task, Path(folder) / "theirs")
            config = from_diffusers(source, Path(folder) / "native", progress=False)
            results = image_theirs.compute_all(source, config, patch)
        save_file(results, place / f"{task}.safetensors")
        for path in place.rglob("*.safetensors"):
            path.chmod(0o644)
        for name, result in results.items():
            assert result.isfinite().all() and result.std() > 1e-2, (name, "a constant would prove nothing")
            print(f"{task} {name:18} {str(tuple(result.shape)):20} std {result.std():.3f}")


if __name__ == "__main__":
    main()
