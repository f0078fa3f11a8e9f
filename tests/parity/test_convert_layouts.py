"""The converter on checkpoints that diffusers and transformers wrote themselves, in every layout, and back to them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the parity suite needs the extra: pip install .[parity] -c constraints.txt")

from diffusers import DiffusionPipeline  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import CLIPConfig as WholeCLIPConfig  # noqa: E402
from transformers import CLIPModel  # noqa: E402

from kandinsky5 import Pipeline  # noqa: E402
from kandinsky5.config import NablaConfig
from kandinsky5.config_file import load_config  # noqa: E402
from random_weights import randomise  # noqa: E402
from small_diffusers import PIPELINES, build_qwen, load_qwen_tokenizer, save_small_checkpoint  # noqa: E402
from weights_convert import from_diffusers, from_official, inspect, to_diffusers  # noqa: E402

MODELS = ("dit", "vae", "qwen", "clip")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return save_small_checkpoint(tmp_path_factory.mktemp("layouts") / "small")


@pytest.fixture(scope="module")
def native(small) -> Path:
    from_diffusers(small, small.with_name("native"), progress=False)
    return small.with_name("native")


def tensors(folder: Path, model: str) -> dict[str, torch.Tensor]:
    state = {}
    for file in sorted(folder.glob(f"{model}*.safetensors")):
        state |= load_file(file)
    return state


def assert_same(one: Path, other: Path, *models: str) -> None:
    for model in models or MODELS:
        assert getattr(load_config(one / "config.json"), model) == getattr(load_config(other / "config.json"), model)
        ours, theirs = tensors(one, model), tensors(other, model)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), model


def edit_json(path: Path, edit) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps(edit(values) or values))


def respell(folder: Path, rename) -> None:
    """Give the tensors of a model's one file other names."""
    file = next(folder.glob("*.safetensors"))
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def test_shards_give_what_one_file_gives(small, native, tmp_path):
    shards = save_small_checkpoint(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((shards / "transformer").glob("*.safetensors"))) > 3
    from_diffusers(shards, tmp_path / "native", progress=False)
    assert_same(native, tmp_path / "native")


def test_image_to_video_nabla_and_shift_are_read(tmp_path):
    folder = save_small_checkpoint(tmp_path / "i2v", "i2v", nabla=True)
    edit_json(folder / "scheduler" / "scheduler_config.json", lambda values: values.update(shift=10.0))
    config = from_diffusers(folder, tmp_path / "native", progress=False)
    assert config == load_config(tmp_path / "native" / "config.json")
    assert config.tasks == ("i2v",) and config.sampling.shift == 10 and config.sampling.rope_scale is None
    assert config.dit.nabla == NablaConfig(P=0.8, window=(5, 3, 1))
    Pipeline.load(tmp_path / "native", device="meta")


def test_bf16_checkpoints_keep_what_diffusers_keeps_in_float32(small, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(small, tokenizer=load_qwen_tokenizer(), torch_dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path / "bf16")
    from_diffusers(tmp_path / "bf16", tmp_path / "native", progress=False)
    found = tensors(tmp_path / "native", "dit")
    kept = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in found if "time_embedder" in name or "modulation" in name}


@pytest.mark.parametrize("new_names, old_config", [(True, False), (False, True), (True, True)])
def test_both_spellings_of_qwen_and_both_places_of_its_sizes(new_names, old_config, small, native, tmp_path):
    folder = Path(shutil.copytree(small / "text_encoder", tmp_path / "qwen"))
    if new_names:
        assert "model.layers.0.mlp.up_proj.weight" in load_file(folder / "model.safetensors")  # as 5.23.0 writes it
        new = {"model.": "model.language_model.", "visual.": "model.visual."}
        respell(folder, lambda n: next((b + n.removeprefix(a) for a, b in new.items() if n.startswith(a)), n))
    if old_config:

        def to_the_top(config):
            text = config.pop("text_config")
            theta = text.pop("rope_parameters")["rope_theta"]
            return {
                **config,
                **text,
                "rope_theta": theta,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            }

        edit_json(folder / "config.json", to_the_top)
    from_diffusers(folder, tmp_path / "native", only="qwen", progress=False)
    assert_same(native, tmp_path / "native", "qwen")


