"""A batch evaluated more than once, calls without gradient, and rows that must not teach."""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import available, eager_official
from test_buffer import overlapping
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dlb_fast import LastBatchLoss, LogitBuffer, dlb_step, fused_lb_loss, ops
from dlb_fast._options import TENSORS
from dlb_fast.functional import prepare

STREAMS = {"equal halves": [4, 4, 4, 4], "short halves": [4, 3, 4, 1, 4], "grows": [2, 3, 5, 4], "odd halves": [3, 3]}


def features(news, generator, samples=None):
    """Batches (x, target, ids) of features, an id's label being the same in both."""
    batches = []
    for z, y, ids in overlapping(generator, news):
        batches.append((z.double(), y, ids))
    return batches


def copy_of(model):
    twin = nn.Linear(6, 6).double()
    twin.load_state_dict(model.state_dict())
    return twin


def move(model, grads, rate):
    with torch.no_grad():
        for p, g in zip(model.parameters(), grads, strict=True):
            p += rate * g


def state(criterion):
    buffer = criterion.buffer
    return buffer.logits, buffer.ids, buffer.count


def assert_same_state(one, other):
    for a, b in zip(state(one), state(other), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("how", ["ids", "same_batch"])
def test_sam_is_a_hand_written_loop(generator, how, name):
    """Two passes per step: both meet the rows of the batch before, and the rows of the second pass are stored."""
    impl = "cpu" if available("cpu") else "torch"
    batches = features(STREAMS[name], generator)
    model = nn.Linear(6, 6).double()
    by_hand = copy_of(model)
    criterion = LastBatchLoss(6, impl=impl)
    teacher = None
    for x, y, ids in batches:
        given = ids if how == "ids" else None

        def loss(x=x, y=y, given=given):
            return criterion(model(x), y, given)

        def want(x=x, y=y, teacher=teacher):
            return eager_official(by_hand(x), y, teacher)

        grads: dict[nn.Module, tuple[torch.Tensor, ...]] = {}
        if how == "same_batch":
            with criterion.same_batch():
                grads[model] = torch.autograd.grad(loss(), list(model.parameters()))
                move(model, grads[model], 0.05)
                second = loss()
        else:
            grads[model] = torch.autograd.grad(loss(), list(model.parameters()))
            move(model, grads[model], 0.05)
            second = loss()
        grads[by_hand] = torch.autograd.grad(want(), list(by_hand.parameters()))
        move(by_hand, grads[by_hand], 0.05)
        expected = want()
        assert second.item() == pytest.approx(expected.item(), rel=1e-12)
        final = torch.autograd.grad(second, list(model.parameters()))
        ours = torch.autograd.grad(expected, list(by_hand.parameters()))
        stored = by_hand(x).detach()[0 if teacher is None else len(teacher) :]
        torch.testing.assert_close(criterion.buffer.logits, stored, rtol=1e-12, atol=1e-12)
        for net, found in ((model, final), (by_hand, ours)):
            move(net, grads[net], -0.05)
            move(net, found, -0.1)
        for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        teacher = stored
    assert criterion.buffer.mismatched.item() == criterion.buffer.unknown.item() == 0


@pytest.mark.parametrize("with_ids", [True, False])
def test_selective_checkpointing_keeps_the_products(impl, generator, with_ids):
    """It runs no op in the recomputation that the first evaluation did not run, and ends early by an exception."""

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if "addmm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    model = nn.Linear(6, 6)
    plain, recomputed = LastBatchLoss(6, capacity=3, impl=impl), LastBatchLoss(6, capacity=3, impl=impl)
    for x, y, ids in features([3, 3, 2], generator):
        x, given = x.float().requires_grad_(), ids if with_ids else None
        (want,) = torch.autograd.grad(plain(model(x), y, given), x)
        loss = checkpoint(
            lambda x, y=y, given=given: recomputed(model(x), y, given), x, use_reentrant=False, context_fn=contexts
        )
        (grad,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-7)
        assert_same_state(plain, recomputed)


@pytest.mark.parametrize("given", [{}, {"capacity": 4}, {"capacity": 3}, {"num_old": 0}])
def test_the_first_batch_of_new_rows_again(impl, generator, given):
    """All its rows are stored, so the first rows are the stored ones as well as the last: it is the same batch."""
    (x, y, ids), (x2, y2, ids2) = features([3, 3], generator)
    criterion = LastBatchLoss(6, impl=impl, capacity=given.get("capacity"))
    where = {"num_old": given["num_old"]} if "num_old" in given else {}
    for scale in (1.0, 2.0):
        loss = criterion((scale * x).float().requires_grad_(), y, ids, **where)
        assert loss.item() == pytest.approx(F.cross_entropy((scale * x).float(), y).item(), rel=1e-5)
        assert criterion.buffer.count == 3
    with torch.no_grad():
        assert criterion(x.float(), y, ids, **where).item() == pytest.approx(F.cross_entropy(x, y).item(), rel=1e-5)
    criterion(x2.float().requires_grad_(), y2, ids2)
    expected = eager_official(x2, y2, 2 * x)
    assert criterion.parts.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    buffer = LogitBuffer(6, 3, torch.float64)
    for scale in (1.0, 2.0):
        dlb_step(scale * x, y, buffer, ids=ids, **where)
    assert torch.equal(buffer.logits, 2 * x)


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", STREAMS)
def test_checkpointing_changes_nothing(impl, generator, name, reentrant, with_ids):
    batches = features(STREAMS[name], generator)
    model = nn.Linear(6, 6)
    plain, recomputed = LastBatchLoss(6, impl=impl), LastBatchLoss(6, impl=impl)
    for x, y, ids in batches:
        x, given = x.float().requires_grad_(), ids if with_ids else None
        found = []
        for criterion, run in (
            (plain, lambda f, x: f(x)),
            (recomputed, lambda f, x: checkpoint(f, x, use_reentrant=reentrant)),
        ):
            model.zero_grad()
            loss = run(lambda x, criterion=criterion, y=y, given=given: criterion(model(x), y, given), x)
            (grad,) = torch.autograd.grad(loss, x, retain_graph=False) if not reentrant else (None,)
            if reentrant:
                x.grad = None
                loss.backward()
                grad = x.grad
            found.append((loss.item(), grad.clone()))
        assert found[0][0] == found[1][0]
        torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-6, atol=1e-7)
        assert_same_state(plain, recomputed)


