"""Make a video from a prompt, or from an image and a prompt.

    python sample.py "a red circle moves left" --enlarge 4   # nano, the small bundled model
    python sample.py "the fox looks up" --checkpoint weights/i2v-lite-5s --image fox.jpg -o fox.mp4

This is the whole of it, to be copied and changed. Options that it does not know, such as --replay, --offload or --help,
are those of `kandinsky5 sample` (kandinsky5/sample_command.py), which then makes the video; --help has more examples.
"""

import argparse
import os

from kandinsky5 import cli, sample_command


def main(arguments: list[str] | None = None) -> int:
    """Make one video; returns the exit code. Raises ValueError or OSError for invalid requests."""
    options, rarer = build_parser().parse_known_args(arguments)
    if rarer or options.prompt is None or "WORLD_SIZE" in os.environ:  # which torchrun sets
        return sample_command.main(arguments)

    from kandinsky5 import Pipeline  # PyTorch takes seconds to import
    from kandinsky5.checkpoint import find_checkpoint
    from kandinsky5.config_file import load_config
    from kandinsky5.extras import notes, replay
    from kandinsky5.files import check_apart, check_writable, free_name
    from kandinsky5.request import Request
    from kandinsky5.screen import printable
    from kandinsky5.video_io import write_video

    # Invalid requests are refused here, before the weights are loaded.
    folder = find_checkpoint(options.checkpoint)
    config = load_config(folder / "config.json")
    request = Request.resolve(
        config,
        options.prompt,
        options.image,
        options.negative_prompt,
        options.height,
        options.width,
        options.num_frames,
        options.steps,
        options.guidance,
        options.shift,
        seed=options.seed,
    )
    fps = config.sampling.fps
    output = options.output or free_name("out.png" if request.num_frames == 1 else "out.mp4")
    check_apart({"-o": output}, {"--image": options.image})
    check_writable(output, request.num_frames, fps)

    pipe = Pipeline.load(folder, options.device, options.dtype, compile="auto")
    notes.show(request, pipe, folder)
    frames = pipe.generate(request)[0]  # (F, H, W, 3) uint8
    metadata = replay.describe(request, pipe, options.checkpoint, options.image, fps=fps)
    write_video(output, frames, fps, metadata=metadata, keep=True)
    count, height, width, _ = frames.shape
    print(printable(f"{output}: {count} frame{'s' * (count > 1)} of {height}x{width}, seed {options.seed}"))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The main options; invalid values raise argparse.ArgumentError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--image", action=cli.Once)
    parser.add_argument("--negative-prompt")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--shift", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument("-o", "--output")
    return parser


if __name__ == "__main__":
    cli.end(main)
