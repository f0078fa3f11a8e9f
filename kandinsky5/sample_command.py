"""Make a video from a prompt, or from an image and a prompt.

    python sample.py "a red circle moves left" --enlarge 4   # nano, the small bundled model
    python sample.py "a red fox runs through snow" --checkpoint weights/t2v-lite-sft-5s -o fox.mp4
    python sample.py "the fox looks up" --checkpoint weights/i2v-lite-5s --image fox.jpg --seed 3
    python sample.py "make it night" --checkpoint weights/i2i-lite-sft --image fox.jpg -o night.png
    python sample.py "a red fox in snow" --checkpoint weights/t2v-lite-sft-5s --num-frames 1 -o fox.png
    python sample.py --replay fox.mp4 -o again.mp4           # the same file again, from the settings in it
    python sample.py --replay fox.mp4 --seed 4 -o other.mp4  # all as it was, but for the seed

nano knows one or two objects: red, green, blue, yellow, purple or cyan; circle, square, triangle or diamond; big or
small; moves left, right, up or down, grows, shrinks or stays still; in English and Russian. What is not given is the
checkpoint's own default.
"""

# This is `kandinsky5 sample`. PyTorch, which takes seconds, is imported once the command line is known to be sound.

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky5 import cli
from kandinsky5.files import check_apart, check_writable, free_name, make_folder
from kandinsky5.screen import printable

if TYPE_CHECKING:
    from kandinsky5 import Pipeline
    from kandinsky5.config import PipelineConfig
    from kandinsky5.extras.expand import Instruction
    from kandinsky5.extras.lora import LoRA
    from kandinsky5.request import Request

DEFAULTS = {
    "checkpoint": "nano", "image": None, "step_skipping": False, "quality": 8.0, "enlarge": 1, "device": "auto",
    "dtype": "auto", "attention": "auto", "compile": "auto", "offload": None, "tile_space": False, "loras": (),
    "trigger": True, "quantize": None, "expand": False, "ranks": None, "shard": False,
}  # fmt: skip
REQUEST = (  # arguments of Request.resolve
    "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "shift", "schedule",
    "step_skipping", "rope_scale", "seed",
)  # fmt: skip
LOAD = ("device", "dtype", "attention", "offload", "compile", "tile_space", "quantize")  # arguments of Pipeline.load


def main(arguments: list[str] | None = None) -> int:
    """What sample.py does, with replays, previews and the rarer options. Raises ValueError or OSError."""
    if "WORLD_SIZE" in os.environ:  # which torchrun sets
        from kandinsky5.runtime import ending

        return ending.together(lambda: sample(arguments), cli.explain)
    return sample(arguments)


@dataclass
class Job:
    """One file to make, with all options and defaults."""

    settings: dict[str, Any]
    request: "Request"
    instruction: "Instruction | None"  # to expand the prompt by
    output: Path = Path()


def sample(arguments: list[str] | None) -> int:
    """Make one video, or with --prompts one of each. Raises ValueError or OSError."""
    options, unknown = build_parser().parse_known_args(arguments)
    if unknown:
        raise ValueError(f"cannot use {' '.join(unknown)}: a prompt goes in quotes, and --help lists the options")
    given = vars(options)
    replayed, place, listed = (given.pop(name, None) for name in ("replay", "preview", "prompts"))
    output = check_places(given, replayed, place, listed)
    with _naming(replayed, "replaying "):
        from kandinsky5.checkpoint import find_checkpoint
        from kandinsky5.config_file import load_config
        from kandinsky5.extras import lora, preview, replay

        settings = DEFAULTS | (replay.read_settings(replayed, given) if replayed else {}) | given
        folder = find_checkpoint(settings["checkpoint"])
        config = load_config(folder / "config.json")
        _read_ratios(settings)
        settings.setdefault("fps", config.sampling.fps)
        jobs = read_jobs(config, settings, listed)
        loras = lora.open_all(settings["loras"], config.dit)
        for job in jobs:
            check_apart({"-o": output, "--preview": place}, name_inputs(job.settings))
        if listed and output:
            make_folder(output)
            for job, name in zip(jobs, name_all(folder, jobs, loras), strict=True):
                job.output = check_output(output / name, job)
        else:
            jobs[0].output = check_output(output, jobs[0])
        show = None if place is None else preview.open_place(place)
        pipe = load_pipeline(folder, config, settings, jobs, loras, many=bool(listed))
        for one, requested in zip(loras, settings["loras"], strict=True):
            pipe.load_lora(one, requested["weight"], settings["trigger"])
        if not listed:
            print(make(pipe, folder, jobs[0], show))
            return 0

        from kandinsky5.extras import prompts

        def make_with_image(job: Job) -> str:
            return make(pipe, folder, build_job(config, job.settings, job.output), show)

        print(prompts.show(prompts.make_all(jobs, make_with_image, pipe.ranks)))
    return 0


