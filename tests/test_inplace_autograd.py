"""``inplace_grad=True`` and autograd: nobody who still needs the logits is fooled, and what cannot be is refused first.

The cases are those in which fused losses of other projects wrote over their input and nothing noticed: a leaf, a tensor
somebody else saved, a second head, a second backward.
"""

from __future__ import annotations

import pytest
import torch

from dlb_fast import LastBatchLoss, LogitBuffer, dlb_step, fused_lb_loss


def problem(rows=8, taught=4, classes=37):
    g = torch.Generator().manual_seed(0)
    device = torch.empty(0).device
    z = 3 * torch.randn(rows, classes, generator=g, device="cpu")
    t = 3 * torch.randn(taught, classes, generator=g, device="cpu")
    y = torch.randint(0, classes, (rows,), generator=g, device="cpu")
    return z.to(device), y.to(device), t.to(device)


HEADS = {  # and whether they save the logits (softmax, exp and log_softmax save what they return)
    "square": (lambda z: z.square().mean(), True),
    "view": (lambda z: z[2:].view(-1).square().sum(), True),
    "softmax": (lambda z: (torch.softmax(z, 1).square() + z.exp()).sum(), False),
    "another loss": (lambda z: torch.nn.functional.cross_entropy(z, torch.zeros(8, dtype=torch.long)), False),
    "this loss": (lambda z: fused_lb_loss(z, torch.zeros(8, dtype=torch.long), impl="cpu"), False),
}


@pytest.mark.parametrize("head", HEADS)
def test_another_head_never_gets_a_silent_wrong_gradient(kernel, head):
    function, saves = HEADS[head]
    z, y, t = problem()
    if head == "this loss" and kernel != "cpu":
        pytest.skip("names the CPU")

    def both(in_place, first):
        leaf = z.clone().requires_grad_()
        logits = leaf * 1
        other = function(logits) if first else 0
        loss = fused_lb_loss(logits, y, t, impl=kernel, inplace_grad=in_place)
        (loss + (other if first else function(logits))).backward()
        return leaf.grad

    with pytest.raises(RuntimeError, match="used after inplace_grad"):
        both(True, first=False)
    if saves:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            both(True, first=True)
    else:
        assert torch.equal(both(True, first=True), both(False, first=True))


