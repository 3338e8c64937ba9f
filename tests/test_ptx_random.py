"""Random cases through the CUDA kernels' PTX."""

from __future__ import annotations

import os

import pytest
from ptx import fuzz, harness

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(harness.missing()), reason=f"PTX: {harness.missing()}"),
    pytest.mark.usefixtures("one_thread"),
]
COUNT = int(os.environ.get("DLB_FAST_FUZZ_CASES", "120"))


def test_random_cases() -> None:
    described = [fuzz.one_case(seed) for seed in range(COUNT)]
    options = ("virtual", "probabilities", "dense", "pair", "weight", "kd_mask")
    for word in ("roll", "same", "again 1", "again -1", *options):
        assert any(word in text for text in described), word
