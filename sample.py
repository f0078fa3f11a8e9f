"""Make a video from a prompt, or from an image and a prompt.

    python sample.py "a red fox runs through snow" --checkpoint ~/kandinsky5-lite -o fox.mp4
    python sample.py "the fox looks up" --checkpoint ~/kandinsky5-i2v --image fox.jpg
    python sample.py --replay fox.mp4 -o again.mp4          # the same video, from the settings in the file

The checkpoint is a folder that `python -m weights_convert` wrote. What is not given is the checkpoint's own.
"""

import argparse
import sys
from pathlib import Path

import torch

import kandinsky5
from kandinsky5 import Pipeline, video_io

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(args: argparse.Namespace) -> None:
    settings = dict(fps=None, quality=8, seed=0, schedule="official", dtype="bfloat16", image=None)
    if args.replay:
        settings |= video_io.read_metadata(args.replay)
        if settings["version"] != kandinsky5.__version__:
            print(f"note: {args.replay} was made by version {settings['version']}, this is {kandinsky5.__version__}")
    settings |= {name: value for name, value in vars(args).items() if value is not None}
    if "prompt" not in settings:
        raise ValueError('no prompt: give one, python sample.py "a red fox runs through snow", or --replay FILE')
    if "checkpoint" not in settings:
        raise ValueError("no checkpoint: give the folder that weights_convert wrote, --checkpoint DIR")
    video_io.check_writable(args.output, quality=settings["quality"])

    pipe = Pipeline.load(settings["checkpoint"], settings.get("device", default_device()), DTYPES[settings["dtype"]])
    # From here on settings holds every value that the result depends on: they go into the file, for --replay.
    sampling = pipe.config.sampling
    for name in ("negative_prompt", "num_inference_steps", "guidance_scale", "shift", "num_frames", "fps"):
        settings[name] = getattr(sampling, name) if settings.get(name) is None else settings[name]
    video_io.check_writable(args.output, settings["num_frames"], settings["fps"], settings["quality"])
    frames = pipe(
        settings["prompt"],
        image=settings["image"],
        **{
            name: settings.get(name)
            for name in (
                "negative_prompt",
                "height",
                "width",
                "num_frames",
                "num_inference_steps",
                "guidance_scale",
                "shift",
                "schedule",
                "rope_scale",
                "seed",
            )  # fmt: skip
        },
    )[0]  # (F, H, W, 3)

    settings |= {"height": frames.shape[1], "width": frames.shape[2]}
    settings |= {"model": pipe.config.name, "version": kandinsky5.__version__}
    for path in ("image", "checkpoint"):  # a replay may start in another folder
        if settings[path] is not None and Path(settings[path]).exists():
            settings[path] = str(Path(settings[path]).resolve())
    metadata = {name: value for name, value in settings.items() if name not in ("output", "replay", "device")}
    video_io.write_video(args.output, frames, settings["fps"], settings["quality"], metadata)
    print(f"{args.output}: {len(frames)} frames of {frames.shape[1]}×{frames.shape[2]}, {settings['fps']} per second")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_arguments() -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="what the video shows; the models were trained with long descriptions")
    add("--checkpoint", metavar="DIR", help="converted checkpoint folder")
    add("--image", metavar="FILE", help="first frame (JPEG, PNG, WebP); needs an i2v checkpoint")
    add("--negative-prompt", metavar="TEXT", help="what to avoid; has no effect at --guidance 1")
    add("--height", type=int, metavar="PX", help="a multiple of 16, with NABLA of 128")
    add("--width", type=int, metavar="PX", help="likewise; with --image both default to the image's shape")
    add("--num-frames", type=int, metavar="N", help="4k + 1; 121 are 5 seconds")
    add("--steps", type=int, dest="num_inference_steps", metavar="N", help="more are slower and finer")
    add(
        "--guidance",
        type=float,
        dest="guidance_scale",
        metavar="W",
        help="how strictly to follow the prompt; 1 halves the time",
    )
    add("--shift", type=float, metavar="S", help="more of the steps near the noise")
    add("--schedule", choices=["official", "diffusers"], help="spacing of the steps (default: official)")
    add("--seed", type=int, metavar="N", help="another seed, another video (default: 0)")
    add("--fps", type=int, metavar="N", help="frames per second of the file; changes the speed, not the frames")
    add("--quality", type=float, metavar="Q", help="of the file, 1 to 10 (default: 8)")
    add("--device", metavar="NAME", help="such as cuda:1 (default: cuda if there is one, else cpu)")
    add("--dtype", choices=DTYPES, help="precision of the models (default: bfloat16)")
    add(
        "--replay",
        metavar="FILE",
        help="take the settings from a file that sample.py wrote; options given beside it win",
    )
    add("-o", "--output", default="out.mp4", metavar="FILE", help=".mp4, or .png for one frame (default: out.mp4)")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
