"""Every implementation against the definition in float64.

The rule: our error against float64 is no larger than that of eager PyTorch in the same dtype, plus a few units in the
last place of the largest value; on a GPU also plus the error of its exponentials, see `float32_error`.
Upstream gradients are random, never ones.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DTYPES, eager_official, float32_error, row_loss

from dlb_fast import distillation_loss, fused_lb_loss, reference

SIZES = [(1, 1, 1), (2, 1, 2), (7, 3, 10), (64, 32, 100), (33, 20, 1000), (9, 4, 1001), (5, 5, 3000), (4, 2, 21843)]
EPS = {torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4, torch.float64: 2.3e-16}


def problem(impl, generator, rows, taught, classes, dtype, *, drift=1.0, scale=3.0):
    if impl == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels refuse float64")
    z = (scale * torch.randn(rows, classes, generator=generator)).to(dtype)
    t = (z[:taught].double() + drift * torch.randn(taught, classes, generator=generator).double()).to(dtype)
    y = torch.randint(0, classes, (rows,), generator=generator)
    return z, y, t


def value_and_gradient(function, z, upstream):
    z = z.detach().clone().requires_grad_()
    loss = function(z)
    loss.backward(upstream.to(loss))
    return loss.detach().double().cpu(), z.grad.double().cpu()


def assert_as_good_as_eager(impl, dtype, ours, eager, truth, upstream):
    """``ours``, ``eager`` and ``truth`` map logits to a loss; compares value and gradient errors."""
    z = ours.z
    loss, grad = value_and_gradient(ours, z, upstream)
    eager_loss, eager_grad = value_and_gradient(eager, z, upstream)
    true_loss, true_grad = value_and_gradient(truth, z.double(), upstream)
    # In float64 "the truth" carries the same rounding errors as the two it judges.
    value_eps = 8 * EPS[torch.float64] if dtype == torch.float64 else EPS[torch.float32]
    tolerance = 8 * value_eps * true_loss.abs().max().clamp(min=1e-30)
    assert (loss - true_loss).abs().max() <= (eager_loss - true_loss).abs().max() + tolerance
    grad_tolerance = (16 if dtype == torch.float64 else 2) * EPS[dtype] * true_grad.abs().max()
    if dtype == torch.float16:
        grad_tolerance += 6e-8  # its smallest step
    if impl in ("cuda", "triton") and dtype != torch.float64:
        grad_tolerance += float(upstream.max()) * float32_error(z, **ours.terms).max().cpu()
    error, eager_error = (grad - true_grad).abs().max(), (eager_grad - true_grad).abs().max()
    assert error <= eager_error + grad_tolerance, f"{error} against eager's {eager_error}"


class Call:
    """A loss as a function of its logits, for the comparison above."""

    def __init__(self, z, function, ce=1.0, kl=1.0, temperature=3.0):
        self.z, self.function, self.terms = z, function, {"ce": ce, "kl": kl, "temperature": temperature}

    def __call__(self, z):
        return self.function(z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_value_and_gradient(impl, generator, size, dtype):
    z, y, t = problem(impl, generator, *size, dtype)
    upstream = torch.rand((), generator=generator) + 0.5
    assert_as_good_as_eager(
        impl, dtype,
        Call(z, lambda v: fused_lb_loss(v, y, t, alpha=0.7, temperature=3.0, impl=impl), 4 / len(z), 2.1 / len(t)),
        lambda v: eager_official(v, y, t, alpha=0.7, temperature=3.0),
        lambda v: eager_official(v, y, t.double(), alpha=0.7, temperature=3.0),
        upstream,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)  # float64 is what the others are judged by
@pytest.mark.parametrize("classes", [100, 1000])
def test_near_equal_teacher(impl, generator, classes, dtype):
    """The normal case of this method: the teacher is the same network one step ago, so p_s - p_t cancels."""
    z, _, t = problem(impl, generator, 16, 16, classes, torch.float32, drift=1e-3)
    z, t = z.to(dtype), t.to(torch.float32)
    truth = lambda v: reference.last_batch_loss(v, None, t.double(), temperature=3.0)[0]  # noqa: E731
    eager = lambda v: reference.last_batch_loss(v, None, t, temperature=3.0)[0]  # noqa: E731
    ours = Call(z, lambda v: fused_lb_loss(v, None, t, temperature=3.0, impl=impl))
    upstream = torch.ones(())
    _, grad = value_and_gradient(ours, z, upstream)
    _, eager_grad = value_and_gradient(eager, z, upstream)
    _, true_grad = value_and_gradient(truth, z.double(), upstream)
    error, eager_error = (grad - true_grad).norm(), (eager_grad - true_grad).norm()
    tolerance = EPS[dtype] * true_grad.norm()
    if impl in ("cuda", "triton"):  # by luck eager is off by less than a GPU's exponential
        tolerance += float32_error(z, ce=0.0, kl=3.0 / len(z)).norm().cpu()
    assert error <= 1.1 * eager_error + tolerance


OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"weight": True},
    "weights+smoothing": {"weight": True, "label_smoothing": 0.3},
    "ignored": {"ignored": True},
    "weights+ignored+smoothing": {"weight": True, "ignored": True, "label_smoothing": 0.2},
    "dense": {"dense": True},
    "dense+weights+smoothing": {"dense": True, "weight": True, "label_smoothing": 0.1},
    "pair": {"pair": True},
    "pair+weights+ignored": {"pair": True, "weight": True, "ignored": True},
    "mask": {"mask": True},
    "no target": {"no_target": True},
    "no teacher": {"no_teacher": True},
    "probabilities": {"kind": "probabilities"},
    "unnormalised probabilities": {"kind": "probabilities", "mass": 0.5},
    "uniform teacher": {"kind": "virtual"},
    "corrected teacher": {"kind": "virtual", "share": 0.7},
    "corrected teacher, all mass": {"kind": "virtual", "share": 1.0, "ignored": True},
    "lsr weights": {"kind": "virtual", "ce_alpha": -1.0},
}


REDUCTIONS = ("mean", "sum", "none")
# Every option with every dtype and every reduction, and every dtype with every reduction.
PAIRS = [
    (name, REDUCTIONS[(i + j) % 3], dtype) for i, name in enumerate(OPTIONS) for j, dtype in enumerate(DTYPES)
]  # fmt: skip


@pytest.mark.parametrize(("name", "reduction", "dtype"), PAIRS, ids=str)
def test_every_option(impl, generator, name, reduction, dtype):
    o = OPTIONS[name]
    rows, taught, classes = 12, 6, 37
    z, y, t = problem(impl, generator, rows, taught, classes, dtype)
    device = z.device
    if o.get("ignored"):
        y[torch.tensor([1, 8])] = -100
    weight = torch.rand(classes, generator=generator).to(device) if o.get("weight") else None
    target = torch.softmax(torch.randn(rows, classes, generator=generator), 1).to(device) if o.get("dense") else y
    pair = {}
    if o.get("pair"):
        pair = {"target_b": y.flip(0), "lam": torch.rand(rows, generator=generator).to(device)}
    kind, share = o.get("kind", "logits"), o.get("share")
    teacher: torch.Tensor | None = t
    if kind == "probabilities":
        teacher = torch.softmax(t.float(), 1) * o.get("mass", 1.0)
        teacher[0, :5] = 0.0
    elif kind == "virtual" or o.get("no_teacher"):
        teacher = None
    mask = torch.tensor([True, False, True, False, True, True], device=device) if o.get("mask") else None

    def loss(v, run_as):
        exact = (lambda x: None if x is None else x.double()) if v.dtype == torch.float64 else (lambda x: x)
        dense = exact(target) if target.dim() == 2 else target
        return row_loss(
            "test", run_as, v, None if o.get("no_target") else dense, teacher=exact(teacher), teacher_kind=kind,
            alpha=0.6, temperature=2.5, label_smoothing=o.get("label_smoothing", 0.0), weight=exact(weight),
            kd_mask=mask, reduction=reduction, correct_share=share,
            ce_alpha=o.get("ce_alpha", 0.0), **{k: exact(v) if k == "lam" else v for k, v in pair.items()},
        )  # fmt: skip

    upstream = torch.rand((rows,) if reduction == "none" else (), generator=generator) + 0.5
    mean = reduction == "mean"
    terms = (4 / rows, 0.6 * 2.5 / (taught / 2), 2.5) if mean else (1.0, 0.6 * 2.5, 2.5)
    assert_as_good_as_eager(
        impl, dtype, Call(z, lambda v: loss(v, impl)[0], *terms), lambda v: loss(v, "torch")[0],
        lambda v: loss(v, "torch")[0], upstream,
    )  # fmt: skip
    parts, truth = loss(z, impl)[1][:4].double(), loss(z.double(), "torch")[1][:4]
    torch.testing.assert_close(parts, truth, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 4.0, 20.0])
def test_temperatures_and_device_scalars(impl, generator, tau):
    z, y, t = problem(impl, generator, 16, 8, 50, torch.float32)
    number = fused_lb_loss(z, y, t, alpha=0.3, temperature=tau, impl=impl)
    tensor = fused_lb_loss(
        z, y, t, alpha=torch.tensor(0.3, device=z.device), temperature=torch.tensor(tau, device=z.device), impl=impl
    )
    truth = eager_official(z.double(), y, t.double(), alpha=0.3, temperature=tau)
    assert number.item() == pytest.approx(truth.item(), rel=2e-6)
    assert tensor.item() == pytest.approx(truth.item(), rel=2e-6)


def test_the_logits_decide_the_dtype(impl, generator):
    """A scalar of another dtype does not; who else may have a gradient stands in test_autograd.py."""
    z, _, t = problem(impl, generator, 8, 4, 5, torch.float32)
    target = torch.rand(8, 5, device=z.device)
    alpha = torch.tensor(0.3, dtype=torch.float64, device=z.device)
    temperature = torch.tensor(2.0, dtype=torch.float64, device=z.device)
    loss = fused_lb_loss(z.requires_grad_(), target, t, alpha=alpha, temperature=temperature, impl=impl)
    loss.backward()
    assert loss.dtype == z.grad.dtype == torch.float32
    assert z.grad.abs().sum() > 0


def test_a_second_derivative_is_refused_or_right(impl, generator):
    z, y, t = problem(impl, generator, 8, 4, 5, torch.float64)
    z.requires_grad_()
    loss = fused_lb_loss(z, y, t, impl=impl)
    if impl != "torch":
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss, z, create_graph=True)
        return
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    penalty = loss + grad.square().sum()  # beside the loss: a constant gradient would not be noticed
    (got,) = torch.autograd.grad(penalty, z)
    (plain,) = torch.autograd.grad(eager_official(z, y, t), z, create_graph=True)
    (want,) = torch.autograd.grad(eager_official(z, y, t) + plain.square().sum(), z)
    torch.testing.assert_close(got, want)


def test_float16_gradient_survives_a_loss_scale(impl, generator):
    z, y, t = problem(impl, generator, 64, 32, 1000, torch.float16)
    scale = 65536.0
    for upstream in (scale, 3.0 * scale / 4, 128.0):
        _, grad = value_and_gradient(lambda v: fused_lb_loss(v, y, t, impl=impl), z, torch.tensor(upstream))
        _, truth = value_and_gradient(
            lambda v: eager_official(v, y, t.double()), z.double(), torch.tensor(upstream)
        )
        wanted = truth.to(torch.float16).double()
        assert (grad - wanted).abs().max() <= 2e-3 * truth.abs().max()
        # Entries that float16 can hold must not have been flushed to zero.
        assert ((grad == 0) & (wanted.abs() > 6.2e-5)).sum() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("right", [1, 200])
def test_float16_with_several_right_classes_stays_finite(impl, generator, right, reduction):
    """Dense targets need not sum to 1; a gradient enlarged for one right class would overflow at any loss scale."""
    z = torch.randn(4, 300, generator=generator).half()
    y = (torch.arange(300) < right).float().expand(4, 300)
    _, grad = value_and_gradient(lambda v: fused_lb_loss(v, y, reduction=reduction, impl=impl), z, torch.tensor(8.0))
    _, truth = value_and_gradient(
        lambda v: torch.nn.functional.cross_entropy(v, y.double(), reduction=reduction), z.double(), torch.tensor(8.0)
    )
    assert (grad - truth).abs().max() <= 2e-3 * truth.abs().max()


def test_smoothing_over_weightless_rows_is_zero(impl, generator):
    """Their labels weigh nothing, so there is nothing to divide by, though the other classes' share is not 0."""
    z, y, t = problem(impl, generator, 4, 2, 5, torch.float32)
    weight = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    for dtype in (torch.float32, torch.float16):
        loss, grad = value_and_gradient(
            lambda v: fused_lb_loss(v, torch.zeros_like(y), weight=weight, label_smoothing=0.5, impl=impl),
            z.to(dtype), torch.tensor(1.0),
        )
        assert loss == 0 and grad.abs().max() == 0


