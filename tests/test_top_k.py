"""The top-k teacher: k classes and one bucket for the others, as a function and as the memory of LastBatchLoss."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, available, device_of, require
from test_buffer import overlapping
from test_last_batch import Call, assert_as_good_as_eager

from benchmarks import top_k_fidelity
from dlb_fast import LastBatchLoss, LogitBuffer, Teacher, TopK, _backends, distillation_loss, dlb_step, reference
from dlb_fast.functional import distill
from dlb_fast.losses import Inputs
from dlb_fast.train.checkpoint import _divide_buffer

inf, nan = math.inf, math.nan


ON_GPU = [pytest.param("auto", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["torch", "cpu", *ON_GPU])
def impl(request):
    """What has this teacher: on a GPU plain PyTorch, which "auto" takes."""
    if request.param != "auto":
        require(request.param)
    with torch.device(device_of(request.param)):
        yield request.param


def plain(z, t, k, tau):
    """tau^2 KL per row from probabilities, in float64, with sums where the definition has logarithms of sums."""
    p, q = (t.double() / tau).softmax(1), (z.double() / tau).softmax(1)
    order = t.double().argsort(1, descending=True)
    p, q = p.gather(1, order), q.gather(1, order)
    p, q = (torch.cat([v[:, :k], v[:, k:].sum(1, keepdim=True)], 1) for v in (p, q))
    return torch.where(p > 0, p * (p / q).log(), 0).sum(1) * tau**2


def problem(generator, rows=7, taught=4, classes=20, dtype=torch.float64, drift=1.0):
    z = 3 * torch.randn(rows, classes, generator=generator)
    t = z[:taught] + drift * torch.randn(taught, classes, generator=generator)
    return z.to(dtype), torch.randint(0, classes, (rows,), generator=generator), t.to(dtype)


def test_by_hand(impl):
    """Teacher (1/2, 1/4 | 1/8, 1/8), student (1/4, 1/4 | 2/5, 1/10): KL = 1/2 ln 2 - 1/4 ln 2."""
    t, q = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), torch.tensor([[0.25, 0.25, 0.4, 0.1]])
    top = TopK.of(t, 2, 1.0)
    assert top.indices.tolist() == [[0, 1]]
    torch.testing.assert_close(top.logsumexp, torch.tensor([math.log(2)]))  # of logits relative to the largest
    z = q.log().requires_grad_()
    loss = distillation_loss(z, None, top, kind="top_k", impl=impl)
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * math.log(2), rel=1e-6)
    torch.testing.assert_close(z.grad, torch.tensor([[-0.25, 0.0, 0.2, 0.05]]), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("k", "tau"), [*((5, tau) for tau in (1.0, 2.0, 3.0, 4.0, 2.5)), (1, 3.0), (19, 2.5), (20, 3.0)]
)
def test_it_is_the_plain_computation(impl, generator, k, tau):
    z, y, t = problem(generator)
    top = TopK.of(t, k, tau)
    z.requires_grad_()
    wanted = F.cross_entropy(z, y) + 0.7 * plain(z[:4], t, k, tau).mean()
    (grad,) = torch.autograd.grad(wanted, z)
    loss = distillation_loss(z, y, top, kind="top_k", alpha=0.7, temperature=tau, impl=impl)
    (found,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_classes_are_the_dense_teacher(impl, generator, dtype):
    z, y, t = problem(generator, dtype=dtype)
    found = []
    for teacher, kind in ((t, "logits"), (TopK.of(t, 20, 3.0), "top_k")):
        leaf = z.clone().requires_grad_()
        loss = distillation_loss(leaf, y, teacher, kind=kind, temperature=3.0, impl=impl)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=2e-6, atol=1e-7)


def test_gradient_by_finite_differences(impl, generator):
    z, y, t = problem(generator, classes=9)
    top = TopK.of(t, 3, 2.0)
    one = lambda v: distillation_loss(v, y, top, kind="top_k", temperature=2.0, impl=impl)  # noqa: E731
    assert torch.autograd.gradcheck(one, (z.requires_grad_(),))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(2, 1, 2, 1, 3.0), (7, 3, 10, 3, 1.5), (33, 20, 1000, 64, 3.0), (5, 5, 5001, 64, 1.5)], ids=str
)
def test_as_good_as_eager(impl, generator, size, dtype):
    rows, taught, classes, k, tau = size
    z, y, t = problem(generator, rows, taught, classes, dtype)
    packed = TopK.of(t, k, tau).packed()

    def loss(teacher):
        return lambda v: reference.last_batch_loss(
            v, y, teacher, alpha=0.7, temperature=tau, teacher_kind="top_k"
        )[0]  # fmt: skip

    ours = Call(z, lambda v: distill("test", v, y, Teacher("top_k", packed), alpha=0.7, temperature=tau, impl=impl)[0])
    upstream = torch.rand((), generator=generator) + 0.5
    assert_as_good_as_eager(impl, dtype, ours, loss(packed), loss(packed.double()), upstream)


OPTIONS = {
    "smoothing": dict(label_smoothing=0.1),
    "weights": dict(weight=torch.linspace(0.5, 2, 20), label_smoothing=0.2),
    "dense": dict(target=torch.linspace(0, 1, 140).view(7, 20).softmax(1)),
    "ignored": dict(target=torch.tensor([3, -100, 0, 1, 2, -100, 4])),
    "pair": dict(target_b=torch.arange(7), lam=0.3),
    "mask": dict(kd_mask=torch.tensor([True, False, True, True, False, True, True])),
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "tensors": dict(alpha=torch.tensor(0.4), temperature=torch.tensor(2.0)),
    "lsr": dict(alpha=0.5, ce_alpha=-1.0),
    "KL alone": dict(target=None),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(impl, generator, name):
    """Beside every option of the cross entropy, against the definition in float64."""
    given = {"temperature": 3.0, **OPTIONS[name]}
    z, y, t = problem(generator, dtype=torch.float32)
    y = given.pop("target", y)
    top = TopK.of(t, 6, float(given["temperature"]))
    double = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in given.items()}
    double_target = y.double() if y is not None and y.is_floating_point() else y
    results = []
    for logits, target, options, how in ((z, y, given, impl), (z.double(), double_target, double, "torch")):
        leaf = logits.clone().requires_grad_()
        loss, parts = distillation_loss(leaf, target, top, kind="top_k", impl=how, return_parts=True, **options)
        loss.sum().backward()
        results.append((loss.detach().double(), leaf.grad.double(), torch.stack(list(parts)).double()))
    torch.testing.assert_close(results[0], results[1], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("classes", "target"), [(9, False), (40, True), (5000, True), (5000, False)])
@pytest.mark.parametrize("margin", [5.0, 30.0, 60.0, 400.0, 2000.0])
def test_a_sure_student(impl, generator, margin, target, classes):
    """All but the k classes together have e^-5 down to nothing that float32 can hold; the teacher thinks otherwise."""
    z, y, t = problem(generator, 3, 3, classes, torch.float32)
    z = z.clone()
    z[:, :4] += margin
    t[:, :4] = t.amax(1, keepdim=True) + torch.tensor([0.1, 0.3, 0.2, 0.5])
    tau = 3.0
    y = torch.tensor([0, 5, 8]) if target else None
    top = TopK.of(t, 4, tau)
    results = []
    for logits, how in ((z, impl), (z.double(), "torch")):
        leaf = logits.clone().requires_grad_()
        loss = distillation_loss(leaf, y, top, kind="top_k", temperature=tau, impl=how)
        loss.backward()
        results.append((loss.detach().double(), leaf.grad.double()))
    (loss, grad), (true_loss, true_grad) = results
    # The logarithms of plain float32 are as wrong as they are large.
    value, rtol, atol = (2e-6, 2e-5, 1e-8) if impl != "torch" else (2e-4, 2e-4, 1e-5)
    assert loss.item() == pytest.approx(true_loss.item(), rel=value)
    # Also where nearly nothing of the student is left: the teacher pulls each of those classes up by its share.
    torch.testing.assert_close(grad, true_grad, rtol=rtol, atol=atol)


def test_rows_that_are_not_finite_do_not_teach(impl, generator):
    z, y, t = problem(generator, dtype=torch.float32)
    t[1, 3], t[2, 4] = nan, inf
    z.requires_grad_()
    top = TopK.of(t, 5, 3.0)
    assert top.packed()[:, -1].isnan().tolist() == [False, True, True, False]
    nothing = TopK(torch.full((1, 2), -inf), torch.tensor([[0, 1]]), torch.tensor([-inf]))
    assert nothing.packed()[0, -1].isnan()
    loss, parts = distillation_loss(z, y, top, kind="top_k", temperature=3.0, return_parts=True, impl=impl)
    loss.backward()
    good = plain(z.detach()[[0, 3]], t[[0, 3]], 5, 3.0)
    assert parts.lb.item() == pytest.approx(good.mean().item(), rel=1e-5)
    ce = z.detach().clone().requires_grad_()
    F.cross_entropy(ce, y).backward()
    torch.testing.assert_close(z.grad[[1, 2]], ce.grad[[1, 2]])


def test_no_mass_costs_nothing(impl):
    """0 log 0 = 0 for a class of the k and for the bucket, also where the student has nothing there."""
    t = torch.tensor([[2.0, 1.0, -inf, -inf], [2.0, -inf, -inf, -inf]])
    z = torch.tensor([[1.0, 2.0, -inf, -inf], [0.5, 1.0, 0.0, -inf]], requires_grad=True)
    rows = distillation_loss(z, None, TopK.of(t, 2, 1.0), kind="top_k", reduction="none", impl=impl)
    rows.sum().backward()
    (p, _), q = torch.tensor([1.0, 0.0]).softmax(0), torch.tensor([0.5, 1.0, 0.0]).softmax(0)
    first = p * (p / (1 - p)).log() + (1 - p) * ((1 - p) / p).log()
    assert rows.tolist() == pytest.approx([first.item(), -q[0].log().item()], rel=1e-5)
    wanted = [[1 - 2 * p.item(), 2 * p.item() - 1, 0, 0], [q[0].item() - 1, q[1].item(), q[2].item(), 0]]
    torch.testing.assert_close(z.grad, torch.tensor(wanted))
    # All mass is in the bucket.
    bucket = TopK(torch.full((1, 2), -inf), torch.tensor([[0, 3]]), torch.zeros(1))
    q = torch.tensor([[0.1, 0.3, 0.4, 0.2]])
    assert distillation_loss(q.log(), None, bucket, kind="top_k", impl=impl).item() == pytest.approx(-math.log(0.7))
    # The teacher sees classes that the student holds impossible.
    never = torch.tensor([[1.0, 2.0, -inf, -inf]])
    assert distillation_loss(never, None, TopK.of(torch.zeros(1, 4), 2, 1.0), kind="top_k", impl=impl).item() == inf


@pytest.mark.parametrize("indices", [[[1, 1, 2]], [[0, 1, 20]], [[-1, 1, 2]]], ids=str)
def test_wrong_classes_make_the_row_nan(impl, generator, indices):
    z, y, t = problem(generator, dtype=torch.float32)
    top = TopK.of(t, 3, 3.0)
    top.indices[1] = torch.tensor(indices[0])
    rows = distillation_loss(z, y, top, kind="top_k", temperature=3.0, reduction="none", impl=impl)
    assert rows.isnan().tolist() == [False, True, *[False] * 5]


@pytest.mark.parametrize(("k", "made", "tau"), [(5, 1.0, 4.0), (20, 4.0, 1.0)])
def test_another_temperature_leaves_a_distribution(impl, generator, k, made, tau):
    """Where the k would have more than 1 together, or are all and would have less, they have 1; the KL is not < 0."""
    z, _, t = problem(generator, taught=7)
    top = TopK.of(t, k, made)
    z.requires_grad_()
    rows = distillation_loss(z, None, top, kind="top_k", temperature=tau, reduction="none", impl=impl)
    (grad,) = torch.autograd.grad(rows.sum(), z)
    p = (top.values / tau).softmax(1)
    log_q = (z.detach() / tau).log_softmax(1)
    torch.testing.assert_close(rows.detach(), tau**2 * (p * (p.log() - log_q.gather(1, top.indices))).sum(1))
    torch.testing.assert_close(grad, tau * log_q.exp().scatter_add(1, top.indices, -p), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_is_topk_and_logsumexp(generator, dtype):
    """Of short rows, and of long ones, of which it looks through a part; a common offset costs no digits."""
    for rows, classes, k in ((3, 7, 7), (70, 9001, 5)):
        logits = torch.randn(rows, classes, generator=generator).to(dtype)
        top = TopK.of(logits, k, 2.0)
        values, indices = logits.topk(k, 1)
        compute = reference.compute_dtype(dtype)
        relative = logits.to(compute) - logits.to(compute).amax(1, keepdim=True)
        assert torch.equal(logits.gather(1, top.indices), values)
        assert torch.equal(top.values, relative.gather(1, indices)) and top.values.dtype == compute
        wanted = (relative.double() / 2).logsumexp(1).to(compute)
        torch.testing.assert_close(top.logsumexp, wanted, rtol=5e-7 if compute == torch.float32 else 1e-14, atol=0)
    offset = torch.tensor([[0.0, -1.0, -2.0, -30.0]], dtype=torch.float32) + 4096.0
    wanted = math.log(1 + math.exp(-1 / 3) + math.exp(-2 / 3) + math.exp(-10))
    assert TopK.of(offset, 2, 3.0).logsumexp.item() == pytest.approx(wanted, rel=3e-7)
    packed = top.packed()
    assert packed.shape == (70, 11) and packed.dtype == compute and torch.equal(packed[:, 5:10].long(), top.indices)


def test_of_follows_its_logits_not_the_default_device(generator):
    logits = torch.randn(3, 9001, generator=generator)
    with torch.device("meta"):
        found = TopK.of(logits, 5, 2.0)
    assert all(map(torch.equal, found, TopK.of(logits, 5, 2.0)))


def by_hand(batches, k, **options):
    """Losses and gradients of a stream whose top k are kept by hand; the next batch repeats all new rows."""
    last, found = None, []
    for z, y, _ in batches:
        leaf = z.clone().requires_grad_()
        loss = distillation_loss(leaf, y, last, kind="top_k" if last else "logits", temperature=3.0, **options)
        loss.backward()
        old = 0 if last is None else len(last.values)
        last = TopK.of(z[old:], k, 3.0)
        found.append((loss.detach(), leaf.grad))
    return found, last


def run(criterion, batches):
    found = []
    for z, y, ids in batches:
        leaf = z.clone().requires_grad_()
        loss = criterion(leaf, y, ids)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    return found


@pytest.mark.parametrize(
    ("news", "capacity", "dtype"),
    [
        ([4, 4, 4, 4], None, torch.float32),
        ([4, 4, 4, 4], 5, torch.float64),
        ([2, 3, 5, 4, 1, 2], None, torch.bfloat16),
        ([2, 3, 5, 4, 1, 2], 5, torch.float32),
    ],
    ids=str,
)
def test_the_criterion_is_a_top_k_kept_by_hand(impl, generator, news, capacity, dtype):
    batches = [(z.to(dtype), y, ids) for z, y, ids in overlapping(generator, news)]
    criterion = LastBatchLoss(batches[0][0].shape[1], keep="top_k", k=3, capacity=capacity, impl=impl)
    wanted, last = by_hand(batches, 3, impl=impl)
    torch.testing.assert_close(run(criterion, batches), wanted)
    buffer = criterion.buffer
    assert (buffer.num_classes, buffer.of_classes) == (7, batches[0][0].shape[1])
    assert buffer.dtype == reference.compute_dtype(dtype)
    assert torch.equal(buffer.logits, last.packed()) and buffer.ids.tolist() == batches[-1][2][-news[-1] :].tolist()
    assert int(buffer.taught) == sum(news[:-1]) and int(buffer.mismatched) == 0


def test_the_criterion_masks_and_knows_other_samples(impl, generator):
    (z, y, ids), (z2, y2, ids2) = overlapping(generator, [4, 4])
    criterion = LastBatchLoss(6, keep="top_k", k=2, impl=impl)
    criterion(z.requires_grad_(), y, ids)
    last = TopK.of(z, 2, 3.0)
    wrong = ids2.clone()
    wrong[1] = 999
    mask = torch.ones(8, dtype=torch.bool)
    mask[3] = False
    with torch.no_grad():  # the same teacher, and nothing is stored
        before = criterion(z2, y2, wrong, kd_mask=mask)
    loss = criterion(z2.clone().requires_grad_(), y2, wrong, kd_mask=mask)
    valid = torch.tensor([True, False, True, False])
    last = last._replace(logsumexp=last.logsumexp.masked_fill(~valid, nan))  # which takes rows out as well
    wanted = distillation_loss(z2, y2, last, kind="top_k", temperature=3.0, impl=impl)
    torch.testing.assert_close(loss.detach(), wanted)
    torch.testing.assert_close(before, wanted)
    assert int(criterion.buffer.taught) == 2 and int(criterion.buffer.mismatched) == 1
    criterion.eval()
    torch.testing.assert_close(criterion(z2, y2), F.cross_entropy(z2, y2))


def test_the_same_batch_again(impl, generator):
    """The second evaluation meets the first one's teacher, and what it stores takes its place."""
    batches = overlapping(generator, [4, 4, 4])
    criterion = LastBatchLoss(6, keep="top_k", k=2, impl=impl)
    run(criterion, batches[:1])
    z, y, ids = batches[1]
    first = run(criterion, [(z + 1.5 * torch.arange(6), y, ids)])
    second = run(criterion, [(z, y, ids)])
    third = run(criterion, batches[2:])
    wanted, _ = by_hand(batches, 2, impl=impl)
    torch.testing.assert_close(second + third, wanted[1:])
    assert not torch.equal(first[0][0], second[0][0])


