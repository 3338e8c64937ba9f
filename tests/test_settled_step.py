"""The criterion's short cut for a call like the last: it changes no result, forgets nothing and hides no mistake."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import time

import pytest
import torch
from conftest import available
from test_buffer import overlapping
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

from dlb_fast import LastBatchLoss, LogitBuffer, _backends, dlb_step, functional, losses, ops

HALVES = [4, 4, 3, 4, 1, 4, 4]


@pytest.fixture
def short_cuts(monkeypatch):
    """Counts the calls that took the short cut."""
    taken = []
    step = losses.settled_step

    def counted(*args):
        found = step(*args)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(losses, "settled_step", counted)
    return taken


def run(criterion, batches, *, remember, **options):
    """Loss, gradient, parts and buffer of every batch; without ``remember`` no call is like the last."""
    seen = []
    for z, y, ids in batches:
        if not remember:
            criterion.alpha = criterion.alpha  # setting anything forgets the last call
        z = z.clone().requires_grad_()
        loss = criterion(z, y, ids, **options)
        loss.backward()
        state = criterion.buffer.state_dict()
        numbers = (loss.item(), *(part.item() for part in criterion.parts), state["count"], state["mismatched"])
        seen.append((numbers, z.grad, state["logits"], state["ids"]))
    return seen


def assert_same(one, other):
    for (numbers, *tensors), (more_numbers, *more_tensors) in zip(one, other, strict=True):
        assert numbers == more_numbers
        assert all(torch.equal(a, b) for a, b in zip(tensors, more_tensors, strict=True))


@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "reduction": "sum", "alpha": 0.3}])
def test_a_stream_is_bit_identical_with_and_without_it(impl, generator, short_cuts, capacity, options):
    batches = overlapping(generator, HALVES)
    make = lambda: LastBatchLoss(6, capacity=capacity, impl=impl, temperature=3.0, **options)  # noqa: E731
    one = run(make(), batches, remember=True)
    compiled = impl in ("cpu", "cuda")
    assert sum(short_cuts) == (len(HALVES) - 1 if compiled else 0)
    short_cuts.clear()
    assert_same(one, run(make(), batches, remember=False))
    assert not any(short_cuts)


def test_what_is_set_in_between_counts(impl, generator, short_cuts):
    batches = overlapping(generator, [4] * 12)
    changes = [
        ("alpha", 0.25), ("temperature", 2.5), ("label_smoothing", 0.2), ("reduction", "sum"), ("ignore_index", 2),
        ("z_loss", 0.01), ("alpha", torch.tensor(0.75)), ("weight", torch.rand(6) + 0.5), ("weight", None),
    ]  # fmt: skip
    criterion, plain = LastBatchLoss(6, impl=impl), LastBatchLoss(6, impl=impl)
    assert_same(run(criterion, batches[:2], remember=True), run(plain, batches[:2], remember=False))
    for batch, (name, value) in zip(batches[2:], changes, strict=False):
        setattr(criterion, name, value)
        setattr(plain, name, value)
        assert_same(run(criterion, [batch], remember=True), run(plain, [batch], remember=False))
    assert sum(short_cuts) == (1 if impl in ("cpu", "cuda") else 0)


def test_eval_in_between_is_plain_cross_entropy(impl, generator):
    (first, second, third) = overlapping(generator, [4, 4, 4])
    criterion = LastBatchLoss(6, impl=impl)
    run(criterion, [first, second], remember=True)
    before = criterion.buffer.logits.clone()
    loss = criterion.eval()(third[0], third[1], third[2])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(third[0], third[1]))
    assert torch.equal(criterion.buffer.logits, before)
    plain = LastBatchLoss(6, impl=impl)
    want = run(plain, [first, second, third], remember=False)
    assert_same(run(criterion.train(), [third], remember=True), want[-1:])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_other_integers_and_strides_take_the_long_way(impl, generator, dtype):
    batches = overlapping(generator, [4] * 4)
    odd = [(z.t().contiguous().t(), y.to(dtype), ids.to(dtype)) for z, y, ids in batches]
    want = run(LastBatchLoss(6, impl=impl), batches, remember=False)
    assert_same(run(LastBatchLoss(6, impl=impl), odd, remember=True), want)


def test_a_mistake_in_the_middle_is_named_and_changes_nothing(impl, generator):
    first, second, third = overlapping(generator, [4, 4, 4])
    criterion = LastBatchLoss(6, capacity=4, impl=impl)
    run(criterion, [first, second], remember=True)
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
    want = run(LastBatchLoss(6, impl=impl), batches, remember=False)
    criterion = LastBatchLoss(6, impl=impl)
    run(criterion, batches[:3], remember=True)
    other = LastBatchLoss(6, impl=impl)
    run(other, batches[:2], remember=True)
    other.load_state_dict(criterion.state_dict())
    for resumed in (other, copy.deepcopy(criterion)):
        assert_same(run(resumed, batches[3:], remember=True), want[3:])


needs_cpu = pytest.mark.skipif(not available("cpu"), reason="nothing is compiled here")


@pytest.fixture(params=["C++", "Python"])
def caller(request, monkeypatch):
    """Who goes to the op: csrc/settled_call.cpp, or Python where that was not built for this torch and Python."""
    if request.param == "Python":
        monkeypatch.setattr(_backends, "load_settled_call", lambda: None)
    elif _backends.load_settled_call() is None:
        pytest.skip("there is none for this torch and Python")
    return request.param


@needs_cpu
@pytest.mark.parametrize("wanted", ["gradient", "no gradient", "inference"])
def test_the_short_cut_knows_whether_a_gradient_is_wanted(generator, short_cuts, caller, wanted):
    batches = overlapping(generator, [4] * 4)
    mode = {"gradient": torch.enable_grad, "no gradient": torch.no_grad, "inference": torch.inference_mode}[wanted]
    criteria = [LastBatchLoss(6, impl="cpu") for _ in range(2)]
    for (z, y, ids), remember in itertools.product(batches, (True, False)):
        criterion = criteria[remember]
        if not remember:
            criterion.alpha = criterion.alpha
        with mode():
            loss = criterion(z.clone().requires_grad_(wanted != "inference"), y, ids)
        assert loss.requires_grad == (wanted == "gradient") and not criterion.parts.loss.requires_grad
        if not remember:
            assert all(torch.equal(a, b) for a, b in zip(*(c.parts for c in criteria), strict=True))
            assert torch.equal(*(c.buffer.logits for c in criteria))
    asked_for = caller == "C++" and wanted == "inference"  # a mode that torch's dispatcher has to see
    assert sum(short_cuts) == (0 if asked_for else len(batches) - 1)


@needs_cpu
def test_a_functorch_transform_takes_the_long_way(generator, short_cuts, caller):
    first, second, (z, y, ids) = overlapping(generator, [4] * 3)
    criterion, plain = LastBatchLoss(6, impl="cpu"), LastBatchLoss(6, impl="torch")
    run(criterion, [first, second], remember=True)
    before = criterion.buffer.logits.clone()
    with pytest.raises(RuntimeError, match="LastBatchLoss: impl='cpu' does not know torch.func"):
        torch.func.grad(lambda logits: criterion(logits, y, ids))(z)
    assert short_cuts == [True, False] and torch.equal(criterion.buffer.logits, before)
    run(plain, [first, second], remember=False)


class Failure(Exception):
    pass


@needs_cpu
@pytest.mark.parametrize("error", [Failure, RuntimeError, TypeError])
def test_what_fails_after_the_op_is_raised_and_does_not_roll_the_buffer_again(generator, short_cuts, caller, error):
    """As torch.autograd.graph.save_on_cpu may, where memory runs out once."""
    *before, (z, y, ids) = overlapping(generator, [4] * 4)
    criterion, plain = LastBatchLoss(6, impl="cpu"), LastBatchLoss(6, impl="cpu")
    run(criterion, before, remember=True)

    failures = [error("the hook's own words")]

    def pack(tensor):
        if failures:  # a second try would succeed, with the batch's own new rows as its teacher
            raise failures.pop()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), pytest.raises(error, match="own words"):
        criterion(z.clone().requires_grad_(), y, ids)
    run(plain, [*before, (z, y, ids)], remember=False)
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
def test_who_watches_torch_sees_the_op(generator, caller, z_grad):
    *before, (z, y, ids) = overlapping(generator, [4] * 3)
    criterion = LastBatchLoss(6, impl="cpu")
    run(criterion, before, remember=True)
    with Seen() as seen:
        criterion(z.clone().requires_grad_(z_grad), y, ids)
    assert "dlb_fast.last_batch_roll.default" in seen.ops


@needs_cpu
def test_a_default_device_and_autocast_are_no_reason_for_the_long_way(generator, short_cuts, caller):
    *before, third, fourth = overlapping(generator, [4] * 4)
    criterion, plain = LastBatchLoss(6, impl="cpu"), LastBatchLoss(6, impl="cpu")
    run(criterion, before, remember=True)
    with torch.device("cpu"), torch.autocast("cpu", torch.bfloat16):
        found = run(criterion, [third, fourth], remember=True)
    assert_same(found, run(plain, [*before, third, fourth], remember=False)[2:])
    assert short_cuts == [True] * 3


@needs_cpu
def test_a_subclass_of_tensor_takes_the_long_way(generator, short_cuts, caller):
    class Named(torch.Tensor):
        pass

    *before, (z, y, ids) = overlapping(generator, [4] * 3)
    criterion, plain = LastBatchLoss(6, impl="cpu"), LastBatchLoss(6, impl="cpu")
    run(criterion, before, remember=True)
    loss = criterion(z.as_subclass(Named), y, ids)
    assert short_cuts == [True, caller == "Python"]
    run(plain, before, remember=False)
    assert float(loss) == float(plain(z, y, ids))


@needs_cpu
def test_a_criterion_is_pickled_and_copied_between_two_calls(generator, caller):
    *before, last = overlapping(generator, [4] * 4)
    criterion = LastBatchLoss(6, impl="cpu")
    run(criterion, before, remember=True)
    others = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    want = run(criterion, [last], remember=True)
    for other in others:
        assert_same(run(other, [last], remember=True), want)


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


def test_what_settled_call_is_given_is_looked_at():
    settled_call = _backends.load_settled_call()
    if settled_call is None:
        pytest.skip("there is none for this torch and Python")
    numbers = [None] * 6 + [1.0, 3.0, 1.0, 0.0, 0.0, 0.0, -1.0, -100, 1, 0]
    for options, words in (
        (numbers[:-1], "expected 16 options, got 15"),
        (["mean", *numbers[1:]], r"options\[0\], target_b, has another type"),
        ([*numbers[:6], 1, *numbers[7:]], r"options\[6\], alpha, has another type"),
        ([*numbers[:-1], True], r"options\[15\], reduction, has another type"),
        ([*numbers[:-1], 2**70], "too (large|big)"),
    ):
        with pytest.raises((TypeError, OverflowError), match=words):
            settled_call(tuple(options), False, None)
    with pytest.raises(TypeError, match="options, gradient, DeviceContext"):
        settled_call(tuple(numbers))
    call = settled_call(tuple(numbers), False, DeviceContext)
    with pytest.raises(TypeError, match="expected 6 arguments, got 1"):
        call(torch.zeros(1))
    assert call(torch.zeros(2, 2), None, None, None, -1, None) is None  # the buffer is no tensor
    with pytest.raises(TypeError):
        call(torch.zeros(2, 2), torch.zeros(1, 2), torch.zeros(3), None, "all", None)
    with pytest.raises(RuntimeError, match="slots"):
        call(torch.zeros(2, 2), torch.zeros(1, 2), torch.zeros(3), None, -1, None)


@needs_cpu
def test_the_count_stays_with_the_device_unless_it_is_given(generator, monkeypatch, caller):
    """A captured step is replayed when the host's count has moved on; only a caller may fix it."""
    asked = []
    plain, short = ops.run_eagerly, ops.roll_call

    def counted(*args, **options):
        call = short(*args, **options)
        return lambda *given: asked.append(given[4]) or call(*given)

    monkeypatch.setattr(ops, "roll_call", counted)
    first = lambda impl, op, *args: (asked.append(args[4]) if not asked else None) or plain(impl, op, *args)  # noqa: E731
    monkeypatch.setattr(ops, "run_eagerly", first)
    criterion = LastBatchLoss(6, impl="cpu")
    *batches, (z, y, ids) = overlapping(generator, [4] * 4)
    run(criterion, batches, remember=True)
    criterion(z, y, ids, num_old=4)
    assert asked == [-1, -1, -1, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_step_like_the_last_is_spared_its_checks_and_changes_no_result(impl, monkeypatch, dtype):
    """`dlb_step`: the same loss, gradient and buffer, whatever changes between the calls; mistakes are still named."""
    if impl in ("torch", "triton"):
        pytest.skip("their ops do not check their tensors themselves")
    taken = []
    short = functional.settled_step

    def counted(*args):
        found = short(*args)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(functional, "settled_step", counted)
    results = []
    for remember in (True, False):
        functional.SETTLED_STEPS.clear()
        torch.manual_seed(0)
        buffer, seen = LogitBuffer(6, 4, dtype, torch.empty(0).device), []
        for step, temperature in enumerate([3.0, 3.0, 3.0, 2.0, 2.0, 3.0]):
            z, y = torch.randn(4 if step == 0 else 8, 6).to(dtype), torch.randint(0, 6, (4 if step == 0 else 8,))
            upstream = 0.5 if step == 4 else 1.0
            if not remember:
                functional.SETTLED_STEPS.clear()
            loss, grad = dlb_step(z, y, buffer, temperature=temperature, upstream=upstream, impl=impl)
            seen += [loss, grad, buffer.logits.clone(), torch.tensor(buffer.count)]
        results.append(seen)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert taken == [True] * 3  # not the first one with a number, nor with an upstream gradient
    with pytest.raises(ValueError, match="classes on"):
        dlb_step(torch.randn(8, 5), y, buffer, impl=impl)
    with pytest.raises((ValueError, TypeError)):
        dlb_step(z, y[:3], buffer, impl=impl)
    assert torch.equal(buffer.logits, results[0][-2]) and buffer.count == 4