def test_layouts(impl, generator):
    """Transposed, strided, expanded, offset and empty inputs are read as what they are."""
    z, y, t = problem(impl, generator, 12, 6, 20, torch.float32)
    truth = eager_official(z.double(), y, t.double()).item()
    wide = torch.zeros(12, 47, device=z.device)
    wide[:, 5:25] = z
    labels = torch.full((30,), 3, device=z.device)
    labels[1:25:2] = y
    holed = torch.zeros(6, 2, 20, device=z.device)
    holed[:, 1] = t
    for logits in (z.t().contiguous().t(), wide[:, 5:25]):
        loss = fused_lb_loss(logits, labels[1:25:2], holed[:, 1], impl=impl)
        assert loss.item() == pytest.approx(truth, rel=1e-6)
    row = z[:1].expand(12, 20)
    teacher = t[:1].expand(6, 20)
    expanded = fused_lb_loss(row, y, teacher, impl=impl)
    assert expanded.item() == pytest.approx(eager_official(row.double(), y, teacher.double()).item(), rel=1e-6)
    empty = z[:0].clone().requires_grad_()
    loss = fused_lb_loss(empty, y[:0], t[:0], impl=impl)
    loss.backward()
    assert loss.item() == 0.0
    assert empty.grad.shape == (0, 20)