@pytest.mark.parametrize("capacity", [None, 4])
def test_state_round_trip(generator, capacity):
    batches = overlapping(generator, [4, 4, 4])
    kept = LastBatchLoss(6, keep="top_k", k=2, capacity=capacity)
    run(kept, batches[:2])
    saved = copy.deepcopy(kept.state_dict())
    other = LastBatchLoss(6, keep="top_k", k=2, capacity=capacity)
    other.load_state_dict(saved)
    assert other.buffer.of_classes == 6
    torch.testing.assert_close(run(other, batches[2:]), run(kept, batches[2:]), rtol=0, atol=0)
    state = LastBatchLoss(6, keep="top_k", k=2, capacity=4)
    state.set_extra_state(kept.buffer.state_dict())  # the dict itself
    assert torch.equal(state.buffer.logits, kept.buffer.logits)


@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("saver", [dict(keep="logits"), dict(keep="top_k", k=1)], ids=str)
def test_a_state_of_another_form_restarts(generator, saver, capacity):
    """Also of 5 classes, where the rows of 2 k + 1 numbers have the same width as the logits."""
    batches = [(z[:, :5], y % 5, ids) for z, y, ids in overlapping(generator, [4, 4])]
    kept = LastBatchLoss(5, capacity=capacity, **saver)
    run(kept, batches)
    for form in (dict(keep="top_k", k=2), dict(keep="logits")):
        other = LastBatchLoss(5, capacity=capacity, **form)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            other.load_state_dict(kept.state_dict())
        fits = form["keep"] == saver["keep"] and "k" not in saver
        assert (other.buffer is not None and other.buffer.count == 4) == fits
        assert ["restarts empty" in str(w.message) for w in said] == ([] if fits else [True])
    # Of the same width, but of other classes.
    wide = LastBatchLoss(7, keep="top_k", k=2, capacity=4)
    narrow = LastBatchLoss(5, keep="top_k", k=2, capacity=4)
    run(narrow, batches)
    with pytest.warns(UserWarning, match="expected the top k of 7 classes, saved the top k of 5 classes"):
        wide.load_state_dict(narrow.state_dict())