def test_a_closure_of_lbfgs_meets_one_teacher(generator):
    batches = features([4, 4, 4], generator)
    model = nn.Linear(6, 6).double()
    twin = copy_of(model)
    criterion = LastBatchLoss(6)
    options = {"lr": 0.1, "max_iter": 4, "line_search_fn": "strong_wolfe"}
    one, other = torch.optim.LBFGS(model.parameters(), **options), torch.optim.LBFGS(twin.parameters(), **options)
    teacher = None
    for x, y, ids in batches:

        def closure(x=x, y=y, ids=ids):
            one.zero_grad()
            loss = criterion(model(x), y, ids)
            loss.backward()
            return loss

        last = []

        def by_hand(x=x, y=y, teacher=teacher, last=last):
            other.zero_grad()
            z = twin(x)
            last[:] = [z.detach()[0 if teacher is None else len(teacher) :]]
            loss = eager_official(z, y, teacher)
            loss.backward()
            return loss

        one.step(closure)
        other.step(by_hand)
        teacher = last[0]
        torch.testing.assert_close(criterion.buffer.logits, teacher, rtol=1e-8, atol=1e-8)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)  # the line search lets roundings grow


def test_dlb_step_says_that_a_batch_comes_again(impl, generator):
    (z0, y0, _), (z1, y1, _), (z2, y2, _) = overlapping(generator, [4, 4, 4])
    buffer = LogitBuffer(6, 4, device=z0.device)
    dlb_step(z0, y0, buffer, impl=impl)
    first, _ = dlb_step(z1, y1, buffer, impl=impl)
    second, grad = dlb_step(z1 + 1, y1, buffer, again=True, impl=impl)
    leaf = (z1 + 1).requires_grad_()
    want = eager_official(leaf, y1, z0)
    assert second.item() == pytest.approx(want.item(), rel=2e-6)
    torch.testing.assert_close(grad, torch.autograd.grad(want, leaf)[0], rtol=1e-5, atol=1e-6)
    third, _ = dlb_step(z2, y2, buffer, impl=impl)
    assert third.item() == pytest.approx(eager_official(z2, y2, (z1 + 1)[4:]).item(), rel=2e-6)
    with pytest.raises(ValueError, match="same batch again must have its 8 rows, got 6"):
        dlb_step(z2[:6], y2[:6], buffer, again=True, impl=impl)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("with_ids", [True, False])
def test_without_gradient_the_second_batch_has_its_teacher(impl, generator, with_ids, mode):
    """Without capacity= all rows of the first batch are stored, and the second half of them teaches."""
    first, second = (torch.randn(8, 6, generator=generator) for _ in range(2))
    target = torch.arange(8) % 6
    ids, next_ids = (torch.arange(8), torch.arange(4, 12)) if with_ids else (None, None)
    criterion = LastBatchLoss(6, impl=impl)
    criterion(first, target, ids)
    with mode():
        found = criterion(second, target, next_ids)
        again = criterion(first, target, ids) if with_ids else None
    assert criterion.buffer.count == 8  # nothing has changed
    if again is not None:
        assert torch.equal(again, LastBatchLoss(6, impl=impl)(first, target))
    want = criterion(second, target, next_ids)
    assert criterion.parts.lb > 0 and found.item() == pytest.approx(want.item(), rel=1e-6)


