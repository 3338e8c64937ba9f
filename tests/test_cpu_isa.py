"""Every instruction set that this machine can run computes the losses and the crops: one process for each.

The row kernels and the resize are compiled once for each set. The crops are torch's, bit for bit. The losses are no
further from float64 than plain PyTorch, plus four units in the last place of the largest element, as in
tests/test_last_batch.py.
"""

from __future__ import annotations

import json
import os

import pytest
from builders import ROOT, python

from dlb_fast import _backends

CROPS = 150
SETS = ("portable", "avx2", "avx512")

MEASURE = """
import json, sys, torch, test_resized_crops
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
print(json.dumps({"set": _build.build_info()["cpu_instruction_set"], "errors": errors,
    "crops": test_resized_crops.compare(3, int(sys.argv[1])) if test_resized_crops.resized_crops() else None}))
"""


@pytest.fixture(scope="module", params=SETS)
def found(request):
    """What a process with this instruction set measured: errors of the losses, and how many crops of which kind."""
    if not _backends.implementations()["cpu"].available:
        pytest.skip(_backends.implementations()["cpu"].reason)
    pytest.importorskip("dlb_fast._build", reason="the build-info module is not built")
    tests = str(ROOT / "tests")
    done = python("-c", MEASURE, CROPS, PYTHONPATH=os.pathsep.join([str(ROOT), tests]), DLB_FAST_CPU_ISA=request.param)
    measured = json.loads(done.stdout)
    if measured["set"] != request.param:
        pytest.skip(f"this machine has no {request.param}; it ran {measured['set']}")
    return measured


def test_losses_and_gradients(found):
    worst = {case: pair for case, pair in found["errors"].items() if not (pair[0] <= 1 and pair[1] <= 1)}
    assert not worst, f"error of gradient and loss, as a share of what is allowed: {worst}"


def test_crops(found):
    if found["crops"] is None:
        pytest.skip("the op is not built here")
    assert all(count > 10 for count in found["crops"].values()), found["crops"]