def test_rows_divided_among_ranks_stay_a_top_k(generator):
    kept = LastBatchLoss(6, keep="top_k", k=2)
    run(kept, overlapping(generator, [4, 4]))
    state = kept.buffer.state_dict()
    half = _divide_buffer([state], 1, 2)
    other = LastBatchLoss(6, keep="top_k", k=2)
    half.update(rank=0, world_size=1)
    other.set_extra_state(half)
    assert other.buffer.of_classes == 6 and torch.equal(other.buffer.logits, kept.buffer.logits[2:])


def test_what_it_says_of_itself():
    criterion = LastBatchLoss(100, keep="top_k", k=8)
    assert "keep='top_k', k=8" in repr(criterion) and "17 numbers" in criterion.cost()
    assert "keep" not in repr(LastBatchLoss(100)) and "k=" not in repr(LastBatchLoss(100))


def test_a_checkpoint_does_not_grow_with_the_classes(generator):
    sizes = []
    for classes in (50, 500):
        criterion = LastBatchLoss(classes, keep="top_k", k=4, capacity=2, dtype=torch.float32)
        before = criterion.get_extra_state().numel()
        criterion(torch.randn(2, classes, generator=generator, requires_grad=True), torch.tensor([0, 1]))
        sizes += [before, criterion.get_extra_state().numel()]
    assert len(set(sizes)) == 1


