"""What a run logs, as tables and curves.

loss.csv, samples.csv  one row per logged step, per sample
loss.png               loss.csv as curves
held_out.png           samples.csv: the loss of held-out samples by flow time
events/                both, for TensorBoard
"""

import csv
import io
import shutil
from pathlib import Path

from kandinsky5.files import read_utf8, replacing
from kandinsky5.screen import printable

LARGEST_LOG = 2**28  # bytes: a row for each of a million steps


def append_row(path: Path, row: dict[str, float]) -> None:
    """Append a row to a CSV file; with a new column the file is rewritten."""
    rows = read_rows(path)
    columns = list(dict.fromkeys([*(rows[0] if rows else []), *row]))
    if rows and list(rows[0]) == columns:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns).writerow(row)
    else:
        _write_rows(path, columns, [*rows, row])


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a log, [] if there is none. Raises ValueError where another program has changed its form."""
    if not path.is_file():
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(read_utf8(path, LARGEST_LOG), newline="")))
        for row in rows:
            int(row["step"])
            [float(cell) for cell in row.values() if cell]
    except (csv.Error, LookupError, TypeError, ValueError) as error:
        reason = printable(error, 100)
        raise ValueError(f"{path} is no log of a run any more ({reason}): restore it, or remove it") from error
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Remove what an interrupted run logged after it last saved its state."""
    rows = read_rows(path)
    kept = [row for row in rows if int(row["step"]) <= step]
    if len(kept) < len(rows):
        _write_rows(path, list(rows[0]), kept)


def _write_rows(path: Path, columns: list[str], rows: list[dict]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def plot_losses(path: Path, image: Path) -> None:
    """The curves of a log as a PNG, with the values of the same name that are in samples.csv: those of held-out data.

    Nothing without matplotlib (`pip install kandinsky5[train]`).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows, held_out = read_rows(path), read_rows(path.with_name("samples.csv"))
    columns = [name for name in rows[0] if name not in ("step", "seconds", "rate")]
    panels = {name: [name] for name in columns if not name.startswith("gradient ")}
    blocks = [name for name in columns if name.startswith("gradient ")]  # of each block, together
    panels |= {"gradient of each block": blocks} if blocks else {}
    figure = Figure(figsize=(8, 2.2 * len(panels)), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        positive = True
        for name in names:
            points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
            axes.plot(*zip(*points, strict=True), linewidth=0.8, label=name.removeprefix("gradient "))
            positive = positive and all(value > 0 for _, value in points)
        if others := [(int(row["step"]), float(row[title])) for row in held_out if row.get(title)]:
            axes.plot(*zip(*others, strict=True), linewidth=0.8, marker=".", label="held-out")
            axes.legend(fontsize=7)
        axes.set_title(title, fontsize=9)
        if len(names) > 1:
            axes.legend(fontsize=5, ncols=4)
        if positive:
            axes.set_yscale("log")
    with replacing(image) as temporary:
        figure.savefig(temporary, dpi=80)


def plot_by_flow_time(path: Path, image: Path, curves: int = 6) -> None:
    """A log with columns "step" and "t …" as a PNG, one curve per row, `curves` rows at most; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [row for row in read_rows(path) if any(name.startswith("t ") and row[name] for name in row)]
    if not rows:
        return
    last = len(rows) - 1
    shown = sorted({round(i * last / max(curves - 1, 1)) for i in range(curves)})
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number in shown:
        points = [(float(name[2:]), float(value)) for name, value in rows[number].items() if name.startswith("t ")]
        axes.plot(*zip(*points, strict=True), marker=".", label=f"step {rows[number]['step']}")
    axes.set(xlabel="flow time (1: noise)", ylabel="validation loss", yscale="log")
    axes.legend(fontsize=8)
    with replacing(image) as temporary:
        figure.savefig(temporary, dpi=80)


def write_events(path: Path, folder: Path) -> None:
    """A log as TensorBoard's events in a new `folder`; nothing without the library (`pip install tensorboard`)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for row in read_rows(path):
            for name, value in row.items():
                if name != "step" and value:
                    writer.add_scalar(name, float(value), int(row["step"]))
