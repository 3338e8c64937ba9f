"""The derivative of the compiled losses: what backward gives, and what is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import available
from torch.autograd import forward_ad

from dlb_fast import LastBatchLoss, fused_lb_loss

pytestmark = [
    pytest.mark.skipif(not available("cpu"), reason="nothing is compiled here"),
    # torch 2.14 loads its own forward-mode rules by torch.jit.script.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:FutureWarning"),
]


def batch(dtype=torch.float32, rows=8, classes=11):
    g = torch.Generator().manual_seed(3)
    z = (2 * torch.randn(rows, classes, generator=g)).to(dtype)
    return z, torch.randint(0, classes, (rows,), generator=g), z[: rows // 2].detach() + 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, -0.37, 65536.0])
def test_the_gradient_is_that_of_the_op_times_the_upstream(dtype, factor):
    z, y, t = batch(dtype)
    leaf = z.clone().requires_grad_()
    (fused_lb_loss(leaf, y, t, impl="cpu") * factor).backward()
    reference = z.double().requires_grad_()
    (fused_lb_loss(reference, y, t.double(), impl="torch") * factor).backward()
    unit = torch.finfo(dtype).eps * reference.grad.abs().max().item()
    assert leaf.grad.dtype == dtype
    assert (leaf.grad.double() - reference.grad).abs().max().item() <= 8 * unit


def test_a_loss_per_row_has_an_upstream_per_row():
    z, y, t = batch(torch.float64)
    weights = torch.linspace(-1, 2, len(z), dtype=torch.float64)
    grads = []
    for impl in ("cpu", "torch"):
        leaf = z.clone().requires_grad_()
        fused_lb_loss(leaf, y, t, reduction="none", impl=impl).backward(weights)
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_upstream_per_row_whose_sum_is_1_still_multiplies(dtype):
    z, y, t = batch(dtype)
    upstream = torch.zeros(len(z), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    upstream[1], upstream[4] = 0.25, 0.75
    ones, leaf = z.clone().requires_grad_(), z.clone().requires_grad_()
    fused_lb_loss(ones, y, t, reduction="none", impl="cpu").backward(torch.ones_like(upstream))
    fused_lb_loss(leaf, y, t, reduction="none", impl="cpu").backward(upstream)
    assert torch.equal(leaf.grad, (ones.grad.to(upstream.dtype) * upstream[:, None]).to(dtype))


def test_backward_a_second_time():
    z, y, t = batch()
    leaf = z.clone().requires_grad_()
    loss = fused_lb_loss(leaf, y, t, impl="cpu")
    first = torch.autograd.grad(loss * 3, leaf, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss * 3, leaf)[0]
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def penalised(loss_of, how):
    """A penalty on the gradient by the inputs, with which the logits' derivative varies only in part."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(11, 11), torch.randn(8, 11, requires_grad=True)
    (grad,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    penalty = grad.square().sum()
    if how == "backward":
        penalty.backward()
    else:
        torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("how", ["backward", "grad"])
def test_a_second_derivative_is_refused_and_neither_zero_nor_a_part(how):
    _, y, t = batch()
    with pytest.raises(RuntimeError, match="differentiate twice|differentiable once"):
        penalised(lambda z: fused_lb_loss(z, y, t, impl="cpu"), how)
    penalised(lambda z: fused_lb_loss(z, y, t, impl="torch"), how)


def test_a_hessian_is_refused_and_not_zero():
    z, y, t = batch()
    with pytest.raises(RuntimeError, match="differentiate twice|differentiable once"):
        torch.autograd.functional.hessian(lambda z: fused_lb_loss(z, y, t, impl="cpu"), z)


TRANSFORMS = {
    "jvp": lambda f, z: torch.func.jvp(f, (z,), (torch.ones_like(z),))[1],
    "jacfwd": lambda f, z: torch.func.jacfwd(f)(z),
    "jacrev": lambda f, z: torch.func.jacrev(f)(z),
    "vmap": lambda f, z: torch.func.vmap(f)(torch.stack([z, z + 1])),
    "vmap and grad": lambda f, z: torch.func.vmap(torch.func.grad(f))(torch.stack([z, z + 1])),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_torch_func_runs_in_plain_torch_or_is_refused(name):
    z, y, t = batch(torch.float64)
    run = lambda impl: TRANSFORMS[name](lambda z: fused_lb_loss(z, y, t, impl=impl), z)  # noqa: E731
    torch.testing.assert_close(run("auto"), run("torch"))
    with pytest.raises(RuntimeError, match=r"fused_lb_loss: impl='cpu' does not know torch.func; use impl='torch'"):
        run("cpu")


@pytest.mark.parametrize("criterion", [False, True], ids=["function", "criterion"])
def test_a_forward_derivative_is_not_dropped(criterion):
    z, y, t = batch(torch.float64)
    found = {}
    for impl in ("auto", "torch", "cpu"):
        module = LastBatchLoss(11, impl=impl, capacity=4, dtype=torch.float64)
        for logits in (t, z, z):
            module(logits, y[: len(logits)])
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(z, torch.ones_like(z).cumsum(1))
            call = module if criterion else lambda z, y, impl=impl: fused_lb_loss(z, y, t, impl=impl)
            if impl == "cpu":
                with pytest.raises(RuntimeError, match="does not know forward mode"):
                    call(dual, y)
            else:
                found[impl] = forward_ad.unpack_dual(call(dual, y)).tangent
    torch.testing.assert_close(found["auto"], found["torch"])


def test_parts_have_no_derivative_and_need_none():
    z, y, t = batch()
    leaf = z.clone().requires_grad_()
    loss, parts = fused_lb_loss(leaf, y, t, impl="cpu", return_parts=True)
    assert not parts.loss.requires_grad and not parts.lb.requires_grad
    (leaf.sum() + 0 * parts.ce).backward()  # a graph that does not reach the loss
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_hooks_see_what_is_saved():
    """As torch.autograd.graph.save_on_cpu does: what is unpacked is what backward uses."""
    z, y, t = batch()
    leaf, plain = z.clone().requires_grad_(), z.clone().requires_grad_()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: packed.append(s.shape) or s.clone(), lambda s: s):
        loss = fused_lb_loss(leaf, y, t, impl="cpu")
    loss.backward()
    fused_lb_loss(plain, y, t, impl="cpu").backward()
    assert z.shape in packed and torch.equal(leaf.grad, plain.grad)


def test_a_refused_batch_is_refused_in_our_words():
    z, y, t = batch()
    with pytest.raises(ValueError, match="target"):
        fused_lb_loss(z.requires_grad_(), y + 11, t, impl="cpu")


def test_under_no_grad_no_node_is_made():
    z, y, t = batch()
    with torch.no_grad():
        assert fused_lb_loss(z.requires_grad_(), y, t, impl="cpu").grad_fn is None
