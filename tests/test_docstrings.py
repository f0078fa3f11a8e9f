"""Every public name says what it is: modules, functions, classes, methods, properties.

What takes or gives tensors names a shape, what raises an error says which. All this in the docstring, where help() and
editors show it.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
import typing
from collections.abc import Iterator

import pytest
from torch import nn

import kandinsky5
import sample
import weights_convert

PACKAGES = (kandinsky5, weights_convert)
MODULES = [sample, *PACKAGES]
for package in PACKAGES:
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    MODULES += [importlib.import_module(module.name) for module in found]


def public_names(module) -> Iterator[tuple[str, object, str]]:
    """(name, object, docstring) of the module and all public names that it defines."""
    yield module.__name__, module, module.__doc__ or ""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue  # private, imported, or a constant
        if inspect.isclass(value):
            yield f"{module.__name__}.{name}", value, own_doc(value)
            yield from public_methods(f"{module.__name__}.{name}", value)
        elif callable(value) and hasattr(value, "__name__"):
            yield f"{module.__name__}.{name}", inspect.unwrap(value), value.__doc__ or ""


def public_methods(where: str, cls: type) -> Iterator[tuple[str, object, str]]:
    """Public methods and properties, `__call__` among them. Of a model's `forward` its class may speak."""
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(function) and (name == "__call__" or not name.startswith("_")):
            doc = function.__doc__ or ""
            if name == "forward" and issubclass(cls, nn.Module):
                doc += own_doc(cls)
            yield f"{where}.{name}", inspect.unwrap(function), doc


def own_doc(cls: type) -> str:
    """The docstring that the class itself has: not its base's, and not the field list that dataclasses write for it."""
    doc = vars(cls).get("__doc__") or ""
    return "" if doc.startswith(f"{cls.__name__}(") else doc


NAMES = {name: (value, doc) for module in MODULES for name, value, doc in public_names(module)}

FUNCTIONS = {name: (value, doc) for name, (value, doc) in NAMES.items() if inspect.isfunction(value)}


def has_tensors(function) -> bool:
    """Whether it takes or gives arrays; tensors by name are weights, whose shapes are those of their model."""
    hints = " ".join(str(hint) for hint in typing.get_type_hints(function).values())
    hints = re.sub(r"(Mapping|dict)\[str, torch\.Tensor\]", "", hints)
    return "torch.Tensor" in hints or "numpy.ndarray" in hints


def names_a_shape(doc: str) -> bool:
    """It has "shape" or "scalar" in it, or sizes in brackets: (B, L, dim), (steps + 1,), (…, 16)."""
    if re.search(r"\b(shapes?|scalars?)\b", doc):
        return True
    for inside in re.findall(r"\(([^()]+,[^()]*)\)", doc):
        axes = [axis.strip() for axis in inside.split(",")]
        sizes = all(re.fullmatch(r"([\w/]+( ?[·+−] ?[\w/]+)*|…|)", axis) for axis in axes)
        if sizes and any(re.fullmatch(r"[A-Z]|\d+|…|", axis) for axis in axes):  # not "(one, two)"
            return True
    return False


def errors_raised(function) -> set[str]:
    """Names of the errors that its body raises, but for those that it catches."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = {ast.unparse(node.exc.func) for node in ast.walk(tree) if hasattr(getattr(node, "exc", None), "func")}
    caught = " ".join(
        ast.unparse(node.type) for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type
    )
    return {error.removeprefix("argparse.") for error in raised if error not in caught}


def test_all_modules_are_walked():
    assert {"kandinsky5.dit", "kandinsky5.nano.world", "weights_convert.sizes", "sample"} <= NAMES.keys()
    assert {"kandinsky5.pipeline.Pipeline.__call__", "kandinsky5.pipeline.Pipeline.device"} <= NAMES.keys()


def test_every_public_name_has_a_docstring():
    assert [name for name, (_, doc) in NAMES.items() if not doc.strip()] == []


def test_docstrings_of_functions_on_tensors_name_shapes():
    assert len(FUNCTIONS) > 200
    assert [n for n, (function, doc) in FUNCTIONS.items() if has_tensors(function) and not names_a_shape(doc)] == []


def test_docstrings_name_the_errors_that_are_raised():
    assert [
        f"{name}: {error}"
        for name, (function, doc) in FUNCTIONS.items()
        for error in errors_raised(function)
        if error not in doc
    ] == []


@pytest.mark.parametrize(
    "doc, expected",
    [
        ("x (B, L, dim) → the same", True),
        ("Flow times: (steps + 1,) float32.", True),
        ("Scaled latents (…, 16).", True),
        ("v_u + w·(v_c − v_u), any shape.", True),
        ("A scalar.", True),
        ("Vectors (biases, norms) have none.", False),
        ("As it is, in the official code (of the authors, 2025).", False),
        ("Multiplies two tensors.", False),
    ],
)
def test_what_counts_as_a_shape(doc, expected):
    assert names_a_shape(doc) == expected