def test_a_head_that_keeps_nothing_of_the_logits_is_right(kernel):
    z, y, t = problem()
    grads = []
    for in_place in (False, True):
        leaf = z.clone().requires_grad_()
        logits = leaf * 1
        other = (3 * logits).sum()
        (other + fused_lb_loss(logits, y, t, impl=kernel, inplace_grad=in_place)).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_the_node_that_made_the_logits_may_need_them(kernel):
    """tanh and softmax save what they return."""
    z, y, t = problem()
    for made in (torch.tanh, lambda v: torch.log_softmax(v, 1)):
        loss = fused_lb_loss(made(z.clone().requires_grad_()), y, t, impl=kernel, inplace_grad=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_two_in_place_losses_of_the_same_logits(kernel):
    z, y, t = problem()
    logits = z.requires_grad_() * 1
    first = fused_lb_loss(logits, y, t, impl=kernel, inplace_grad=True)
    second = fused_lb_loss(logits, y, t, impl=kernel, inplace_grad=True)
    with pytest.raises(RuntimeError, match="inplace"):
        second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def test_repeated_backward(kernel):
    z, y, t = problem()
    leaf = z.requires_grad_()
    want = torch.autograd.grad(fused_lb_loss(leaf, y, t, impl=kernel) * 3, leaf)[0]
    loss = fused_lb_loss(leaf * 1, y, t, impl=kernel, inplace_grad=True)
    first = torch.autograd.grad(loss * 3, leaf, retain_graph=True)[0]
    second = torch.autograd.grad(loss * 3, leaf, retain_graph=True)[0]
    third = torch.autograd.grad(loss * 3, leaf)[0]
    assert torch.equal(first, want) and torch.equal(second, want) and torch.equal(third, want)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_second_derivative_is_refused(kernel):
    z, y, t = problem()
    leaf = z.requires_grad_()
    loss = fused_lb_loss(leaf * 1, y, t, impl=kernel, inplace_grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_a_write_between_the_loss_and_backward_is_noticed(kernel):
    z, y, t = problem()
    logits = z.requires_grad_() * 1
    loss = fused_lb_loss(logits, y, t, impl=kernel, inplace_grad=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(kernel, reentrant):
    z, y, t = problem()
    leaf = z.requires_grad_()
    checkpoint = torch.utils.checkpoint.checkpoint
    loss = checkpoint(
        lambda v: fused_lb_loss(v * 1, y, t, impl=kernel, inplace_grad=True), leaf, use_reentrant=reentrant
    )
    loss.backward()
    assert torch.equal(leaf.grad, torch.autograd.grad(fused_lb_loss(leaf, y, t, impl=kernel), leaf)[0])
    with pytest.raises((RuntimeError, ValueError), match="inplace operation|leaf"):  # computed again from a gradient
        checkpoint(
            lambda v: fused_lb_loss(v, y, t, impl=kernel, inplace_grad=True), leaf * 1, use_reentrant=reentrant
        ).backward()


REFUSED = {
    "leaf": (lambda v: v, r"logits must be computed.*a leaf.*logits.clone\(\)"),
    "view of a leaf": (lambda v: v.view(-1).view(v.shape), "logits must be computed.*a view of one"),
    "one of several views": (
        lambda v: torch.cat([v, v]).chunk(2)[1],
        "torch lets be modified in place.*several views.*logits.clone",
    ),
    "expanded": (lambda v: (v * 1)[:1].expand(8, 37), r"logits must be contiguous.*got strides \(0, 1\)"),
    "transposed": (lambda v: (v * 1).t().contiguous().t(), r"contiguous.*strides \(1, 8\).*logits.contiguous\(\)"),
    "padded rows": (lambda v: torch.cat([v, v], 1)[:, :37], r"contiguous.*strides \(74, 1\)"),
    "overlapping rows": (lambda v: (v * 1).as_strided((8, 37), (1, 1)), r"contiguous.*strides \(1, 1\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(kernel, name):
    z, y, _ = problem()
    make, message = REFUSED[name]
    leaf = z.clone().requires_grad_()
    logits = make(leaf)
    before = logits.detach().clone()
    criterion = LastBatchLoss(37, impl=kernel, inplace_grad=True)
    with pytest.raises(ValueError, match=message):
        criterion(logits, y)
    assert torch.equal(logits, before) and torch.equal(leaf, z) and criterion.buffer is None
    fused_lb_loss(logits, y, impl=kernel).backward()  # and they can still be used
    assert leaf.grad.abs().sum() > 0


def test_refused_batches_leave_the_logits_to_others(kernel):
    z, y, t = problem()
    leaf = z.clone().requires_grad_()
    logits = leaf * 1
    for teacher in (logits.detach()[:4], logits.detach()[4:]):
        with pytest.raises(ValueError, match=r"last_logits must not share memory.*last_logits.clone\(\)"):
            fused_lb_loss(logits, y, teacher, impl=kernel, inplace_grad=True)
    with pytest.raises(ValueError, match="target must not share memory"):
        fused_lb_loss(logits, logits.detach(), t, impl=kernel, inplace_grad=True)
    logits.retain_grad()
    with pytest.raises(ValueError, match=r"must not retain_grad\(\).*dlb_step"):
        fused_lb_loss(logits, y, t, impl=kernel, inplace_grad=True)
    logits = leaf * 1
    if kernel == "cpu":
        with pytest.raises(ValueError, match=r"target\[0\] = 99 is not a class"):
            fused_lb_loss(logits, torch.full((8,), 99), t, impl=kernel, inplace_grad=True)
    assert torch.equal(logits, z)
    fused_lb_loss(logits, y, t, impl=kernel).backward()
    assert torch.equal(leaf.grad, torch.autograd.grad(fused_lb_loss(leaf, y, t, impl=kernel), leaf)[0])


def test_plain_torch_refuses():
    z, y, t = problem()
    logits = z.requires_grad_() * 1
    with pytest.raises(ValueError, match="needs impl 'cpu', 'cuda' or 'triton', got impl='torch'"):
        fused_lb_loss(logits, y, t, impl="torch", inplace_grad=True)
    with pytest.raises(ValueError, match="got impl='torch'"):
        dlb_step(z.detach(), y, LogitBuffer(37, 8), impl="torch", inplace_grad=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the frames between the graphs, by dynamo itself
def test_torch_compile(kernel):
    """Refused inside a graph; where graphs may break, the loss runs between them, and right."""
    z, y, t = problem()
    step = lambda v: fused_lb_loss(v * 1, y, t, impl=kernel, inplace_grad=True)  # noqa: E731
    torch._dynamo.reset()
    with pytest.raises(Exception, match="inplace_grad=True is for eager calls"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(z.clone().requires_grad_())
    torch._dynamo.reset()
    leaf = z.clone().requires_grad_()
    torch.compile(step, backend="aot_eager")(leaf).backward()
    assert torch.equal(leaf.grad, torch.autograd.grad(fused_lb_loss(leaf, y, t, impl=kernel), leaf)[0])
    buffer = LogitBuffer(37, 8, device=z.device)
    other = z.clone()
    _, grad = torch.compile(lambda v: dlb_step(v, y, buffer, impl=kernel, inplace_grad=True), backend="aot_eager")(
        other
    )
    assert grad.data_ptr() == other.data_ptr()
    assert torch.equal(other, dlb_step(z, y, LogitBuffer(37, 8, device=z.device), impl=kernel)[1])
    model = torch.nn.Linear(37, 37)  # the usual way: a compiled model, an eager loss
    grads = []
    for run, in_place in ((model, False), (torch.compile(model, backend="aot_eager"), True)):
        model.zero_grad()
        fused_lb_loss(run(z), y, t, impl=kernel, inplace_grad=in_place).backward()
        grads.append(model.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_functorch_is_refused(kernel):
    z, y, t = problem()
    with pytest.raises(ValueError, match=r"inplace_grad=True is for eager calls.*torch.func"):
        torch.func.grad(lambda v: fused_lb_loss(v * 1, y, t, impl=kernel, inplace_grad=True))(z)
