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
    child().call(triton_cases.run, name)


def test_scale_grad() -> None:
    child().call(triton_cases.scaled)


@pytest.mark.parametrize("name", triton_cases.BROKEN)
def test_every_barrier_is_missed_or_others_do_its_work(name: str) -> None:
    """Triton puts a barrier before and after each reduction, and some order nothing that others do not order too.

    Of each the machine names those others: it has followed every pair of accesses that the lost one lies between.
    """
    found = child().call(triton_cases.broken, name, True, 0)
    assert set(found) <= {"noticed", "redundant"} and len(found["noticed"]) > 20
    for one in found.get("redundant", []):
        assert one.mutant.kind == "barrier", str(one)
        assert all("bar" in text and not text.startswith(f"{one.mutant.at}:") for text in one.instead), str(one)


@pytest.mark.parametrize("name", triton_cases.BROKEN)
def test_every_wrong_index_and_lost_predicate_is_noticed_or_explained(name: str) -> None:
    found = child().call(triton_cases.broken, name, False, 8)
    assert len(found["noticed"]) >= 8, {why: len(verdicts) for why, verdicts in found.items()}
    assert not found.get(""), [str(one) for one in found[""]]
