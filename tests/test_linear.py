"""The loss from hidden states: the value and gradients of the loss of all logits, which exist for a chunk only."""

from __future__ import annotations

import contextlib
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from builders import value_and_gradient
from conftest import available, eager_official, op_options
from torch.utils._python_dispatch import TorchDispatchMode

from dlb_fast import (
    LastBatchLoss,
    TopK,
    _backends,
    buffer,
    distillation_loss,
    fused_lb_loss,
    fused_linear_lb_loss,
    linear,
    ops,
)

pytestmark = pytest.mark.skipif(not available("cpu"), reason="nothing is compiled here")

ROWS, WIDTH, CLASSES, TAUGHT = 9, 5, 23, 4
WAYS = ("cpu", "torch in chunks", "torch", "no host")


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def labels(rows=ROWS, classes=CLASSES, seed=5):
    return torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))


def layer(dtype=torch.float64, rows=ROWS, width=WIDTH, classes=CLASSES, bias=True):
    """Hidden states, weight and bias of a last layer."""
    made = (draw(rows, width), draw(classes, width, seed=1), draw(classes, seed=2) if bias else None)
    return [None if part is None else part.to(dtype) for part in made]


def outcome(function, parts, upstream=None):
    """Loss and the gradient of every part that is given, in float64."""
    leaves = [None if part is None else part.detach().clone().requires_grad_() for part in parts]
    loss = function(*leaves)
    loss.backward(None if upstream is None else upstream.to(loss.dtype))
    return [loss.detach().double(), *(None if leaf is None else leaf.grad.double() for leaf in leaves)]


def by_logits(y, teacher=None, kind="logits", **given):
    """The definition: all logits, plain autograd, in the dtype of the parts."""

    def loss(hidden, weight, bias):
        given_teacher, of = teacher, kind
        if kind == "hidden" and teacher is not None:
            given_teacher, of = F.linear(*teacher), "logits"
        z = F.linear(hidden, weight, bias)
        if of == "logits":
            return fused_lb_loss(z, y, given_teacher, impl="torch", **given)
        mask = given.pop("kd_mask", None)
        if mask is not None:
            given["kd_mask"] = torch.cat([mask, mask.new_ones(len(z) - len(mask))])
        return distillation_loss(z, y, given_teacher, kind=of, impl="torch", **{"temperature": 3.0, **given})

    return loss


def by_chunks(y, teacher=None, kind="logits", head_bias=None, **given):
    def loss(hidden, weight, bias):
        return fused_linear_lb_loss(hidden, weight, y, teacher, head_bias=bias, kind=kind, **given)

    return loss


def assert_near(found, wanted, within=1e-12):
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            scale = max(other.abs().max().item(), 1.0) if other.numel() else 1.0
            torch.testing.assert_close(one, other, rtol=0, atol=within * scale)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Every way to a chunk's rows, as arguments of the function; one of them as on a device that nothing waits for."""
    if request.param == "no host":
        monkeypatch.setattr(linear, "_on_host", lambda tensor: False)
    if request.param == "torch in chunks":
        monkeypatch.setenv("DLB_FAST_BACKEND", "torch")
    _backends.forget_picks()
    yield {"impl": request.param if request.param in ("cpu", "torch") else "auto"}
    monkeypatch.undo()
    _backends.forget_picks()


def ignoring(y):
    return torch.where(torch.arange(len(y)) % 3 == 1, -100, y)


MASK = torch.tensor([True, False, True, True])
DENSE = draw(ROWS, CLASSES, seed=7).softmax(1)
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "weights": {"weight": draw(CLASSES, seed=3).abs(), "label_smoothing": 0.1},
    "weights of 0": {"weight": torch.zeros(CLASSES, dtype=torch.float64), "label_smoothing": 0.1},
    "ignored": {"y": ignoring(labels()), "weight": draw(CLASSES, seed=3).abs()},
    "all ignored": {"y": torch.full((ROWS,), -100)},
    "mask": {"kd_mask": MASK},
    "all masked": {"kd_mask": ~MASK & MASK},
    "pair": {
        "target_b": ignoring(labels().flip(0)),
        "lam": torch.rand(ROWS, generator=torch.Generator().manual_seed(1)),
    },
    "pair of one share": {"target_b": labels().flip(0), "lam": 0.3, "weight": draw(CLASSES, seed=3).abs()},
    "dense": {"y": DENSE, "weight": draw(CLASSES, seed=3).abs()},
    "no target": {"y": None},
    "scalars": {"alpha": torch.tensor(0.6), "temperature": torch.tensor(1.7)},
    "alpha 0": {"alpha": 0.0},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_as_with_all_logits(name, reduction, way):
    given = dict(OPTIONS[name])
    y = given.pop("y", labels())
    teacher = draw(TAUGHT, CLASSES, seed=4, scale=2.0)
    upstream = torch.linspace(-1, 2, ROWS) if reduction == "none" else torch.tensor(-0.7)
    parts = layer()
    wanted = outcome(by_logits(y, teacher, reduction=reduction, **given), parts, upstream)
    for rows in (2, ROWS):
        memory = rows * CLASSES * 8
        found = outcome(by_chunks(y, teacher, reduction=reduction, max_memory=memory, **given, **way), parts, upstream)
        assert_near(found, wanted)


