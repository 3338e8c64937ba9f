"""What a loss asks of torch: operations and allocations. Time on a GPU needs one; a count does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import available
from torch import Tensor

from dlb_fast import LastBatchLoss, LogitBuffer, _backends, dlb_step, fused_lb_loss

pytestmark = pytest.mark.skipif(not available("cpu"), reason=_backends.implementations()["cpu"].reason)

ROWS, CLASSES = 8, 6
LOSS, PARTS, GRAD = 4, 24, 4 * ROWS * CLASSES
# Views, and memory that nothing is written to.
NO_LAUNCH = ("detach", "slice", "select", "unbind", "as_strided", "to", "empty", "item")


def counted(work: Callable[[], object]) -> tuple[list[str], list[int]]:
    """The outermost operations that compute or copy, and the bytes of every allocation, in order."""
    with torch.autograd.profiler.profile(profile_memory=True) as record:  # torch.profiler imports the compiler
        work()
    operations: list[str] = []
    allocations: list[int] = []

    def look(event, inside: bool) -> None:
        if event.tag == torch._C._profiler._EventType.Allocation:
            allocations.extend([event.extra_fields.alloc_size] if event.extra_fields.alloc_size > 0 else [])
        namespace, _, name = event.name.partition("::")
        operation = namespace in ("aten", "dlb_fast")
        if operation and not inside and name not in NO_LAUNCH:
            operations.append(name)
        for child in event.children:
            look(child, inside or operation)

    for event in record.kineto_results.experimental_event_tree():
        look(event, False)
    return operations, allocations


@pytest.fixture(params=["cpu", "cuda"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The host's way to an implementation. That of CUDA is gone with tensors of the CPU, whose op has the same name."""
    monkeypatch.setattr(_backends, "pick", lambda *_: request.param)
    return request.param


def batch() -> tuple[Tensor, Tensor, Tensor]:
    z = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0))
    return z, torch.arange(ROWS) % CLASSES, torch.arange(ROWS)


