"""The converter on small checkpoints of our own: round trips, options, interruption, bad and hostile input.

That the names and sizes are right is shown against the real libraries, in tests/parity/test_convert_*.py.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from kandinsky5.checkpoint import MODELS, SHIPPED, save_checkpoint
from kandinsky5.config import PRESETS, PipelineConfig, SamplingConfig
from kandinsky5.config_file import load_config, save_config
from kandinsky5.dit import DiT
from kandinsky5.files import locked
from kandinsky5.tensor_files import Stored
from random_weights import SMALL_CLIP, SMALL_DIT, SMALL_NABLA, SMALL_QWEN, SMALL_VAE, build_small_models, randomise
from weights_convert import convert, from_diffusers, from_official, inspect, to_diffusers, write
from weights_convert.__main__ import main
from weights_convert.read import read_weights

CONFIG = PipelineConfig(
    name="small",
    tasks=("i2v",),
    dit=replace(SMALL_DIT, nabla=SMALL_NABLA),
    vae=SMALL_VAE,
    qwen=replace(SMALL_QWEN, vocab_size=1000),
    clip=replace(SMALL_CLIP, vocab_size=1000, start_token=998, end_token=999),
    sampling=SamplingConfig(shift=7.0, num_inference_steps=12),
)


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    words = folder / "words"
    words.mkdir()
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, [])).save(str(words / "tokenizer.json"))
    save_checkpoint(folder / "native", CONFIG, build_small_models(CONFIG), {"qwen": words, "clip": words})
    return folder / "native"


@pytest.fixture(scope="module")
def diffusers(native) -> Path:
    folder = native.with_name("diffusers")
    to_diffusers(native, folder, progress=False)
    return folder


@pytest.fixture
def transformer(diffusers, tmp_path) -> Path:
    """A copy to damage: a folder with config.json and one safetensors file, of a DiT."""
    return Path(shutil.copytree(diffusers / "transformer", tmp_path / "transformer"))


def tensors(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    state = {}
    for file in sorted(folder.glob(f"{stem}*.safetensors")):
        state |= load_file(file)
    return state


def assert_same(folder: Path, other: Path) -> None:
    assert load_config(folder / "config.json") == load_config(other / "config.json")
    for model in MODELS:
        ours, theirs = tensors(folder, model), tensors(other, model)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours), model


def nothing_else_in(folder: Path, *expected: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(expected)


# Round trips and options


def test_native_to_diffusers_and_back_is_bit_exact_whatever_the_shards(native, diffusers, tmp_path):
    from_diffusers(diffusers, tmp_path / "again", progress=False)
    assert_same(native, tmp_path / "again")
    to_diffusers(native, tmp_path / "shards", max_shard_size=50_000, verify=True, progress=False)
    assert len(list((tmp_path / "shards" / "transformer").glob("*-of-*.safetensors"))) > 3
    from_diffusers(tmp_path / "shards", tmp_path / "sharded", max_shard_size=60_000, verify=True, progress=False)
    assert (tmp_path / "sharded" / "dit.safetensors.index.json").is_file()
    assert_same(native, tmp_path / "sharded")


def test_a_folder_that_takes_models_from_a_base_is_written_whole(native, tmp_path):
    variant = tmp_path / "variant"
    variant.mkdir()
    shutil.copy(native / "dit.safetensors", variant)
    save_config(replace(CONFIG, base=os.path.relpath(native, variant)), variant / "config.json")
    assert [row["model"] for row in inspect(variant)["models"]] == list(MODELS)
    to_diffusers(variant, tmp_path / "d", progress=False)
    from_diffusers(tmp_path / "d", tmp_path / "n", progress=False)
    assert_same(native, tmp_path / "n")
    with pytest.raises(ValueError, match="itself takes models from"):
        from_diffusers(tmp_path / "d", tmp_path / "m", only="dit", base=variant, progress=False)


def test_metadata_of_the_source_is_kept_both_ways_and_hashes_are_the_same(native, tmp_path):
    base = Path(shutil.copytree(native, tmp_path / "with metadata"))
    save_file(load_file(native / "dit.safetensors"), base / "dit.safetensors", {"run": "fox"})
    to_diffusers(base, tmp_path / "d", progress=False)
    from_diffusers(tmp_path / "d", tmp_path / "n", progress=False)
    there, back = read_weights(tmp_path / "d" / "transformer"), read_weights(tmp_path / "n", "dit")
    assert there.metadata["run"] == back.metadata["run"] == "fox"
    hashes = write.digests_of(there), write.digests_of(back)
    assert sorted(hashes[0].values()) == sorted(hashes[1].values())


def test_a_cast_leaves_the_float32_islands_unless_told_otherwise(diffusers, native, tmp_path):
    from_diffusers(diffusers, tmp_path / "bf16", dtype="bf16", progress=False)
    from_diffusers(diffusers, tmp_path / "all", dtype="fp16", cast_all=True, progress=False)
    from_diffusers(diffusers, tmp_path / "back", dtype="fp32", only="dit", progress=False)
    for name, tensor in tensors(native, "dit").items():
        island = "time_embedder" in name or "modulation" in name
        cast = tensors(tmp_path / "bf16", "dit")[name]
        assert cast.dtype == (torch.float32 if island else torch.bfloat16)
        assert torch.equal(cast, tensor.to(cast.dtype))
        assert tensors(tmp_path / "all", "dit")[name].dtype == torch.float16
        assert tensors(tmp_path / "back", "dit")[name].dtype == torch.float32
    to_diffusers(tmp_path / "all", tmp_path / "untouched", only="dit", progress=False)
    assert {tensor.dtype for tensor in tensors(tmp_path / "untouched" / "transformer", "").values()} == {torch.float16}


def test_tensors_are_aligned_whatever_their_order(tmp_path):
    save_file({"odd": torch.ones(3, dtype=torch.bfloat16), "wide": torch.ones(2)}, tmp_path / "source.safetensors")
    stored = read_weights(tmp_path).tensors
    part = write.Part("x", {"odd": stored["odd"], "wide": stored["wide"]}, {"odd": "BF16", "wide": "F32"}, {})
    write.write_shard(tmp_path / "x.safetensors", part, ["odd", "wide"], lambda nbytes: None)
    written = read_weights(tmp_path / "x.safetensors").tensors
    assert all(tensor.start % (tensor.nbytes // tensor.shape[0]) == 0 for tensor in written.values())


def test_one_model_is_swapped_and_the_others_are_shared(native, diffusers, tmp_path):
    bare = tmp_path / "bare.safetensors"
    state = load_file(diffusers / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, bare)
    # A bare file says nothing of its 8 norm groups: a config.json beside it does.
    with pytest.raises(ValueError, match="norm_num_groups 32"):
        from_official(tmp_path / "swapped", vae=bare, base=native, progress=False)
    shutil.copy(diffusers / "vae" / "config.json", tmp_path)
    from_official(tmp_path / "swapped", vae=bare, base=native, progress=False)
    assert load_config(tmp_path / "swapped" / "config.json") == CONFIG
    before, after = tensors(native, "vae"), tensors(tmp_path / "swapped", "vae")
    assert all(torch.equal(after[n], before[n] + 1) for n in before)
    for file in ("dit.safetensors", "qwen_tokenizer/tokenizer.json"):
        assert os.path.samefile(native / file, tmp_path / "swapped" / file)


def test_one_model_alone_from_its_folder_goes_into_a_native_folder_that_is_filled_up_later(native, diffusers, tmp_path):
    from_diffusers(diffusers / "transformer", tmp_path / "one", only="dit", progress=False)
    assert nothing_else_in(tmp_path / "one", "config.json", "dit.safetensors")
    for number, model in enumerate(("vae", "qwen", "clip")):
        from_diffusers(diffusers, tmp_path / str(number), only=model, base=tmp_path / "one", progress=False)
        shutil.rmtree(tmp_path / "one")
        (tmp_path / str(number)).rename(tmp_path / "one")
    found = load_config(tmp_path / "one" / "config.json")
    assert [getattr(found, model) for model in MODELS] == [getattr(CONFIG, model) for model in MODELS]
    assert torch.equal(tensors(tmp_path / "one", "clip")["norm.bias"], tensors(native, "clip")["norm.bias"])


def test_to_diffusers_swaps_one_model_of_another_folder(native, diffusers, tmp_path):
    to_diffusers(native, tmp_path / "bf16", only="dit", base=diffusers, dtype="bf16", progress=False)
    assert tensors(tmp_path / "bf16" / "transformer", "")["visual_embeddings.in_layer.bias"].dtype == torch.bfloat16
    assert os.path.samefile(diffusers / "vae" / "config.json", tmp_path / "bf16" / "vae" / "config.json")
    assert json.loads((tmp_path / "bf16" / "scheduler" / "scheduler_config.json").read_text())["shift"] == 7
    from_diffusers(tmp_path / "bf16", tmp_path / "n", progress=False)


def test_a_preset_gives_the_sampling_defaults_and_must_fit():
    lite = replace(PRESETS["i2v-lite-5s"], name="x", sampling=SamplingConfig(rope_scale=None))
    found = convert.use_preset(lite, "i2v-lite-5s")
    assert found.name == "i2v-lite-5s" and found.sampling == PRESETS["i2v-lite-5s"].sampling
    assert convert.presets_like(lite) == ["i2v-lite-5s"]
    with pytest.raises(ValueError, match="another DiT"):
        convert.use_preset(lite, "i2v-pro-sft-5s-sd")
    with pytest.raises(ValueError, match="is for t2v, the checkpoint for i2v"):
        convert.use_preset(lite, "t2v-lite-sft-5s")


@pytest.mark.parametrize("name", ["i2v-pro-sft-5s-sd", "i2v-pro-sft-5s-hd"])
def test_one_download_serves_two_presets_that_differ_in_attention_and_shift(name):
    released = replace(PRESETS["i2v-pro-sft-5s-hd"], name="x", sampling=SamplingConfig(shift=10.0))
    found = convert.use_preset(released, name)
    assert found.dit == PRESETS[name].dit and found.sampling == PRESETS[name].sampling


def test_nano_goes_to_diffusers_and_back_unchanged(tmp_path):
    to_diffusers("nano", tmp_path / "d", progress=False)
    from_diffusers(tmp_path / "d", tmp_path / "n", progress=False)
    assert load_config(tmp_path / "n" / "config.json") == load_config(SHIPPED / "nano" / "config.json")
    assert inspect("nano")["models"] == inspect(SHIPPED / "nano")["models"]
    assert inspect(tmp_path / "d")["tasks"] == inspect(tmp_path / "n")["tasks"] == ("t2v", "i2v")
    (tmp_path / "d" / "kandinsky5.json").unlink()
    assert inspect(tmp_path / "d")["tasks"] == ("t2v",)
    with pytest.raises(ValueError, match="there is no .*nowhere: check the path"):
        from_diffusers(tmp_path / "nowhere", tmp_path / "e", progress=False)
    with pytest.raises(ValueError, match="in the Diffusers layout already"):
        to_diffusers(tmp_path / "d", tmp_path / "e", progress=False)


def test_what_diffusers_cannot_hold_is_said(native, tmp_path, capsys):
    for name, src, said in (("nano", "nano", True), ("small", native, False)):
        assert main(["to-diffusers", str(src), str(tmp_path / name), "--quiet"]) == 0
        assert ("Diffusers has no place for its prompt template" in capsys.readouterr().out) == said


def test_inspect_knows_every_layout(native, diffusers, tmp_path, capsys):
    count = sum(tensor.numel() for tensor in tensors(native, "dit").values())
    for path in (native, diffusers, diffusers / "transformer", native / "dit.safetensors"):
        report = inspect(path)
        assert report["models"][0]["model"] == "dit" and report["models"][0]["parameters"] == count
        assert len(report["models"]) == (4 if path in (native, diffusers) else 1)
    assert main(["inspect", str(diffusers), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "Diffusers"
    assert main(["inspect", str(native)]) == 0
    assert "NABLA 0.5" in capsys.readouterr().out


def test_inspect_ends_quietly_where_nobody_reads_on():
    command = f"{sys.executable} -m weights_convert inspect nano | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=Path(convert.__file__).parents[1])
    assert done.stderr == ""


def test_inspect_knows_the_folder_of_the_authors_download_script(diffusers, tmp_path, capsys):
    weights = diffusers / "transformer" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "model").mkdir()
    for name in ("lite_5s", "lite_10s"):
        shutil.copy(weights, tmp_path / "model" / f"{name}.safetensors")
    assert [row["model"] for row in inspect(tmp_path)["models"]] == ["dit", "dit"]
    for ours, theirs in (("vae", "vae"), ("text_encoder", "text_encoder"), ("text_encoder_2", "text_encoder2")):
        shutil.copytree(diffusers / ours, tmp_path / theirs)
    report = inspect(tmp_path)
    assert report["layout"] == "official"
    assert [row["model"] for row in report["models"]] == ["dit", "dit", "vae", "qwen", "clip"]
    assert main(["inspect", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "model/lite_10s.safetensors" in table and "attention not said" in table and "NABLA" not in table


def test_inspect_names_the_presets_that_a_file_fits(tmp_path):
    """A file of Lite's size that holds nothing: its header alone is read."""
    shapes, _ = convert.describe_model("dit", PRESETS["i2v-lite-5s"].dit, "Lite")
    stored = {n: Stored(tmp_path, 0, 0, shape, "BF16") for n, shape in shapes.items()}
    part = write.Part("dit", stored, dict.fromkeys(stored, "BF16"), {})
    header = write.build_header(part, list(stored), {})
    with open(tmp_path / "dit.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(map(part.nbytes, stored)))
    (report,) = inspect(tmp_path / "dit.safetensors")["models"]
    assert report["parameters"] == 2_007_702_848 and report["dtypes"] == {"BF16": 2 * 2_007_702_848}
    assert report["presets"] == [name for name in PRESETS if "lite" in name]  # nothing says attention or task


def test_a_bare_file_is_what_the_preset_says(diffusers, tmp_path, monkeypatch):
    preset = replace(PRESETS["i2v-lite-5s"], dit=CONFIG.dit)
    monkeypatch.setitem(PRESETS, "i2v-lite-5s", preset)
    bare = shutil.copy(diffusers / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path)
    options = {"preset": "i2v-lite-5s", "only": "dit", "progress": False}
    for found in (
        from_diffusers(bare, tmp_path / "one", **options),
        from_official(tmp_path / "other", dit=bare, **options),
    ):
        assert (found.tasks, found.dit, found.sampling) == (("i2v",), CONFIG.dit, preset.sampling)


def test_what_is_left_out_is_said_even_without_a_bar(diffusers, tmp_path, capsys):
    folder = Path(shutil.copytree(diffusers / "text_encoder", tmp_path / "qwen"))
    file = next(folder.glob("*.safetensors"))
    save_file(load_file(file) | {"lm_head.weight": torch.ones(1000, 1000), "visual.a": torch.ones(2)}, file)
    assert main(["from-diffusers", str(folder), str(tmp_path / "dst"), "--only", "qwen", "--quiet"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "lm_head.* (1 tensors, 4.0 MB)" in said[0] and "visual.*" in said[1]


# Interruption


def test_an_interrupted_run_is_resumed_without_writing_finished_shards_again(native, tmp_path, monkeypatch):
    arguments = dict(max_shard_size=100_000, progress=False)
    to_diffusers(native, tmp_path / "whole", **arguments)
    shards_left = 3

    def interrupted(*arguments):
        nonlocal shards_left
        if shards_left == 0:
            raise KeyboardInterrupt
        shards_left -= 1
        return write_shard(*arguments)

    write_shard = write.write_shard
    monkeypatch.setattr(write, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_diffusers(native, tmp_path / "dst", **arguments)
    assert nothing_else_in(tmp_path, "whole", ".dst.partial")
    finished = {path.name: path.stat().st_ino for path in (tmp_path / ".dst.partial").rglob("*.safetensors")}
    assert len(finished) == 3
    monkeypatch.setattr(write, "write_shard", write_shard)
    to_diffusers(native, tmp_path / "dst", resume=True, **arguments)
    assert nothing_else_in(tmp_path, "whole", "dst")
    assert finished.items() <= {path.name: path.stat().st_ino for path in (tmp_path / "dst").rglob("*")}.items()
    assert_folders_equal(tmp_path / "whole", tmp_path / "dst")


def test_a_run_with_another_base_is_not_gone_on_with(native, diffusers, tmp_path, monkeypatch):
    """What the first run has linked from its base does not stay."""
    first, second = tmp_path / "first", tmp_path / "second"
    for base in (first, second):
        shutil.copytree(native, base)
    (first / "qwen_tokenizer" / "only_here.txt").write_text("first")
    texts = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(write, "sync", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            from_diffusers(diffusers, tmp_path / "dst", only="dit", base=first, progress=False)
    from_diffusers(diffusers, tmp_path / "dst", only="dit", base=second, resume=True, progress=False)
    assert not (tmp_path / "dst" / "qwen_tokenizer" / "only_here.txt").exists()
    assert {path: path.read_bytes() for path in texts} == texts


@pytest.mark.parametrize("resume, first", [(True, {"dtype": "fp16"}), (False, {})], ids=["another run", "not asked to"])
def test_an_unfinished_run_is_not_resumed(resume, first, native, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write, "sync", interrupted)  # all shards are there
        with pytest.raises(KeyboardInterrupt):
            to_diffusers(native, tmp_path / "dst", **first, progress=False)
    unfinished = next((tmp_path / ".dst.partial" / "vae").glob("*.safetensors"))
    unfinished.write_bytes(b"to be written again")
    to_diffusers(native, tmp_path / "dst", resume=resume, progress=False)
    assert tensors(tmp_path / "dst" / "vae", "")["quant_conv.bias"].dtype == torch.float32


def test_killed_at_any_moment_it_leaves_nothing_or_all_and_resumes_to_the_same_bytes(native, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # slow, and for power cuts alone
    arguments = dict(max_shard_size=100_000, progress=False)
    to_diffusers(native, tmp_path / "whole", **arguments)
    steps = run_and_die(native, tmp_path / "counted", None, **arguments)
    shutil.rmtree(tmp_path / "counted")
    assert steps > 100
    for step in random.Random(0).sample(range(1, steps), 20):  # before 0 there is no folder yet
        dst = tmp_path / f"killed at {step}"
        run_and_die(native, dst, step, **arguments)
        assert nothing_else_in(tmp_path, "whole", f".killed at {step}.partial")
        to_diffusers(native, dst, resume=True, **arguments)
        assert_folders_equal(tmp_path / "whole", dst)
        shutil.rmtree(dst)


def run_and_die(native: Path, dst: Path, step: int | None, **arguments) -> int:
    """`to_diffusers` in a process that SIGKILL ends at its `step`-th touch of the file system, in the middle of a write
    if that is one. Without `step` it ends by itself, and the number of its steps is returned.

    Steps and not seconds: how far a run has come after a while depends on what else the machine does.
    """
    child = os.fork()
    if child == 0:
        tqdm.set_lock(threading.RLock())  # its own is shared with this process, which would wait for the dead
        passed = 0

        def touch(event: str, details: tuple) -> None:
            nonlocal passed
            if event in ("open", "os.mkdir", "os.rename", "os.remove") and ".partial" in str(details[0]):
                passed += 1
                if passed - 1 == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        def half_then_all(file, data):
            write_all(file, data[: len(data) // 2])
            touch("open", (".partial",))
            write_all(file, data[len(data) // 2 :])

        write_all, write.write_all = write.write_all, half_then_all
        sys.addaudithook(touch)
        to_diffusers(native, dst, **arguments)
        (dst.parent / "steps").write_text(str(passed))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if step is not None:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        return step
    steps = int((dst.parent / "steps").read_text())
    (dst.parent / "steps").unlink()
    return steps


def test_all_is_on_the_disk_before_anything_takes_its_name(native, tmp_path, monkeypatch):
    """So that a power cut leaves no complete-looking folder with empty files in it."""
    on_disk = set()

    def fsync(handle):
        found = os.fstat(handle)
        on_disk.add((found.st_ino, found.st_size))

    def is_on_disk(path):
        return (path.stat().st_ino, path.stat().st_size) in on_disk

    def renamed_after_fsync(rename):
        def checked(source, target):
            assert "shard" not in str(target) or is_on_disk(source)
            assert all(is_on_disk(path) for path in source.rglob("*"))
            rename(source, target)
            renamed.append(target)

        return checked

    renamed = []
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renamed_after_fsync(os.rename))
    monkeypatch.setattr(os, "replace", renamed_after_fsync(os.replace))
    to_diffusers(native, tmp_path / "dst", max_shard_size=10**6, progress=False)
    assert len(renamed) > 6 and renamed[-1] == tmp_path / "dst" and is_on_disk(tmp_path)


def assert_folders_equal(folder: Path, other: Path) -> None:
    places = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert places == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert all((folder / place).read_bytes() == (other / place).read_bytes() for place in places)


def test_two_conversions_to_one_place_do_not_meet(native, tmp_path):
    (tmp_path / ".dst.partial").mkdir()
    with locked(tmp_path / ".dst.partial", "taken"):
        with pytest.raises(ValueError, match="another conversion"):
            to_diffusers(native, tmp_path / "dst", progress=False)


# Bad and hostile input: one line, exit code 2, nothing left behind


def damage_truncated(folder: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def damage_header_beyond_the_file(folder: Path, file: Path) -> None:
    file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])


def edit_header(file: Path, edit) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def damage_overlapping_offsets(folder: Path, file: Path) -> None:
    def edit(header):
        first, second = [name for name in header if name != "__metadata__"][:2]
        header[second]["data_offsets"][0] -= 4
        header[first]["data_offsets"][1] += 4

    edit_header(file, edit)


def damage_wrong_dtype_tag(folder: Path, file: Path) -> None:
    edit_header(file, lambda header: header["visual_embeddings.in_layer.bias"].update(dtype="F64"))


def damage_unknown_dtype_tag(folder: Path, file: Path) -> None:
    edit_header(file, lambda header: header["visual_embeddings.in_layer.bias"].update(dtype="X7"))


def damage_integer_weights(folder: Path, file: Path) -> None:
    edit_header(file, lambda header: header["visual_embeddings.in_layer.bias"].update(dtype="I32"))


def damage_missing_tensor(folder: Path, file: Path) -> None:
    state = load_file(file)
    del state["visual_transformer_blocks.1.cross_attention.key_norm.weight"]
    save_file(state, file)


def damage_unknown_tensors(folder: Path, file: Path) -> None:
    save_file(load_file(file) | {"lora.up": torch.ones(2), "lora.down": torch.ones(2)}, file)


def damage_config_of_another_depth(folder: Path, file: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_visual_blocks": 60}))


def damage_config_that_is_no_json(folder: Path, file: Path) -> None:
    (folder / "config.json").write_text("{" * 100_000)


def damage_config_of_another_attention(folder: Path, file: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_type": "sta"}))


def damage_no_weights(folder: Path, file: Path) -> None:
    file.unlink()


def damage_two_sets_of_weights(folder: Path, file: Path) -> None:
    shutil.copy(file, folder / "other.safetensors")


def damage_html_instead_of_weights(folder: Path, file: Path) -> None:
    file.write_text("<html>404</html>")


def damage_index_that_leaves_the_folder(folder: Path, file: Path) -> None:
    file.unlink()
    (folder / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))


def damage_index_that_names_a_safetensors_file_elsewhere(folder: Path, file: Path) -> None:
    weight_map = dict.fromkeys(load_file(file), f"../{folder.name}/{file.name}")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def damage_index_without_its_shard(folder: Path, file: Path) -> None:
    file.unlink()
    (folder / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))


def damage_index_of_numbers(folder: Path, file: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 5}}))


def damage_pickle_with_code(folder: Path, file: Path) -> None:
    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "code was run"),))

    file.unlink()
    torch.save({"state_dict": {"a": Code()}}, folder / "x.pt")


def damage_bare_pickle_with_code(folder: Path, file: Path) -> None:
    damage_pickle_with_code(folder, file)
    with zipfile.ZipFile(folder / "x.pt") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        (folder / "pytorch_model.bin").write_bytes(archive.read(name))
    (folder / "x.pt").unlink()


def damage_torchscript(folder: Path, file: Path) -> None:
    file.unlink()
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "x.pt")


def damage_pt_that_is_no_zip(folder: Path, file: Path) -> None:
    file.unlink()
    (folder / "x.pt").write_bytes(os.urandom(1000))


BAD_INPUT = {
    damage_truncated: "no complete safetensors file",
    damage_header_beyond_the_file: "no complete safetensors file",
    damage_overlapping_offsets: "no complete safetensors file",
    damage_wrong_dtype_tag: "no complete safetensors file",
    damage_unknown_dtype_tag: "no complete safetensors file",
    damage_integer_weights: "visual_embeddings.in_layer.bias is stored as I32",
    damage_missing_tensor: "visual_transformer_blocks.1.cross_attention.key_norm.weight is missing",
    damage_unknown_tensors: "lora.down is not known, lora.up is not known",
    damage_config_of_another_depth: "config.json says num_visual_blocks = 60, its tensors have 2",
    damage_config_that_is_no_json: "cannot be read as JSON",
    damage_config_of_another_attention: "attention_type = 'sta'",
    damage_no_weights: "no weights in",
    damage_two_sets_of_weights: "several sets of weights",
    damage_html_instead_of_weights: "no complete safetensors file",
    damage_index_that_leaves_the_folder: "'../../etc/passwd'",
    damage_index_that_names_a_safetensors_file_elsewhere: "transformer/diffusion_pytorch_model.safetensors'",
    damage_index_without_its_shard: "gone.safetensors is missing",
    damage_index_of_numbers: "no weight_map",
    damage_pickle_with_code: "posix.mkdir",
    damage_bare_pickle_with_code: "posix.mkdir",
    damage_torchscript: "it is a TorchScript program",
    damage_pt_that_is_no_zip: "cannot be read",
}


@pytest.mark.parametrize("damage", BAD_INPUT, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_bad_input(damage, transformer, tmp_path, capsys):
    damage(transformer, next(transformer.glob("*.safetensors")))
    assert main(["from-diffusers", str(transformer), str(tmp_path / "dst"), "--only", "dit", "--quiet"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and BAD_INPUT[damage] in message
    assert nothing_else_in(tmp_path, "transformer") and not (transformer / "code was run").exists()


@pytest.mark.parametrize(
    "model, odd, message",
    [
        ("vae", {"spatial_compression_ratio": [8]}, "spatial_compression_ratio is [8] and should be a whole number"),
        ("vae", {"temporal_compression_ratio": 16}, "temporal_compression_ratio 16; this code computes powers of two"),
        ("vae", {"spatial_compression_ratio": 4}, "spatial_compression_ratio 4 and temporal_compression_ratio 4"),
        ("vae", {"block_out_channels": [[16]]}, "block_out_channels is [16] and should be a whole number"),
        ("vae", {"scaling_factor": 0}, "scaling_factor is 0; it must be more than 0"),
        ("vae", {"scaling_factor": 10**400}, "and should be a finite number"),
        ("qwen", {"text_config": 5}, "text_config is 5 and should be a table"),
        ("qwen", {"text_config": {"rope_parameters": [1]}}, "rope_parameters is [1] and should be a table"),
        ("qwen", {"text_config": {"num_key_value_heads": 3}}, "num_key_value_heads 3"),
        ("clip", {"num_attention_heads": -2}, "num_attention_heads is -2; it must be more than 0"),
        ("clip", {"num_attention_heads": 5}, "hidden_size 24, num_attention_heads 5"),
        ("clip", {"bos_token_id": [0]}, "bos_token_id is [0] and should be a whole number"),
        ("dit", {"attention_wT": "a"}, "attention_wT is 'a' and should be a whole number"),
        ("dit", {"attention_P": [0.9]}, "attention_P is [0.9] and should be a finite number"),
        ("dit", {"attention_P": 2}, "attention_P = 2.0; it is a share, at most 1"),
        ("dit", {"attention_wH": None}, "attention_type = 'nabla' but no attention_wH"),
        ("dit", {"attention_type": ["nabla"]}, "attention_type is ['nabla'] and should be a text"),
        ("dit", {"axes_dims": [16, 16]}, "axes_dims is [16, 16] and should be a list of 3 times a whole number"),
        ("dit", {"axes_dims": [7, 13, 12]}, "axes_dims (7, 13, 12)"),
        ("dit", {"visual_cond": 1}, "visual_cond is 1 and should be true or false"),
    ],
)
def test_odd_values_in_a_config(model, odd, message, diffusers, tmp_path, capsys):
    folder = Path(shutil.copytree(diffusers / convert.FOLDERS[model], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | odd))
    for command in (["from-diffusers", str(folder), str(tmp_path / "dst"), "--only", model], ["inspect", str(folder)]):
        assert main(command) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: {folder}: ") and printed.count("\n") == 1 and message in printed
    assert nothing_else_in(tmp_path, "model")


def test_no_value_of_any_key_in_a_config_ends_in_anything_but_the_clear_error(diffusers):
    odd = [None, -1, 0, 5, 2**40, 1.5, float("nan"), "a", True, [], [8], ["a"], [[8]], {}, {"a": 1}]
    refused = 0
    for model in MODELS:
        weights = read_weights(diffusers / convert.FOLDERS[model])
        shapes = {name: stored.shape for name, stored in weights.tensors.items()}
        config = json.loads((diffusers / convert.FOLDERS[model] / "config.json").read_text())
        for table in (config, config.get("text_config", {})):
            for key, right in list(table.items()):
                for table[key] in odd:
                    try:
                        convert.describe_model(model, convert.build_config(model, config, shapes, "x"), "x")
                    except ValueError as error:
                        refused += 1
                        assert str(error).startswith("x: ")
                table[key] = right
    assert refused > 500


@pytest.mark.parametrize(
    "file, odd, message",
    [
        ("model_index.json", {"_class_name": []}, "model_index.json is for []"),
        ("scheduler/scheduler_config.json", {"shift": [5]}, "scheduler_config.json says shift = [5]"),
        ("kandinsky5.json", {"tasks": []}, "(tasks (): tasks are t2v, i2v or both)"),
    ],
)
def test_odd_values_in_the_other_files(file, odd, message, diffusers, tmp_path, capsys):
    folder = Path(shutil.copytree(diffusers, tmp_path / "diffusers"))
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | odd))
    assert main(["from-diffusers", str(folder), str(tmp_path / "dst")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed
    assert nothing_else_in(tmp_path, "diffusers")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("from-diffusers gone dst", "there is no gone: check the path"),
        ("from-diffusers gone dst --only vae", "gone is missing"),
        ("from-diffusers {diffusers} {diffusers}", "exists already: choose another name, or remove it"),
        ("from-diffusers {diffusers} dst --preset t2v-lite-sft", "did you mean t2v-lite-sft-"),
        ("from-diffusers {diffusers} dst --preset i2v-lite-5s", "preset i2v-lite-5s has another DiT"),
        ("from-official --dit {native}/dit.safetensors dst", "--vae, --qwen, --clip is not given"),
        ("from-official --only dit --dit {native}/vae.safetensors dst", "these are not the weights of a dit"),
        ("to-diffusers gone dst", "gone"),
        ("to-diffusers {native} dst --base {native}", "is not in the Diffusers layout"),
        ("inspect gone", "gone does not exist"),
        ("inspect {native}/config.json", "no complete safetensors file"),
    ],
)
def test_bad_arguments(arguments, message, native, diffusers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"native": native, "diffusers": diffusers}
    assert main([word.format(**places) for word in arguments.split()]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed
    assert nothing_else_in(tmp_path)


def test_models_that_do_not_belong_together_are_refused(native, diffusers, tmp_path):
    config = replace(CONFIG, dit=replace(CONFIG.dit, text_dim=48))
    other = randomise(DiT(config.dit)).state_dict()
    names = {convert.tables.theirs("dit", name): tensor for name, tensor in other.items()}
    save_file(names, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"dit.text_dim 48, qwen.dim \d+: these models do not belong"):
        from_official(tmp_path / "dst", dit=tmp_path / "x.safetensors", base=native, progress=False)


def test_nan_is_warned_of_by_name(transformer, tmp_path, capsys):
    file = next(transformer.glob("*.safetensors"))
    state = load_file(file)
    state["visual_embeddings.in_layer.weight"][3, 5] = float("nan")
    state["out_layer.out_layer.bias"][0] = float("-inf")
    save_file(state, file)
    assert main(["from-diffusers", str(transformer), str(tmp_path / "dst"), "--only", "dit", "--quiet"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2 and "patch_embedder.weight" in "".join(warnings) and "final_layer" in "".join(warnings)


def test_what_overflows_in_fp16_is_warned_of(transformer, tmp_path, capsys):
    file = next(transformer.glob("*.safetensors"))
    state = load_file(file)
    state["visual_embeddings.in_layer.weight"][3, 5] = 1e6
    save_file(state, file)
    arguments = ["from-diffusers", str(transformer), str(tmp_path / "dst"), "--only", "dit", "--quiet"]
    assert main([*arguments, "--dtype", "fp16"]) == 0
    assert "holds NaN or infinity as F16" in capsys.readouterr().err


def test_no_room_on_the_disk_is_said_before_anything_is_written(native, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="has 0.0 GB free"):
        to_diffusers(native, tmp_path / "dst", progress=False)
    assert nothing_else_in(tmp_path)


def test_a_disk_that_fails_while_writing_leaves_nothing(native, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_index", full)
    with pytest.raises(OSError, match="No space left"):
        to_diffusers(native, tmp_path / "dst", progress=False)
    assert nothing_else_in(tmp_path)


def test_verify_names_the_tensor_that_changed(native, tmp_path):
    to_diffusers(native, tmp_path / "d", only="vae", progress=False)
    file = next((tmp_path / "d" / "vae").glob("*.safetensors"))
    write.verify_shard(file)
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["sha256"]).keys() == set(opened.keys())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not what was written.*: [a-z_.0-9]+$"):
        write.verify_shard(file)


def test_three_thousand_damaged_headers_give_the_one_clear_error_or_none(tmp_path):
    """Bytes of the header changed or cut out: nothing but ValueError may come of it, at any stage."""
    tiny = replace(SMALL_DIT, dim=32, ff_dim=8, time_dim=4, text_dim=4, pooled_dim=4, num_text_blocks=1)
    theirs = partial(convert.tables.theirs, "dit")
    save_file({theirs(name): tensor for name, tensor in DiT(tiny).state_dict().items()}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    choose, refused = random.Random(3), 0
    for _ in range(3000):
        header = bytearray(content[:length])
        for _ in range(choose.randint(1, 4)):
            place = choose.randrange(8, length) if choose.random() < 0.95 else choose.randrange(8)
            header[place] = choose.choice([choose.randrange(256), *b'0123456789"{}[],:-'])
        if choose.random() < 0.2:
            cut = choose.randrange(8, length)
            del header[cut : cut + choose.randint(1, 20)]
        (tmp_path / "x.safetensors").write_bytes(bytes(header) + content[length:])
        try:
            source = convert.read_source("dit", tmp_path)
            convert.build_part("dit", source.sizes, source.weights, theirs, str, "dit", write.Options())
        except ValueError as error:
            refused += 1
            assert str(error)
    assert refused > 2000


def test_three_hundred_damaged_pt_files_too(tmp_path):
    state = {
        name: torch.randn(4, 3) for name in ("encoder.conv_in.conv.weight", "quant_conv.weight", "quant_conv.bias")
    }
    torch.save({"state_dict": state}, tmp_path / "x.pt")
    content, choose, refused = (tmp_path / "x.pt").read_bytes(), random.Random(4), 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(choose.randint(1, 6)):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        if choose.random() < 0.1:
            del damaged[choose.randrange(len(damaged)) :]
        (tmp_path / "x.pt").write_bytes(damaged)
        try:
            for stored in read_weights(tmp_path).tensors.values():
                list(stored.chunks())
        except ValueError:
            refused += 1
    assert refused > 30
