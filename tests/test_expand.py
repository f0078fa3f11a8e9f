"""Prompt expansion: what Qwen is asked, what comes of its answer, and what a video remembers of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sample
from kandinsky5 import Pipeline, video_io
from kandinsky5.checkpoint import save_checkpoint
from kandinsky5.cli import run
from kandinsky5.extras import expand
from random_weights import SMALL, SMALL_VISION, build_small_models, save_small_checkpoint
from tokenizer_data import tokenizer_folder

CONFIG = replace(SMALL, qwen_vision=SMALL_VISION)
SIZE = ["--height", "16", "--width", "16", "--num-frames", "1", "--steps", "1", "--guidance", "1", "--dtype", "float32"]
FOX = ["a fox", "--checkpoint", "small", *SIZE, "-o", "fox.png"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The answers depend on all that is read, as attention weighs more than the last word."""
    models = build_small_models(CONFIG)
    for block in models["qwen"].blocks:
        block.attention.to_out.weight *= 30
    folder = tmp_path_factory.mktemp("native") / "small"
    tokenizers = {"qwen": tokenizer_folder("qwen2.5"), "clip": tokenizer_folder("clip-vit-large-patch14")}
    save_checkpoint(folder, CONFIG, models, tokenizers)
    return folder


@pytest.fixture(scope="module")
def pipe(saved) -> Pipeline:
    return Pipeline.load(saved, dtype=torch.float32)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(expand, "MOST_WORDS", 6)


@pytest.fixture
def cli(saved, tmp_path, monkeypatch, capsys):
    """Runs sample.py next to the checkpoint `small`; returns the exit code and stdout, or the last line of stderr."""
    monkeypatch.chdir(tmp_path)
    Path("small").symlink_to(saved)

    def command(*arguments):
        code = run(lambda: sample.main([str(argument) for argument in arguments]))
        shown = capsys.readouterr()
        return code, shown.err.splitlines()[-1] if code else shown.out

    return command