def steady() -> tuple[LastBatchLoss, Tensor, Tensor, Tensor]:
    """A criterion that has seen a few batches, and another batch."""
    criterion = LastBatchLoss(CLASSES)
    z, y, ids = batch()
    for k, rows in enumerate((ROWS // 2, ROWS, ROWS)):
        criterion(z[:rows], y[:rows], ids[:rows] + ROWS // 2 * max(k - 1, 0)).detach()
    return criterion, z.requires_grad_(), y, ids + ROWS


def test_a_criterion_is_one_operation_with_three_outputs(host: str) -> None:
    """Loss, parts and gradient have a storage each: outputs of an op must not alias, and a view costs more."""
    criterion, z, y, ids = steady()
    operations, allocations = counted(lambda: criterion(z, y, ids))
    assert operations == ["last_batch_update"]
    assert sorted(allocations) == [LOSS, PARTS, GRAD]
    assert counted(lambda: criterion.parts) == ([], [])


def test_a_loss_changed_in_place_leaves_its_parts(host: str) -> None:
    """As `loss /= n` in a loop that accumulates gradients: one more reason for a storage each."""
    criterion, z, y, ids = steady()
    loss = criterion(z, y, ids)
    whole, kept = loss.item(), criterion.parts
    loss /= 2
    loss.backward()
    assert kept.loss.item() == whole and loss.item() == whole / 2
    other, z_other, *_ = steady()
    other(z_other, y, ids).backward()
    assert torch.equal(z.grad, z_other.grad / 2)


def test_evaluation_allocates_no_gradient(host: str) -> None:
    criterion, z, y, _ = steady()
    criterion.eval()
    with torch.no_grad():
        operations, allocations = counted(lambda: criterion(z, y))
    assert operations == ["last_batch"] and sorted(allocations) == [LOSS, PARTS]


def test_backward_of_a_loss_reads_its_factor_where_it_is(host: str) -> None:
    """torch fills a one. The CPU reads it; a GPU's host cannot without waiting, and the kernel leaves for a one."""
    criterion, z, y, ids = steady()
    loss = criterion(z, y, ids)
    operations, allocations = counted(loss.backward)
    assert operations == (["ones_like"] if host == "cpu" else ["ones_like", "scale_grad_"])
    assert allocations == [LOSS]  # the one


def test_backward_of_a_scaled_loss_scales_in_place(host: str) -> None:
    """As with a GradScaler or gradient accumulation."""
    criterion, z, y, ids = steady()
    factor = torch.tensor(0.5)
    loss = criterion(z, y, ids) * factor
    operations, allocations = counted(loss.backward)
    assert operations == ["ones_like", "mul", "scale_grad_"] and allocations == [LOSS, LOSS]


def test_dlb_step_and_its_backward_are_one_operation(host: str) -> None:
    """The fast loop: no factor, so nothing fills, reads or applies one."""
    z, y, ids = batch()
    buffer = LogitBuffer(CLASSES, ROWS // 2)
    dlb_step(z[: ROWS // 2], y[: ROWS // 2], buffer, ids=ids[: ROWS // 2])
    z.requires_grad_()

    def step() -> None:
        _, grad = dlb_step(z, y, buffer, ids=ids)
        torch.autograd.grad(z, z, grad)

    operations, allocations = counted(step)
    assert operations == ["last_batch_update"] and sorted(allocations) == [LOSS, PARTS, GRAD]


def test_a_number_is_filled_in_and_not_copied(host: str) -> None:
    """A copy from the host waits for a GPU, and cannot be captured."""
    z, y, _ = batch()
    other = y.flip(0)
    buffer = LogitBuffer(CLASSES, ROWS // 2)
    buffer.update(z[: ROWS // 2])
    operations, allocations = counted(lambda: dlb_step(z, y, buffer, upstream=0.5))
    assert operations == ["last_batch_update", "full", "scale_grad_"]
    assert sorted(allocations) == [LOSS, LOSS, PARTS, GRAD]
    operations, _ = counted(lambda: fused_lb_loss(z, y, target_b=other, lam=0.3))
    assert operations == ["full", "last_batch"]
    factor = torch.tensor(0.5)
    assert counted(lambda: dlb_step(z, y, buffer, upstream=factor))[0] == ["last_batch_update", "scale_grad_"]


def test_a_given_teacher_is_looked_at_in_three_launches(host: str) -> None:
    """Whether its rows are finite; the CPU's op finds out by itself."""
    z, y, _ = batch()
    operations, _ = counted(lambda: fused_lb_loss(z, y, z[: ROWS // 2]))
    assert operations == (["last_batch"] if host == "cpu" else ["amax", "abs", "lt", "last_batch"])


def test_plain_torch_fills_a_number_in_too() -> None:
    z, y, _ = batch()
    operations, _ = counted(lambda: fused_lb_loss(z, y, target_b=y.flip(0), lam=0.3, impl="torch"))
    assert not {"lift_fresh", "_to_copy", "copy_"} & set(operations) and "new_full" in operations


@pytest.mark.parametrize("factor", ["none", "accumulated", "scaled"])
def test_the_fast_loop_trains_the_weights_of_the_criterion(factor: str) -> None:
    """To the bit, also with a factor, as docs/own-loop.md says how."""
    z, y, ids = batch()
    trained = []
    for fast in (False, True):
        torch.manual_seed(0)
        model, criterion = torch.nn.Linear(CLASSES, CLASSES), LastBatchLoss(CLASSES)
        optimizer, buffer = torch.optim.SGD(model.parameters(), 0.5), LogitBuffer(CLASSES, ROWS // 2)
        scaler = torch.amp.GradScaler("cpu", enabled=factor == "scaled", init_scale=1024.0)
        for step in range(4):
            now = ids if step else ids[: ROWS // 2]
            logits, target, now = model(z[: len(now)]), y[: len(now)], now + ROWS // 2 * max(step - 1, 0)
            share = 0.5 if factor == "accumulated" else 1.0
            if fast:
                upstream = scaler.scale(torch.ones(())) if factor == "scaled" else share
                _, gradient = dlb_step(logits, target, buffer, ids=now, upstream=upstream)
                logits.backward(gradient)
            else:
                scaler.scale(criterion(logits, target, now) * share).backward()
            if factor != "accumulated" or step % 2:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        trained.append(model.weight.detach())
    assert torch.equal(*trained) and buffer.taught == 3 * ROWS // 2
