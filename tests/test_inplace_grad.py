"""``inplace_grad=True``: the same bits in the logits' own memory and no other. Autograd: test_inplace_autograd.

float32 and float64 apart from the rest: there "the row in the compute dtype" is the row itself.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DTYPES, available, eager_official

from dlb_fast import LastBatchLoss, LogitBuffer, dlb_step, fused_lb_loss
from dlb_fast.functional import row_loss


def problem(rows=8, taught=4, classes=37, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = (3 * torch.randn(rows, classes, generator=g, device="cpu")).to(dtype)
    t = (3 * torch.randn(taught, classes, generator=g, device="cpu")).to(dtype)
    y = torch.randint(0, classes, (rows,), generator=g, device="cpu")
    device = torch.empty(0).device
    return z.to(device), y.to(device), t.to(device)


def gradient(z, upstream, function, in_place):
    """Loss and gradient of ``function(logits, inplace_grad)``; the gradient must lie where ``in_place`` says."""
    leaf = z.clone().requires_grad_()
    logits = leaf * 1
    version, where = logits._version, []
    logits.register_hook(lambda grad: where.append(grad.data_ptr()))
    loss = function(logits, in_place)
    assert (logits._version > version) == in_place
    assert torch.equal(logits, z) != in_place
    loss.backward(upstream.to(loss))
    assert (where == [logits.data_ptr()]) == in_place
    return loss.detach(), leaf.grad.clone()


def assert_same_bits(z, upstream, function):
    outside, inside = (gradient(z, upstream, function, in_place) for in_place in (False, True))
    assert torch.equal(outside[0], inside[0]) and torch.equal(outside[1], inside[1])
    return inside


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (7, 3, 10), (64, 32, 100), (9, 4, 1001), (4, 2, 21843)], ids=str)
def test_the_bits_of_the_default_in_the_logits_memory(kernel, size, dtype):
    if kernel == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels refuse float64")
    z, y, t = problem(*size, dtype)
    if size[2] == 1:
        z = z + 1  # a gradient of zero must differ from the logits
    for upstream in (torch.tensor(1.0), torch.tensor(0.3)):
        _, grad = assert_same_bits(
            z, upstream, lambda v, ip: fused_lb_loss(v, y, t, alpha=0.7, impl=kernel, inplace_grad=ip)
        )
        exact = z.clone().double().requires_grad_()
        (eager_official(exact, y, t.double(), alpha=0.7) * upstream).backward()
        limit = 2 * torch.finfo(dtype).eps * exact.grad.abs().max() + 1e-7
        assert (grad.double() - exact.grad).abs().max() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", ["labels", "dense", "pair", "probabilities", "virtual", "no target", "ignored NaN"])
def test_every_form(kernel, form, reduction, dtype):
    z, y, t = problem(dtype=dtype)
    y[2] = -100
    kwargs = {"teacher": t, "z_loss": 1e-2, "label_smoothing": 0.1, "weight": torch.rand(37)}
    target = y
    if form == "dense":
        target = torch.softmax(torch.randn(8, 37), 1)
    elif form == "pair":
        kwargs |= {"target_b": y.flip(0), "lam": torch.rand(8)}
    elif form == "probabilities":
        kwargs |= {"teacher": torch.softmax(t.float(), 1), "teacher_kind": "probabilities"}
    elif form == "virtual":
        kwargs |= {"teacher": None, "teacher_kind": "virtual", "correct_share": 0.8}
    elif form == "no target":
        target = None
    elif form == "ignored NaN":
        kwargs["kd_mask"] = torch.tensor([True, True, False, True])
        z[2] = float("nan")
    upstream = torch.rand(8 if reduction == "none" else ()) + 0.5  # never ones

    def loss(v, in_place):
        return row_loss("test", kernel, v, target, reduction=reduction, inplace_grad=in_place, **kwargs)[0]

    if form == "ignored NaN":  # torch.equal of NaN rows is False whatever happens
        leaf = z.clone().requires_grad_()
        logits = leaf * 1
        loss(logits, True).backward(upstream)
        assert logits[2].abs().max() == 0 and logits.isfinite().all()
        logits = leaf * 1
        (want,) = torch.autograd.grad(loss(logits, False), logits, upstream)
        assert torch.equal(want[[0, 1, 3, 4, 5, 6, 7]], leaf.grad[[0, 1, 3, 4, 5, 6, 7]])
    else:
        assert_same_bits(z, upstream, loss)


def test_float16_with_a_loss_scale(kernel):
    z, y, t = problem(64, 32, 1000, torch.float16)
    _, grad = assert_same_bits(
        z, torch.tensor(65536.0), lambda v, ip: fused_lb_loss(v, y, t, impl=kernel, inplace_grad=ip)
    )
    assert (grad == 0).float().mean() < 0.01


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_buffer_takes_the_logits_and_not_their_gradient(kernel, dtype, stored):
    if kernel == "cuda" and stored == torch.float64:
        pytest.skip("the CUDA kernels refuse float64")
    ways = [LastBatchLoss(37, capacity=4, dtype=stored, impl=kernel, inplace_grad=ip) for ip in (False, True)]
    for step, rows in enumerate((4, 8, 8, 7, 6)):
        z, y, _ = problem(rows, 0, 37, dtype, seed=step)
        y[-1] = -100  # an idle row is stored as it is
        ids = torch.arange(rows) + 10 * step
        results = []
        for criterion in ways:
            leaf = z.clone().requires_grad_()
            loss = criterion(leaf * 1, y, ids)
            loss.backward()
            results.append(
                (loss.detach(), *criterion.parts, leaf.grad, criterion.buffer.logits, criterion.buffer.slots)
            )
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True)), step
        stored_rows = ways[1].buffer.count
        assert torch.equal(ways[1].buffer.logits[:stored_rows], z[rows - stored_rows :].to(stored))


def test_a_model_behind_views(kernel):
    """Logits as language models make them, (N, T, C) seen as (N T, C): a view of what nobody else needs."""
    y = torch.arange(12) % 9
    grads = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 9)
        logits = model(torch.ones(3, 4, 5) * torch.arange(4)[:, None]).view(-1, 9)
        (fused_lb_loss(logits, y, impl=kernel, inplace_grad=in_place) * 0.5).backward()
        grads.append((model.weight.grad, model.bias.grad))
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_nothing_is_written_where_no_gradient_is_wanted(impl):
    z, y, t = problem()
    view = torch.cat([z, z], 1)[:, :37]
    want = fused_lb_loss(z, y, t, impl=impl)
    for frozen in (z, view, z[:1].expand(8, 37)):
        loss = fused_lb_loss(frozen, y, t, impl=impl, inplace_grad=True)
        assert not loss.requires_grad
    logits = z.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(fused_lb_loss(logits, y, t, impl=impl, inplace_grad=True), want)
        assert torch.equal(LastBatchLoss(37, impl=impl, inplace_grad=True)(logits, y).isfinite(), want.isfinite())
    criterion = LastBatchLoss(37, impl=impl, inplace_grad=True).eval()
    scored = logits * 1
    version = scored._version
    criterion(scored, y).backward()  # eval() never writes, wanted or not
    assert logits.grad.abs().sum() > 0 and scored._version == version and torch.equal(scored, z)
    assert torch.equal(logits, z) and torch.equal(view, z)


def test_switched_on_and_off(kernel):
    """The short way of ordinary calls does not outlive the switch."""
    criterion = LastBatchLoss(37, capacity=4, impl=kernel)
    z, y, _ = problem()
    for step, in_place in enumerate([False, False, False, True, True, True, False, False]):
        if criterion.inplace_grad != in_place:  # an assignment settles things anew
            criterion.inplace_grad = in_place
        logits = z.clone().requires_grad_() * 1
        criterion(logits, y).backward()
        assert torch.equal(logits, z) != in_place, step


def test_dlb_step(kernel):
    z, y, _ = problem()
    ids = torch.arange(8)
    results = []
    for in_place in (False, True):
        model, buffer = torch.nn.Linear(37, 37, bias=False), LogitBuffer(37, 4, device=z.device)
        with torch.no_grad():
            model.weight.copy_(torch.eye(37))
        for _ in range(2):
            logits = model(z)
            other = logits.square().sum()
            version = logits._version
            loss, grad = dlb_step(
                logits, y, buffer, ids=ids, upstream=128.0, alpha=0.5, impl=kernel, inplace_grad=in_place
            )
            assert (grad.data_ptr() == logits.data_ptr()) == in_place == (logits._version > version)
            logits.backward(grad)
            if in_place:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    other.backward()
        results.append((loss, grad.detach().clone(), model.weight.grad, buffer.logits, buffer.slots))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    with torch.inference_mode():
        plain = z.clone()
        buffer = LogitBuffer(37, 8, device=z.device)
        assert dlb_step(plain, y, buffer, impl=kernel, inplace_grad=True)[1].data_ptr() == plain.data_ptr()
    with pytest.raises(ValueError, match="dlb_step: logits must be computed"):
        dlb_step(z.requires_grad_(), y, LogitBuffer(37, 8, device=z.device), impl=kernel, inplace_grad=True)
    with pytest.raises(ValueError, match="buffer must not share memory"):
        buffer = LogitBuffer(37, 8, device=z.device)
        dlb_step(buffer.logits, y, buffer, impl=kernel, inplace_grad=True)


@pytest.mark.skipif(not available("cpu"), reason="not compiled")
def test_no_gradient_is_allocated():
    """What forward and backward allocate, by the profiler: the gradient's bytes are gone."""
    z, y, t = problem(256, 128, 1000)
    allocated = []
    for in_place in (False, True):
        leaf = z.clone().requires_grad_()
        logits = leaf + 0  # its backward passes the gradient on as it is
        fused_lb_loss(logits.detach().clone(), y, t, impl="cpu")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
            loss = fused_lb_loss(logits, y, t, impl="cpu", inplace_grad=in_place)
            torch.autograd.grad(loss, leaf)
        allocated.append(sum(max(event.self_cpu_memory_usage, 0) for event in profiled.events()))
    gradient = z.numel() * z.element_size()
    assert allocated[0] >= gradient and allocated[1] < gradient / 100
