"""What torch is promised of the ops: schema, fake tensors, one graph under torch.compile, honest derivatives."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import available, eager_official, op_options

from dlb_fast import LastBatchLoss, LogitBuffer, _backends, _options, functional, fused_lb_loss, ops

needs_cpu_op = pytest.mark.skipif(not available("cpu"), reason=_backends.implementations()["cpu"].reason)


def options(target, **given):
    return op_options(target, alpha=0.7, label_smoothing=0.1, **given)


def problem(generator, rows=8, taught=4, classes=12, dtype=torch.float32):
    z = torch.randn(rows, classes, generator=generator).to(dtype)
    return z, torch.randint(0, classes, (rows,), generator=generator), torch.randn(taught, classes, generator=generator)


@needs_cpu_op
@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_the_compiled_schema_is_the_python_one(name):
    compiled = torch._C.parse_schema(f"dlb_fast::{name}{ops.SCHEMAS[name]}")
    assert str(getattr(torch.ops.dlb_fast, name).default._schema) == str(compiled)


def test_every_option_has_one_place_and_one_order():
    """options.h names them, `prepare` gives every number, and the Triton kernel takes the floats in that order."""
    assert _options.TENSORS[0] == "target" and _options.NUMBERS[-2:] == ("ignore_index", "reduction")
    numbers = functional.prepare(
        "test", alpha=1, temperature=2, ce_weight=3, ce_alpha=4, label_smoothing=0.5, correct_share=0.25,
        ignore_index=7, reduction="sum",
    ).numbers  # fmt: skip
    wanted = {
        "alpha": 1, "temperature": 2, "ce_weight": 3, "ce_alpha": 4, "label_smoothing": 0.5, "correct_share": 0.25,
        "ignore_index": 7, "reduction": 1,
    }  # fmt: skip
    assert dict(zip(_options.NUMBERS, numbers, strict=True)) == wanted


def test_the_triton_kernel_takes_the_floats_in_the_order_of_the_table():
    pytest.importorskip("triton")
    from dlb_fast.kernels.last_batch_kernel import last_batch_kernel

    names = {"alpha_value": "alpha", "tau_value": "temperature", "smoothing": "label_smoothing"}
    arguments = inspect.signature(getattr(last_batch_kernel, "fn", last_batch_kernel)).parameters.values()
    floats = [a.name for a in arguments if "float64" in str(a.annotation)]
    assert tuple(names.get(name, name) for name in floats) == _options.FLOATS


@needs_cpu_op
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(generator, dtype, reduction):
    z, y, t = problem(generator, dtype=dtype)
    torch.library.opcheck(torch.ops.dlb_fast.last_batch.default, (z, t, 1, *options(y, reduction=reduction)))
    torch.library.opcheck(
        torch.ops.dlb_fast.last_batch.default, (z, None, 0, *options(y, reduction=reduction, need_grad=False))
    )
    buffer = LogitBuffer(12, 4)
    buffer.update(t)
    torch.library.opcheck(
        torch.ops.dlb_fast.last_batch_update.default,
        (z, buffer.rows, buffer.slots, torch.arange(8), -1, -1, *options(y, reduction=reduction)),
    )
    loss, parts, grad = torch.ops.dlb_fast.last_batch(z, t, 1, *options(y, reduction=reduction))
    torch.library.opcheck(torch.ops.dlb_fast.scale_grad_.default, (grad, torch.full_like(loss, 0.5), parts))


def test_opcheck_catches_a_wrong_fake(generator):
    """The check above has teeth: an op whose fake forgets the reduction is refused."""
    library = torch.library.Library("dlb_fast_test", "DEF")
    library.define("bad(Tensor x) -> Tensor")
    library.impl("bad", lambda x: x.sum(0), "CPU")
    torch.library.register_fake("dlb_fast_test::bad", lambda x: x.new_empty(()))
    with pytest.raises(Exception, match=r"[Ss]hape|size"):
        torch.library.opcheck(torch.ops.dlb_fast_test.bad.default, (torch.randn(3, 2),))


def test_compile_fullgraph(impl, generator):
    torch._dynamo.reset()

    def step(z, y, t, alpha, reduction):
        rows = fused_lb_loss(z * 1.5, y, t, alpha=alpha, reduction=reduction, impl=impl)
        return rows.mul(z.detach()[:, 0]).sum()  # a factor per row: a fake of another shape would sum the gradient

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    # Plain PyTorch has no operator whose fake could forget the reduction.
    for rows, reduction in ((8, "mean"), (10, "mean"), *([] if impl == "torch" else [(8, "none")])):
        z, y, t = problem(generator, rows)
        alpha = torch.tensor(0.4)
        results = []
        for function in (step, compiled):
            leaf = z.clone().requires_grad_()
            loss = function(leaf, y, t, alpha, reduction)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@needs_cpu_op
@pytest.mark.slow
def test_compile_with_inductor_keeps_the_buffer_honest(generator):
    """The module, buffer and all, inside one compiled graph: the same losses and the same stored rows as eager."""
    torch._dynamo.reset()

    def run(compile_it):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 12)
        criterion = LastBatchLoss(12, capacity=4, impl="cpu")
        step = lambda x, y, ids: criterion(model(x), y, ids)  # noqa: E731
        step = torch.compile(step, fullgraph=True) if compile_it else step
        stream, losses = torch.Generator().manual_seed(1), []
        for i in range(4):
            x, y = torch.randn(8, 6, generator=stream), torch.randint(0, 12, (8,), generator=stream)
            loss = step(x, y, torch.arange(4 * i, 4 * i + 8))
            loss.backward()
            losses.append(loss.item())
        return losses, criterion.buffer.logits.clone(), criterion.buffer.slots.clone(), model.weight.grad

    eager, compiled = run(False), run(True)
    assert eager[0] == pytest.approx(compiled[0], rel=1e-5)
    torch.testing.assert_close(eager[1:], compiled[1:], rtol=1e-5, atol=1e-6)


def test_second_derivative_raises(impl, generator):
    if impl == "torch":
        pytest.skip("plain autograd has a second derivative")
    z, y, t = problem(generator)
    z.requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(fused_lb_loss(z, y, t, impl=impl), z, create_graph=True)


def test_backward_twice_with_retain_graph(impl, generator):
    z, y, t = problem(generator)
    z.requires_grad_()
    loss = fused_lb_loss(z, y, t, impl=impl)
    first = torch.autograd.grad(loss * 2, z, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss * 2, z, retain_graph=True)[0].clone()
    third = torch.autograd.grad(loss, z)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(2 * third, first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, z)


def test_two_losses_on_the_same_logits(impl, generator):
    """DLB users add other losses; none may see a gradient in place of its logits."""
    z, y, t = problem(generator)
    results = []
    for _ in range(2):
        leaf = z.clone().requires_grad_()
        logits = leaf * 1.0
        other = logits.square().mean()
        total = 3 * fused_lb_loss(logits, y, t, impl=impl) + other
        total.backward()
        results.append(leaf.grad)
        assert torch.equal(logits.detach(), z)
    want = z.double().requires_grad_()
    (3 * eager_official(want, y, t.double()) + want.square().mean()).backward()
    torch.testing.assert_close(results[0].double(), want.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0], results[1])


def test_without_gradient(impl, generator):
    z, y, t = problem(generator)
    with torch.no_grad():
        loss = fused_lb_loss(z.requires_grad_(), y, t, impl=impl)
    assert not loss.requires_grad
    with torch.inference_mode():
        assert fused_lb_loss(z, y, t, impl=impl).item() == pytest.approx(loss.item(), rel=1e-6)
    frozen = fused_lb_loss(z.detach(), y, t, impl=impl)
    assert not frozen.requires_grad
    assert frozen.item() == pytest.approx(loss.item(), rel=1e-6)


def test_gradient_does_not_reach_the_teacher(impl, generator):
    z, y, t = problem(generator)
    t.requires_grad_()
    fused_lb_loss(z.requires_grad_(), y, t, impl=impl).backward()
    assert t.grad is None


def test_activation_checkpointing_and_autocast(impl, generator):
    z, y, t = problem(generator)
    want = eager_official(z.double(), y, t.double()).item()
    leaf = z.clone().requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(lambda v: fused_lb_loss(v, y, t, impl=impl), leaf, use_reentrant=False)
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=1e-6)
    with torch.autocast(z.device.type, dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(z, torch.eye(12))
        assert logits.dtype == torch.bfloat16
        assert fused_lb_loss(logits, y, t, impl=impl).dtype == torch.float32
