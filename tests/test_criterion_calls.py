"""A stream of calls of one criterion: changed options count, mistakes are named and change nothing."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import available
from test_buffer import overlapping
from torch.utils._python_dispatch import TorchDispatchMode

import dlb_fast
from dlb_fast import LastBatchLoss, ops

HALVES = [4, 4, 3, 4, 1, 4, 4]
needs_cpu = pytest.mark.skipif(not available("cpu"), reason="nothing is compiled here")


def run(criterion, batches, **options):
    """Loss, gradient, parts and buffer of every batch."""
    seen = []
    for z, y, ids in batches:
        z = z.clone().requires_grad_()
        loss = criterion(z, y, ids, **options)
        (loss if loss.dim() == 0 else loss.sum()).backward()
        state = criterion.buffer.state_dict()
        numbers = (loss.tolist(), *(part.item() for part in criterion.parts), state["count"], state["mismatched"])
        seen.append((numbers, z.grad, state["logits"], state["ids"]))
    return seen


def assert_same(one, other):
    for (numbers, *tensors), (more_numbers, *more_tensors) in zip(one, other, strict=True):
        assert numbers == more_numbers
        assert all(torch.equal(a, b) for a, b in zip(tensors, more_tensors, strict=True))


CHANGES = {
    "alpha": 0.25,
    "alpha as a tensor": torch.tensor(0.75),
    "temperature": 2.5,
    "temperature as a tensor": torch.tensor(1.5),
    "label_smoothing": 0.2,
    "weight": torch.rand(6, generator=torch.Generator().manual_seed(1)) + 0.5,
    "ignore_index": None,  # a label of the batch
    "reduction": "sum",
    "reduction, per row": "none",
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_changed_between_two_calls_counts_from_the_next_call(impl, generator, name):
    """And changed back, it counts no more."""
    batches = overlapping(generator, [4] * 6)
    option = name.split()[0].strip(",")
    value = CHANGES[name] if option != "ignore_index" else int(batches[3][1][-1])
    criterion = LastBatchLoss(6, impl=impl)
    run(criterion, batches[:3])
    before = getattr(criterion, option)
    fresh = LastBatchLoss(6, impl=impl, **{option: value})
    fresh.set_extra_state(criterion.get_extra_state())
    setattr(criterion, option, value)
    changed = run(criterion, batches[3:5])
    assert_same(changed, run(fresh, batches[3:5]))
    plain = LastBatchLoss(6, impl=impl)
    run(plain, batches[:3])
    unchanged = run(plain, batches[3:5])
    assert changed[0][0] != unchanged[0][0]
    setattr(criterion, option, before)
    assert_same(run(criterion, batches[5:]), run(plain, batches[5:]))


@needs_cpu
def test_a_changed_implementation_counts_from_the_next_call(generator, monkeypatch):
    batches = overlapping(generator, [4] * 4)
    criterion = LastBatchLoss(6, impl="cpu")
    run(criterion, batches[:3])
    asked = []
    monkeypatch.setattr(ops, "op_for", lambda impl, name: asked.append(impl))
    criterion.impl = "torch"
    run(criterion, batches[3:])
    assert not asked


def test_a_wrong_option_set_between_two_calls_is_refused_at_the_next(impl, generator):
    *batches, (z, y, ids) = overlapping(generator, [4] * 3)
    criterion = LastBatchLoss(6, impl=impl)
    run(criterion, batches)
    wrong = [
        ("alpha", -1.0), ("alpha", float("nan")), ("alpha", True), ("temperature", 0.0), ("temperature", float("inf")),
        ("label_smoothing", 1.5), ("label_smoothing", None), ("ignore_index", 1.0), ("reduction", "average"),
        ("weight", torch.rand(5)), ("impl", "cuda11"), ("ce_weight", -1.0), ("ce_alpha", "a"),
    ]  # fmt: skip
    for name, value in wrong:
        before = getattr(criterion, name)
        setattr(criterion, name, value)
        with pytest.raises((ValueError, TypeError), match=name):
            criterion(z, y, ids)
        setattr(criterion, name, before)
    alpha = torch.tensor(1.0)
    criterion.alpha = alpha
    criterion(z, y, ids)
    if impl in ("cpu", "torch"):
        alpha.fill_(-1.0)  # a tensor may change by itself
        with pytest.raises(ValueError, match="alpha must be finite"):
            criterion(z, y, ids)


def test_eval_in_between_is_plain_cross_entropy(impl, generator):
    (first, second, third) = overlapping(generator, [4, 4, 4])
    criterion = LastBatchLoss(6, impl=impl)
    run(criterion, [first, second])
    before = criterion.buffer.logits.clone()
    loss = criterion.eval()(third[0], third[1], third[2])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(third[0], third[1]))
    assert torch.equal(criterion.buffer.logits, before)
    plain = LastBatchLoss(6, impl=impl)
    want = run(plain, [first, second, third])
    assert_same(run(criterion.train(), [third]), want[-1:])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_other_integers_and_strides_give_the_same(impl, generator, dtype):
    batches = overlapping(generator, [4] * 4)
    odd = [(z.t().contiguous().t(), y.to(dtype), ids.to(dtype)) for z, y, ids in batches]
    want = run(LastBatchLoss(6, impl=impl), batches)
    assert_same(run(LastBatchLoss(6, impl=impl), odd), want)


def test_a_mistake_in_the_middle_is_named_and_changes_nothing(impl, generator):
    first, second, third = overlapping(generator, [4, 4, 4])
    criterion = LastBatchLoss(6, capacity=4, impl=impl)
    run(criterion, [first, second])
    before = copy.deepcopy(criterion.buffer.state_dict())
    z, y, ids = third
    for args, error, words in (
        ((z.to("meta"), y, ids), ValueError, "device of the logits"),
        ((z[:, :5], y, ids), ValueError, "C = 6 classes, got 5"),
        ((z[0], y, ids), ValueError, r"shape \(B, C\)"),
        ((z.long(), y, ids), TypeError, "logits must be float32"),
        ((z, y[:3], ids), ValueError, r"target must have shape \(8,\)"),
        ((z, y.float(), ids), TypeError, "integer class labels"),
        ((z, y, ids[:3]), ValueError, "ids must be an integer tensor"),
        ((z.tolist(), y, ids), TypeError, "logits must be a torch.Tensor"),
        ((torch.cat([z, z]), torch.cat([y, y]), None), ValueError, "at most"),
    ):
        with pytest.raises(error, match=words):
            criterion(*args)
        after = criterion.buffer.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in ("logits", "ids"))
        assert before["count"] == after["count"]
    with pytest.raises(TypeError, match="num_old must be an integer or None, got 4.0"):
        criterion(z, y, ids, num_old=4.0)
    if impl not in ("cuda", "triton"):
        with pytest.raises(ValueError, match=r"target\[1\] = 9 is not a class"):
            criterion(z, torch.where(torch.arange(8) == 1, 9, y), ids)


def test_a_state_taken_in_the_middle_continues_alike(impl, generator):
    batches = overlapping(generator, HALVES)
    want = run(LastBatchLoss(6, impl=impl), batches)
    criterion = LastBatchLoss(6, impl=impl)
    run(criterion, batches[:3])
    other = LastBatchLoss(6, impl=impl)
    run(other, batches[:2])
    other.load_state_dict(criterion.state_dict())
    for resumed in (other, copy.deepcopy(criterion)):
        assert_same(run(resumed, batches[3:]), want[3:])


class Failure(Exception):
    pass


@needs_cpu
@pytest.mark.parametrize("error", [Failure, RuntimeError, TypeError])
def test_what_fails_after_the_op_is_raised_and_does_not_roll_the_buffer_again(generator, error):
    """As torch.autograd.graph.save_on_cpu may, where memory runs out once."""
    *before, (z, y, ids) = overlapping(generator, [4] * 4)
    criterion, plain = LastBatchLoss(6, impl="cpu"), LastBatchLoss(6, impl="cpu")
    run(criterion, before)

    failures = [error("the hook's own words")]

    def pack(tensor):
        if failures:  # a second try would succeed, with the batch's own new rows as its teacher
            raise failures.pop()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), pytest.raises(error, match="own words"):
        criterion(z.clone().requires_grad_(), y, ids)
    run(plain, [*before, (z, y, ids)])
    assert torch.equal(criterion.buffer.logits, plain.buffer.logits)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_cpu
@pytest.mark.parametrize("z_grad", [True, False])
def test_who_watches_torch_sees_the_op(generator, z_grad):
    *before, (z, y, ids) = overlapping(generator, [4] * 3)
    criterion = LastBatchLoss(6, impl="cpu")
    run(criterion, before)
    with Seen() as seen:
        criterion(z.clone().requires_grad_(z_grad), y, ids)
    assert "dlb_fast.last_batch_update.default" in seen.ops


@needs_cpu
def test_a_default_device_and_autocast_change_nothing(generator):
    *before, third, fourth = overlapping(generator, [4] * 4)
    criterion, plain = LastBatchLoss(6, impl="cpu"), LastBatchLoss(6, impl="cpu")
    run(criterion, before)
    with torch.device("cpu"), torch.autocast("cpu", torch.bfloat16):
        found = run(criterion, [third, fourth])
    assert_same(found, run(plain, [*before, third, fourth])[2:])


@needs_cpu
def test_a_subclass_of_tensor_gives_the_same(generator):
    class Named(torch.Tensor):
        pass

    *before, (z, y, ids) = overlapping(generator, [4] * 3)
    criterion, plain = LastBatchLoss(6, impl="cpu"), LastBatchLoss(6, impl="cpu")
    run(criterion, before)
    loss = criterion(z.as_subclass(Named), y, ids)
    run(plain, before)
    assert float(loss) == float(plain(z, y, ids))


@needs_cpu
def test_a_criterion_is_pickled_and_copied_between_two_calls(generator):
    *before, last = overlapping(generator, [4] * 4)
    criterion = LastBatchLoss(6, impl="cpu")
    run(criterion, before)
    others = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    want = run(criterion, [last])
    for other in others:
        assert_same(run(other, [last]), want)


@needs_cpu
def test_threads_are_let_go_on_while_the_op_runs(generator):
    """A loader's threads need the interpreter while the loss is computed."""
    criterion = LastBatchLoss(20000, impl="cpu")
    z, y = torch.randn(256, 20000), torch.randint(0, 20000, (256,))
    for half in (z[:128], z, z):
        criterion(half, y[: len(half)])
    seen, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            seen.append(time.perf_counter())
            time.sleep(0.0005)

    def seen_in_the_middle():
        start = time.perf_counter()
        criterion(z, y)
        end = time.perf_counter()
        # Around the call the interpreter changes hands anyway.
        return any(start + 0.3 * (end - start) < moment < end - 0.3 * (end - start) for moment in list(seen))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        assert any(seen_in_the_middle() for _ in range(40))  # one is enough: the machine may have no core to spare
    finally:
        stop.set()
        thread.join()