def test_expanded_upstream_gradient(impl, generator):
    z, y, t = problem(impl, generator, 12, 6, 20, torch.float32)
    z.requires_grad_()
    fused_lb_loss(z, y, t, reduction="none", impl=impl).sum().backward()
    (want,) = torch.autograd.grad(
        reference.last_batch_loss(z.double(), y, t.double(), reduction="none")[0].sum(), z
    )  # fmt: skip
    torch.testing.assert_close(z.grad, want, rtol=1e-5, atol=1e-6)


def test_infinities_and_nan(impl, generator):
    z, y, t = problem(impl, generator, 8, 4, 30, torch.float32)
    z[:, 7] = t[:, 7] = float("-inf")
    y[y == 7] = 0
    z.requires_grad_()
    loss = fused_lb_loss(z, y, t, impl=impl)
    loss.backward()
    truth = reference.last_batch_loss(z.detach().double(), y, t.double())[0]
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    assert z.grad.isfinite().all()
    assert z.grad[:, 7].abs().max() == 0

    poisoned = z.detach().clone()
    poisoned[5, 3] = float("nan")
    poisoned.requires_grad_()
    rows = fused_lb_loss(poisoned, y, t, reduction="none", impl=impl)
    rows.sum().backward()
    assert rows.isnan().tolist() == [i == 5 for i in range(8)]
    assert poisoned.grad.isnan().any(1).tolist() == [i == 5 for i in range(8)]


