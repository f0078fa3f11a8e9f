"""Every public module, class, function, method and property has a docstring."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest
from torch import nn

import kandinsky5
import sample
import weights_convert

MODULES = [sample, kandinsky5, weights_convert]
for package in (kandinsky5, weights_convert):
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    MODULES += [importlib.import_module(module.name) for module in found if not module.name.endswith("__main__")]


def missing(module) -> Iterator[str]:
    """Names of the public things that the module defines and does not describe."""
    if not module.__doc__:
        yield module.__name__
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue  # private, imported, or a constant
        if inspect.isclass(value):
            yield from missing_in_class(value)
        elif inspect.isroutine(value) and not value.__doc__:
            yield name


def missing_in_class(cls: type) -> Iterator[str]:
    doc = vars(cls).get("__doc__") or ""
    if not doc or doc.startswith(f"{cls.__name__}("):  # the list of fields that dataclasses write
        yield cls.__name__
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        described = name == "forward" and issubclass(cls, nn.Module)  # by its class
        if inspect.isfunction(function) and not name.startswith("_") and not described and not function.__doc__:
            yield f"{cls.__name__}.{name}"


MISSING = {module.__name__: list(missing(module)) for module in MODULES}  # before fixtures replace functions


@pytest.mark.parametrize("module", MISSING)
def test_public_names_have_docstrings(module):
    assert MISSING[module] == []
