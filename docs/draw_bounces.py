"""Draw a folder of clips that teaches nano a word it does not know: 200 mp4 files with a caption next to each.

    python docs/draw_bounces.py bounces

In two of three something bounces; the rest show what nano knows, so that it does not forget that. Each file has six
takes of what its caption says, one after the other, in other places. docs/teach-a-word.md uses them.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from kandinsky5 import cli
from kandinsky5.files import make_folder, write_text
from kandinsky5.nano.captions import write_caption
from kandinsky5.nano.world import FPS, NEW_MOTION, Scene, draw_scene, sample_scene
from kandinsky5.video_io import write_video

SEED = 11  # of the scenes; the judge's are others
SIDE = 128  # pixels: twice what nano makes, as mp4 stores colours at half of that


def draw(folder: Path, count: int, takes: int) -> None:
    """Write `count` clips and captions; clip i is the same in every run."""
    make_folder(folder)
    for i in range(count):
        rng, split = np.random.default_rng([SEED, i]), "train" if i % 3 == 2 else NEW_MOTION
        scene = sample_scene(rng, split, num_objects=1)
        caption = write_caption(scene, "english", rng).text
        scenes = [scene, *(retake(scene, split, rng) for _ in range(takes - 1))]
        frames = np.concatenate([draw_scene(one, height=SIDE, width=SIDE) for one in scenes])
        write_video(folder / f"{i:03d}.mp4", frames, FPS, quality=10)
        write_text(folder / f"{i:03d}.txt", caption + "\n")


def retake(scene: Scene, split: str, rng: np.random.Generator) -> Scene:
    """The same words, drawn again: another position, distance and radius."""
    (first,) = scene.objects
    while True:
        (other,) = sample_scene(rng, split, num_objects=1).objects
        if (other.shape, other.motion, other.size) == (first.shape, first.motion, first.size):
            return replace(scene, objects=(replace(other, colour=first.colour),))


def main() -> None:
    """The command line."""
    parser = cli.Parser("draw_bounces.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="files (default: 200)")
    parser.add_argument("--takes", type=int, default=6, metavar="N", help="of each, 1.7 seconds long (default: 6)")
    arguments = parser.parse_args()
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        raise ValueError(f"{arguments.folder} is not empty: name a new folder")
    if arguments.takes < 1:
        raise ValueError(f"--takes {arguments.takes}: give at least 1")
    draw(arguments.folder, arguments.count, arguments.takes)
    print(f"{arguments.count} files of {arguments.takes} clips each, and captions, in {arguments.folder}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