@pytest.mark.parametrize("classes", [2, 10, 100, 1001])
def test_a_teacher_that_says_the_same_costs_exactly_nothing(impl, generator, classes):
    z, y, _ = problem(impl, generator, 16, 8, classes, torch.float32)
    _, parts = fused_lb_loss(z, y, z[:8].clone(), impl=impl, return_parts=True)
    assert parts.lb == 0


def test_a_common_offset_does_not_hurt(impl, generator):
    z, y, t = problem(impl, generator, 8, 4, 30, torch.float32)
    truth = eager_official(z.double(), y, t.double()).item()
    offset = 2.0**12  # exact in float32 for logits of this size, rounded to 2^-11
    shifted = fused_lb_loss(z + offset, y, t - offset, impl=impl)
    assert shifted.item() == pytest.approx(truth, rel=1e-3)


def test_rows_that_do_not_count_may_hold_nan(impl, generator):
    z, y, t = problem(impl, generator, 8, 4, 30, torch.float32)
    z[1], y[1], t[1] = float("nan"), -100, float("nan")
    z.requires_grad_()
    mask = torch.tensor([True, False, True, True], device=z.device)
    loss = fused_lb_loss(z, y, t, kd_mask=mask, impl=impl)
    loss.backward()
    assert loss.isfinite()
    assert z.grad[1].abs().max() == 0
    assert z.grad.isfinite().all()


