"""The definition is tested first, and alone: by tables one can check by hand, by autograd, and by identities."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import eager_official

from dlb_fast import fused_lb_loss, reference

D = torch.float64
# KL((3/4, 1/4) || (1/2, 1/2)), by hand.
QUARTERS = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)


def batch(generator, rows=8, taught=4, classes=5):
    z = torch.randn(rows, classes, dtype=D, generator=generator)
    y = torch.randint(0, classes, (rows,), generator=generator)
    t = torch.randn(taught, classes, dtype=D, generator=generator)
    return z, y, t


@pytest.mark.parametrize(
    ("z", "y", "t", "temperature", "ce", "lb"),
    [
        # Even student, even teacher: CE = ln C, KL = 0.
        ([[0.0, 0.0]], [0], [[0.0, 0.0]], 1.0, math.log(2), 0.0),
        # p_t = (3/4, 1/4) from t = (ln 3, 0); even student: KL = 3/4 ln(3/2) + 1/4 ln(1/2).
        ([[0.0, 0.0]], [1], [[math.log(3), 0.0]], 1.0, math.log(2), QUARTERS),
        # The same at tau = 2 with doubled teacher logits has the same distributions, so 4 times the KL.
        ([[0.0, 0.0]], [1], [[2 * math.log(3), 0.0]], 2.0, math.log(2), 4 * QUARTERS),
        # Two rows, one taught: CE averages both (ln 4/3 and ln 4), the KL divides by the one repeated row.
        (
            [[math.log(3), 0.0], [math.log(3), 0.0]], [0, 1], [[0.0, 0.0]], 1.0,
            (math.log(4 / 3) + math.log(4)) / 2, 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25),
        ),
    ],
)  # fmt: skip
def test_hand_table(z, y, t, temperature, ce, lb):
    loss, parts = reference.last_batch_loss(
        torch.tensor(z, dtype=D), torch.tensor(y), torch.tensor(t, dtype=D), alpha=0.5, temperature=temperature
    )
    assert parts[1].item() == pytest.approx(ce, abs=1e-12)
    assert parts[2].item() == pytest.approx(lb, abs=1e-12)
    assert loss.item() == pytest.approx(ce + 0.5 * lb, abs=1e-12)


def test_hand_gradient():
    # z = (0, 0), y = 0, teacher (3/4, 1/4), tau = 1: CE gives (-1/2, 1/2), KL gives p_s - p_t = (-1/4, 1/4).
    z = torch.zeros(1, 2, dtype=D, requires_grad=True)
    t = torch.tensor([[math.log(3), 0.0]], dtype=D)
    reference.last_batch_loss(z, torch.tensor([0]), t, alpha=2.0, temperature=1.0)[0].backward()
    assert z.grad.tolist() == [[pytest.approx(-0.5 - 2 * 0.25), pytest.approx(0.5 + 2 * 0.25)]]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(generator, reduction, smoothing):
    z, y, t = batch(generator)
    y[2] = -100
    mask = torch.tensor([True, False, True, True])
    weight = torch.rand(5, dtype=D, generator=generator)
    assert torch.autograd.gradcheck(
        lambda v: reference.last_batch_loss(
            v, y, t, alpha=0.7, temperature=2.5, label_smoothing=smoothing, weight=weight, kd_mask=mask,
            reduction=reduction,
        )[0],
        z.requires_grad_(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["probabilities", "virtual"])
def test_gradcheck_other_teachers(generator, kind):
    z, y, t = batch(generator, taught=8)
    teacher = torch.softmax(t, 1) if kind == "probabilities" else None
    share = 0.6 if kind == "virtual" else None
    assert torch.autograd.gradcheck(
        lambda v: reference.last_batch_loss(v, y, teacher, teacher_kind=kind, correct_share=share)[0],
        z.requires_grad_(),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dense", [False, True])
def test_without_teacher_it_is_torch_cross_entropy(generator, smoothing, weighted, reduction, dense):
    z, y, _ = batch(generator)
    weight = torch.rand(5, dtype=D, generator=generator) if weighted else None
    target = torch.softmax(torch.randn(8, 5, dtype=D, generator=generator), 1) if dense else y
    if not dense:
        target[3] = -100
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    ours, _ = reference.last_batch_loss(z, target, **options)
    torch.testing.assert_close(ours, F.cross_entropy(z, target, **options), rtol=1e-12, atol=1e-12)


def test_alpha_zero_is_cross_entropy(generator):
    z, y, t = batch(generator)
    assert reference.last_batch_loss(z, y, t, alpha=0.0)[0] == pytest.approx(F.cross_entropy(z, y).item(), abs=1e-14)


def test_equals_official_code(generator):
    z, y, t = batch(generator, 64, 32, 100)
    ours = reference.last_batch_loss(z, y, t, alpha=0.5, temperature=4.0)[0]
    theirs = eager_official(z, y, t, alpha=0.5, temperature=4.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


def test_same_logits_cost_nothing_and_pull_nowhere(generator):
    z, y, _ = batch(generator)
    z.requires_grad_()
    loss, parts = reference.last_batch_loss(z, None, z.detach()[:4], temperature=3.0)
    loss.backward()
    assert parts[2].item() == 0.0
    assert z.grad.abs().max() < 1e-16


def test_shift_invariance(generator):
    z, y, t = batch(generator)
    shift = 100 * torch.randn(8, 1, dtype=D, generator=generator)
    plain = reference.last_batch_loss(z, y, t)[0]
    torch.testing.assert_close(reference.last_batch_loss(z + shift, y, t - shift[:4])[0], plain, rtol=1e-12, atol=1e-12)


def test_large_temperature_is_half_the_mean_squared_gap_of_centred_logits(generator):
    z, _, t = batch(generator)
    gap = (z[:4] - z[:4].mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    limit = gap.square().mean(1).mean() / 2
    high = reference.last_batch_loss(z, None, t, temperature=1e4)[0]
    assert high.item() == pytest.approx(limit.item(), rel=1e-3)


def test_small_temperature_compares_the_winners():
    z = torch.tensor([[3.0, 0.0], [3.0, 0.0]], dtype=D)
    same, other = z[:1], z[:1].flip(1)
    assert reference.last_batch_loss(z[:1], None, same, temperature=0.05)[0] == pytest.approx(0.0, abs=1e-9)
    # All teacher mass on the wrong class: tau^2 * (gap / tau) = tau * 3.
    assert reference.last_batch_loss(z[:1], None, other, temperature=0.05)[0] == pytest.approx(0.05 * 3.0, rel=1e-6)


def test_row_permutation(generator):
    z, y, t = batch(generator)
    order = torch.cat([torch.randperm(4, generator=generator), 4 + torch.randperm(4, generator=generator)])
    plain = reference.last_batch_loss(z, y, t)[0]
    torch.testing.assert_close(reference.last_batch_loss(z[order], y[order], t[order[:4]])[0], plain)


@pytest.mark.parametrize("lam", [1.0, "()", "(B,)"])
def test_a_label_without_a_share_costs_nothing(lam, impl):
    """Mixup draws a share of 1; the logit of the other label may then be -inf, as in a dense target."""
    z = torch.tensor([[0.0, -torch.inf, 1.0], [0.5, 1.0, -torch.inf]], requires_grad=True)
    y, other = torch.tensor([0, 1]), torch.tensor([1, 2])
    lam = {"()": torch.ones(()), "(B,)": torch.ones(2)}.get(lam, lam)  # made where the implementation runs
    want = F.cross_entropy(z.detach(), y)
    for labels, share in (((y, other), lam), ((other, y), 1.0 - lam)):
        loss = fused_lb_loss(z, labels[0], target_b=labels[1], lam=share, impl=impl)
        torch.testing.assert_close(loss.detach(), want)
        assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_pair_form_is_the_dense_mixture(generator):
    z, y, _ = batch(generator)
    other = torch.randint(0, 5, (8,), generator=generator)
    lam = torch.rand(8, dtype=D, generator=generator)
    dense = lam[:, None] * F.one_hot(y, 5) + (1 - lam[:, None]) * F.one_hot(other, 5)
    weight = torch.rand(5, dtype=D, generator=generator)
    ours = reference.last_batch_loss(z, y, target_b=other, lam=lam, weight=weight, label_smoothing=0.1)[0]
    torch.testing.assert_close(ours, F.cross_entropy(z, dense, weight=weight, label_smoothing=0.1))


def test_virtual_teacher_at_temperature_one_is_label_smoothing_up_to_a_constant(generator):
    z, y, _ = batch(generator)
    z.requires_grad_()
    eps = 0.3
    smooth = F.cross_entropy(z, y, label_smoothing=eps)
    ours = reference.last_batch_loss(
        z, y, alpha=eps, temperature=1.0, ce_weight=1 - eps, teacher_kind="virtual"
    )[0]  # fmt: skip
    (g1,) = torch.autograd.grad(smooth, z)
    (g2,) = torch.autograd.grad(ours, z)
    torch.testing.assert_close(g1, g2, rtol=1e-12, atol=1e-14)
    assert (smooth - ours).item() == pytest.approx(eps * math.log(5), rel=1e-12)


def test_nothing_valid_is_zero_with_zero_gradient(generator):
    z, y, t = batch(generator)
    z.requires_grad_()
    loss, parts = reference.last_batch_loss(
        z, torch.full_like(y, -100), t, kd_mask=torch.zeros(4, dtype=torch.bool)
    )
    loss.backward()
    assert loss.item() == 0.0
    assert parts.tolist() == [0.0, 0.0, 0.0, 0.0]
    assert z.grad.abs().max() == 0.0


def test_rows_that_do_not_count_may_hold_nan(generator):
    z, y, t = batch(generator)
    z[1], y[1], t[1] = float("nan"), -100, float("nan")
    z.requires_grad_()
    loss, _ = reference.last_batch_loss(z, y, t, kd_mask=torch.tensor([True, False, True, True]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert z.grad.isfinite().all()
    assert z.grad[1].abs().max() == 0


def test_minus_infinity_logits(generator):
    z, y, t = batch(generator)
    z[:, 2] = float("-inf")
    t[:, 2] = float("-inf")
    y[y == 2] = 0
    z.requires_grad_()
    loss, _ = reference.last_batch_loss(z, y, t)
    loss.backward()
    keep = [0, 1, 3, 4]
    narrowed = eager_official(z.detach()[:, keep], torch.tensor([keep.index(int(v)) for v in y]), t[:, keep])
    assert loss.item() == pytest.approx(narrowed.item(), rel=1e-12)
    assert z.grad.isfinite().all()


def test_top1_counts_ties_and_skips_ignored():
    z = torch.tensor([[1.0, 1.0], [0.0, 2.0], [5.0, 1.0]])
    assert reference.top1_correct(z, torch.tensor([1, 0, -100])).item() == 1
    assert reference.top1_correct(z, torch.tensor([[0.2, 0.8], [0.1, 0.9], [0.4, 0.6]])).item() == 2
