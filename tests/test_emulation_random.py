"""Random cases through the emulated kernels, as they are and under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulation import fuzz, harness

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=f"emulator: {harness.missing()}")
COUNT = int(os.environ.get("DLB_FAST_FUZZ_CASES", "120"))


def test_random_cases() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    described = [fuzz.one_case(harness.module(), seed) for seed in range(COUNT)]
    torch.set_num_threads(threads)
    options = ("virtual", "probabilities", "dense", "pair", "weight", "kd_mask")
    for word in ("roll", "same", "again 1", "again -1", *options):
        assert any(word in text for text in described), word


@pytest.mark.slow
def test_random_cases_under_sanitizers() -> None:
    runtimes = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("g++ has no sanitizer runtimes")
    module = harness.build(float32_only=True, flags=("-O1", *harness.SANITIZERS))
    environment = os.environ | {
        # Python and torch were not built with it: the runtime comes first, and their leaks are not ours.
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    script = [sys.executable, fuzz.__file__, str(module), "1000", str(COUNT // 3)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert f"{COUNT // 3} cases" in done.stdout
