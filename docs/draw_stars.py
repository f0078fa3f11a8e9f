"""Draw a folder of clips that teaches nano a word it does not know: 200 short mp4 files with a caption next to each.

    python docs/draw_stars.py stars

Two of three show a star, the rest what nano knows, so that it does not forget that. docs/teach-a-word.md uses them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from kandinsky5 import cli
from kandinsky5.files import make_folder, write_text
from kandinsky5.nano.captions import write_caption
from kandinsky5.nano.world import FPS, NEW_SHAPE, draw_scene, sample_scene
from kandinsky5.video_io import write_video

SEED = 11  # of the scenes; the judge's are others


def draw(folder: Path, count: int) -> None:
    """Write `count` clips and captions; clip i is the same in every run."""
    make_folder(folder)
    for i in range(count):
        rng = np.random.default_rng([SEED, i])
        scene = sample_scene(rng, "train" if i % 3 == 2 else NEW_SHAPE, num_objects=1)
        write_video(folder / f"{i:03d}.mp4", draw_scene(scene), FPS, quality=10)
        write_text(folder / f"{i:03d}.txt", write_caption(scene, "english", rng).text + "\n")


def main() -> None:
    """The command line."""
    parser = cli.Parser("draw_stars.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="clips (default: 200)")
    arguments = parser.parse_args()
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        raise ValueError(f"{arguments.folder} is not empty: name a new folder")
    draw(arguments.folder, arguments.count)
    print(f"{arguments.count} clips and captions in {arguments.folder}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
