"""Triton's PTX for sm_90, executed on the CPU, against the reference: every regime, option and dtype, and mutants.

The kernels' own launcher calls it: a driver pretends that the card is here. The interpreter, which the other tests use,
knows neither layouts nor barriers nor what the compiler makes of them.
"""

from __future__ import annotations

import shutil

import pytest
from ptx import triton_cases
from ptx.triton_device import child

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


@pytest.mark.parametrize("name", triton_cases.CASES)
def test_a_case_is_right(name: str) -> None:
    child().call(triton_cases.check, name)


def test_scale_grad() -> None:
    child().call(triton_cases.scaled)


@pytest.mark.parametrize("name", triton_cases.BROKEN)
def test_barriers_and_accesses_are_missed(name: str) -> None:
    """Triton puts a barrier before and after each reduction. One may go where the other barriers order all accesses:
    the machine has followed every one of them and found no race, and the numbers are right."""
    found = child().call(triton_cases.broken, name)
    assert found["barriers"] > 20 and not found["unreached"]
    assert len(found["redundant"]) <= found["barriers"] / 4, found
    assert len(found["unnoticed"]) <= found["others"] / 2, found
