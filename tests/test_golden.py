"""Every case of tests/cases.py against the references' stored results, with neither diffusers nor transformers.

How the results came about: data/golden/README.md. To make them again: `python tests/parity/make_goldens.py`.
"""

import pytest
import torch

import cases
from golden_data import GOLDEN, fingerprint, load_about, load_golden_pipeline, load_results, measure_error
from kandinsky5 import Pipeline
from kandinsky5.runtime.device import is_native

COMPONENTS = [name for name in cases.OURS if name not in cases.FRAME_CASES]


@pytest.fixture(scope="module", params=["plain", "fast"])
def exact(request) -> Pipeline:
    """With the definitions, and with the forms and kernels that Pipeline.load installs."""
    return load_golden_pipeline(torch.float32, plain=request.param == "plain")


@pytest.fixture(scope="module", params=["plain", "fast"])
def half(request) -> Pipeline:
    return load_golden_pipeline(torch.bfloat16, plain=request.param == "plain")


@pytest.mark.parametrize("name", COMPONENTS)
def test_float32_matches_the_references(name, exact):
    assert measure_error(name, exact) <= cases.TOLERANCE[torch.float32]


NATIVE = is_native(torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("name", [name for name in COMPONENTS if NATIVE or name == "vae_decode" or "vae" not in name])
def test_bfloat16_matches_float32_up_to_rounding(name, half):
    assert half.dtype == torch.bfloat16
    assert measure_error(name, half) <= cases.TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("name", cases.FRAME_CASES)
def test_frames_match_the_references_within_a_level(name, exact):
    assert measure_error(name, exact) <= 1 / 255


def test_the_goldens_are_those_of_todays_cases(exact):
    assert load_results().keys() == cases.OURS.keys()
    assert load_about()["inputs"] == fingerprint(cases.build_inputs(exact.config)), "make the goldens again"
    assert load_about()["diffusers"] == "0.42.1" and load_about()["transformers"] == "5.23.0"


def test_the_goldens_are_small():
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) <= 10e6
