"""The rolling form of the Triton kernel against ``LogitBuffer``'s own definition, step by step."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import op_options, row_loss

from dlb_fast import LogitBuffer, ops

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU these tests need TRITON_INTERPRET=1 (conftest sets it)", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAN = float("nan")


def steps(capacity, classes, dtype, layout, ids=True, buffer_dtype=None, **options):
    """Feed batches of (old, new) rows, ``num_old`` given or not, to both; yields the kernel's parts after each."""
    mine, right = (LogitBuffer(classes, capacity, buffer_dtype or dtype, DEVICE) for _ in range(2))
    g = torch.Generator().manual_seed(3)
    stream = torch.arange(1000)
    place = layout[0][0]
    for old, new, given in layout:
        z = (2 * torch.randn(old + new, classes, generator=g, dtype=F64)).to(dtype).to(DEVICE)
        y = torch.randint(0, classes, (old + new,), generator=g).to(DEVICE)
        own = stream[place - old : place + new].clone()
        place += new
        if ids == "wrong" and old > 1:
            own[1] = 999
        every = {**options, "ids": own.to(DEVICE) if ids else None, "num_old": given}
        results = []
        for impl, buffer in (("triton", mine), ("torch", right)):
            x = z.clone().requires_grad_()
            loss, parts = row_loss("test", impl, x, y, buffer=buffer, **every)
            results.append((loss.detach(), parts[:4], torch.autograd.grad(loss.sum(), x)[0], parts))
        for one, two in zip(results[0][:3], results[1][:3], strict=True):
            close = {"rtol": 1e-5, "atol": 2e-6} if dtype == F32 else {"rtol": 1e-2, "atol": 1e-4}
            torch.testing.assert_close(one, two, **close)
        assert torch.equal(mine.logits, right.logits)
        assert torch.equal(mine.slots, right.slots) and mine.count == right.count
        yield results[0][3]


def test_first_full_and_short_steps():
    layout = [(4, 4, None), (4, 4, None), (4, 2, None), (2, 4, None), (4, 4, None)]
    taught = [p[5].item() for p in steps(4, 50, F32, layout)]
    assert taught == [0, 4, 4, 2, 4]


def test_without_ids_and_half_precision_storage():
    for dtype in (BF16, F16):
        list(steps(3, 40, F32, [(0, 3, 0), (3, 3, None), (3, 3, None)], ids=False, buffer_dtype=dtype))
    list(steps(3, 40, BF16, [(0, 3, 0), (3, 3, None), (3, 3, None)]))


def test_num_old_given_and_room_to_spare():
    layout = [(0, 5, 0), (5, 3, 5), (3, 5, 3), (5, 0, 5), (0, 4, 0), (4, 4, None)]
    list(steps(7, 20, F32, layout))


def test_resumed_without_a_buffer():
    taught = [p[5].item() for p in steps(4, 20, F32, [(4, 4, 4), (4, 4, None)])]
    assert taught == [0, 4]


def test_mismatched_rows_are_counted_and_not_taught():
    mask = torch.ones(8, dtype=torch.bool, device=DEVICE)
    mask[2] = False
    taught = [p[5].item() for p in steps(4, 20, F32, [(4, 4, None)] * 3, ids="wrong", kd_mask=mask)]
    assert taught == [0, 2, 2]


def test_ids_are_written_by_their_owner_after_the_counting_kernel(monkeypatch):
    from dlb_fast.kernels import launch

    monkeypatch.setattr(launch, "COUNT_HERE_ROWS", 2)
    list(steps(4, 20, F32, [(4, 4, None)] * 3, ids="wrong"))


def test_per_row_losses_and_long_rows():
    list(steps(2, 5000, F32, [(2, 2, None)] * 2, reduction="none", label_smoothing=0.1))
    list(steps(1, 9001, F32, [(1, 1, None)] * 3))


def test_a_corrupt_count_stays_inside():
    buffer = LogitBuffer(8, 4, F32, DEVICE)
    guard = buffer.logits.clone()
    buffer.slots[0] = 10**6
    z, y = torch.randn(6, 8, device=DEVICE), torch.arange(6, device=DEVICE)
    ops.op_for("triton", "last_batch_update")(z, buffer.logits, buffer.slots, None, -1, *op_options(y))
    assert buffer.slots[0] == 2 and torch.equal(buffer.logits[:2], z[4:]) and torch.equal(buffer.logits[2:], guard[2:])


def test_ignored_nan_rows_are_stored_as_they_are():
    buffer = LogitBuffer(8, 3, F32, DEVICE)
    z, y = torch.randn(3, 8, device=DEVICE), torch.arange(3, device=DEVICE)
    z[1, 2] = NAN
    y[1] = -100
    _, parts = row_loss("test", "triton", z, y, buffer=buffer, num_old=0)
    assert parts[:4].isfinite().all() and torch.equal(buffer.logits.isnan(), z.isnan())


