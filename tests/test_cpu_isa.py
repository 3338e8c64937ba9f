"""Every instruction set that this machine can run computes the losses: the row kernels are compiled once for each.

The rule of tests/test_last_batch.py: no further from float64 than plain PyTorch, plus four units in the
last place of the largest element.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlb_fast import _backends

ROOT = Path(__file__).parent.parent
SETS = ("portable", "avx2", "avx512")

MEASURE = """
import json, torch
from dlb_fast import _build, fused_lb_loss
errors = {}
for classes in (1, 5, 100, 1003, 5000):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for temperature in (1.0, 2.5, 3.0):
            g = torch.Generator().manual_seed(classes)
            z = (4 * torch.randn(12, classes, generator=g)).to(dtype)
            z[9, classes // 2] = -torch.inf if classes > 1 else 0
            t = (z[:6].float() + torch.randn(6, classes, generator=g)).to(dtype)
            y = torch.zeros(12, dtype=torch.long)

            def gradient(impl, kind):
                leaf = z.to(kind, copy=True).requires_grad_()
                loss = fused_lb_loss(leaf, y, t.to(kind), temperature=temperature, impl=impl)
                loss.backward()
                return leaf.grad.double(), loss.item()

            (true, value), (eager, _), (ours, loss) = (
                gradient("torch", torch.float64), gradient("torch", dtype), gradient("cpu", dtype)
            )
            unit = true.abs().max().clamp(min=1e-3) * torch.finfo(dtype).eps
            allowed = (eager - true).abs().max() + 4 * unit
            assert classes > 1 or not ours.any(), "one class: nothing to learn, exactly"
            errors[f"{classes} {dtype} {temperature}"] = (
                ((ours - true).abs().max() / allowed).item(), abs(loss - value) / max(abs(value), 1.0) / 5e-7
            )
print(json.dumps({"set": _build.build_info()["cpu_instruction_set"], "errors": errors}))
"""


@pytest.mark.parametrize("wished", SETS)
def test_losses_and_gradients(wished):
    if not _backends.implementations()["cpu"].available:
        pytest.skip(_backends.implementations()["cpu"].reason)
    pytest.importorskip("dlb_fast._build", reason="the build-info module is not built")
    environment = {**os.environ, "DLB_FAST_CPU_ISA": wished, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if found["set"] != wished:
        pytest.skip(f"this machine has no {wished}; it ran {found['set']}")
    worst = {case: pair for case, pair in found["errors"].items() if not (pair[0] <= 1 and pair[1] <= 1)}
    assert not worst, f"error of gradient and loss, as a share of what is allowed: {worst}"
