"""What a checkpoint is: every layout, the presets that it may be, the table."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from converted import STEM, diffusers, native, tensors
from kandinsky5.config import PRESETS
from kandinsky5.tensor_files import Stored
from weights_convert import inspect, match, write
from weights_convert.__main__ import main


@pytest.mark.parametrize("place", ["native", "diffusers", "diffusers/transformer", "native/dit.safetensors"])
def test_every_layout_is_known(place):
    diffusers()
    report = inspect(native().parent / place)
    assert report["models"][0]["model"] == "dit"
    assert report["models"][0]["parameters"] == sum(x.numel() for x in tensors(native(), "dit").values())
    assert len(report["models"]) == (4 if "/" not in place else 1)


def test_the_report_is_a_table_or_json(capsys):
    assert main(["inspect", str(diffusers()), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "Diffusers"
    assert main(["inspect", str(native())]) == 0
    assert "NABLA 0.5" in capsys.readouterr().out


def test_the_folder_of_the_authors_download_script_is_known(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for name in ("lite_5s", "lite_10s"):
        shutil.copy(diffusers() / "transformer" / f"{STEM}.safetensors", tmp_path / "model" / f"{name}.safetensors")
    assert [row["model"] for row in inspect(tmp_path)["models"]] == ["dit", "dit"]
    for ours, theirs in (("vae", "vae"), ("text_encoder", "text_encoder"), ("text_encoder_2", "text_encoder2")):
        shutil.copytree(diffusers() / ours, tmp_path / theirs)
    report = inspect(tmp_path)
    assert report["layout"] == "official"
    assert [row["model"] for row in report["models"]] == ["dit", "dit", "vae", "qwen", "clip"]
    assert main(["inspect", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "model/lite_10s.safetensors" in table and "NABLA" not in table  # which nothing says


def test_presets_that_a_file_fits_are_named(tmp_path):
    """A file of Lite's size that holds nothing: only its header is read."""
    shapes, _ = match.describe_model("dit", PRESETS["i2v-lite-5s"].dit, "Lite")
    stored = {n: Stored(tmp_path, 0, 0, shape, "BF16") for n, shape in shapes.items()}
    part = write.Part("dit", stored, dict.fromkeys(stored, "BF16"), {})
    header = write.build_header(part, list(stored), {})
    with open(tmp_path / "dit.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(map(part.nbytes, stored)))
    (report,) = inspect(tmp_path / "dit.safetensors")["models"]
    assert report["parameters"] == 2_007_702_848 and report["dtypes"] == {"BF16": 2 * 2_007_702_848}
    assert report["presets"] == [name for name in PRESETS if "2v-lite" in name]  # nothing says attention or task


def test_names_in_the_table_are_printable(tmp_path, capsys):
    folder = shutil.copytree(diffusers() / "transformer", tmp_path / "a\x1b[31mb")
    assert main(["inspect", str(folder)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_lora_with_thousands_of_notes_is_shown_in_a_few_lines(tmp_path, capsys):
    A, B = torch.ones(2, 8), torch.ones(8, 2)
    modules = [f"visual_blocks.{i}.self_attention.to_q" for i in range(50)]
    alphas = json.dumps({module: i + 1 for i, module in enumerate(modules)})
    notes = {"alpha": alphas, **{f"note {i}": "x" for i in range(5000)}}
    save_file(
        {f"{m}.{half}": x.clone() for m in modules for half, x in (("A", A), ("B", B))},
        tmp_path / "a.safetensors",
        notes,
    )
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40 and max(map(len, lines)) < 300 and "4,980" in lines[-1]
