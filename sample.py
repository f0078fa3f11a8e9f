"""Make a video from a prompt, or from an image and a prompt.

    python sample.py "a red circle moves left"               # nano, the small model of this package
    python sample.py "a red fox runs through snow" --checkpoint weights/t2v-lite-sft-5s -o fox.mp4
    python sample.py "the fox looks up" --checkpoint weights/i2v-lite-5s --image fox.jpg --seed 3
    python sample.py "a red fox in snow" --checkpoint weights/t2v-lite-sft-5s --num-frames 1 -o fox.png
    python sample.py --replay fox.mp4 -o again.mp4           # the same file again, from the settings in it
    python sample.py --replay fox.mp4 --seed 4 -o other.mp4  # all as it was, but for the seed

A checkpoint is a folder that `python -m weights_convert` wrote, or the name of a small model. What is not given is
the checkpoint's own default.
"""

import argparse
import dataclasses
import hashlib
import re
import signal
import sys
from pathlib import Path

import torch

import kandinsky5
from kandinsky5 import Pipeline, video_io
from kandinsky5.attention import KERNELS
from kandinsky5.checkpoint import SHIPPED, find_checkpoint, fingerprint
from kandinsky5.config import PipelineConfig
from kandinsky5.extras import magcache, preview
from kandinsky5.extras.replay import check_checkpoint, check_image, check_output, read_settings, to_metadata
from kandinsky5.request import choose_size
from kandinsky5.rope import scale_for_size
from kandinsky5.runtime.offload import MODES as OFFLOAD
from kandinsky5.text_encoder import MAX_TOKENS, TextEncoder

DEFAULTS = {"checkpoint": "nano", "image": None, "seed": 0, "schedule": "official", "quality": 8.0,
            "step_skipping": False, "dtype": "bfloat16", "attention": "auto",
            "compile": False, "offload": None, "tile_space": False}  # fmt: skip
FROM_CHECKPOINT = {"negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "shift",
                   "fps"}  # fmt: skip