def test_without_gradient_a_buffer_on_another_device_teaches():
    """A resumed buffer is on the CPU until a batch with gradient moves it; here the meta device is the other one."""
    criterion = LastBatchLoss(6, impl="torch")
    criterion(torch.zeros(4, 6), torch.arange(4), torch.arange(4))
    with torch.no_grad():
        teacher, valid = criterion._stored_teacher(torch.zeros(8, 6, device="meta"), None, None, None)
    assert teacher.shape == (4, 6) and teacher.is_meta and valid.shape == (4,)
    assert criterion.buffer.device.type == "cpu" and criterion.buffer.ids.tolist() == [0, 1, 2, 3]


def test_without_gradient_nothing_changes(impl, generator):
    batches = overlapping(generator, [4, 4, 4])
    criterion = LastBatchLoss(6, impl=impl)
    with torch.no_grad():  # also before the first batch
        assert criterion(*batches[0]).item() == pytest.approx(F.cross_entropy(*batches[0][:2]).item(), rel=1e-6)
    assert criterion.buffer is None
    for k, (z, y, ids) in enumerate(batches):
        want = eager_official(z, y, batches[k - 1][0][-4:] if k else None).item()
        for _ in range(2):  # a new batch, and the one stored last
            before = None if criterion.buffer is None else criterion.buffer.slots.clone()
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    assert criterion(z, y, ids).item() == pytest.approx(want, rel=2e-6)
            assert before is None or torch.equal(before, criterion.buffer.slots)
            assert criterion(z, y, ids).item() == pytest.approx(want, rel=2e-6)
    z, y = torch.randn(7, 6, generator=generator), torch.zeros(7, dtype=torch.long)
    with torch.no_grad():  # a validation batch of any size, of samples that were not seen
        loss = criterion(z, y, torch.arange(1000, 1007))
        assert loss.item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-6)
    assert criterion.buffer.mismatched.item() == 0


def test_rows_stored_without_ids_never_teach_a_batch_with_ids(impl, generator):
    (z0, y0, _), (z1, y1, i1) = overlapping(generator, [4, 4])
    criterion = LastBatchLoss(6, impl=impl)
    criterion(z0, y0)
    loss = criterion(z1, y1, i1)
    assert loss.item() == pytest.approx(F.cross_entropy(z1, y1).item(), rel=1e-6)
    buffer = criterion.buffer
    assert (buffer.unknown.item(), buffer.mismatched.item(), buffer.taught.item()) == (4, 0, 0)


BAD = {"nan": [math.nan], "inf": [math.inf], "all -inf": [-math.inf] * 6}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("with_ids", [True, False])
def test_a_batch_that_is_not_finite_does_not_poison_the_next(impl, generator, name, with_ids):
    (z0, y0, i0), (z1, y1, i1), (z2, y2, i2) = overlapping(generator, [4, 4, 4])
    criterion = LastBatchLoss(6, impl=impl, ignore_index=5)
    z0, y0 = z0.clone(), y0 % 5
    y1, y2 = y1 % 5, y2 % 5
    z0[1, : len(BAD[name])] = torch.tensor(BAD[name])
    z0[2, 3] = -math.inf  # one class is masked: the row is as good as any
    y0[1] = 5  # stored also where its label is ignored
    criterion(z0, y0, i0 if with_ids else None)
    leaf = z1.clone().requires_grad_()
    loss = criterion(leaf, y1, i1 if with_ids else None)
    loss.backward()
    keep = [0, 2, 3]
    want = z1.double().requires_grad_()
    kl = F.softmax(z0[keep].double() / 3, 1)
    logs = F.log_softmax(want[keep] / 3, 1)
    kl = torch.where(kl > 0, kl * (kl.log() - logs), 0.0).sum() / 3 * 9
    (F.cross_entropy(want, y1) + kl).backward()
    assert math.isfinite(loss.item())
    torch.testing.assert_close(leaf.grad.double(), want.grad, rtol=1e-5, atol=1e-6)
    assert criterion.buffer.not_finite.item() == 1 and criterion.buffer.taught.item() == 3
    loss = criterion(z2, y2, i2 if with_ids else None)
    assert loss.item() == pytest.approx(eager_official(z2, y2, z1[4:]).item(), rel=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", BAD)
def test_a_given_teacher_that_is_not_finite_does_not_count(impl, generator, name, reduction):
    z, t = torch.randn(6, 6, generator=generator), torch.randn(4, 6, generator=generator)
    y = torch.randint(0, 6, (6,), generator=generator)
    t[2, : len(BAD[name])] = torch.tensor(BAD[name])
    leaf, want = z.clone().requires_grad_(), z.clone().requires_grad_()
    mask = torch.tensor([True, True, False, True])
    clean = torch.where(mask[:, None], t, torch.zeros_like(t))
    loss = fused_lb_loss(leaf, y, t, reduction=reduction, impl=impl)
    expected = fused_lb_loss(want, y, clean, kd_mask=mask, reduction=reduction, impl="torch")
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad, want.grad, rtol=1e-5, atol=1e-6)