def teacher_of(kind, rows=TAUGHT, dtype=torch.float64, classes=CLASSES):
    z = draw(rows, classes, seed=4, scale=2.0).to(dtype)
    if kind == "probabilities":
        return z.softmax(1)
    if kind == "top_k":
        return TopK.of(z, 3, 3.0)
    if kind == "hidden":
        return draw(rows, 3, seed=8).to(dtype), draw(classes, 3, seed=9).to(dtype), draw(classes, seed=10).to(dtype)
    return z


@pytest.mark.parametrize("kind", linear.KINDS)
@pytest.mark.parametrize("taught", [0, 1, TAUGHT, ROWS])
def test_every_kind_of_teacher(kind, taught, way):
    teacher, parts, y = teacher_of(kind, taught), layer(), labels()
    wanted = outcome(by_logits(y, teacher, kind), parts)
    for memory in (1, 3 * CLASSES * 8, None):
        assert_near(outcome(by_chunks(y, teacher, kind, max_memory=memory, **way), parts), wanted)


@pytest.mark.parametrize("kind", linear.KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_teacher_row_that_is_not_finite_teaches_nothing(kind, bad, way):
    """Also where it shows only when other chunks are done, whose gradients stood over their logits."""
    teacher, parts, y = teacher_of(kind, ROWS), layer(), labels()
    if kind == "top_k":
        teacher.logsumexp[6] = bad
    else:
        (teacher[0] if kind == "hidden" else teacher)[6, 1] = bad
    wanted = outcome(by_logits(y, teacher, kind), parts)
    assert all(part.isfinite().all() for part in wanted)
    for memory in (1, 4 * CLASSES * 8, None):
        assert_near(outcome(by_chunks(y, teacher, kind, max_memory=memory, **way), parts), wanted)


@pytest.mark.parametrize(
    ("rows", "width", "classes"), [(0, 5, 7), (1, 1, 1), (1, 64, 3), (5, 1, 1000), (7, 16, 4097), (33, 8, 100)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_odd_shapes(rows, width, classes, bias):
    parts, y = layer(rows=rows, width=width, classes=classes, bias=bias), labels(rows, classes)
    teacher = draw(rows // 2, classes)
    wanted = outcome(by_logits(y, teacher), parts)
    for memory in (1, 2 * classes * 8, None):
        assert_near(outcome(by_chunks(y, teacher, max_memory=memory), parts), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_slices_of_classes_make_one_gradient(dtype, monkeypatch):
    """Where products pass through another dtype; 600 classes are three slices here."""
    parts, y = [part.to(dtype) for part in layer(classes=600)], labels(classes=600)
    teacher = draw(TAUGHT, 600).to(dtype)
    wanted = outcome(by_logits(y, teacher.double()), [part.double() for part in parts])
    monkeypatch.setattr(linear, "_SLICE_BYTES", 1)
    found = outcome(by_chunks(y, teacher, max_memory=4 * 600 * dtype.itemsize), parts)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert (one - other).norm() <= max(2 * torch.finfo(dtype).eps, 1e-14) * other.norm()


def test_other_threads_keep_their_precision(monkeypatch):
    """A bfloat16 product sets a precision of the process, which rounds the float32 products of every thread."""
    setting, seen, product = torch.backends.mkldnn.matmul, [], torch.Tensor.addmm_

    def looked_at(out, *operands, **scales):
        seen.append(setting.fp32_precision)
        if fails:
            raise ArithmeticError
        return product(out, *operands, **scales)

    def run():
        hidden, weight, bias = (part.requires_grad_() for part in layer(torch.bfloat16))
        seen.clear()
        fused_linear_lb_loss(hidden, weight, labels(), head_bias=bias).backward()
        return {*seen}

    monkeypatch.setattr(torch.Tensor, "addmm_", looked_at)
    monkeypatch.setattr(threading, "active_count", lambda: threads)
    before, fails, threads = setting.fp32_precision, False, 2
    assert run() == {before}
    threads = 1
    assert run() == {"bf16"}
    fails = True
    with pytest.raises(ArithmeticError):
        run()
    assert setting.fp32_precision == before


def test_any_layout():
    hidden, weight, bias = layer()
    teacher, y = teacher_of("logits"), labels()
    wanted = outcome(by_logits(y, teacher), (hidden, weight, bias))
    strided = [hidden.T.contiguous().T, weight.T.contiguous().T, torch.stack([bias, bias], 1)[:, 0]]
    leaves = [part.detach().requires_grad_() for part in strided]
    loss = fused_linear_lb_loss(
        leaves[0], leaves[1], y, torch.stack([teacher, teacher], 2)[..., 0], head_bias=leaves[2], max_memory=500
    )
    loss.backward()
    assert_near([loss.detach(), *(leaf.grad for leaf in leaves)], wanted)


@pytest.mark.parametrize("kind", linear.KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_against_finite_differences(kind, reduction):
    teacher, y, parts = teacher_of(kind), labels(), layer()
    leaves = [part.requires_grad_() for part in parts]
    loss = by_chunks(y, teacher, kind, reduction=reduction, max_memory=3 * CLASSES * 8)
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "mask", "all ignored", "pair", "scalars"])
@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_by_triton(name, kind, reduction, monkeypatch):
    """In the interpreter, as on a GPU: a gradient of its own for every chunk, and no value read."""
    if not available("triton"):
        pytest.skip("no Triton here")
    monkeypatch.setattr(linear, "_on_host", lambda tensor: False)
    given = dict(OPTIONS[name])
    y, teacher, parts = given.pop("y", labels()), teacher_of(kind), layer()
    upstream = torch.linspace(-1, 2, ROWS) if reduction == "none" else None
    (teacher[0] if kind == "hidden" else teacher)[2] = float("nan")
    wanted = outcome(by_logits(y, teacher, kind, reduction=reduction, **given), parts, upstream)
    given["max_memory"] = 5 * CLASSES * 8
    assert_near(
        outcome(by_chunks(y, teacher, kind, reduction=reduction, impl="triton", **given), parts, upstream), wanted
    )
    if kind == "logits" and reduction == "mean":
        with pytest.raises(RuntimeError, match=r"impl='triton' has no teacher of kind 'top_k'; use impl='auto'"):
            by_chunks(y, teacher_of("top_k"), "top_k", impl="triton")(*parts)


def test_parts_are_those_of_the_loss_of_all_logits(way):
    hidden, weight, bias = layer()
    y, teacher = ignoring(labels()), teacher_of("logits")
    for reduction in ("mean", "sum", "none"):
        _, wanted = fused_lb_loss(
            F.linear(hidden, weight, bias), y, teacher, reduction=reduction, impl="torch", return_parts=True
        )
        _, parts = fused_linear_lb_loss(
            hidden, weight, y, teacher, head_bias=bias, reduction=reduction, max_memory=2 * CLASSES * 8,
            return_parts=True, **way,
        )  # fmt: skip
        torch.testing.assert_close(torch.stack(parts), torch.stack(wanted), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kind", "reduction"), [("logits", "mean"), ("hidden", "mean"), ("logits", "none"), (None, "mean")]
)
def test_no_less_accurate_than_eager(dtype, kind, reduction):
    """The error of loss and gradients against float64 from the same numbers, beside that of the usual code."""
    rows, width, classes, taught = 64, 24, 1501, 32 if kind else 0
    parts = layer(dtype, rows, width, classes)
    parts = [part * scale for part, scale in zip(parts, (1.0, 0.3 if kind else 0.05, 0.1), strict=True)]
    y = labels(rows, classes)
    hidden = draw(taught, 7, seed=8).to(dtype), draw(classes, 7, seed=9).to(dtype)
    teacher = hidden if kind == "hidden" else F.linear(*hidden)
    wide = [part.double() for part in parts]
    wide_teacher = tuple(part.double() for part in hidden) if kind == "hidden" else teacher.double()
    if kind is None:
        teacher, wide_teacher, kind = None, None, "logits"

    def eager(hidden, weight, bias):
        z, t = F.linear(hidden, weight, bias), F.linear(*teacher) if kind == "hidden" else teacher
        if t is None:
            return F.cross_entropy(z, y)
        kl = F.kl_div(F.log_softmax(z[:taught] / 3, 1), F.softmax(t / 3, 1), reduction="none").sum(1)
        if reduction == "mean":
            return F.cross_entropy(z, y) + 9 * kl.mean()
        return F.cross_entropy(z, y, reduction="none") + 9 * torch.cat([kl, kl.new_zeros(rows - taught)])

    upstream = torch.linspace(0.1, 1, rows) if reduction == "none" else None
    wanted = outcome(by_logits(y, wide_teacher, kind, reduction=reduction), wide, upstream)
    theirs = outcome(eager, parts, upstream)
    for memory in (8 * classes * dtype.itemsize, None):
        ours = outcome(by_chunks(y, teacher, kind, reduction=reduction, max_memory=memory), parts, upstream)
        for name, one, other, right in zip(("loss", "hidden", "weight", "bias"), ours, theirs, wanted, strict=True):
            unit = 2e-7 if dtype == torch.float32 else 0.0  # eager float32 may be right to the last digit by luck
            limit = (other - right).norm() + unit * right.norm()
            assert (one - right).norm() <= limit, f"{name}: {(one - right).norm():g} > {limit:g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 65536.0])
def test_a_loss_scale_reaches_the_gradients(dtype, factor):
    """Of 4096 rows: without the scale a float16 gradient would lie below its smallest number."""
    rows, classes = 64, 300
    parts, y = [part.to(dtype) for part in layer(torch.float64, rows, 8, classes)], labels(rows, classes)
    wide = [part.double() for part in parts]
    factor = torch.tensor(factor / 64)
    wanted = outcome(by_logits(y), wide, factor)
    found = outcome(by_chunks(y, max_memory=20 * classes * dtype.itemsize), parts, factor)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        # 8 units of the largest entry, and what the dtype itself cannot hold.
        limit = 8 * torch.finfo(dtype).eps * other.abs().max() + torch.finfo(dtype).smallest_normal * 2**-9
        assert (one - other).abs().max() <= limit


def test_a_recomputed_loss_and_saved_tensors_that_others_hold():
    """Activation checkpointing, and hooks that keep what is saved: the saved gradients are not written to."""
    y, teacher, parts = labels(), teacher_of("logits"), layer()
    wanted = outcome(by_logits(y, teacher), parts, torch.tensor(3.0))
    loss = by_chunks(y, teacher)
    found = outcome(lambda *leaves: torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False), parts,
                    torch.tensor(3.0))  # fmt: skip
    assert_near(found, wanted)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append((t, t.clone())) or t, lambda t: t):
        assert_near(outcome(loss, parts, torch.tensor(3.0)), wanted)
    assert len(held) >= 4 and all(torch.equal(now, then) for now, then in held)


def test_the_chunk_size_changes_rounding_only():
    parts, y = layer(torch.float32, 40, 16, 300), labels(40, 300)
    teacher = draw(20, 300).float()
    results = [outcome(by_chunks(y, teacher, max_memory=n * 1200), parts) for n in (1, 7, 40, 40)]
    for result in results[:2]:
        assert_near(result, results[2], 1e-6)
    assert all(torch.equal(one, other) for one, other in zip(results[2], results[3], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(dtype, reduction):
    """The products in autocast's dtype, the gradients in that of the parameters, and the weight's summed in float32."""
    hidden, weight, bias = layer(torch.float32, 32, 16, 700)
    y, teacher = labels(32, 700), draw(16, 700).float()
    upstream = torch.ones(32) if reduction == "none" else None
    low = [part.to(dtype).double() for part in (hidden, weight, bias)]
    wanted = outcome(by_logits(y, teacher.double(), reduction=reduction), low, upstream)
    with torch.autocast("cpu", dtype):
        found = outcome(
            by_chunks(y, teacher, reduction=reduction, max_memory=4 * 700 * 2), (hidden, weight, bias), upstream
        )
        leaf = weight.clone().requires_grad_()
        fused_linear_lb_loss(hidden, leaf, y, teacher).backward()
        assert leaf.grad.dtype == torch.float32
    assert_near(found, wanted, 2e-2)


def test_float64_is_not_cast_by_autocast():
    parts, y, teacher = layer(), labels(), teacher_of("logits")
    wanted = outcome(by_logits(y, teacher), parts)
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(outcome(by_chunks(y, teacher), parts), wanted)


class Products(TorchDispatchMode):
    """Counts the products of matrices, and the elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.dlb_fast.linear_last_batch.default:
            with self:
                return linear._run(*args)
        result = func(*args, **(kwargs or {}))
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        given = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_what_needs_no_gradient_costs_no_product(needs):
    """And the rest is right; without any gradient the loss is, too."""
    y, teacher, parts = labels(), teacher_of("logits"), layer()
    wanted = outcome(by_logits(y, teacher), parts)
    leaves = [part.clone().requires_grad_(need) for part, need in zip(parts, needs, strict=True)]
    with Products() as seen:
        loss = fused_linear_lb_loss(leaves[0], leaves[1], y, teacher, head_bias=leaves[2])
    assert seen.count == 1 + needs[0] + needs[1]
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    found = [loss.detach(), *(leaf.grad for leaf in leaves)]
    assert_near(found, [wanted[0], *(part if need else None for part, need in zip(wanted[1:], needs, strict=True))])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = fused_linear_lb_loss(*parts[:2], y, teacher, head_bias=parts[2])
        torch.testing.assert_close(loss.clone(), wanted[0])


@pytest.mark.parametrize("kind", ["logits", "hidden", "top_k"])
def test_no_tensor_of_all_logits_is_made(kind):
    rows, classes = 64, 500
    parts, y = layer(torch.float32, rows, 4, classes), labels(rows, classes)
    teacher = teacher_of(kind, rows, torch.float32, classes)
    with Products() as seen:
        outcome(by_chunks(y, teacher, kind, max_memory=4 * 8 * classes), parts)
    assert seen.largest <= 8 * classes
    with Products() as seen:
        outcome(by_logits(y, teacher, kind), parts)
    assert seen.largest >= rows * classes


def test_gradients_accumulate():
    y, teacher, parts = labels(), teacher_of("logits"), layer()
    wanted = outcome(by_logits(y, teacher), parts)
    leaves = [part.clone().requires_grad_() for part in parts]
    for _ in range(3):
        (fused_linear_lb_loss(leaves[0], leaves[1], y, teacher, head_bias=leaves[2]) / 3).backward()
    assert_near([leaf.grad for leaf in leaves], wanted[1:])


def test_a_tied_weight_gets_both_gradients():
    embedding, y = draw(CLASSES, WIDTH), labels()
    tokens = labels(seed=11)
    found, wanted = (
        value_and_gradient(lambda weight, f=f: f(weight[tokens].tanh(), weight, None), embedding)
        for f in (by_chunks(y, teacher_of("logits"), max_memory=1), by_logits(y, teacher_of("logits")))
    )
    assert_near(found, wanted)


def test_a_head_that_teaches_itself_gets_no_gradient_as_teacher():
    hidden, weight, bias = layer()
    y = labels()
    leaf, teacher = weight.clone().requires_grad_(), draw(TAUGHT, WIDTH, seed=12).requires_grad_()
    loss = fused_linear_lb_loss(hidden, leaf, y, (teacher, leaf, bias), head_bias=bias, kind="hidden")
    loss.backward()
    wanted = outcome(by_logits(y, (teacher.detach(), weight, bias), "hidden"), (hidden, weight, bias))
    assert teacher.grad is None
    frozen = fused_linear_lb_loss(hidden, weight, y, (teacher, leaf, bias), kind="hidden")
    assert not frozen.requires_grad
    assert_near([loss.detach(), leaf.grad], [wanted[0], wanted[2]])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_batched(reduction):
    y, teacher, parts = labels(), teacher_of("logits"), layer()
    leaves = [part.clone().requires_grad_() for part in parts]
    loss = by_chunks(y, teacher, reduction=reduction)(*leaves)
    upstream = torch.ones_like(loss)
    first = torch.autograd.grad(loss, leaves, 2 * upstream, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    assert_near(first, [2 * part for part in again])
    with pytest.raises(RuntimeError, match=r"create_graph=True; use impl='torch'"):
        torch.autograd.grad(loss, leaves, upstream, create_graph=True)
    second = torch.autograd.grad(by_chunks(y, teacher, reduction=reduction, impl="torch")(*leaves).sum(), leaves,
                                 create_graph=True)  # fmt: skip
    assert all(part.requires_grad for part in second)
    if reduction == "mean":
        rows = torch.autograd.grad(loss, leaves, torch.tensor([1.0, 2.0]).double(), is_grads_batched=True)
        assert_near([part[1] for part in rows], first)


def test_torch_func_and_other_gradients_take_plain_pytorch():
    hidden, weight, bias = layer()
    y, teacher = labels(), teacher_of("logits")
    wanted = outcome(by_logits(y, teacher), (hidden, weight, bias))
    grad = torch.func.grad(by_chunks(y, teacher), argnums=1)(hidden, weight, bias)
    torch.testing.assert_close(grad, wanted[2])
    temperature = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    by_chunks(y, teacher, temperature=temperature)(hidden, weight, bias).backward()
    assert temperature.grad.abs() > 0
    with pytest.raises(RuntimeError, match=r"fused_linear_lb_loss: impl='cpu' has no gradient of temperature"):
        by_chunks(y, teacher, temperature=temperature, impl="cpu")(hidden, weight, bias)


def wrong(**given):
    parts = layer(torch.float32)
    arguments = {
        "hidden": parts[0], "head_weight": parts[1], "target": labels(), "teacher": draw(TAUGHT, CLASSES).float(),
        "head_bias": parts[2],
    }  # fmt: skip
    return fused_linear_lb_loss(**{**arguments, **given})


WRONG = {
    r"hidden must have shape \(B, D\), got \(1, 9, 5\); pass hidden.flatten\(0, -2\)": {"hidden": torch.zeros(1, 9, 5)},
    r"head_weight must have shape \(C, 5\).*got \(5, 23\); pass head_weight.T": {"head_weight": torch.zeros(5, 23)},
    r"head_weight must have the dtype of hidden \(torch.float32\), got torch.bfloat16; pass head_weight.to\(": {
        "head_weight": torch.zeros(23, 5).bfloat16()
    },
    r"hidden must be float32, bfloat16, float16 or float64, got torch.int64": {"hidden": torch.zeros(9, 5).long()},
    r"head_bias must have shape \(23,\), got \(5,\)": {"head_bias": torch.zeros(5)},
    r"target\[8\] = 23 is not a class: expected 0 <= label < 23": {"target": torch.tensor([0] * 8 + [23])},
    r"target must have shape \(9,\) for labels": {"target": torch.zeros(8).long()},
    r"teacher must have shape \(H, C\) with H <= 9 and C = 23, got \(4, 22\)": {"teacher": torch.zeros(4, 22)},
    r"kind must be one of logits, probabilities, hidden, top_k, got 'logit'": {"kind": "logit"},
    r"with kind='hidden' the teacher must be \(hidden_t, head_weight_t\).*got Tensor": {"kind": "hidden"},
    r"the teacher's head_weight must have shape \(C, 3\)": {
        "kind": "hidden", "teacher": (torch.zeros(4, 3), torch.zeros(23, 4))
    },
    r"the teacher's logits must have shape \(H, C\) with H <= 9 and C = 23, got \(4, 22\)": {
        "kind": "hidden", "teacher": (torch.zeros(4, 3), torch.zeros(22, 3))
    },
    r"a teacher of kind 'top_k' must be a dlb_fast.TopK, got Tensor": {"kind": "top_k"},
    r"a TopK belongs to kind='top_k', got kind='logits'": {"teacher": TopK.of(torch.zeros(4, 23), 2, 1.0)},
    r"a TopK belongs to kind='top_k', got kind='hidden'": {
        "kind": "hidden", "teacher": TopK.of(torch.zeros(4, 23), 2, 1.0)
    },
    r"with kind='logits' the teacher must be a torch.Tensor, got tuple; .* kind='hidden'": {
        "teacher": (torch.zeros(4, 3), torch.zeros(23, 3))
    },
    r"hidden must be a torch.Tensor, got NoneType": {"hidden": None},
    r"head_weight must be a torch.Tensor, got NoneType": {"head_weight": None},
    r"the teacher's hidden states must be a torch.Tensor, got NoneType": {
        "kind": "hidden", "teacher": (None, torch.zeros(23, 3))
    },
    r"the teacher's head_weight must be a torch.Tensor, got NoneType": {
        "kind": "hidden", "teacher": (torch.zeros(4, 3), None)
    },
    r"kd_mask was given without a teacher": {"teacher": None, "kd_mask": MASK},
    r"target and teacher are both None": {"teacher": None, "target": None},
    r"kd_mask must be a bool tensor of shape \(4,\)": {"kd_mask": torch.ones(9, dtype=torch.bool)},
    r"weight must be floating with shape \(23,\)": {"weight": torch.ones(5)},
    r"max_memory must be at least 1, got 0": {"max_memory": 0},
    r"temperature must be finite and > 0": {"temperature": 0.0},
    r"reduction must be one of mean, sum, none, got 'max'": {"reduction": "max"},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_mistake_is_named(message):
    with pytest.raises((ValueError, TypeError), match=rf"^fused_linear_lb_loss: {message}"):
        wrong(**WRONG[message])


# The op that writes the gradient over the logits


@pytest.mark.parametrize("classes", [1, 7, 100, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4])
def test_the_op_in_place_is_the_other_one(classes, dtype, kind):
    """Bit for bit: rows are read before they are written, also those that no scratch holds."""
    z, y = draw(6, classes, scale=3.0).to(dtype), labels(6, classes)
    t = draw(4, classes, seed=3)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    teacher = {1: t.float(), 2: t.softmax(1).to(dtype), 4: TopK.of(t.to(wide), min(3, classes), 3.0).packed()}.get(kind)
    pair = {"target_b": y.flip(0), "lam": torch.full((6,), 0.3, dtype=wide)}
    dense = draw(6, classes, seed=4).softmax(1).to(wide)
    for target, given in ((y, {}), (y, pair), (y, {"weight": draw(classes).abs().to(wide)}), (dense, {})):
        for reduction in ("sum", "none"):
            options = op_options(target, alpha=0.7, label_smoothing=0.1, reduction=reduction, **given)
            loss, parts, grad = torch.ops.dlb_fast.last_batch(z, teacher, kind, *options)
            over = z.clone()
            found = torch.ops.dlb_fast.last_batch_(over, teacher, kind, *options)
            assert torch.equal(found[0], loss) and torch.equal(found[1], parts) and torch.equal(over, grad)


def test_the_op_in_place_says_that_a_teacher_row_is_not_finite():
    z, t, options = draw(6, 30), draw(4, 30), op_options(labels(6, 30), reduction="sum")
    t[2, 3] = float("nan")
    _, parts = torch.ops.dlb_fast.last_batch_(z, t, 1, *options)
    assert parts[linear._VALID] == 3


def test_the_op_in_place_refuses_logits_with_gaps():
    with pytest.raises(RuntimeError, match="must be contiguous"):
        torch.ops.dlb_fast.last_batch_(draw(6, 30)[:, :20], None, 0, *op_options(labels(6, 20)))


def test_the_schema_in_place_is_the_python_one():
    compiled = torch._C.parse_schema(f"dlb_fast::last_batch_{ops.IN_PLACE}")
    assert str(torch.ops.dlb_fast.last_batch_.default._schema) == str(compiled)


def arguments(reduction="mean", **given):
    """The op's arguments for a small batch."""
    hidden, weight, bias = (part.float() for part in layer())
    found = []

    def seen(*args):
        found.append(args)
        raise KeyError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(linear._LinearLastBatch, "apply", seen)
        leaf = weight.requires_grad_()
        fused_linear_lb_loss(
            hidden, leaf, labels(), draw(TAUGHT, CLASSES).float(), head_bias=bias, reduction=reduction,
            max_memory=300, **given,
        )  # fmt: skip
    hidden, weight, bias, args, needs = found[0]
    return hidden.detach(), weight.detach(), bias, *args.values(), *needs


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction):
    torch.library.opcheck(torch.ops.dlb_fast.linear_last_batch.default, arguments(reduction))
    z, options = draw(6, 30), op_options(labels(6, 30), reduction=reduction)
    torch.library.opcheck(torch.ops.dlb_fast.last_batch_.default, (z, draw(4, 30), 1, *options))


@pytest.mark.parametrize("keep", [-1, 4])
def test_rows_are_kept_before_their_gradient_takes_their_place(keep, way):
    hidden, weight, bias = layer()
    options = linear.prepare("test", temperature=2.0, **way)
    for grad in (False, True):
        _, _, kept = linear.linear_loss(
            options, hidden, weight.clone().requires_grad_(grad), labels(), head_bias=bias, max_memory=2 * CLASSES * 8,
            kept_from=3, keep=keep,
        )  # fmt: skip
        z = F.linear(hidden, weight, bias)[3:]
        torch.testing.assert_close(kept, z if keep < 0 else TopK.of(z, keep, 2.0).packed())
        assert not kept.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compile_fullgraph(backend, reduction, autocast):
    torch._dynamo.reset()
    parts = layer(torch.float32)
    teacher, y = teacher_of("logits", dtype=torch.float32), labels()

    def step(hidden, weight, bias):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = fused_linear_lb_loss(
                hidden * 1.5, weight, y, teacher, head_bias=bias, reduction=reduction, max_memory=200
            )
        return (loss * torch.arange(1, 1 + loss.numel()).view(loss.shape)).sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert_near(outcome(compiled, parts), outcome(step, parts), 1e-5)


def test_eager_official_is_the_value():
    """Against the official code's own lines, in float64."""
    parts, y, teacher = layer(), labels(), teacher_of("logits")
    wanted = outcome(lambda h, w, b: eager_official(F.linear(h, w, b), y, teacher, alpha=0.5), parts)
    assert_near(outcome(by_chunks(y, teacher, alpha=0.5, max_memory=1), parts), wanted)


# The criterion from hidden states


def stream(batches=6, new=4, dtype=torch.float64):
    """Hidden states, labels and ids of batches that overlap; the third is evaluated twice."""
    for i in [0, 1, 2, 2, *range(3, batches)]:
        rows = new if i == 0 else 2 * new
        ids = torch.arange((i + 1) * new - rows, (i + 1) * new)
        yield draw(rows, WIDTH, seed=i).to(dtype), labels(rows, seed=i), ids


@pytest.mark.parametrize("given_ids", [True, False])
@pytest.mark.parametrize("options", [{}, {"keep": "top_k", "k": 5}, {"reduction": "none"}, {"capacity": 4}], ids=str)
def test_the_criterion_remembers_the_same_as_from_logits(options, given_ids, way):
    _, weight, bias = layer()
    one, other = (LastBatchLoss(CLASSES, **options, **part) for part in (way, {"impl": "torch"}))
    for hidden, y, ids in stream():
        ids = ids if given_ids else None
        parts = (hidden, weight, bias)
        upstream = torch.ones(len(y)) if "reduction" in options else None
        with torch.no_grad():
            early = one(hidden, y, ids, head_weight=weight, head_bias=bias)
        found = outcome(lambda h, w, b, y=y, ids=ids: one(h, y, ids, head_weight=w, head_bias=b), parts, upstream)
        with torch.no_grad():
            other(F.linear(hidden, weight, bias), y, ids)
        wanted = outcome(lambda h, w, b, y=y, ids=ids: other(F.linear(h, w, b), y, ids), parts, upstream)
        assert_near([early, *found], [found[0], *wanted], 1e-12)
        torch.testing.assert_close(torch.stack(one.parts), torch.stack(other.parts))
        torch.testing.assert_close(one.buffer.state_dict(), other.buffer.state_dict())
    assert one.parts.lb > 0
    one.eval()
    assert_near([one(hidden, y, head_weight=weight, head_bias=bias)], [other.eval()(F.linear(hidden, weight, bias), y)])


@pytest.mark.parametrize("keep", ["logits", "top_k"])
def test_the_criterion_makes_no_tensor_of_all_logits(keep, monkeypatch):
    """Nor a second copy of the stored rows while it stores them."""
    new, classes = 32, 500
    monkeypatch.setattr(buffer, "_PIECE", 8 * classes)
    criterion = LastBatchLoss(classes, keep=keep, **({"k": 10} if keep == "top_k" else {}))
    _, weight, _ = layer(torch.float32, classes=classes)
    monkeypatch.setattr(linear, "LOGIT_BYTES_ON_CPU", 8 * 4 * classes)
    leaf = weight.requires_grad_()
    for first in (0, 0, new):
        ids = torch.arange(first, first + (2 * new if criterion.buffer else new))
        with Products() as seen:
            loss = criterion(draw(len(ids), WIDTH).float(), labels(len(ids), classes), ids, head_weight=leaf)
            loss.backward()
    assert seen.largest == (new if keep == "logits" else 8) * classes
    assert criterion.buffer.taught == 2 * new


def test_the_criterion_says_what_a_layer_lacks():
    hidden, weight, bias = layer()
    with pytest.raises(ValueError, match="LastBatchLoss: head_bias was given without head_weight"):
        LastBatchLoss(CLASSES)(hidden, labels(), head_bias=bias)
    with pytest.raises(ValueError, match="LastBatchLoss: logits must have C = 7 classes, got 23; make the criterion"):
        LastBatchLoss(7)(hidden, labels(), head_weight=weight)
    criterion = LastBatchLoss(CLASSES)
    with pytest.raises(ValueError, match=r"target\[0\] = 99 is not a class"):
        criterion(hidden, torch.full((ROWS,), 99), head_weight=weight)
    assert criterion.buffer is None  # a refused batch changes nothing


@pytest.mark.slow
def test_the_criterion_compiles():
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        criterion = LastBatchLoss(CLASSES, keep="top_k", k=5, capacity=4)
        _, weight, bias = layer(torch.float32)
        leaf = weight.requires_grad_()
        step = lambda h, y, ids, c=criterion: c(h, y, ids, head_weight=leaf, head_bias=bias)  # noqa: B023, E731
        step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        losses.append([])
        for hidden, y, ids in stream(dtype=torch.float32):
            loss = step(hidden, y, ids)
            loss.backward()
            losses[-1].append(loss.item())
        losses[-1].append(leaf.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_operands_are_multiplied_as_bfloat16_where_they_are(dtype, monkeypatch):
    used = []

    @contextlib.contextmanager
    def counted():
        used.append(dtype)
        yield

    monkeypatch.setattr(linear, "_bfloat16_products", counted)
    outcome(by_chunks(labels(), None), [part.to(dtype) for part in layer()])
    assert used == [torch.bfloat16] * (dtype is torch.bfloat16)
