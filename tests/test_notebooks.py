"""The committed notebooks: generated from their sources, executed in order, small, nothing stale.

Executing them takes minutes: `python notebooks/build.py --check`, which CI runs.
"""

import ast
import base64
import importlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
every_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


@cache
def read_notebook(source: Path) -> dict:
    return json.loads(source.with_suffix(".ipynb").read_text())


def read_source(source: Path) -> list[tuple[str, str]]:
    """The cells of a file in jupytext's percent format: (kind, text)."""
    cells = []
    for part in re.split(r"^# %%", source.read_text(), flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n")
        if head.strip() == "[markdown]":
            cells.append(("markdown", re.sub(r"^# ?", "", text, flags=re.MULTILINE).strip()))
        else:
            cells.append(("code", text.strip()))
    return cells


def code_of(source: Path) -> str:
    return "\n\n".join(text for kind, text in read_source(source) if kind == "code")


def test_sources_and_notebooks_correspond():
    assert len(SOURCES) == 7
    assert [path.with_suffix(".ipynb") for path in SOURCES] == sorted(FOLDER.glob("*.ipynb"))


@every_notebook
def test_notebook_matches_its_source(source):
    cells = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in read_notebook(source)["cells"]]
    stale = f"{source.stem}.ipynb is stale: run python notebooks/build.py {source.stem[:2]}"
    assert cells == read_source(source), stale


@every_notebook
def test_cells_ran_in_order_without_errors(source):
    cells = [cell for cell in read_notebook(source)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


@every_notebook
def test_notebook_has_images_and_is_small(source):
    outputs = [o.get("data", {}) for cell in read_notebook(source)["cells"] for o in cell.get("outputs", [])]
    pictures = [base64.b64decode("".join(data["image/png"])) for data in outputs if "image/png" in data]
    assert len(pictures) >= 4 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert source.with_suffix(".ipynb").stat().st_size < 1.5e6


@every_notebook
def test_notebook_states_its_goal_and_exercises(source):
    texts = [text for kind, text in read_source(source) if kind == "markdown"]
    assert texts[0].startswith(f"# {int(source.stem[:2])} · ") and "**At the end you will" in texts[0]
    assert source.stem.startswith("01") or "**Try:**" in texts[-1]


@every_notebook
def test_links_lead_to_files(source):
    links = re.findall(r"\]\(([^)]+)\)", source.read_text())
    assert [link for link in links if not link.startswith("http") and not (FOLDER / link).is_file()] == []


@every_notebook
def test_imports_from_the_package_exist(source):
    """A moved name fails here, not only when the notebook runs."""
    imports = [node for node in ast.walk(ast.parse(code_of(source))) if isinstance(node, ast.ImportFrom)]
    imports = [node for node in imports if node.module.split(".")[0] == "kandinsky5"]
    assert imports
    for node in imports:
        module = importlib.import_module(node.module)
        for name in (alias.name for alias in node.names):
            if not hasattr(module, name):
                importlib.import_module(f"{node.module}.{name}")  # a submodule, or an error that names it


@every_notebook
def test_no_class_of_the_package_is_redefined(source):
    """A class with the name of one in the package would be a copy."""
    defined = {node.name for node in ast.walk(ast.parse(code_of(source))) if isinstance(node, ast.ClassDef)}
    package = "".join(path.read_text() for path in FOLDER.parent.glob("kandinsky5/*.py"))
    assert not defined & set(re.findall(r"^class (\w+)", package, flags=re.MULTILINE))


def test_notebooks_import_the_checkout_that_they_lie_in(tmp_path):
    """In plain Jupyter, whose kernel starts next to the notebook; also where another copy is installed."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("IPython")
    (tmp_path / "kandinsky5").mkdir()
    (tmp_path / "kandinsky5" / "__init__.py").write_text("raise ImportError('a copy')")
    program = [sys.executable, "-c", "import show, kandinsky5; print(kandinsky5.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(program, cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(FOLDER.parent.resolve() / "kandinsky5" / "__init__.py"), done.stderr
    for source in SOURCES:
        names = [line.split()[1] for line in code_of(source).splitlines() if line.startswith(("from ", "import "))]
        assert next(name for name in names if name.startswith(("show", "kandinsky5"))) == "show"
