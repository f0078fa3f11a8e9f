"""Make a video from a prompt, or from an image and a prompt.

    python sample.py "a red circle moves left" --enlarge 4   # nano, the small bundled model
    python sample.py "a red fox runs through snow" --checkpoint weights/t2v-lite-sft-5s -o fox.mp4
    python sample.py "the fox looks up" --checkpoint weights/i2v-lite-5s --image fox.jpg --seed 3
    python sample.py "a red fox in snow" --checkpoint weights/t2v-lite-sft-5s --num-frames 1 -o fox.png
    python sample.py --replay fox.mp4 --seed 4 -o other.mp4  # the settings in a file, but for the seed

This is the whole of it, to be copied and changed. Options that it does not know, such as --replay, --offload or --help,
are those of `kandinsky5 sample` (kandinsky5/cli.py), which then makes the video.
"""

import argparse

from kandinsky5 import cli


def main(arguments: list[str] | None = None) -> int:
    """Make one video; returns the exit code. Raises ValueError or OSError for invalid requests."""
    options, others = parse_arguments(arguments)
    if others or options.prompt is None:
        return cli.sample(arguments)
    output = cli.check_places(vars(options))

    from kandinsky5 import Pipeline, checkpoint  # PyTorch takes seconds to import
    from kandinsky5.extras import notes, replay
    from kandinsky5.request import Request

    folder = checkpoint.find_checkpoint(options.checkpoint)
    config = checkpoint.load_config(folder / "config.json")
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
    fps = config.sampling.fps if options.fps is None else options.fps
    cli.check_writable(output, request.num_frames, fps)

    pipe = Pipeline.load(folder, options.device, options.dtype)
    notes.show(request, pipe.config, pipe.text_encoder, folder)
    frames = pipe.generate(request)[0]  # (F, H, W, 3)
    metadata = replay.describe(request, pipe, options.checkpoint, options.image, fps=fps)
    cli.write(output, frames, fps, 8, metadata)
    cli.say_what(output, frames, options.seed)
    return 0


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The main options, and what is none of them. Raises ValueError for an invalid value."""
    parser = cli.Parser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("prompt", nargs="?")
    add("--checkpoint", default="nano")
    add("--image")
    add("--negative-prompt")
    add("--height", type=int)
    add("--width", type=int)
    add("--num-frames", type=int)
    add("--steps", type=int)
    add("--guidance", type=float)
    add("--shift", type=float)
    add("--seed", type=int, default=0)
    add("--fps", type=cli.frame_rate)
    add("--device", default="auto")
    add("--dtype", choices=cli.DTYPES, default="auto")
    add("-o", "--output")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    cli.end(main)
