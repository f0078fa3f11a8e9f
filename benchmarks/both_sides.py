"""The same model on both sides: ours, and that of diffusers or transformers, with equal random weights.

The weights are drawn for our model; the reference gets the very same tensors under the names that the converter's
tables give them. Random weights are enough, as neither time nor memory depends on their values (NABLA's map does:
its row says how many tiles it keeps).
"""

import torch
from torch import Tensor, nn

from kandinsky5.runtime import fast, kernels
from kandinsky5.runtime.loading import CLASSES
from kandinsky5.text_encoder import TextEncoder
from kandinsky5.tokenizer import Tokenizer
from random_weights import randomise
from tokenizer_data import tokenizer_folder
from weights_convert import tables
from weights_convert.sizes import to_their_config


def build(side: str, name: str, config, dtype: torch.dtype) -> nn.Module:
    """The model `name` ("dit", "vae", "qwen" or "clip") of the given config, ours or the reference's."""
    with torch.device("meta"):
        ours = CLASSES[name](config)
    ours = randomise(ours.to(dtype).to_empty(device="cpu"))
    if side != "ours":
        return build_theirs(name, config, ours.state_dict())
    fast.install(ours)  # as Pipeline.load does
    kernels.install(ours, "auto")
    return ours


def build_theirs(name: str, config, weights: dict[str, Tensor]) -> nn.Module:
    """The reference's class for our config, with our weights in it (the tensors themselves, not copies)."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLHunyuanVideo, Kandinsky5Transformer3DModel
    from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sizes = to_their_config(name, config)
    with init_empty_weights(include_buffers=False):  # buffers are computed, not loaded
        match name:
            case "dit":
                model = Kandinsky5Transformer3DModel.from_config(sizes)
            case "vae":
                model = AutoencoderKLHunyuanVideo.from_config(sizes)
            case "qwen":
                model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**sizes))
            case "clip":
                model = CLIPTextModel(CLIPTextConfig(**sizes))
    called = tables.respell(name, {n: n for n in model.state_dict()})  # name in the table: name in this version
    model.load_state_dict({called[tables.theirs(name, n)]: w for n, w in weights.items()}, strict=False, assign=True)
    if name == "qwen":
        model.tie_weights()  # lm_head, which we have not; the released one is a matrix of its own, of this size
        model.model.visual.to_empty(device="cpu")  # nor this, which sees no image here
    missing = [n for n, parameter in model.named_parameters() if parameter.is_meta]
    assert not missing, f"{name}: no weights for {missing}"
    return model.eval().requires_grad_(False)


def build_text_encoder(config, dtype: torch.dtype) -> TextEncoder:
    """Our two language models of a `PipelineConfig`, with the real vocabularies."""
    tokenizers = [Tokenizer.load(tokenizer_folder(name)) for name in ("qwen2.5", "clip-vit-large-patch14")]
    qwen, clip = (build("ours", name, getattr(config, name), dtype) for name in ("qwen", "clip"))
    return TextEncoder(config.text, qwen, clip, *tokenizers)


def build_their_pipeline(config, dtype: torch.dtype, models: tuple[str, ...] = ("dit", "vae", "qwen", "clip")):
    """Diffusers' text-to-video pipeline of a `PipelineConfig`; what is not in `models` is None.

    The prompt template is set back to the one that the models were trained with (docs/differences.md).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline
    from transformers import CLIPTokenizerFast

    from small_diffusers import load_qwen_tokenizer

    parts = {name: build("theirs", name, getattr(config, name), dtype) for name in models}
    pipe = Kandinsky5T2VPipeline(
        transformer=parts.get("dit"),
        vae=parts.get("vae"),
        text_encoder=parts["qwen"],
        text_encoder_2=parts["clip"],
        tokenizer=load_qwen_tokenizer(),
        tokenizer_2=CLIPTokenizerFast.from_pretrained(tokenizer_folder("clip-vit-large-patch14")),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.sampling.shift),
    )
    assert "a prompt engineer" in pipe.prompt_template and pipe.prompt_template_encode_start_idx == 128
    pipe.prompt_template = pipe.prompt_template.replace("a prompt engineer", "a promt engineer")
    pipe.prompt_template_encode_start_idx = config.text.dropped_tokens
    pipe.set_progress_bar_config(disable=True)
    return pipe
