"""Both sides of every comparison: `theirs`, the references' models, and `ours`, the same weights converted.

By default the weights are small and random. With `pytest tests/parity --checkpoint SRC` they are those of a real
Diffusers folder, and a table of the errors is printed at the end. The references compute all cases first and go before
ours are loaded, so that only one side is in memory.
"""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the parity suite needs the extra: pip install .[parity] -c constraints.txt")

import cases  # noqa: E402
import theirs as reference  # noqa: E402
from golden_data import make_fast, make_plain  # noqa: E402
from kandinsky5 import Pipeline  # noqa: E402
from kandinsky5.config_file import load_config  # noqa: E402
from small_diffusers import save_small_checkpoint  # noqa: E402
from weights_convert import from_diffusers  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ERRORS: list[tuple[str, str, float, float]] = []  # case, precision, error, tolerance


def pytest_addoption(parser):
    group = parser.getgroup("parity")
    need = "Lite needs about 45 GB of memory, 22 with --precision bfloat16, and 20 GB of disk; Pro 115, 58, 54"
    group.addoption("--checkpoint", type=Path, metavar="SRC", help=f"a Diffusers folder to compare on; {need}")
    group.addoption("--device", default="cpu", help="where both sides run (default: cpu)")
    group.addoption("--precision", choices=DTYPES, help="only this one (default: both)")


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--precision")
        names = [chosen] if chosen else list(DTYPES)
        metafunc.parametrize("dtype", [DTYPES[name] for name in names], ids=names, scope="session")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def source(request, tmp_path_factory) -> Path:
    """The checkpoint in the Diffusers layout."""
    given = request.config.getoption("--checkpoint")
    if given:
        return given
    folder = tmp_path_factory.mktemp("parity") / "diffusers"
    save_small_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def converted(source, tmp_path_factory) -> Path:
    """The same in our layout."""
    folder = tmp_path_factory.mktemp("parity") / "native"
    from_diffusers(source, folder)
    return folder


@pytest.fixture(scope="session")
def theirs(request, source, converted, dtype, device) -> dict:
    """What the references compute in each case that will run: their models are gone when this returns."""
    wanted = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    inputs = cases.build_inputs(load_config(converted / "config.json"))
    parts = reference.load_components(source, dtype, device)
    with pytest.MonkeyPatch.context() as monkeypatch:
        reference.make_comparable(monkeypatch)
        names = [name for name in inputs if name in wanted and cases.is_compared(name, dtype)]
        results = {name: reference.compute(name, parts, inputs[name]) for name in names}
    parts.clear()
    gc.collect()
    return results


@pytest.fixture(scope="session")
def ours(theirs, converted, dtype, device) -> Pipeline:
    return Pipeline.load(converted, device=device, dtype=dtype)


@pytest.fixture(params=["plain", "fast"])
def either(request, ours) -> Iterator[Pipeline]:
    """With the definitions, and with the forms and kernels that Pipeline.load installs; the weights are loaded once."""
    if request.param == "plain":
        make_plain(ours)
    yield ours
    make_fast(ours)


@pytest.fixture
def record():
    """Keep an error for the table at the end of the run."""
    return lambda *row: ERRORS.append(row)


def pytest_terminal_summary(terminalreporter):
    if ERRORS:
        terminalreporter.write_line("\n| case | precision | error | at most |\n|---|---|---|---|")
        for case, precision, error, limit in ERRORS:
            terminalreporter.write_line(f"| {case} | {precision} | {error:.1e} | {limit:.1e} |")