@needs_cpu
def test_the_count_stays_with_the_device_unless_it_is_given(generator, monkeypatch):
    """A captured step is replayed when the host's count has moved on; only a caller may fix it."""
    asked = []
    find = ops.op_for
    monkeypatch.setattr(
        ops, "op_for", lambda impl, name: lambda *args: asked.append(args[4]) or find(impl, name)(*args)
    )
    criterion = LastBatchLoss(6, impl="cpu")
    *batches, (z, y, ids) = overlapping(generator, [4] * 4)
    for batch in batches:
        criterion(*batch)
    criterion(z, y, ids, num_old=4)
    assert asked == [-1, -1, -1, 4]


@needs_cpu
def test_an_ordinary_call_makes_at_most_12_python_calls(generator):
    """In files of this package: the loss of a small batch takes hardly longer than they do."""
    criterion = LastBatchLoss(6, impl="cpu")
    *batches, (z, y, ids) = overlapping(generator, [4] * 4)
    run(criterion, batches)
    z.requires_grad_()
    package, calls = str(Path(dlb_fast.__file__).parent), []

    def watch(frame, event, _arg):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        criterion(z, y, ids)
    finally:
        sys.setprofile(None)
    assert calls[0] == "forward" and len(calls) <= 12, calls


@pytest.mark.parametrize("grad", [False, True])
def test_a_validation_that_forgets_eval_is_named_once(generator, recwarn, grad):
    """Its batches come without ids, in train(), after training batches with ids."""
    batches = overlapping(generator, HALVES[:4])
    criterion = LastBatchLoss(6)
    run(criterion, batches[:3])
    z, y, _ = batches[3]
    criterion.eval()
    criterion(z, y)
    criterion.train()
    assert not recwarn
    with torch.set_grad_enabled(grad):
        with pytest.warns(UserWarning, match=r"without ids follows batches with ids.*criterion\.eval\(\)") as warned:
            criterion(z, y)
        assert warned[0].filename == __file__
        criterion(z, y) if not grad else None
    assert not recwarn
    criterion.reset()  # a new stream may come without ids
    run(criterion, [(z, y, None) for z, y, _ in batches[:3]])
    assert not recwarn