def test_inputs_are_never_written(impl, generator):
    z, y, t = problem(impl, generator, 16, 8, 100, torch.float32)
    before = [v.clone() for v in (z, y, t)]
    fused_lb_loss(z.requires_grad_(), y, t, impl=impl).backward()
    for now, then in zip((z.detach(), y, t), before, strict=True):
        assert torch.equal(now, then)


def test_bit_identical_from_run_to_run(impl, generator):
    z, y, t = problem(impl, generator, 255, 100, 1000, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    runs = [value_and_gradient(lambda v: fused_lb_loss(v, y, t, impl=impl), z, torch.tensor(0.7)) for _ in range(3)]
    torch.set_num_threads(1)
    runs.append(value_and_gradient(lambda v: fused_lb_loss(v, y, t, impl=impl), z, torch.tensor(0.7)))
    torch.set_num_threads(threads)
    if impl == "torch":
        runs.pop()  # eager's own reductions may depend on the number of threads
    assert all(torch.equal(runs[0][0], loss) and torch.equal(runs[0][1], grad) for loss, grad in runs[1:])


def test_seeded_random_shapes_and_options(impl, generator):
    """Two hundred draws of shape, stride, dtype and option; each against the reference in float64."""

    dtypes = DTYPES[:3] if impl == "cuda" else DTYPES

    def draw(high: int) -> int:
        return int(torch.randint(0, high, (), generator=generator))

    for _ in range(20 if impl == "triton" else 200):  # each is a compilation there
        rows, classes = 1 + draw(9), 1 + draw(70)
        taught = draw(rows + 1)
        dtype = dtypes[draw(len(dtypes))]
        z, y, t = problem(impl, generator, rows, taught, classes, dtype, scale=1.0 + draw(8))
        if draw(2):
            padded = torch.zeros(rows, classes + draw(9), dtype=dtype, device=z.device)
            padded[:, :classes] = z
            z = padded[:, :classes]
        if draw(3) == 0:
            y[draw(rows)] = -100
        mask = torch.rand(taught, generator=generator).to(z.device) < 0.7 if draw(2) else None
        options = {"alpha": draw(3) / 2, "temperature": 0.5 + draw(8), "label_smoothing": draw(3) / 10}
        options["reduction"] = ("mean", "sum", "none")[draw(3)]
        loss = fused_lb_loss(z, y, t, kd_mask=mask, impl=impl, **options)
        truth = reference.last_batch_loss(z.double(), y, t.double(), kd_mask=mask, **options)[0]
        torch.testing.assert_close(loss.double(), truth, rtol=3e-5, atol=1e-6)


def test_an_empty_batch_is_zero_in_every_form(impl):
    """The address of an empty tensor may be null, which must not read as a missing argument."""
    z, y = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.long)
    for loss in (
        fused_lb_loss(z, y, z.detach(), impl=impl),
        fused_lb_loss(z, torch.zeros(0, 5), impl=impl),
        fused_lb_loss(z, y, target_b=y, lam=0.3, impl=impl),
        fused_lb_loss(z, y, target_b=y, lam=torch.zeros(0), impl=impl),
        distillation_loss(z, y, kind="uniform", correct_share=0.9, impl=impl),
    ):
        (grad,) = torch.autograd.grad(loss, z)
        assert loss.item() == 0 and grad.shape == z.shape