def read_jobs(config: "PipelineConfig", settings: dict[str, Any], listed: str | None) -> list[Job]:
    """One job, or one for each line of a file of prompts, without its image: thousands would fill the memory."""
    if not listed:
        return [build_job(config, settings)]
    from kandinsky5.extras import prompts

    jobs = []
    for where, line in prompts.read(listed).items():
        with _naming(where):
            jobs.append(build_job(config, settings | line))
        jobs[-1].request = replace(jobs[-1].request, images=None, qwen_images=None)
    return jobs


def build_job(config: "PipelineConfig", settings: dict[str, Any], output: Path = Path()) -> Job:
    """The request of these settings, with everything checked that can be before models are loaded."""
    from kandinsky5.extras import expand
    from kandinsky5.request import LONGEST_SIDE, Request

    requested = {name: settings[name] for name in REQUEST if name in settings}
    request, instruction = Request.resolve(config, settings["prompt"], settings["image"], **requested), None
    if how := settings["expand"]:
        one_frame, file = request.num_frames == 1, how if isinstance(how, str) else None
        instruction = expand.choose_instruction(config, settings["image"] is not None, one_frame, file)
        settings = settings | {"expanded_from": settings["prompt"], "instruction_sha256": instruction.sha256}
    enlarge = settings["enlarge"]
    if not 1 <= enlarge <= 16 or max(request.height, request.width) * enlarge > LONGEST_SIDE:
        raise ValueError(f"enlarge {enlarge}: give 1 to 16, with which no side passes {LONGEST_SIDE} pixels")
    return Job(settings, request, instruction, output)


def name_all(folder: Path, jobs: Sequence[Job], loras: "Sequence[LoRA]") -> list[str]:
    """A name for each video, with a hash of all that it depends on."""
    from kandinsky5.checkpoint import fingerprint
    from kandinsky5.extras import prompts

    origin = " ".join([fingerprint(folder), *(one.fingerprint for one in loras)])
    return [prompts.name_video(job.settings, origin, job.request.num_frames == 1) for job in jobs]


def load_pipeline(
    folder: Path, config: "PipelineConfig", settings: dict[str, Any], jobs: Sequence[Job], loras: "Sequence[LoRA]",
    many: bool,
) -> "Pipeline":  # fmt: skip
    """The pipeline, on all ranks if there are several: those that do not share a video need others to make."""
    from kandinsky5 import Pipeline
    from kandinsky5.runtime import launch

    how, requested = {name: settings[name] for name in LOAD}, settings["ranks"]
    if not launch.is_one_of_many():
        if requested or settings["shard"]:
            raise ValueError("--ranks and --shard are for several processes: start them with torchrun, or leave it out")
        return Pipeline.load(folder, **how)

    from kandinsky5.checkpoint import fingerprint
    from kandinsky5.runtime import parallel
    from kandinsky5.runtime.device import choose_device, choose_dtype

    if settings["device"] not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {settings['device']}: torchrun gives each process a GPU, so leave it out")
    device = choose_device(settings["device"])
    precision, work = choose_dtype(settings["dtype"], device), name_all(folder, jobs, loras)  # and its files
    launch.agree(**settings | {"checkpoint": fingerprint(folder)}, precision=precision)
    launch.agree(work=work)
    if many and not settings["shard"]:
        requested = requested or "1x1"
    guidance = next((job.request.guidance_scale for job in jobs if job.request.guided), 1.0)
    config = replace(config, sampling=replace(config.sampling, guidance_scale=guidance))  # as requested
    ranks = parallel.find_ranks(requested or "auto", config, device, settings["shard"])
    assert ranks is not None
    if ranks.data > 1 and not many:
        raise ValueError(f"{ranks} would make {ranks.data} videos at once: give --prompts, or ranks for all processes")
    return Pipeline.load(folder, **how, ranks=ranks)


def expand_once(pipe: "Pipeline", job: Job) -> "Request":
    """The job's request with its prompt expanded: by the first of the ranks that share a video, for all of them.

    Where they share Qwen's weights too, all of them compute the same.
    """
    from kandinsky5.extras import expand

    assert job.instruction
    how = pipe.text_encoder, job.request, job.instruction, job.settings["image"]
    if pipe.ranks is None or pipe.ranks.shard:
        return expand.expand_request(*how)

    import torch

    def written(_: None) -> torch.Tensor:
        return torch.tensor(list(expand.expand_request(*how).prompts[0].encode()), dtype=torch.uint8)

    (text,) = pipe.ranks.map("team", written, [None])
    return replace(job.request, prompts=(bytes(text.tolist()).decode(),))