Z, TOP = torch.zeros(6, 4), TopK(torch.zeros(3, 2), torch.tensor([[0, 1]] * 3), torch.zeros(3))
ERRORS = {
    "a tensor": (dict(teacher=torch.zeros(3, 4)), TypeError, "must be a dlb_fast.TopK, got Tensor; TopK.of"),
    "another kind": (dict(kind="logits"), TypeError, "a TopK belongs to kind='top_k', got kind='logits'"),
    "k": (dict(teacher=TopK.of(torch.zeros(3, 5), 5, 1.0)), ValueError, "k must be at most the 4 classes, got 5"),
    "rows": (dict(teacher=TopK.of(torch.zeros(7, 4), 2, 1.0)), ValueError, r"H <= 6, got \(7, 5\)"),
    "float classes": (dict(teacher=TOP._replace(indices=torch.zeros(3, 2))), TypeError, r"integer.*indices.long\(\)"),
    "shapes": (dict(teacher=TOP._replace(logsumexp=torch.zeros(2))), ValueError, r"\(H, k\).*\(3, 2\) and \(2,\)"),
    "device": (dict(teacher=TOP._replace(indices=TOP.indices.to("meta"))), ValueError, "one device, got cpu, meta"),
    "other device": (dict(teacher=TopK(*(t.to("meta") for t in TOP))), ValueError, "device of the logits"),
    "no tensor": (dict(teacher=TOP._replace(values=[1.0])), TypeError, "TopK.values must be a torch.Tensor, got list"),
    "kind": (dict(kind="topk"), ValueError, "'top_k' or 'uniform', got 'topk'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    given, error, message = ERRORS[name]
    with pytest.raises(error, match=f"^distillation_loss: .*{message}"):
        distillation_loss(Z, None, **{"teacher": TOP, "kind": "top_k", **given})


def test_errors_elsewhere(monkeypatch):
    with pytest.raises(TypeError, match=r"kind 'top_k' must be float32 or float64, got torch.bfloat16"):
        distill("op", Z, None, Teacher("top_k", TOP.packed().bfloat16()), alpha=1.0, temperature=1.0)
    with pytest.raises(ValueError, match=r"must have shape \(H, 2 k \+ 1\) with H <= 6, got \(3, 4\)"):
        distill("op", Z, None, Teacher("top_k", torch.zeros(3, 4)), alpha=1.0, temperature=1.0)
    with pytest.raises(ValueError, match="TopK.of: k must be at most the 4 classes, got 5"):
        TopK.of(Z, 5, 1.0)
    with pytest.raises(ValueError, match="TopK.of: temperature must be finite and > 0"):
        TopK.of(Z, 2, 0.0)
    with pytest.raises(ValueError, match="LastBatchLoss: keep must be 'logits' or 'top_k', got 'all'"):
        LastBatchLoss(10, keep="all")
    with pytest.raises(ValueError, match="LastBatchLoss: k must be at most the 10 classes, got 64"):
        LastBatchLoss(10, keep="top_k")
    with pytest.raises(ValueError, match="k belongs to keep='top_k', got k=8 with keep='logits'"):
        LastBatchLoss(10, k=8)
    with pytest.raises(ValueError, match="takes at most 16777216 classes, got 16777217"):
        LastBatchLoss(2**24 + 1, keep="top_k")
    with pytest.raises(TypeError, match="stores float32 or float64.*got torch.bfloat16"):
        LastBatchLoss(100, keep="top_k", dtype=torch.bfloat16)
    buffer = LogitBuffer(5, 3)
    buffer.of_classes = 9
    with pytest.raises(ValueError, match="must hold logits, got one that holds their top k"):
        dlb_step(torch.zeros(3, 5), torch.tensor([0, 1, 2]), buffer)


@pytest.mark.parametrize("picked", ["cuda", "triton"])
def test_auto_takes_plain_pytorch_where_the_kernels_lack_it(generator, picked, monkeypatch):
    z, y, t = problem(generator)
    top = TopK.of(t, 3, 2.0)
    monkeypatch.setattr(_backends, "pick", lambda *_: picked)
    found = distillation_loss(z, y, top, kind="top_k", temperature=2.0)
    monkeypatch.undo()
    wanted = distillation_loss(z, y, top, kind="top_k", temperature=2.0, impl="torch")
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.skipif(not available("triton"), reason="no Triton")
def test_an_implementation_without_it_says_so():
    with pytest.raises(RuntimeError, match=r"impl='triton' has no teacher of kind 'top_k'; use impl='auto'"):
        distillation_loss(Z, None, TOP, kind="top_k", impl="triton")


@pytest.mark.slow  # imports the compiler
def test_compile_fullgraph(impl, generator):
    torch._dynamo.reset()
    z, y, t = problem(generator, dtype=torch.float32)

    def step(logits, last):
        top = TopK.of(last, 3, 2.0)
        return distillation_loss(logits * 1.5, y, top, kind="top_k", temperature=2.0, impl=impl)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = z.clone().requires_grad_()
        loss = function(leaf, t)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compile_the_criterion(impl, generator):
    torch._dynamo.reset()
    batches = overlapping(generator, [4, 4, 4])
    one, other = (LastBatchLoss(6, keep="top_k", k=2, capacity=4, impl=impl) for _ in range(2))
    found = run(torch.compile(one, fullgraph=True, backend="aot_eager"), batches)
    torch.testing.assert_close(found, run(other, batches), rtol=1e-5, atol=1e-6)


def test_torch_func(generator):
    """Plain PyTorch serves the transforms, as for the other kinds; the criterion cannot remember inside one."""
    z, y, t = problem(generator)
    top = TopK.of(t, 3, 2.0)
    one = lambda v: distillation_loss(v, y, top, kind="top_k", temperature=2.0)  # noqa: E731
    leaf = z.clone().requires_grad_()
    one(leaf).backward()
    torch.testing.assert_close(torch.func.grad(one)(z), leaf.grad)
    several = torch.stack([z, 2 * z])
    torch.testing.assert_close(torch.func.vmap(one)(several), torch.stack([one(v) for v in several]))
    torch.testing.assert_close(
        torch.func.vmap(lambda v: TopK.of(v, 3, 2.0).packed())(several),
        torch.stack([TopK.of(v, 3, 2.0).packed() for v in several]),
    )
    with pytest.raises(RuntimeError, match="does not allow"):
        torch.func.grad(LastBatchLoss(20, keep="top_k", k=3))(z, y)


def test_a_learned_temperature_softens_the_student_alone(generator):
    z, _, t = problem(generator)
    tau = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    top = TopK.of(t, 3, 2.0)

    def loss(tau):
        q = (z[:4] / tau).softmax(1)
        p = (top.values / 2 - top.logsumexp[:, None]).exp()
        mine = q.gather(1, top.indices)
        rest = 1 - p.sum(1), 1 - mine.sum(1)
        return tau**2 * ((p * (p / mine).log()).sum(1) + rest[0] * (rest[0] / rest[1]).log()).mean()

    (wanted,) = torch.autograd.grad(loss(tau), tau)
    found = distillation_loss(z, None, top, kind="top_k", temperature=tau, impl="torch")
    torch.testing.assert_close(torch.autograd.grad(found, tau)[0], wanted, rtol=1e-9, atol=0)


def test_a_method_may_teach_so(generator):
    from dlb_fast import DistillationLoss

    class Last(DistillationLoss):
        def teacher(self, inputs: Inputs) -> Teacher:
            return Teacher("top_k", TopK.of(inputs.logits.detach().flip(0), 3, inputs.temperature).packed())

    z, y, _ = problem(generator)
    wanted = distillation_loss(z, y, TopK.of(z.flip(0), 3, 2.0), kind="top_k", temperature=2.0)
    torch.testing.assert_close(Last(temperature=2.0)(z, y), wanted)


def test_the_benchmark_of_its_fidelity(generator):
    teacher = 2 * torch.randn(6, 300, generator=generator, dtype=torch.float64)
    student = teacher + torch.randn(6, 300, generator=generator, dtype=torch.float64)
    records = top_k_fidelity.compare(student, teacher)
    assert len(top_k_fidelity.table(records).splitlines()) == 2 + 15
    for tau in (1.0, 2.0, 4.0):
        of_tau = [r for r in records if r["temperature"] == tau]
        losses = [r["kl_error"] for r in of_tau]  # a finer partition has the larger KL, and no partition more than all
        assert losses == sorted(losses, reverse=True) and losses[-1] > 0
        wanted = plain(student, teacher, 256, tau).mean() / plain(student, teacher, 300, tau).mean()
        assert of_tau[-1]["kl_error"] == pytest.approx(1 - wanted.item(), rel=1e-9)
        assert of_tau[-1]["cosine"] > 0.98 and of_tau[-1]["gradient_error"] < of_tau[0]["gradient_error"]