def test_float32_logits_that_overflow_a_float16_buffer_do_not_teach(impl, generator):
    (z0, y0, i0), (z1, y1, i1) = overlapping(generator, [4, 4])
    z0 = z0.clone()
    z0[0, 0] = 1e6
    criterion = LastBatchLoss(6, dtype=torch.float16, impl=impl)
    criterion(z0, y0, i0)
    assert math.isfinite(criterion(z1, y1, i1).item())
    assert criterion.buffer.not_finite.item() == 1


def test_nothing_repeats_and_the_criterion_says_so_once(generator):
    criterion = LastBatchLoss(6)
    with pytest.warns(
        UserWarning, match=r"repeated no row of the batch before.*shuffle=True.*OverlapBatchSampler"
    ) as seen:
        for k in range(60):
            z = torch.randn(8, 6, generator=generator)
            criterion(z, torch.zeros(8, dtype=torch.long), torch.randint(1000 * k, 1000 * k + 999, (8,)))
    assert len(seen) == 1
    assert criterion.buffer.untaught.item() == 59 and criterion.buffer.taught.item() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = LastBatchLoss(6)
        for batch in overlapping(generator, [4] * 40):
            quiet(*batch)
        for z, y, ids in overlapping(generator, [4] * 40, start=1000):  # masked, not missing
            quiet(z, y, ids, kd_mask=torch.zeros(len(z), dtype=torch.bool))
    assert quiet.buffer.untaught.item() == 0


def test_a_batch_of_one_set_twice_is_a_new_batch(generator):
    """Where the new half is the repeated half, the batch repeats its own samples and is no second evaluation."""
    ids = torch.tensor([3, 1, 3, 1])
    criterion = LastBatchLoss(6)
    z = [torch.randn(4, 6, generator=generator) for _ in range(3)]
    y = torch.tensor([0, 1, 0, 1])
    criterion(z[0][2:], y[2:], ids[2:])
    for before, now in ((z[0], z[1]), (z[1], z[2])):
        loss = criterion(now, y, ids)
        assert loss.item() == pytest.approx(eager_official(now, y, before[2:]).item(), rel=2e-6)


def test_same_batch_ends_where_it_ends(generator):
    (z0, y0, _), (z1, y1, _) = overlapping(generator, [4, 4])
    criterion = LastBatchLoss(6)
    with pytest.raises(KeyError), criterion.same_batch():
        criterion(z0, y0)
        raise KeyError
    assert criterion(z1, y1).item() == pytest.approx(eager_official(z1, y1, z0).item(), rel=2e-6)


@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize("capacity", [None, 4])
def test_a_first_batch_that_is_all_new_comes_again_too(impl, generator, rows, capacity):
    """Its recomputation and SAM's second pass hold nothing but stored rows."""
    z, y, ids = torch.randn(rows, 6, generator=generator), torch.arange(rows), torch.arange(rows)
    criterion = LastBatchLoss(6, capacity=capacity, impl=impl)
    criterion(z.requires_grad_(), y, ids)
    again = criterion(z + 1, y, ids)
    torch.testing.assert_close(again, torch.nn.functional.cross_entropy(z + 1, y))
    assert torch.equal(criterion.buffer.logits, z + 1) and criterion.buffer.mismatched == 0
    follow = torch.randn(2 * rows, 6, generator=generator).requires_grad_()
    criterion(follow, y.repeat(2), torch.arange(2 * rows))
    assert criterion.buffer.taught == rows


def test_the_op_knows_a_batch_of_new_rows_again(impl, generator):
    """All its rows are stored, so its first rows have the stored ids too."""
    if impl == "torch":
        pytest.skip("has no op")
    z, y, ids = torch.randn(3, 6, generator=generator), torch.zeros(3, dtype=torch.long), torch.arange(3)
    buffer, want = LogitBuffer(6, 4, device=z.device), LogitBuffer(6, 4, device=z.device)
    given = {"target": y}
    options = (*map(given.get, TENSORS), *prepare("test").numbers, True)
    for values in (z, z + 1):
        ops.op_for(impl, "last_batch_update")(values, buffer.rows, buffer.slots, ids, 0, -1, *options)
        want.update(values, ids, 0, again=-1 if values is z else 1)
    assert torch.equal(buffer.slots, want.slots) and torch.equal(buffer.rows, want.rows)
    assert torch.equal(want.logits, z + 1)