IMAGE = torch.randint(0, 256, (70, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("image", [None, IMAGE], ids=["text", "image"])
def test_a_batch_gets_what_each_prompt_gets_alone(pipe, image):
    prompts = ["a fox", "Рыжая лиса бежит по глубокому снегу", ""]
    together = pipe.expand(prompts, image, progress=False)
    assert together == [pipe.expand(prompt, image, progress=False) for prompt in prompts]
    assert len({*together, *prompts}) == 6


def test_the_image_matters_and_each_prompt_has_its_own(pipe):
    other = torch.full((280, 280, 3), 255, dtype=torch.uint8)
    first, second = (pipe.expand("a fox", image, progress=False) for image in (IMAGE, other))
    assert first != second
    assert pipe.expand(["a fox", "a fox"], [IMAGE, other], progress=False) == [first, second]


@pytest.mark.parametrize("offload", ["model", "blocks"])
def test_offloading_changes_nothing(saved, pipe, offload):
    resting = Pipeline.load(saved, dtype=torch.float32, offload=offload)
    assert resting.expand("a fox", IMAGE, progress=False) == pipe.expand("a fox", IMAGE, progress=False)
    models = (resting.text_encoder.qwen, resting.text_encoder.head, resting.text_encoder.vision)
    assert all(weight.is_meta for model in models for weight in model.parameters())


def test_what_qwen_reads_is_its_chat(pipe):
    """As the chat template of Qwen2.5-VL writes it; in editing the image comes after the text."""
    words = pipe.text_encoder.qwen_tokenizer
    ids, mask, positions, tokens = expand.read_chats(
        pipe.text_encoder, [expand.BEFORE + expand.IMAGE + "Hello" + expand.AFTER], [IMAGE]
    )
    rows, columns = 2, 3  # 70 × 90 pixels
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{'<|image_pad|>' * rows * columns}<|vision_end|>Hello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert words.decode(ids[0].tolist()) == expected and mask.all()
    assert tokens.shape == (rows * columns, CONFIG.qwen.dim)
    assert positions.amax() == ids.shape[1] - 1 - rows * columns + max(rows, columns)


def test_an_answer_ends_before_its_end_token(pipe, monkeypatch):
    script = [[791, 151645, 3], [151643, 5, 151645], [9906, 151657, 1917]]  # rows of words; the last has a special one
    monkeypatch.setattr(expand, "generate", lambda *_: map(torch.tensor, zip(*script, strict=True)))
    words = pipe.text_encoder.qwen_tokenizer
    expected = [words.decode([791]).strip(), "a dog", words.decode([9906, 1917]).strip()]  # nothing said: the prompt
    assert pipe.expand(["a fox", "a dog", "a cat"], progress=False) == expected


def test_generation_stops_when_all_have_ended(pipe, monkeypatch):
    def script(*_):
        yield torch.tensor([791, 792])
        yield torch.tensor([151645, 151643])
        raise AssertionError("nobody reads on")

    monkeypatch.setattr(expand, "generate", script)
    assert len(pipe.expand(["a fox", "a dog"], progress=False)) == 2


@pytest.mark.parametrize("tasks, image, frame, kind", [
    (("t2v",), False, False, "video"), (("t2v",), False, True, "image"), (("i2v",), True, False, "image-to-video"),
    (("t2i",), False, True, "image"), (("i2i",), True, True, "editing"),
])  # fmt: skip
def test_the_instruction_is_for_what_is_made(tasks, image, frame, kind):
    config = replace(CONFIG, tasks=tasks)
    chosen = expand.choose_instruction(config, image, frame)
    assert chosen.text == (expand.OURS / f"{kind}.txt").read_text(encoding="utf-8").strip()
    assert chosen.text.count("{}") == 1 and chosen.editing == (kind == "editing") and len(chosen.sha256) == 64


def test_images_are_shrunk_for_reading():
    assert expand.shrink(IMAGE, editing=True).shape == (18, 22, 3)
    assert expand.shrink(torch.zeros(4000, 3000, 3, dtype=torch.uint8), editing=False).shape[:2] == (1157, 868)


def test_a_video_remembers_and_a_replay_does_not_expand(cli, monkeypatch):
    Path("mine.txt").write_text("Say more of: {}\n", encoding="utf-8")
    code, out = cli(*FOX, "--expand", "mine.txt")
    known = video_io.read_metadata("fox.png")
    assert code == 0 and f"prompt: {known['prompt']}\n" in out
    assert known["expanded_from"] == "a fox" != known["prompt"]
    assert known["instruction_sha256"] == expand.Instruction("Say more of: {}").sha256

    monkeypatch.setattr(expand, "expand", None)
    assert cli("--replay", "fox.png", "-o", "again.png")[0] == 0
    assert Path("again.png").read_bytes() == Path("fox.png").read_bytes()
    assert cli("--replay", "fox.png", "--expand")[0] == 2
    assert cli("--replay", "fox.png", "a dog", "-o", "dog.png")[0] == 0
    assert video_io.read_metadata("dog.png")["expanded_from"] is None


def test_one_frame_is_expanded_with_the_instruction_for_images(cli):
    assert cli(*FOX, "--expand")[0] == 0
    ours = expand.choose_instruction(CONFIG, False, one_frame=True)
    assert video_io.read_metadata("fox.png")["instruction_sha256"] == ours.sha256


@pytest.mark.parametrize("text", ["Say more", "{} and {}", ""])
def test_an_instruction_without_one_place_is_refused(cli, text):
    Path("mine.txt").write_text(text)
    code, line = cli(*FOX, "--expand", "mine.txt")
    assert code == 2 and "mine.txt" in line and not Path("fox.png").exists()


def test_an_instruction_in_another_encoding_is_refused(cli):
    Path("mine.txt").write_bytes("Опиши: {}".encode("cp1251"))
    code, line = cli(*FOX, "--expand", "mine.txt")
    assert code == 2 and "UTF-8" in line and not Path("fox.png").exists()


def test_checkpoints_without_the_parts_are_refused_by_name(tmp_path):
    small = save_small_checkpoint(tmp_path / "small")
    pipe = Pipeline.load(small)
    with pytest.raises(ValueError, match="--with-vision"):
        pipe.expand("a fox")
    with pytest.raises(ValueError, match="--with-vision"):
        pipe.text_encoder.encode(["a fox"], images=[IMAGE])


@pytest.mark.parametrize("image", [None, IMAGE], ids=["text", "image"])
def test_a_prompt_that_spells_an_image_token_is_refused(pipe, image):
    if image is None:
        assert pipe.expand("a <|image_pad|>", progress=False)
    else:
        with pytest.raises(ValueError, match="image_pad"):
            pipe.expand("a <|image_pad|>", image, progress=False)
