"""GCE, SCE, ELR and R-Drop against their published code, written down here, and where their float32 could fail."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from method_cases import CLASSES, make

import dlb_fast
from dlb_fast import ElrLoss, GceLoss, RDropLoss, SceLoss, ddgsd_loss, elr_loss, gce_loss, r_drop_loss, sce_loss
from dlb_fast.methods import gce


def graded(function, z, upstream=1.0):
    z = z.detach().clone().requires_grad_()
    loss = function(z)
    return loss.detach(), torch.autograd.grad((loss * upstream).sum(), z)[0]


def problem(generator, rows=8, classes=CLASSES):
    z = 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64, device="cpu")
    return z, torch.randint(0, classes, (rows,), generator=generator, device="cpu")


def close(found, wanted, tolerance=1e-12):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double().cpu(), other.double().cpu(), rtol=tolerance, atol=tolerance)


# ---- GCE and SCE: functions of the label's probability

GAPS = [-2000.0, -200.0, -90.0, -40.0, -18.0, -9.0, -1.0, 0.0, 1.0, 9.0, 18.0, 40.0, 90.0, 2000.0]


def exact(z, y, value, factor):
    """Rows and gradients in float64 from log p: value(log p), and factor(log p) times the gradient of the CE."""
    log_p = torch.log_softmax(z.double(), 1)
    own = log_p.gather(1, y[:, None])[:, 0]
    others = torch.ones_like(log_p).scatter(1, y[:, None], 0.0)
    at_label = -(log_p.exp() * others).sum(1, keepdim=True)  # p - 1 without cancellation
    grad = torch.where(others > 0, log_p.exp(), at_label)
    return value(own), factor(own)[:, None] * grad


def close_rows(found, wanted, scale):
    """Of a certain label, float32 knows the cross entropy and 1 - p to 2e-7; everything else is known relatively."""
    unsure = torch.tensor(GAPS) <= 1
    for one, other in zip(found, wanted, strict=True):
        one = one.double().cpu()
        torch.testing.assert_close(one, other, rtol=3e-5, atol=2e-7 * scale)
        torch.testing.assert_close(one[unsure], other[unsure], rtol=3e-5, atol=1e-37)


@pytest.mark.parametrize("q", [0.05, 0.7, 1.0])
def test_gce_is_exact_where_the_label_is_certain_or_impossible(impl, q):
    """The gradient is p^q times that of the CE also for p^q of 1e-8, which 1 - (1 - p^q) would round away."""
    z = torch.zeros(len(GAPS), 4)
    z[:, 2], y = torch.tensor(GAPS), torch.full((len(GAPS),), 2)
    device = device_of(impl)
    call = lambda z: gce_loss(z, y.to(device), q=q, reduction="none", impl=impl)  # noqa: E731
    found = graded(call, z.to(device))
    wanted = exact(z, y, lambda lp: -torch.expm1(q * lp) / q, lambda lp: torch.exp(q * lp))
    close_rows(found, wanted, 1.0)
    assert found[0][0].item() == pytest.approx(1 / q) and found[1][0].abs().max() < 1e-37
    published = graded(lambda z: gce.reference(z, y, q=q), z)
    assert published[1].isnan().any() == (q < 1)  # 0^(q - 1)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_sce_is_exact_where_the_label_is_certain_or_impossible(impl, alpha):
    z = torch.zeros(len(GAPS), 4)
    z[:, 2], y = torch.tensor(GAPS), torch.full((len(GAPS),), 2)
    device, a = device_of(impl), math.log(1e-4)
    call = lambda z: sce_loss(z, y.to(device), alpha=alpha, beta=2.0, reduction="none", impl=impl)  # noqa: E731
    found = graded(call, z.to(device))
    value = lambda lp: -alpha * lp + 2.0 * a * torch.expm1(lp)  # noqa: E731
    wanted = exact(z, y, value, lambda lp: alpha - 2.0 * a * torch.exp(lp))
    close_rows(found, wanted, -2.0 * a)


@pytest.mark.parametrize("loss", [gce_loss, sce_loss], ids=lambda f: f.__name__)
def test_a_label_whose_logit_is_minus_infinity_has_a_finite_gradient(impl, loss):
    z = torch.tensor([[-math.inf, 0.0, 1.0]], device=device_of(impl))
    value, grad = graded(lambda z: loss(z, torch.zeros(1, dtype=torch.int64, device=z.device), impl=impl), z)
    assert grad.isfinite().all()
    assert value.isfinite() == (loss is gce_loss)  # SCE has a CE


def test_gce_between_cross_entropy_and_mean_absolute_error(impl, generator):
    z, y = (v.to(device_of(impl)) for v in problem(generator))
    z = z.float()
    close(graded(lambda z: gce_loss(z, y, q=1e-7, impl=impl), z), graded(lambda z: F.cross_entropy(z, y), z), 1e-5)
    mae = lambda z: 0.5 * (F.softmax(z, 1) - F.one_hot(y, CLASSES)).abs().sum(1).mean()  # noqa: E731
    close(graded(lambda z: gce_loss(z, y, q=1.0, impl=impl), z), graded(mae, z), 1e-6)


def test_gce_counts_classes_and_ignored_rows_as_cross_entropy_does(impl, generator):
    device = device_of(impl)
    z, y = (v.to(device) for v in problem(generator))
    weight = torch.rand(CLASSES, generator=generator).to(device)
    y[1], y[5] = 3, -100
    z = z.float()
    rows = torch.cat([gce_loss(z[i : i + 1], y[i : i + 1], impl=impl)[None] for i in range(8) if i != 5])
    share = weight[y[y >= 0]]
    wanted = (share * rows).sum() / share.sum()
    torch.testing.assert_close(gce_loss(z, y, weight=weight, impl=impl), wanted)
    torch.testing.assert_close(gce_loss(z, y, impl=impl), rows.mean())
    torch.testing.assert_close(gce_loss(z, y, weight=weight, reduction="sum", impl=impl), (share * rows).sum())
    assert gce_loss(z, y, reduction="none", impl=impl)[5] == 0
    assert not graded(lambda z: gce_loss(z, y, weight=weight, impl=impl), z)[1][5].any()
    criterion = GceLoss(weight=weight, impl=impl)
    torch.testing.assert_close(criterion(z, y), wanted)
    small = gce_loss(z, y, q=1e-7, weight=weight, impl=impl)
    torch.testing.assert_close(small, F.cross_entropy(z, y, weight), rtol=1e-5, atol=1e-6)
    assert gce_loss(z, torch.full_like(y, -100), impl=impl) == 0


def published_sce(z, y, alpha, beta):
    """HanxunH/SCELoss-Reproduce, `loss.py`."""
    p = torch.clamp(F.softmax(z, dim=1), min=1e-7, max=1.0)
    hot = torch.clamp(F.one_hot(y, z.shape[1]).to(z.dtype), min=1e-4, max=1.0)
    return alpha * F.cross_entropy(z, y) + beta * (-(p * hot.log()).sum(1)).mean()


def test_sce_is_the_published_pytorch_version(impl, generator):
    """It also clips the prediction of the reverse term, by less than 1e-7 per class."""
    z, y = (v.to(device_of(impl)) for v in problem(generator))
    ours = lambda scale: graded(lambda z: sce_loss(z, y, impl=impl), (scale * z).float())  # noqa: E731
    theirs = lambda scale: graded(lambda z: published_sce(z, y, 0.1, 1.0), scale * z)  # noqa: E731
    assert F.softmax(z, 1).min() > 1e-7
    close(ours(1.0), theirs(1.0), 3e-6)
    assert F.softmax(8 * z, 1).min() < 1e-7
    assert abs(ours(8.0)[0].double() - theirs(8.0)[0]) < CLASSES * 1e-7 * 9.22 + 1e-5


def test_class_weights_and_smoothing_of_sce_belong_to_its_cross_entropy(impl, generator):
    z, y = (v.to(device_of(impl)) for v in problem(generator))
    z, weight = z.float(), torch.rand(CLASSES, generator=generator).to(z.device)
    y[2] = -100
    kept = y >= 0
    reverse = -math.log(1e-4) * (1 - z.softmax(1)[kept].gather(1, y[kept][:, None])).mean()
    for options in ({"weight": weight}, {"label_smoothing": 0.2}, {"weight": weight, "label_smoothing": 0.2}, {}):
        wanted = 0.1 * F.cross_entropy(z, y, **options) + reverse
        torch.testing.assert_close(sce_loss(z, y, impl=impl, **options), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(SceLoss(impl=impl, **options)(z, y), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gce", "sce"])
def test_what_has_no_single_label_probability_is_refused(name):
    criterion, z, y = make(name), torch.zeros(4, CLASSES), torch.arange(4)
    with pytest.raises(ValueError, match=f"{type(criterion).__name__}: needs one class per row.*label's probability"):
        criterion(z, z.softmax(1))
    with pytest.raises(ValueError, match="turn mixup and CutMix off"):
        criterion(z, y, target_b=y, lam=0.5)
    with pytest.raises(ValueError, match=f"{type(criterion).__name__}: kd_mask must be None.*by ignore_index"):
        criterion(z, y, kd_mask=torch.ones(4, dtype=torch.bool))
    criterion.label_smoothing = 0.1
    if name == "gce":
        with pytest.raises(ValueError, match="GceLoss: label_smoothing must be 0, got 0.1"):
            criterion(z, y)


# ---- ELR


class PublishedElr:
    """shengliu66/ELR, `ELR/model/loss.py`."""

    def __init__(self, samples, classes, beta, lam):
        self.target, self.beta, self.lam = torch.zeros(samples, classes, dtype=torch.float64), beta, lam

    def __call__(self, index, output, label):
        y_pred = torch.clamp(F.softmax(output, dim=1), 1e-4, 1.0 - 1e-4)
        y_pred_ = y_pred.detach()
        self.target[index] = self.beta * self.target[index] + (1 - self.beta) * (
            y_pred_ / y_pred_.sum(dim=1, keepdim=True)
        )
        reg = (1 - (self.target[index] * y_pred).sum(dim=1)).log().mean()
        return F.cross_entropy(output, label) + self.lam * reg


@pytest.mark.parametrize(
    ("memory", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 2e-3)], ids=str
)
@pytest.mark.parametrize(("alpha", "beta"), [(3.0, 0.7), (7.0, 0.9), (1.0, 0.0)])
def test_elr_is_the_published_loop(memory, tolerance, alpha, beta):
    """Values, gradients and averages, over visits of every sample; some predictions are beyond the clip."""
    theirs = PublishedElr(12, CLASSES, beta, alpha)
    ours = ElrLoss(12, CLASSES, alpha=alpha, beta=beta, memory_dtype=memory)
    g = torch.Generator().manual_seed(3)
    clipped = False
    for step in range(9):
        ids = torch.randperm(12, generator=g)[:5]
        z, y = problem(g, 5)
        z[0] *= 5
        clipped |= bool((z.softmax(1) < 1e-4).any())
        close(graded(lambda z: ours(z, y, ids), z), graded(lambda z: theirs(ids, z, y), z), tolerance)  # noqa: B023
        ours.step()
        rows, seen = ours.bank.rows(torch.arange(12), "cpu")
        torch.testing.assert_close(rows.double()[seen], theirs.target[seen], rtol=tolerance, atol=tolerance)
        assert not theirs.target[~seen].any()
        if step == 4:  # saved and loaded in the middle
            saved, ours = ours.state_dict(), ElrLoss(12, CLASSES, alpha=alpha, beta=beta, memory_dtype=memory)
            ours.load_state_dict(copy.deepcopy(saved))
    assert clipped and seen.all()


def test_elr_by_hand():
    """Two classes at p = (1/2, 1/2): t = (0.15, 0.15), then (0.255, 0.255)."""
    criterion = ElrLoss(1, 2)
    z, y, ids = torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0])
    for average in (0.15, 0.255):
        assert criterion(z, y, ids).item() == pytest.approx(math.log(2) + 3 * math.log(1 - average), rel=1e-6)
        criterion.step()


def test_elr_leaves_ignored_and_masked_rows_out(impl, generator):
    z, y = (v.to(device_of(impl)) for v in problem(generator))
    past = 0.5 * z.softmax(1)
    y[3] = -100
    kept = y >= 0
    both = graded(lambda z: elr_loss(z, y, past.to(z), impl=impl), z.float())
    alone = graded(lambda z: elr_loss(z, y[kept], past[kept].to(z), impl=impl), z[kept].float())
    torch.testing.assert_close(both[0], alone[0])
    torch.testing.assert_close(both[1][kept], alone[1])
    assert not both[1][3].any()
    nothing = elr_loss(z.float(), y, past.float(), kd_mask=torch.zeros_like(kept), impl=impl)
    torch.testing.assert_close(nothing, F.cross_entropy(z.float(), y))
    every = elr_loss(z.float(), y, past.float(), kd_mask=torch.ones_like(kept), impl=impl)
    torch.testing.assert_close(every, both[0])
    pair = elr_loss(z.float(), y, past.float(), target_b=y.flip(0), lam=0.3, return_parts=True, impl=impl)[1]
    unlabelled = ~kept | ~kept.flip(0)
    parts = elr_loss(z[~unlabelled].float(), y[~unlabelled], past[~unlabelled].float(), return_parts=True)[1]
    torch.testing.assert_close(pair.lb, parts.lb)


def test_elr_takes_dense_targets_by_hand_and_names_what_its_bank_cannot_take(generator):
    z, y = problem(generator)
    past = torch.zeros_like(z)
    torch.testing.assert_close(elr_loss(z, F.one_hot(y, CLASSES).double(), past), elr_loss(z, y, past))
    with pytest.raises(ValueError, match="past must be floating with the shape of the logits"):
        elr_loss(z, y, past[:2])
    criterion = ElrLoss(8, CLASSES)
    with pytest.raises(ValueError, match="ElrLoss: needs one class per row.*belongs to no single sample"):
        criterion(z, z.softmax(1), torch.arange(8))
    with pytest.raises(ValueError, match="ElrLoss: logits must have C = 5 classes"):
        criterion(z[:, :4], y.clamp(max=3), torch.arange(8))
    with pytest.raises(ValueError, match=r"ElrLoss: expected a saved bank of shape \(8, 5\)"):
        criterion.load_state_dict(ElrLoss(9, CLASSES).state_dict())
    assert "8 x 5 float32 rows" in criterion.cost()


# ---- R-Drop


def published_kl(p_logits, q_logits):
    """`compute_kl_loss` of dropreg/R-Drop, `fairseq_src/examples/roberta`."""
    p, p_tec = F.log_softmax(p_logits, dim=-1), F.softmax(p_logits, dim=-1)
    q, q_tec = F.log_softmax(q_logits, dim=-1), F.softmax(q_logits, dim=-1)
    p_loss, q_loss = F.kl_div(p, q_tec, reduction="none").sum(), F.kl_div(q, p_tec, reduction="none").sum()
    return (p_loss + q_loss) / 2


def test_r_drop_is_the_published_criterion(impl, generator):
    """The fairseq criterion sums over 2n rows and divides by the n samples: twice this loss, with the same alpha."""
    z, y = problem(generator)
    y = torch.cat([y[:4], y[:4]]).to(device_of(impl))
    z = z.to(y.device)

    def criterion(z, alpha=0.6):
        one, two = z.chunk(2)
        nll = F.cross_entropy(one, y[:4], reduction="sum") + F.cross_entropy(two, y[:4], reduction="sum")
        return (nll + alpha * published_kl(one, two)) / 4

    close(graded(lambda z: 2 * r_drop_loss(z, y, impl=impl), z.float()), graded(criterion, z), 5e-6)
    module = RDropLoss(impl=impl)
    close(graded(lambda z: 2 * module(z, y), z.float()), graded(criterion, z), 5e-6)


def test_both_views_of_r_drop_learn_as_teachers_too(generator):
    """DDGSD at temperature 1 has the same value, and half of the gradient."""
    z, y = problem(generator)
    y = torch.cat([y[:4], y[:4]])
    value, grad = graded(lambda z: r_drop_loss(z, y, alpha=4.0), z)
    detached, half = graded(lambda z: ddgsd_loss(z, y, alpha=1.0, temperature=1.0), z)
    torch.testing.assert_close(value, detached)
    assert (grad - half).abs().max() > 0.1 * grad.abs().max()
    one = lambda z: r_drop_loss(torch.cat([z, z]), torch.cat([y[:4], y[:4]]))  # noqa: E731
    torch.testing.assert_close(graded(one, z[:4]), graded(lambda z: F.cross_entropy(z, y[:4]), z[:4]))


def test_r_drop_without_labels_with_a_mask_and_with_masked_classes(generator):
    z, y = problem(generator)
    loss, parts = r_drop_loss(z, None, alpha=2.0, return_parts=True)
    torch.testing.assert_close(parts.lb, published_kl(*z.chunk(2)) / 8)  # half of the mean KL over all rows
    assert parts.ce == 0 and loss == 2 * parts.lb
    mask = torch.arange(8) < 4  # the second views only teach
    one, two = z.chunk(2)
    taught = r_drop_loss(z, None, alpha=1.0, kd_mask=mask)
    torch.testing.assert_close(taught, 0.5 * F.kl_div(one.log_softmax(1), two.softmax(1), reduction="batchmean"))
    z[:, 4] = -math.inf  # no view gives this class a probability
    value, grad = graded(lambda z: r_drop_loss(z, y.clamp(max=3)), z)
    want, want_grad = graded(lambda z: r_drop_loss(z, y.clamp(max=3)), z[:, :4])
    torch.testing.assert_close((value, grad[:, :4]), (want, want_grad))
    assert not grad[:, 4].any()
    with pytest.raises(ValueError, match=r"r_drop_loss: rows must be \[first views \| second views\], an even number"):
        r_drop_loss(z[:3], y[:3])
    with pytest.raises(ValueError, match="RDropLoss: rows must be"):
        RDropLoss()(z[:3], y[:3])


# ---- all


@pytest.mark.parametrize("name", ["gce", "sce", "elr", "r_drop"])
def test_autocast_computes_the_loss_in_float32(name, generator):
    z, y = problem(generator)
    z16, ids = z.bfloat16(), torch.arange(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = graded(lambda z: make(name)(z, y, ids), z16)
    wanted = graded(lambda z: make(name)(z, y, ids), z16.float())
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1].float(), wanted[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["gce", "sce", "r_drop"])
def test_second_derivatives_in_plain_torch(name):
    """ELR has none that is its loss's: the average is a function of the logits and has no gradient."""
    z, y, g = torch.zeros(4, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1]), torch.Generator().manual_seed(0)
    z += torch.randn(4, 3, generator=g)
    function = getattr(dlb_fast, f"{name}_loss")
    z.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: function(z, y, impl="torch"), z)