def test_rope_theta_and_eps_come_from_the_config(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 3, 3]}
    randomise(build_qwen(rms_norm_eps=1e-5, rope_parameters=rope)).save_pretrained(tmp_path / "qwen")
    config = from_diffusers(tmp_path / "qwen", tmp_path / "native", only="qwen", progress=False)
    assert config.qwen.rope_theta == 5e5 and config.qwen.norm_eps == 1e-5


def whole_clip(small: Path) -> CLIPModel:
    """A CLIP with its vision tower, whose text tower is that of `small`."""
    text = json.loads((small / "text_encoder_2" / "config.json").read_text())
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, patch_size=112)
    clip = CLIPModel(WholeCLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    state = load_file(small / "text_encoder_2" / "model.safetensors")
    clip.text_model.load_state_dict(state)
    return clip


def test_every_spelling_of_clip(small, native, tmp_path):
    # the text tower as older savers name it, with the ids that were stored once
    folder = Path(shutil.copytree(small / "text_encoder_2", tmp_path / "old"))
    respell(folder, lambda name: f"text_model.{name}")
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, folder / "model.safetensors")
    edit_json(folder / "config.json", lambda config: config.update(bos_token_id=0, eos_token_id=2))
    # the whole CLIP
    whole_clip(small).save_pretrained(tmp_path / "whole")
    # OpenAI's own names, in one file; its config.json next to it for the number of heads
    (tmp_path / "openai").mkdir()
    save_file(openai_names(state), tmp_path / "openai" / "ViT-L-14.safetensors")
    shutil.copy(folder / "config.json", tmp_path / "openai")

    for name in ("old", "whole", "openai/ViT-L-14.safetensors"):
        dst = tmp_path / f"native {Path(name).name}"
        from_official(dst, clip=tmp_path / name, only="clip", progress=False)
        assert_same(native, dst, "clip")


