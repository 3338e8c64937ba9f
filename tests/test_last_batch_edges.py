"""Where implementations are apt to differ: one class, a second label ignored, float16 beside large logits, modes."""

from __future__ import annotations

import pytest
import torch

from dlb_fast import LastBatchLoss, LogitBuffer, LsrKDLoss, dlb_step, fused_lb_loss, lsr_kd_loss

HERE = ["torch", "cpu", "triton"]


def ready(impl):
    from conftest import available, device_of

    if not available(impl) or device_of(impl) != "cpu":
        pytest.skip(f"{impl} does not run on CPU tensors here")
    return impl


@pytest.mark.parametrize("impl", HERE)
def test_one_class_teaches_nothing_whatever_share_is_right(impl):
    z, y = torch.tensor([[1.5], [-2.0], [0.0]], requires_grad=True), torch.zeros(3, dtype=torch.long)
    loss = lsr_kd_loss(z, y, alpha=1.0, temperature=2.0, correct_share=0.9, impl=ready(impl))
    (grad,) = torch.autograd.grad(loss, z)
    assert torch.equal(grad, torch.zeros(3, 1))
    want = lsr_kd_loss(z, y, alpha=1.0, temperature=2.0, correct_share=0.9, impl="torch")
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("taught", [0, 2])
def test_a_row_is_right_by_its_first_label_though_the_second_is_ignored(impl, taught):
    z = 5 * torch.eye(4) + torch.tensor([0.0, 0.0, 0.0, float("nan")])[:, None]
    y, other = torch.tensor([0, 1, -100, 3]), torch.tensor([-100, 0, 0, -100])
    options = {"target_b": other, "lam": 0.7, "return_parts": True}
    loss, parts = fused_lb_loss(z, y, z[:taught] if taught else None, impl=ready(impl), **options)
    want, want_parts = fused_lb_loss(z, y, z[:taught] if taught else None, impl="torch", **options)
    assert parts.correct == want_parts.correct == 2
    torch.testing.assert_close(loss, want)


def not_finite(classes):
    """Rows whose label has the largest logit, one for each way in which a row is not finite, and finite ones."""
    inf, nan = float("inf"), float("nan")
    label = torch.arange(8) % classes
    z = torch.randn(8, classes, generator=torch.Generator().manual_seed(0))
    at, beside = (torch.arange(8), label), (torch.arange(8), (label + 1) % classes)
    z[at] = 20.0
    z[1], z[6], z[7] = -inf, -inf, 0.0
    z[0, label[0]], z[2, beside[1][2]], z[3, label[3]] = inf, nan, nan
    z[4, beside[1][4]] = -inf  # right
    z[5] = inf
    z[6, label[6]] = 3.0  # right, with probability 1; row 7 is right by a tie
    return z, label, 3


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("form", ["labels", "probabilities", "pair", "second ignored"])
def test_a_row_without_a_finite_loss_is_not_right(impl, form):
    for classes in (5,) if impl == "triton" else (5, 300):
        z, label, right = not_finite(classes)
        target = torch.nn.functional.one_hot(label, classes).float() if form == "probabilities" else label
        options = {}
        if form in ("pair", "second ignored"):
            second = (label + 1) % classes if form == "pair" else torch.full_like(label, -100)
            options = {"target_b": second, "lam": torch.tensor(0.5)}
        for teacher in (None, torch.zeros(8, classes)):
            found = fused_lb_loss(z, target, teacher, impl=ready(impl), return_parts=True, **options)[1].correct
            assert int(found) == right


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_gives_its_gradient_in_any_mode(impl, generator, mode):
    z, y = torch.randn(8, 5, generator=generator), torch.randint(0, 5, (8,), generator=generator)
    want_buffer, buffer = (LogitBuffer(5, 4, device=z.device) for _ in range(2))
    dlb_step(z[4:], y[4:], want_buffer, impl=impl)
    want = dlb_step(z, y, want_buffer, impl=impl)
    with mode():
        inside = z.clone()
        dlb_step(inside[4:], y[4:], buffer, impl=impl)
        found = dlb_step(inside, y, buffer, impl=impl)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(found, want, strict=True))
    assert torch.equal(buffer.logits, want_buffer.logits) and buffer.count == 4


def test_compiled_implementations_refuse_what_plain_torch_differentiates(impl, generator):
    z = torch.randn(6, 5, generator=generator, requires_grad=True)
    y, other = (torch.randint(0, 5, (6,), generator=generator) for _ in range(2))
    given = {"weight": torch.ones(5), "lam": torch.rand(6, generator=generator)}
    for name in given:
        options = {**given, name: given[name].clone().requires_grad_()}
        if impl == "torch":
            fused_lb_loss(z, y, z[:3].detach() + 1, target_b=other, impl=impl, **options).backward()
            assert options[name].grad.any()
        else:
            with pytest.raises(RuntimeError, match=f"fused_lb_loss: impl='{impl}' has no gradient of {name}"):
                fused_lb_loss(z, y, z[:3].detach() + 1, target_b=other, impl=impl, **options)


@pytest.mark.parametrize("criterion", [LastBatchLoss(3), LsrKDLoss()], ids=lambda c: type(c).__name__)
def test_without_labels_nothing_is_left_in_eval(criterion):
    with pytest.raises(ValueError, match=f"{type(criterion).__name__}: target is None in eval"):
        criterion.eval()(torch.zeros(2, 3), None)