def sample(output: str, replay: str | None = None, **given) -> str:
    """Make the video and write it to `output`; returns a line that says what was made.

    replay: a file of before, whose settings hold where nothing else is `given`. ValueError or OSError, in one line,
    for settings that cannot be.
    """
    recorded = {}
    if replay:
        recorded = read_settings(replay, given)
        check_output(replay, output, given)
    settings = DEFAULTS | recorded | given
    if given.keys() & {"height", "width", "checkpoint"}:
        settings.pop("rope_scale", None)  # it went with those
    if "prompt" not in settings:
        raise ValueError('no prompt: give one, python sample.py "a red fox runs through snow", or --replay FILE')
    settings.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    # Twice: here what was asked for, before models are loaded for nothing, and below with what the checkpoint says.
    video_io.check_writable(output, settings.get("num_frames", 1), settings.get("fps", 24), settings["quality"])
    if isinstance(settings["step_skipping"], str):  # the file may change: what is in it is what a replay needs
        settings["step_skipping"] = dataclasses.asdict(magcache.load(settings["step_skipping"]))
    if isinstance(settings.get("preview"), str) and Path(settings["preview"]).resolve() == Path(output).resolve():
        raise ValueError(f"--preview {output} is the video's own file: give it another name")
    show = preview.open_place(settings["preview"]) if "preview" in settings else None

    image = None
    settings["image_sha256"] = None
    if settings["image"] is not None:
        image = video_io.read_image(settings["image"])  # (H, W, 3)
        settings["image_sha256"] = hashlib.sha256(Path(settings["image"]).read_bytes()).hexdigest()
        if "image" not in given:
            check_image(replay, settings, recorded)

    pipe = Pipeline.load(
        settings["checkpoint"],
        settings["device"],
        getattr(torch, settings["dtype"]),
        attention=settings["attention"],
        offload=settings["offload"],
        compile=settings["compile"],
        tile_space=settings["tile_space"],
    )
    settings["model"] = pipe.config.name
    settings["fingerprint"] = fingerprint(find_checkpoint(settings["checkpoint"]))
    if replay:
        check_checkpoint(replay, settings, recorded, given)
        if settings["model"] != recorded["model"]:  # its steps, guidance and size would be wrong for this one
            for name in FROM_CHECKPOINT - given.keys():
                settings.pop(name)
    if pipe.device.type == "meta":
        raise ValueError("device meta: it knows shapes and no pixels; choose cpu or cuda")
    for name in FROM_CHECKPOINT - {"height", "width"}:  # those may follow from the image
        settings.setdefault(name, getattr(pipe.config.sampling, name))
    video_io.check_writable(output, settings["num_frames"], settings["fps"], settings["quality"])
    images = None if image is None else (image,)
    size = choose_size(pipe.config, images, settings.get("height"), settings.get("width"))
    note_other_size((settings["num_frames"], *size), settings["checkpoint"], pipe.config)
    note_long_prompt(settings["prompt"], pipe.text_encoder)

    every = (settings["num_inference_steps"] + 9) // 10  # rounded up: 10 pictures or fewer
    frames = pipe(
        settings["prompt"],
        image,
        settings["negative_prompt"],
        height=settings.get("height"),
        width=settings.get("width"),
        num_frames=settings["num_frames"],
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=settings["guidance_scale"],
        shift=settings["shift"],
        schedule=settings["schedule"],
        step_skipping=settings["step_skipping"],
        rope_scale=settings.get("rope_scale"),
        seed=settings["seed"],
        callback=preview.build_callback(pipe.vae, show, every) if show else None,
    )[0]  # (F, H, W, 3)

    settings["height"], settings["width"] = frames.shape[1:3]
    settings.setdefault("rope_scale", pipe.config.sampling.rope_scale or scale_for_size(*frames.shape[1:3]))
    settings |= {"device": pipe.device.type, "version": kandinsky5.__version__}
    video_io.write_video(output, frames, settings["fps"], settings["quality"], to_metadata(settings))
    plural = "s" if len(frames) > 1 else ""
    return f"{output}: {len(frames)} frame{plural} of {frames.shape[1]}x{frames.shape[2]}, seed {settings['seed']}"


def note_other_size(size: tuple[int, ...], checkpoint: str, config: PipelineConfig) -> None:
    """A line on stderr where a model of this package, which was trained on one size (F, H, W), is asked for another."""
    trained = (config.sampling.num_frames, config.sampling.height, config.sampling.width)
    if size != trained and find_checkpoint(checkpoint).parent == SHIPPED:
        only = f"{trained[0]} frames of {trained[1]}x{trained[2]} alone"
        print(
            f"note: {config.name} was trained on {only}, and draws other sizes and lengths worse: leave out --height, "
            "--width and --num-frames, or give an image of that shape",
            file=sys.stderr,
        )


