"""Execute the notebooks: every `NN_name.py` here becomes `NN_name.ipynb`, with its outputs.

    python notebooks/build.py              # all of them, or some: 01 05
    python notebooks/build.py --check      # execute all, write nothing, fail on the first error

Edit and review the `.py` files (jupytext's percent format); the `.ipynb` files are generated from them. Each runs in a
kernel of its own, with one thread, in this folder; as many at a time as there are cores.
Needs `pip install -c constraints.txt -e '.[notebooks]'`.
"""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("numbers", nargs="*", help="which ones, such as 01 05 (default: all)")
    parser.add_argument("--check", action="store_true", help="execute, but write nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time (default: the cores)")
    options = parser.parse_args(arguments)
    began, paths = time.monotonic(), sources(*options.numbers)
    pool = ThreadPoolExecutor(options.jobs)
    try:
        list(pool.map(partial(build, check=options.check), paths))  # stops at the first error
    finally:
        pool.shutdown(cancel_futures=True)
    print(f"all {len(paths)}: {time.monotonic() - began:.0f} s")


def build(source: Path, check: bool = False) -> None:
    """Execute one notebook, write it unless `check`, and print its time and size."""
    start = time.monotonic()
    notebook = execute(source)
    if not check:
        write(notebook, source.with_suffix(".ipynb"))
    print(f"{source.stem}: {time.monotonic() - start:.0f} s, {len(nbformat.writes(notebook)) / 1e6:.2f} MB", flush=True)


def sources(*numbers: str) -> list[Path]:
    """The sources of the notebooks, or of those whose names begin with one of `numbers`. Raises ValueError if one matches none."""
    paths = sorted(HERE.glob("[0-9][0-9]_*.py"))
    for number in numbers:
        if not any(path.name.startswith(number) for path in paths):
            raise ValueError(f"no notebook begins with {number!r}: there are {', '.join(p.stem for p in paths)}")
    return [path for path in paths if not numbers or path.name.startswith(numbers)]


def convert(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs. The same source always gives the same notebook."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata = nbformat.from_dict({})
    notebook.metadata = nbformat.from_dict(
        {
            "jupytext": {"formats": "ipynb,py:percent"},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(source: Path) -> nbformat.NotebookNode:
    """Run a notebook in a new kernel. Raises nbclient's CellExecutionError, which shows cell and traceback."""
    notebook = convert(source)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    place = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # of the kernel's own messages in the terminal
        timeout=900,  # of a cell
        startup_timeout=300,
        record_timing=False,
        resources=place,
    )
    client.execute(env=environment)
    notebook.metadata = convert(source).metadata  # the kernel writes its version into it
    return notebook


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook next to `path`, then rename it, so that `path` is always complete."""
    nbformat.validate(notebook)
    partial = path.with_suffix(".partial")
    try:
        nbformat.write(notebook, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