def make(pipe: "Pipeline", folder: Path, job: Job, show: Callable[..., None] | None) -> str:
    """Write a job's file; returns what to print. Of the ranks that share a video the first one writes."""
    from kandinsky5 import video_io
    from kandinsky5.extras import notes, preview, replay

    settings, request, output = job.settings, job.request, job.output
    if job.instruction:
        request = expand_once(pipe, job)
    notes.show(request, pipe, folder)
    writes = pipe.ranks is None or pipe.ranks.place("team") == 0
    callback = None
    if show and writes:
        callback = preview.build_callback(pipe.vae, show, every=-(-request.steps // 10))  # 10 at most
    frames = pipe.generate(request, callback)[0]  # (F, H, W, 3)
    if not writes:
        return ""
    enlarge = settings["enlarge"]
    frames = frames.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
    known = replay.describe(request, pipe, **settings) if settings.get("metadata", True) else None
    video_io.write_video(output, frames, settings["fps"], settings["quality"], known, keep=True)
    count, height, width, _ = frames.shape
    return printable(f"{output}: {count} frame{'s' * (count > 1)} of {height}x{width}, seed {request.seeds[0]}")


def check_places(
    given: dict[str, Any], replayed: str | None, place: str | bool | None, listed: str | None
) -> Path | None:
    """Where to write, if that is named, once what is wrong without any model was refused: ValueError or OSError."""
    if given.get("prompt") is None and replayed is None and listed is None:
        raise ValueError('no prompt: give one, python sample.py "a red fox runs through snow", or --replay FILE')
    named = given.pop("output", None)
    output = Path(named) if named else None
    if empty := [name for name, file in (("--replay", replayed), ("--prompts", listed)) if file == ""]:
        raise ValueError(f"{empty[0]}: give the name of a file")
    if listed and (given.get("prompt") is not None or replayed):
        raise ValueError("--prompts takes the place of a prompt and of --replay: give one of them")
    if listed and (output is None or output.is_file() or output.suffix.lower() in (".mp4", ".png")):
        raise ValueError("--prompts makes many files: name the folder for them, -o DIR")
    read = {"--replay": replayed, "--prompts": listed}
    check_apart({"-o": output, "--preview": place}, name_inputs(given) | read)
    if not listed:
        usual = {"num_frames": 1, "fps": 24, "quality": 8}
        usual |= {name: given[name] for name in usual if given.get(name) is not None}
        check_writable(output or free_name("out.png" if usual["num_frames"] == 1 else "out.mp4"), **usual)
    return output


def name_inputs(settings: dict[str, Any]) -> dict[str, object]:
    """The files that these settings read, by option; a checkpoint holds none that an output could replace."""
    inputs = {f"--{name.replace('_', '-')}": settings.get(name) for name in ("image", "step_skipping", "expand")}
    return inputs | {f"--lora {i}": one["file"] for i, one in enumerate(settings.get("loras", ()), start=1)}


def check_output(output: Path | None, job: Job) -> Path:
    """`output`, or the next free out.mp4; for one frame out.png. Raises ValueError or OSError, as `check_writable`."""
    output = output or free_name("out.png" if job.request.num_frames == 1 else "out.mp4")
    check_writable(output, job.request.num_frames, job.settings["fps"], job.settings["quality"])
    return output


@contextlib.contextmanager
def _naming(path: str | None, doing: str = "") -> Iterator[None]:
    """Errors name the file that was read, or its line: what is wrong may stand there."""
    try:
        yield
    except (ValueError, OSError) as error:
        if path is None or path in str(error):
            raise
        raise type(error)(f"{doing}{path}: {error}") from error


def _read_ratios(settings: dict[str, Any]) -> None:
    """Replace a file of ratios by what it holds, as the file may change before a replay."""
    if isinstance(settings["step_skipping"], str):
        import dataclasses

        from kandinsky5.extras import magcache

        settings["step_skipping"] = dataclasses.asdict(magcache.load(settings["step_skipping"]))


def build_parser() -> cli.Parser:
    """All options of sample.py. Only those that are given are in what it returns."""
    from kandinsky5.config import NANO_NAMES

    parser = cli.Parser(usage=argparse.SUPPRESS, description=__doc__, argument_default=argparse.SUPPRESS)
    add = parser.add_argument_group("what is made").add_argument
    add("prompt", nargs="?",
        help='what to show; long descriptions work best, up to 256 tokens (images: 512); "": anything')  # fmt: skip
    add("--checkpoint", metavar="DIR", help=f"converted checkpoint, or {', '.join(NANO_NAMES)} (default: nano)")
    add("--image", action=cli.Once, metavar="FILE",
        help="first frame, or what to edit (JPEG, PNG, WebP, GIF, AVIF, BMP, TIFF); for i2v and i2i")  # fmt: skip
    add("--expand", nargs="?", const=True, type=file(".txt"), metavar="FILE.txt",
        help="let Qwen write the prompt out in detail; by our instruction, or by yours with {} in it")  # fmt: skip
    add("--negative-prompt", metavar="TEXT", help="what to avoid; no effect at --guidance 1")
    add("--height", type=int, metavar="PX", help="a multiple of 16, with NABLA of 128")
    add("--width", type=int, metavar="PX", help="likewise; with --image both default to its shape")
    add("--num-frames", type=int, metavar="N", help="4k + 1; 121 are 5 seconds at 24 per second; 1: an image")
    add("--seed", type=int, metavar="N", help="another seed, another video (default: 0)")
    add("--prompts", metavar="FILE", help="many: a .txt with one per line, or a .jsonl; -o is then a folder")
    add("--replay", metavar="FILE", help="take the settings from a file of sample.py; other options win")

    add = parser.add_argument_group("how it is sampled").add_argument
    add("--steps", type=int, dest="num_inference_steps", metavar="N", help="more are slower and finer")
    add("--guidance", type=float, dest="guidance_scale", metavar="W",
        help="classifier-free guidance scale; 1 disables it and halves the time; below 1 it is applied as it "
        "stands, away from the prompt (diffusers switches it off)")  # fmt: skip
    add("--shift", type=float, metavar="S", help="above 1, more of the steps go to the noisy end")
    add("--schedule", choices=("official", "diffusers"), help="spacing of the steps (default: official)")
    add("--step-skipping", nargs="?", const=True, type=file(".json"), metavar="RATIOS.json",
        help="about half the time, not quite the same video; by known ratios, or `kandinsky5 magcache`'s")  # fmt: skip
    add("--lora", action="append", dest="loras", type=cli.lora_file, metavar="FILE[:WEIGHT]",
        help="adapt the model: a LoRA in any layout, with a weight if not 1; repeatable")  # fmt: skip
    add("--no-trigger", action="store_false", dest="trigger", help="leave out the trigger phrases of LoRAs")

    add = parser.add_argument_group("where it runs").add_argument
    add("--device", metavar="NAME", help="such as cuda:1 (default: auto, a GPU if there is one)")
    add("--dtype", choices=cli.DTYPES, help="of the models (default: auto, bfloat16 where the device computes in it)")
    add("--attention", choices=("auto", "sdpa", "chunked", "flex", "dense"), help="its kernel (default: auto)")
    add("--offload", choices=("model", "blocks"), help="keep on the device only the running model, or its block")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile, whose first video takes longer (default: on CUDA)")  # fmt: skip
    add("--tile-space", action=argparse.BooleanOptionalAction, help="VAE in tiles of 256 pixels: less memory")
    add("--quantize", choices=("int8",), help="weights of the DiT and Qwen in 8 bits: half the memory of bfloat16")
    add("--ranks", metavar="GxS", help="under torchrun: ranks for the passes of guidance x for the tokens of a pass")
    add("--shard", action="store_true", help="under torchrun: spread the weights of the DiT and Qwen over the ranks")

    add = parser.add_argument_group("what is written").add_argument
    add("--preview", nargs="?", const=True, type=file(".png"), metavar="FILE.png",
        help="show the middle frame while sampling, in the terminal or in a file")  # fmt: skip
    add("--fps", type=cli.frame_rate, metavar="N", help="frames per second, as 24 or 30000/1001; changes the speed")
    add("--quality", type=float, metavar="Q", help="of the file, 1 to 10 (default: 8)")
    add("--enlarge", type=factor, metavar="N", help="repeat each pixel N × N times, for the small videos of nano")
    add("--no-metadata", action="store_false", dest="metadata", help="write no settings (the prompt!) into the file")
    add("-o", "--output", metavar="FILE", help=".mp4, or .png for one frame (default: out.mp4, or the next free name)")
    return parser


def file(suffix: str) -> Callable[[str], str]:
    """For options whose value may be left out: a prompt after them is not taken for it but an ArgumentTypeError."""

    def check(path: str) -> str:
        if not path.lower().endswith(suffix):
            raise argparse.ArgumentTypeError(f"{path!r} does not end in {suffix}; a prompt goes before the options")
        return path

    return check


def factor(text: str) -> int:
    """A whole number from 1 to 16. Raises ArgumentTypeError for anything else."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:9]) <= 16:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 to 16")
    return int(text)