def note_long_prompt(prompt: str, text_encoder: TextEncoder) -> None:
    """A line on stderr where Qwen does not read the whole prompt."""
    empty, whole = (len(text_encoder.qwen_ids(text, sys.maxsize)) for text in ("", prompt))
    cut = whole - empty - MAX_TOKENS
    if cut > 0:
        print(
            f"note: of a prompt {MAX_TOKENS} tokens are read, and this one has {cut} more: shorten it", file=sys.stderr
        )


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns 0, 2 after one line about what is wrong with it, 130 after Ctrl-C."""
    options = vars(parse_arguments(arguments))
    try:
        print(sample(**options))
        return 0
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        reason = str(error)
    except (MemoryError, RuntimeError, TypeError) as error:  # PyTorch says by any of these that a tensor is too large
        words = re.search(
            r"tried to allocate [\d.]+ \w+|out of memory|Storage size calculation overflowed|Overflow when unpacking",
            str(error),
            re.IGNORECASE,
        )
        if not words and not isinstance(error, MemoryError):
            raise
        on_gpu = torch.cuda.is_available() and options.get("device") != "cpu"
        reason = f"not enough memory ({words[0] if words else error}): try {what_to_try(options, on_gpu)}"
    if "replay" in options and options["replay"] not in reason:  # what is wrong may stand there
        reason = f"replaying {options['replay']}: {reason}"
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def what_to_try(options: dict, on_gpu: bool) -> str:
    """The options that take less memory than those that were given."""
    tries = {
        "--attention auto": options.get("attention", "auto") != "auto",
        "--offload model or blocks": on_gpu and "offload" not in options,
        "--tile-space": not options.get("tile_space"),
    }
    return ", ".join([option for option, helps in tries.items() if helps] + ["less --height, --width or --num-frames"])


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The options that were given, and no others: what they default to is decided in `sample`."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # the examples say it better, and a mistake is answered in one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        "prompt",
        nargs="?",
        help="what the video shows; the models were trained with long descriptions, to 256 tokens; empty: anything",
    )
    add("--checkpoint", metavar="DIR", help="converted checkpoint folder, or one of nano's names (default: nano)")
    add("--image", metavar="FILE", help="first frame (JPEG, PNG, WebP); needs an i2v checkpoint")
    add("--negative-prompt", metavar="TEXT", help="what to avoid; has no effect at --guidance 1")
    add("--height", type=int, metavar="PX", help="a multiple of 16, with NABLA of 128")
    shape = "likewise; with --image both default to its shape; a replay keeps its own"
    add("--width", type=int, metavar="PX", help=shape)
    add("--num-frames", type=int, metavar="N", help="4k + 1; at 24 per second, 121 last 5 seconds")
    add("--steps", type=int, dest="num_inference_steps", metavar="N", help="more are slower and finer")
    add("--guidance", type=float, dest="guidance_scale", metavar="W", help="pull to the prompt; 1: none, half the time")
    add("--shift", type=float, metavar="S", help="above 1, more of the steps go to the noisy end")
    add("--schedule", choices=["official", "diffusers"], help="spacing of the steps (default: official)")
    skipping = "about half the time, not quite the same video; ratios: known, or of `kandinsky5.extras.magcache`"
    add("--step-skipping", nargs="?", const=True, type=file(".json"), metavar="RATIOS.json", help=skipping)
    add("--seed", type=int, metavar="N", help="another seed, another video (default: 0)")
    add("--fps", type=int, metavar="N", help="frames per second of the file; changes the speed, not the frames")
    add("--quality", type=float, metavar="Q", help="of the file, 1 to 10 (default: 8)")
    add("--device", metavar="NAME", help="such as cuda:1 (default: cuda if there is one, else cpu)")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="precision of the models (default: bfloat16)")
    add(
        "--attention",
        choices=KERNELS,
        help="how the DiT computes it; in bf16 sdpa is closest to float32, and needs no compiler for NABLA; flex is "
        "for CUDA (default: auto)",
    )
    shown = "the middle frame, at most ten times from the second step on, in the terminal or in a file"
    add("--preview", nargs="?", const=True, type=file(".png"), metavar="FILE.png", help=shown)
    add("--offload", choices=OFFLOAD, help="keep on the device only the model that works, or of it only the block")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile: slow at first; needs a C++ compiler")
    tiles = "above 256 pixels let the VAE work in tiles: less memory, not quite the same video"
    add("--tile-space", action=argparse.BooleanOptionalAction, help=tiles)
    add("--replay", metavar="FILE", help="take the settings from a file of sample.py; options beside it win")
    add("-o", "--output", default="out.mp4", metavar="FILE", help=".mp4, or .png for one frame (default: out.mp4)")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"cannot use {' '.join(unknown)}: a prompt goes in quotes, and --help lists the options")
    return options


def file(suffix: str):
    """For options whose value may be left out: a prompt after them is not taken for it but an ArgumentTypeError."""

    def check(path: str) -> str:
        if not path.lower().endswith(suffix):
            raise argparse.ArgumentTypeError(f"{path!r} does not end in {suffix}; a prompt goes before the options")
        return path

    return check


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as after Ctrl-C
    sys.exit(main())