def openai_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same text tower as OpenAI's code names it, with some of the rest of a whole file."""
    layers = range(sum(name.endswith("layer_norm1.weight") for name in state))
    at = "text_model.embeddings"
    found = {
        "positional_embedding": state[f"{at}.position_embedding.weight"],
        "token_embedding.weight": state[f"{at}.token_embedding.weight"],
        "text_projection": torch.ones(32, 32),
        "logit_scale": torch.ones(()),
        "visual.conv1.weight": torch.ones(8, 3, 14, 14),
    }
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for i in layers:
            hf, openai = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
            found[f"{openai}.attn.in_proj_{kind}"] = torch.cat(
                [state[f"{hf}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            )
            for a, b in [
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ]:
                found[f"{openai}.{a}.{kind}"] = state[f"{hf}.{b}.{kind}"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


@pytest.mark.parametrize("prefix, wrapped", [("", False), ("vae.", True)])
def test_the_official_files_give_what_the_diffusers_folder_gives(prefix, wrapped, small, native, tmp_path):
    vae = {prefix + name: t for name, t in load_file(small / "vae" / "diffusion_pytorch_model.safetensors").items()}
    (tmp_path / "vae").mkdir()
    torch.save({"state_dict": vae} if wrapped else vae, tmp_path / "vae" / "pytorch_model.pt")
    config = json.loads((small / "vae" / "config.json").read_text())
    config["time_compression_ratio"] = config.pop("temporal_compression_ratio")  # as Tencent calls it
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKLCausal3D"}))

    (tmp_path / "model").mkdir()
    dit = shutil.copy(
        small / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path / "model" / "lite.safetensors"
    )
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        shutil.copytree(small / encoder, tmp_path / encoder)
        shutil.copytree(small / tokenizer, tmp_path / encoder, dirs_exist_ok=True)

    found = from_official(
        tmp_path / "native",
        dit=dit,
        vae=tmp_path / "vae" / "pytorch_model.pt",
        qwen=tmp_path / "text_encoder",
        clip=tmp_path / "text_encoder_2" / "model.safetensors",
        progress=False,
    )
    assert_same(native, tmp_path / "native")
    assert found.tasks == ("t2v",) and found.sampling.rope_scale is None
    Pipeline.load(tmp_path / "native", device="meta")


def test_config_and_tensors_that_contradict_are_both_shown(small, tmp_path):
    for folder, key, wrong in [
        ("transformer", "model_dim", 96),
        ("transformer", "num_text_blocks", 4),
        ("vae", "block_out_channels", [16, 24, 32, 48]),
        ("text_encoder_2", "vocab_size", 1000),
    ]:
        copy = Path(shutil.copytree(small / folder, tmp_path / f"{folder} {key}"))
        edit_json(copy / "config.json", lambda values, key=key, wrong=wrong: values.update({key: wrong}))
        model = {"transformer": "dit", "vae": "vae", "text_encoder_2": "clip"}[folder]
        with pytest.raises(ValueError, match=f"config.json says {key} = .*, its tensors have"):
            from_diffusers(copy, tmp_path / "native", only=model, progress=False)
    copy = Path(shutil.copytree(small / "transformer", tmp_path / "axes"))
    edit_json(copy / "config.json", lambda values: values.update(axes_dims=[16, 24, 24]))
    with pytest.raises(ValueError, match=r"key_norm.weight is \(32,\).*\(64,\).*config.json"):
        from_diffusers(copy, tmp_path / "native", only="dit", progress=False)
    copy = Path(shutil.copytree(small / "text_encoder_2", tmp_path / "gelu"))
    edit_json(copy / "config.json", lambda values: values.update(hidden_act="gelu"))
    with pytest.raises(ValueError, match="hidden_act = 'gelu'.*'quick_gelu'"):
        from_diffusers(copy, tmp_path / "native", only="clip", progress=False)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_diffusers_loads_and_runs_what_goes_back(kind, tmp_path):
    small = save_small_checkpoint(tmp_path / "small", kind)
    from_diffusers(small, tmp_path / "native", progress=False)
    to_diffusers(tmp_path / "native", tmp_path / "back", max_shard_size=10**6, progress=False)
    pipes = [PIPELINES[kind].from_pretrained(folder) for folder in (small, tmp_path / "back")]
    one, other = pipes
    assert one.scheduler.config.shift == other.scheduler.config.shift
    for name in ("transformer", "vae", "text_encoder_2"):
        states = [getattr(pipe, name).state_dict() for pipe in pipes]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name
    frames = [run(pipe, kind) for pipe in pipes]
    assert frames[0].std() > 0.01
    # The weights are the same bits; where the files are mapped decides their alignment, and so the last bits of sums.
    assert (frames[0] - frames[1]).abs().max() < 1e-4

    from_diffusers(tmp_path / "back", tmp_path / "again", progress=False)
    assert_same(tmp_path / "native", tmp_path / "again")
    assert load_config(tmp_path / "native" / "config.json") == load_config(tmp_path / "again" / "config.json")


def run(pipe: DiffusionPipeline, kind: str) -> torch.Tensor:
    from PIL import Image

    pipe.set_progress_bar_config(disable=True)
    image = {"image": Image.new("RGB", (48, 32), (200, 90, 10))} if kind == "i2v" else {}
    return torch.as_tensor(
        pipe(
            prompt="A fox", height=32, width=48, num_frames=25, num_inference_steps=2, max_sequence_length=64,
            generator=torch.Generator().manual_seed(0), output_type="np", **image,
        ).frames
    )  # fmt: skip


def test_the_vision_tower_comes_back_with_base(small, native, tmp_path):
    to_diffusers(native, tmp_path / "back", only="dit", base=small, progress=False)
    qwen = inspect(tmp_path / "back")["models"][2]
    assert qwen["other tensors"] == inspect(small)["models"][2]["other tensors"] > 10
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "back", tokenizer=load_qwen_tokenizer())
    assert torch.equal(
        pipe.text_encoder.lm_head.weight, load_file(small / "text_encoder" / "model.safetensors")["lm_head.weight"]
    )


def test_nabla_goes_back_too(tmp_path):
    from diffusers import Kandinsky5Transformer3DModel

    folder = save_small_checkpoint(tmp_path / "small", nabla=True)
    from_diffusers(folder, tmp_path / "native", progress=False)
    to_diffusers(tmp_path / "native", tmp_path / "back", only="dit", progress=False)
    configs = [
        Kandinsky5Transformer3DModel.from_pretrained(f / "transformer").config for f in (folder, tmp_path / "back")
    ]
    first, second = ({k: v for k, v in config.items() if not k.startswith("_")} for config in configs)
    assert {**first, "patch_size": [1, 2, 2]} == {**second, "patch_size": [1, 2, 2]}
