"""What is remembered: alignment of rows and ids through first steps, short batches, growth, resume and bad layouts."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import eager_official

from dlb_fast import LastBatchLoss, LogitBuffer, dlb_step
from dlb_fast.buffer import UNKNOWN_ID


def overlapping(generator, news, classes=6, start=0):
    """A stream of batches [old | new] with ``news[i]`` new rows; ids number the samples."""
    labels = torch.randint(0, classes, (sum(news),), generator=generator)
    batches, old = [], torch.arange(0)
    first = start
    for new in news:
        ids = torch.cat([old, torch.arange(first, first + new)])
        batches.append((torch.randn(len(ids), classes, generator=generator), labels[ids - start], ids))
        old, first = ids[len(old) :], first + new
    return batches


def expected(batches, *, stored=None, **options):
    """Loss of every batch by the definition, the memory being a dictionary from sample id to its last logits."""
    memory = dict(stored or {})
    losses = []
    for z, y, ids in batches:
        known = [i for i, sample in enumerate(ids.tolist()) if sample in memory]
        assert known == list(range(len(known)))
        teacher = torch.stack([memory[int(s)] for s in ids[: len(known)]]) if known else None
        losses.append(eager_official(z.double(), y, None if teacher is None else teacher.double(), **options).item())
        memory = {int(s): row for s, row in zip(ids[len(known) :], z[len(known) :], strict=True)}
    return losses


STREAMS = {
    "equal halves": [4, 4, 4, 4],
    "short last half": [4, 4, 3, 4, 1, 4],
    "single rows": [1, 1, 1, 1],
    "grows": [2, 3, 5, 4],
}


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("name", STREAMS)
def test_stream_equals_a_memory_by_id(impl, generator, name, with_ids):
    batches = overlapping(generator, STREAMS[name])
    criterion = LastBatchLoss(6, alpha=0.5, temperature=2.0, impl=impl)
    losses = [criterion(z, y, ids if with_ids else None).item() for z, y, ids in batches]
    assert losses == pytest.approx(expected(batches, alpha=0.5, temperature=2.0), rel=2e-6)
    assert criterion.buffer.mismatched.item() == 0
    z, _, ids = batches[-1]
    new = STREAMS[name][-1]
    assert torch.equal(criterion.buffer.logits[:new], z[-new:])
    assert criterion.buffer.ids.tolist() == (ids[-new:].tolist() if with_ids else [UNKNOWN_ID] * new)


def test_gradient_of_a_stream(impl, generator):
    criterion = LastBatchLoss(6, impl=impl)
    memory = None
    for z, y, ids in overlapping(generator, [4, 4, 3]):
        leaf, want = z.clone().requires_grad_(), z.double().requires_grad_()
        (criterion(leaf, y, ids) * 0.3).backward()
        (eager_official(want, y, memory) * 0.3).backward()
        torch.testing.assert_close(leaf.grad.double(), want.grad, rtol=1e-5, atol=1e-7)
        memory = z.double()[0 if memory is None else len(memory) :]


def test_full_batches_from_the_start(impl, generator):
    """Every batch [old | new] of one size, the first included: its first half simply has no teacher."""
    z = [torch.randn(8, 6, generator=generator) for _ in range(3)]
    y = torch.randint(0, 6, (8,), generator=generator)
    for capacity in (None, 4):
        criterion = LastBatchLoss(6, capacity=capacity, impl=impl)
        losses = [criterion(v, y).item() for v in z]
        want = [eager_official(z[0], y, None), eager_official(z[1], y, z[0][4:]), eager_official(z[2], y, z[1][4:])]
        assert losses == pytest.approx([w.item() for w in want], rel=2e-6)
        assert criterion.buffer.capacity == 4


def test_rows_of_other_samples_are_not_taught_and_counted(impl, generator):
    (z0, y0, i0), (z1, y1, i1) = overlapping(generator, [4, 4])
    criterion = LastBatchLoss(6, impl=impl)
    criterion(z0, y0, i0)
    i1 = i1.clone()
    i1[2] = 999
    loss = criterion(z1, y1, i1)
    keep = [0, 1, 3]
    kl = F.kl_div(F.log_softmax(z1[keep] / 3, 1), F.softmax(z0[keep] / 3, 1), reduction="batchmean") * 9
    assert loss.item() == pytest.approx((F.cross_entropy(z1, y1) + kl).item(), rel=2e-6)
    assert criterion.buffer.mismatched.item() == 1
    assert criterion.buffer.ids.tolist() == i1[4:].tolist()


def test_masked_repeated_rows(impl, generator):
    (z0, y0, i0), (z1, y1, i1) = overlapping(generator, [4, 4])
    criterion = LastBatchLoss(6, impl=impl)
    criterion(z0, y0, i0)
    mask = torch.tensor([True, False, False, True, True, False, True, True])
    loss = criterion(z1, y1, i1, kd_mask=mask)
    keep = [0, 3]
    kl = F.kl_div(F.log_softmax(z1[keep] / 3, 1), F.softmax(z0[keep] / 3, 1), reduction="batchmean") * 9
    assert loss.item() == pytest.approx((F.cross_entropy(z1, y1) + kl).item(), rel=2e-6)


def test_a_stream_resumed_without_its_buffer(impl, generator):
    batches = overlapping(generator, [4, 4, 3, 4])
    criterion = LastBatchLoss(6, impl=impl)
    (z, y, ids), rest = batches[2], batches[3:]
    loss = criterion(z, y, ids, num_old=4)  # 4 old rows without a teacher, 3 new ones: 7 rows alone tell nothing
    assert loss.item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-6)
    stored = {int(s): row for s, row in zip(ids[4:], z[4:], strict=True)}
    losses = [criterion(z, y, ids, num_old=3).item() for z, y, ids in rest]
    assert losses == pytest.approx(expected(rest, stored=stored), rel=2e-6)


def test_impossible_layouts_raise(impl):
    y = torch.zeros(4, dtype=torch.long)
    criterion = LastBatchLoss(3, capacity=4, impl=impl)
    criterion(torch.zeros(4, 3), y)
    with pytest.raises(ValueError, match=r"repeated rows \| new rows.*reset\(\)"):
        criterion(torch.zeros(4, 3), y)  # no new row: a stream that started again
    with pytest.raises(ValueError, match="more than 4 were expected, got 2.*shuffle=True"):
        criterion(torch.zeros(2, 3), y[:2])  # the short last batch of a loader that shuffles
    with pytest.raises(ValueError, match="keeps at most 4"):
        criterion(torch.zeros(10, 3), torch.zeros(10, dtype=torch.long))
    with pytest.raises(ValueError, match="num_old"):
        criterion(torch.zeros(4, 3), y, num_old=5)
    assert criterion.buffer.count == 4  # the refused batches left no trace
    criterion.reset()
    assert criterion(torch.zeros(4, 3), y).item() == pytest.approx(1.0986, abs=1e-4)


def test_a_refused_batch_leaves_the_buffer_alone(impl, generator):
    if impl in ("cuda", "triton"):
        pytest.skip("a GPU cannot refuse a label without a synchronisation; it poisons the row")
    (z0, y0, i0), (z1, y1, i1) = overlapping(generator, [4, 4])
    criterion = LastBatchLoss(6, impl=impl)
    criterion(z0, y0, i0)
    before = criterion.buffer.state_dict()
    bad = y1.clone()
    bad[5] = 6
    with pytest.raises(ValueError, match=r"target\[5\] = 6 is not a class"):
        criterion(z1, bad, i1)
    after = criterion.buffer.state_dict()
    for key in ("logits", "ids"):
        assert torch.equal(before.pop(key), after.pop(key))
    assert before == after


@pytest.mark.parametrize("rows", [4, 12])
def test_a_refused_batch_does_not_resize_the_buffer(impl, generator, rows):
    if impl in ("cuda", "triton"):
        pytest.skip("a GPU cannot refuse a label without a synchronisation; it poisons the row")
    z, y, ids = overlapping(generator, [4])[0]
    criterion = LastBatchLoss(6, impl=impl)
    criterion(z, y, ids)
    with pytest.raises(ValueError, match=r"target\[0\] = 6 is not a class"):
        criterion(torch.zeros(rows, 6), torch.full((rows,), 6), torch.arange(rows))
    assert (criterion.buffer.capacity, criterion.buffer.count) == (4, 4)
    assert torch.equal(criterion.buffer.logits, z)
    assert torch.equal(criterion.buffer.ids, ids)


def test_eval_is_plain_cross_entropy_and_leaves_the_buffer_alone(impl, generator):
    batches = overlapping(generator, [4, 4, 4])
    criterion = LastBatchLoss(6, impl=impl)
    plain = LastBatchLoss(6, impl=impl)
    want = [plain(*b).item() for b in batches]
    got = []
    for b in batches:
        got.append(criterion(*b).item())
        criterion.eval()
        z, y = torch.randn(5, 6, generator=generator), torch.randint(0, 6, (5,), generator=generator)
        state = copy.deepcopy(criterion.state_dict())
        assert criterion(z, y, torch.arange(5)).item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-6)
        assert criterion.parts.lb.item() == 0.0
        assert state.keys() == criterion.state_dict().keys()
        assert torch.equal(state["_extra_state"], criterion.state_dict()["_extra_state"])
        criterion.train()
    assert got == want


def test_parts(impl, generator):
    (z0, y0, i0), (z1, y1, i1) = overlapping(generator, [4, 4])
    criterion = LastBatchLoss(6, alpha=0.5, impl=impl)
    with pytest.raises(RuntimeError, match="before the first call"):
        _ = criterion.parts
    criterion(z0, y0, i0)
    loss = criterion(z1.requires_grad_(), y1, i1)
    parts = criterion.parts
    assert parts.loss.item() == loss.item()
    assert parts.ce.item() == pytest.approx(F.cross_entropy(z1, y1).item(), rel=1e-6)
    assert parts.loss.item() == pytest.approx((parts.ce + 0.5 * parts.lb).item(), rel=1e-6)
    assert parts.correct.item() == (z1.argmax(1) == y1).sum().item()
    assert not any(p.requires_grad for p in parts)


def through_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("capacity", [None, 4])
def test_resume_continues_bit_for_bit(impl, generator, capacity):
    batches = overlapping(generator, [4, 4, 3, 4, 4])
    whole = LastBatchLoss(6, capacity=capacity, impl=impl)
    want = [whole(*b) for b in batches]
    for stop in range(1, 5):
        first = LastBatchLoss(6, capacity=capacity, impl=impl)
        for b in batches[:stop]:
            first(*b)
        second = LastBatchLoss(6, capacity=capacity, impl=impl)
        second.load_state_dict(through_disk(first.state_dict()))
        assert [second(*b).item() for b in batches[stop:]] == [w.item() for w in want[stop:]]


def test_bfloat16_storage_survives_the_disk(impl, generator):
    batches = [(z.bfloat16(), y, i) for z, y, i in overlapping(generator, [4, 4])]
    first = LastBatchLoss(6, capacity=4, impl=impl)
    first(*batches[0])
    second = LastBatchLoss(6, capacity=4, impl=impl)
    second.load_state_dict(through_disk(first.state_dict()))
    assert second.buffer.logits.dtype == torch.bfloat16
    assert second(*batches[1]).item() == first(*batches[1]).item()


def test_half_precision_storage_of_float32_logits(impl, generator):
    (z0, y0, i0), (z1, y1, i1) = overlapping(generator, [4, 4])
    criterion = LastBatchLoss(6, dtype=torch.float16, impl=impl)
    criterion(z0, y0, i0)
    assert criterion.buffer.logits.dtype == torch.float16
    want = eager_official(z1, y1, z0.half().float())
    assert criterion(z1, y1, i1).item() == pytest.approx(want.item(), rel=2e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_classes": 7}, "expected logits"),
        ({"version": 99}, "version 2 expected, got 99"),
        ({"count": 40, "logits": torch.zeros(40, 6), "ids": torch.arange(40)}, "capacity 4, saved 40 rows"),
        ({"logits": torch.zeros(2, 6)}, "expected logits"),
        ({"logits": None}, "logits must be a floating tensor, got NoneType"),
        ({"logits": torch.zeros(4, 6, dtype=torch.long)}, "logits must be a floating tensor, got torch.int64"),
        ({"ids": torch.rand(4)}, "ids must be an int64 tensor, got torch.float32"),
        ({"count": "4"}, "count must be an integer >= 0, got '4'"),
        ({"mismatched": None}, "mismatched must be an integer >= 0, got None"),
    ],
)
def test_a_foreign_buffer_is_dropped_with_a_warning(generator, change, said):
    batches = overlapping(generator, [4, 4])
    saved = LastBatchLoss(6, capacity=4, impl="torch")
    saved(*batches[0])
    state = {"_extra_state": saved.buffer.state_dict()}
    state["_extra_state"].update(change)
    if change.get("num_classes"):
        state["_extra_state"]["logits"] = torch.zeros(4, 7)
    z, y, ids = batches[0]
    for capacity in (4, None):
        fresh = LastBatchLoss(6, capacity=capacity, impl="torch")
        with pytest.warns(UserWarning, match=said) as warned:
            fresh.load_state_dict(state)
        assert len(warned) == 1
        assert fresh.buffer is None or fresh.buffer.count == 0
        assert fresh(z, y, ids).item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-6)


@pytest.mark.parametrize("state", [[1], {"a": 1}, {"num_classes": 6, "capacity": -1}], ids=str)
@pytest.mark.parametrize("capacity", [4, None])
def test_what_is_no_state_at_all_is_said_once(state, capacity):
    criterion = LastBatchLoss(6, capacity=capacity, impl="torch")
    with pytest.warns(UserWarning, match="the saved buffer does not fit") as warned:
        criterion.load_state_dict({"_extra_state": state})
    assert len(warned) == 1


def test_a_stream_that_starts_anew_does_not_shift_the_pairs(impl, generator):
    """A loop that cuts its epochs short makes most loaders begin again with a batch of new rows only."""
    first = overlapping(generator, [4, 4, 4])
    again = [(z, y, i + 100) for z, y, i in overlapping(generator, [4, 4, 4])]
    criterion = LastBatchLoss(6, impl=impl)
    got = [criterion(*batch).item() for batch in (*first, *again)]
    assert got == pytest.approx(expected(first) + expected(again), rel=2e-6)
    assert criterion.buffer.mismatched.item() == 0


def test_loading_keeps_the_address_and_the_dtype_asked_for(generator):
    batch = overlapping(generator, [4])[0]
    saved = LastBatchLoss(6, capacity=4, impl="torch")
    saved(*batch)
    fixed = LastBatchLoss(6, capacity=4, impl="torch")
    buffer, address = fixed.buffer, fixed.buffer.rows.data_ptr()
    fixed.load_state_dict(through_disk(saved.state_dict()))
    assert fixed.buffer is buffer
    assert fixed.buffer.rows.data_ptr() == address
    assert torch.equal(fixed.buffer.logits, batch[0])
    for capacity in (4, None):
        halved = LastBatchLoss(6, capacity=capacity, dtype=torch.float16, impl="torch")
        halved.load_state_dict(through_disk(saved.state_dict()))
        assert halved.buffer.logits.dtype == torch.float16


def test_copies_and_pickles_are_independent(generator):
    batches = overlapping(generator, [4, 4])
    criterion = LastBatchLoss(6, impl="torch")
    criterion(*batches[0])
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert twin(*batches[1]).item() == pytest.approx(expected(batches)[1], rel=2e-6)
        assert criterion.buffer.count == 4
        assert torch.equal(criterion.buffer.logits, batches[0][0])


def test_ddp_would_not_see_the_buffer():
    criterion = LastBatchLoss(6, capacity=4, weight=torch.ones(6))
    assert [name for name, _ in criterion.named_buffers()] == ["weight"]
    assert list(criterion.state_dict()) == ["weight", "_extra_state"]


def test_buffer_alone(generator):
    buffer = LogitBuffer(5, 3)
    assert not buffer.match(6).faced.any()
    z = torch.randn(3, 5, generator=generator)
    address = buffer.rows.data_ptr()
    buffer.update(z, torch.tensor([7, 8, 9]))
    match = buffer.match(6, torch.tensor([7, 8, 1, 0, 0, 0]))
    assert torch.equal(buffer.teacher(match), z)
    assert match.repeats.tolist() == [True, True, False] and match.mismatched.tolist() == [False, False, True]
    buffer.update(torch.randn(5, 5, generator=generator))
    assert (buffer.count, buffer.match(5).repeats.tolist()) == (2, [True, True, False])
    buffer.reset()
    assert (buffer.count, buffer.rows.data_ptr()) == (0, address)
    for wrong in ({"num_classes": 0}, {"capacity": 0}, {"capacity": 2.0}):
        with pytest.raises((TypeError, ValueError), match="must be (at least 1|an integer), got"):
            LogitBuffer(**{"num_classes": 5, "capacity": 3, **wrong})
    with pytest.raises(TypeError, match="torch.float32, float16, bfloat16 or float64"):
        LogitBuffer(5, 3, dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 1024.0])
def test_dlb_step_is_the_criterion_without_a_node(impl, generator, dtype, upstream):
    criterion = LastBatchLoss(6, capacity=4, dtype=dtype, impl=impl)
    buffer = LogitBuffer(6, 4, dtype, device=torch.zeros(()).device)
    for z, y, ids in overlapping(generator, [4, 4, 3, 4]):
        leaf = z.to(dtype).requires_grad_()
        want = criterion(leaf, y, ids)
        (want * upstream).backward()
        logits = z.to(dtype).requires_grad_()
        loss, grad = dlb_step(logits, y, buffer, ids=ids, upstream=upstream, impl=impl)
        assert not loss.requires_grad
        assert loss.item() == want.item()
        torch.testing.assert_close(grad, leaf.grad, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)
    assert torch.equal(buffer.logits, criterion.buffer.logits)
    assert torch.equal(buffer.slots, criterion.buffer.slots)
    with pytest.raises(ValueError, match="dlb_step: buffer must have C = 5"):
        dlb_step(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), buffer, impl=impl)


def test_after_a_reset_no_row_has_a_teacher(impl, generator):
    """The host's count and the device's are both forgotten: without ids nothing else would tell the rows apart."""
    (z0, y0, i0), (z1, y1, _) = overlapping(generator, [4, 4])
    criterion = LastBatchLoss(6, capacity=4, impl=impl)
    criterion(z0, y0, i0)
    address = criterion.buffer.slots.data_ptr()
    criterion.reset()
    assert criterion.buffer.count == 0 and criterion.buffer.slots[:6].tolist() == [0] * 6
    assert not criterion.buffer.match(8).faced.any() and criterion.buffer.slots.data_ptr() == address
    want = F.cross_entropy(z1, y1)
    torch.testing.assert_close(criterion(z1, y1), want)
    assert criterion.parts.lb == 0 and criterion.buffer.count == 4


def test_mixup_pairs_through_the_criterion(impl, generator):
    (z0, y0, i0), (z1, y1, i1) = overlapping(generator, [4, 4])
    criterion = LastBatchLoss(6, impl=impl)
    criterion(z0, y0, i0)
    other, lam = y1.flip(0), torch.rand(8, generator=generator)
    dense = lam[:, None] * F.one_hot(y1, 6) + (1 - lam[:, None]) * F.one_hot(other, 6)
    want = eager_official(z1, dense, z0)
    assert criterion(z1, y1, i1, target_b=other, lam=lam).item() == pytest.approx(want.item(), rel=3e-6)
    with pytest.raises(ValueError, match="pair form needs labels"):
        criterion(z1, y1, i1, lam=0.5)
    with pytest.raises(ValueError, match="lam must be between 0 and 1, got 2"):
        criterion(z1, y1, i1, target_b=other, lam=2.0)
