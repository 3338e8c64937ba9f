"""The siblings of DLB: each fused function against its definition, value and gradient, on every implementation."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of

import dlb_fast
from dlb_fast import _backends
from dlb_fast import reference_family as ref
from dlb_fast.lessons import average_copies, ensemble_batch, tf_kd_share

ROWS, CLASSES = 12, 17


def extras(name, z, generator):
    """What a method takes beside logits and labels, by argument name, in float64."""
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    rows, classes = z.shape
    return {
        "mr_kd": {"copies_logits": 2 * draw(3, rows, classes)},
        "bake": {"features": draw(rows, 6)},
        "cs_kd": {"partner_logits": 2 * draw(rows, classes)},
        "ps_kd": {"past": torch.softmax(3 * draw(rows, classes), 1)},
    }.get(name, {})


# name of the function -> settings that are tried
SETTINGS = {
    "lsr_kd": [{}, {"alpha": 0.3, "temperature": 5.0}, {"alpha": 0.4, "temperature": 2.0, "correct_share": 0.8}],
    "tf_kd_reg": [{}, {"alpha": 0.95, "temperature": 40.0, "multiplier": 1.0}],
    "mr_kd": [{}, {"alpha": 0.3, "correct_share": 0.9}, {"temperature": 2.0, "swap": True}],
    "bake": [{}, {"alpha": 0.5, "omega": 0.9, "temperature": 2.0}, {"omega": 0.0}],
    "cs_kd": [{}, {"alpha": 3.0, "temperature": 2.0}],
    "ddgsd": [{}, {"alpha": 0.7, "ce_weight": 0.5}],
    "ps_kd": [{"alpha": 0.8}, {"alpha": 0.25}],
    "zipf": [{}, {"alpha": 1.0, "power": 2.0}],
}
CASES = [(name, settings) for name, tried in SETTINGS.items() for settings in tried]


def fused(name):
    return getattr(dlb_fast, f"{name}_loss")


def graded(function, z, upstream=1.7):
    z = z.detach().clone().requires_grad_()
    loss = function(z)
    (loss * upstream).backward()
    return loss.detach().double().cpu(), z.grad.double().cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_fused_equals_definition(impl, generator, name, settings, dtype):
    if impl == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels refuse float64")
    z = (3 * torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)).to(dtype)
    y = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    given = {k: v.to(dtype) for k, v in extras(name, z, generator).items()}
    exact = {k: v.double() for k, v in given.items()}
    device = device_of(impl)
    here = {k: v.to(device) for k, v in given.items()}
    loss, grad = graded(lambda v: fused(name)(v, target=y.to(device), impl=impl, **here, **settings), z.to(device))
    true_loss, true_grad = graded(lambda v: getattr(ref, name)(v, target=y, **exact, **settings), z.double())
    value, gradient = {torch.float64: (1e-11, 1e-11), torch.float32: (2e-5, 2e-6), torch.bfloat16: (2e-4, 1e-2)}[dtype]
    assert loss.item() == pytest.approx(true_loss.item(), rel=value)
    # The cancellation p_s - q is computed in float32 for 16-bit inputs too: what is left is one rounding.
    assert (grad - true_grad).abs().max() <= gradient * true_grad.abs().max()


@pytest.mark.parametrize("name", SETTINGS)
def test_triton_equals_definition(generator, name):
    """Small, because without a GPU it runs in Triton's interpreter."""
    known = _backends.implementations()["triton"]
    if not known.available:
        pytest.skip(known.reason)
    device = device_of("triton")
    z = 2 * torch.randn(4, 7, generator=generator)
    y = torch.randint(0, 7, (4,), generator=generator)
    given = {k: v.float() for k, v in extras(name, z, generator).items()}
    here = {k: v.to(device) for k, v in given.items()}
    exact = {k: v.double() for k, v in given.items()}
    settings = SETTINGS[name][-1]
    loss, grad = graded(lambda v: fused(name)(v, target=y.to(device), impl="triton", **here, **settings), z.to(device))
    true_loss, true_grad = graded(lambda v: getattr(ref, name)(v, target=y, **exact, **settings), z.double())
    assert loss.item() == pytest.approx(true_loss.item(), rel=2e-5)
    assert (grad - true_grad).abs().max() <= 4e-6 * true_grad.abs().max()


@pytest.mark.parametrize("name", SETTINGS)
def test_reductions_options_and_parts(impl, generator, name):
    """sum and none agree with mean; class weights reach the CE only; a label outside the classes is refused."""
    z = 2 * torch.randn(ROWS, CLASSES, generator=generator)
    y = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    given = {k: v.float() for k, v in extras(name, z, generator).items()}
    settings = SETTINGS[name][-1]
    device = device_of(impl)
    z, y, given = z.to(device), y.to(device), {k: v.to(device) for k, v in given.items()}
    call = lambda **more: fused(name)(z, target=y, impl=impl, return_parts=True, **given, **settings, **more)  # noqa: E731
    (mean, parts), (total, _), (rows, _) = call(), call(reduction="sum"), call(reduction="none")
    assert rows.shape == (ROWS,)
    torch.testing.assert_close(rows.sum(), total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.mean(), mean, rtol=1e-5, atol=1e-5)
    assert parts.loss.item() == pytest.approx(mean.item(), rel=1e-6)
    assert parts.ce.item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    assert parts.correct.item() == (z.argmax(1) == y).sum().item()
    weight = torch.rand(CLASSES, generator=generator).to(device)
    weighted, weighted_parts = call(weight=weight, label_smoothing=0.1)
    wanted = F.cross_entropy(z, y, weight=weight, label_smoothing=0.1)
    assert weighted_parts.ce.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert weighted_parts.lb.item() == pytest.approx(parts.lb.item(), rel=1e-5)
    assert weighted.item() != pytest.approx(mean.item(), rel=1e-4)
    if device == "cpu":
        bad = y.clone()
        bad[3] = CLASSES
        with pytest.raises(ValueError, match="is not a class"):
            fused(name)(z, target=bad, impl=impl, **given, **settings)


@pytest.mark.parametrize("name", ["lsr_kd", "mr_kd", "bake", "cs_kd", "ps_kd", "zipf"])
def test_alpha_as_a_device_scalar(impl, generator, name):
    z = 2 * torch.randn(ROWS, CLASSES, generator=generator).to(device_of(impl))
    y = torch.randint(0, CLASSES, (ROWS,), generator=generator).to(z.device)
    given = {k: v.to(z) for k, v in extras(name, z, generator).items()}
    number = fused(name)(z, target=y, impl=impl, alpha=0.3, **given)
    tensor = fused(name)(z, target=y, impl=impl, alpha=torch.tensor(0.3, device=z.device), **given)
    assert tensor.item() == pytest.approx(number.item(), rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.1, 0.35])
def test_label_smoothing_is_lsrkd_at_temperature_one(impl, generator, epsilon):
    z = (3 * torch.randn(ROWS, CLASSES, generator=generator)).to(device_of(impl))
    y = torch.randint(0, CLASSES, (ROWS,), generator=generator).to(z.device)
    ours = graded(lambda v: dlb_fast.lsr_kd_loss(v, y, alpha=epsilon, impl=impl), z)
    smooth = graded(lambda v: F.cross_entropy(v, y, label_smoothing=epsilon), z)
    assert ours[0].item() + epsilon * math.log(CLASSES) == pytest.approx(smooth[0].item(), rel=1e-5)
    torch.testing.assert_close(ours[1], smooth[1], rtol=1e-4, atol=1e-6)


def test_a_large_temperature_is_the_logit_variance_penalty(impl, generator):
    if impl == "cuda":
        pytest.skip("the CUDA kernels refuse float64")
    z = torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64).to(device_of(impl))
    y = torch.zeros(ROWS, dtype=torch.int64, device=z.device)
    kl = dlb_fast.lsr_kd_loss(z, y, alpha=1.0, temperature=1000.0, impl=impl)
    assert kl.item() == pytest.approx(0.5 * z.var(1, correction=0).mean().item(), rel=5e-3)


def test_a_uniform_share_is_no_correction(impl, generator):
    z = torch.randn(ROWS, CLASSES, generator=generator).to(device_of(impl))
    y = torch.randint(0, CLASSES, (ROWS,), generator=generator).to(z.device)
    plain = dlb_fast.lsr_kd_loss(z, y, temperature=3.0, impl=impl)
    shared = dlb_fast.lsr_kd_loss(z, y, temperature=3.0, correct_share=1 / CLASSES, impl=impl)
    assert shared.item() == pytest.approx(plain.item(), rel=1e-5)


def test_tf_kd_at_its_defaults_is_nearly_label_smoothing(generator):
    """C = 100, T = 20, multiplier 100: 0.9 CE + 0.1 KL(nearly uniform || p)."""
    z, y = torch.randn(8, 100, generator=generator), torch.randint(0, 100, (8,), generator=generator)
    assert tf_kd_share(100, 20.0) == pytest.approx(0.0105, abs=5e-5)
    official = dlb_fast.tf_kd_reg_loss(z, y)
    assert official.item() == pytest.approx(dlb_fast.lsr_kd_loss(z, y, alpha=0.1).item(), rel=2e-3)


def test_ps_kd_by_hand():
    """Two classes, by paper and pencil: target (0.6, 0.4) against p = (0.5, 0.5) costs log 2."""
    loss = dlb_fast.ps_kd_loss(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[0.2, 0.8]]), alpha=0.5)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    seen = torch.tensor([[1.0, 3.0]])
    p = torch.softmax(seen, 1)[0]
    wanted = -(0.6 * p[0].log() + 0.4 * p[1].log())
    loss = dlb_fast.ps_kd_loss(seen, torch.tensor([0]), torch.tensor([[0.2, 0.8]]), alpha=0.5)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_zipf_counts_the_right_class_and_shares_ties(impl):
    """z = (4, 3, 3, 1), y = 0: ranks of the others 2, 2, 4."""
    z, y = torch.tensor([[4.0, 3.0, 3.0, 1.0]], device=device_of(impl)), torch.tensor([0], device=device_of(impl))
    q = torch.tensor([1 / 2, 1 / 2, 1 / 4], dtype=torch.float64, device="cpu")
    q = q / q.sum()
    kl = (q * (q.log() - torch.log_softmax(z[0, 1:].double().cpu(), 0))).sum()
    loss, parts = dlb_fast.zipf_loss(z, y, alpha=1.0, impl=impl, return_parts=True)
    assert parts.lb.item() == pytest.approx(kl.item(), rel=1e-5)
    assert loss.item() == pytest.approx(parts.ce.item() + kl.item(), rel=1e-5)


def test_the_swap_leaves_right_answers_alone(generator):
    z = torch.randn(2, 6, 5, generator=generator)
    right = z.sum(0).argmax(1)
    teacher = average_copies(z, right, 1.0, swap=True)
    assert (teacher.argmax(1) == right).all()  # in every copy the right class is now the largest
    agreeing = torch.stack([z[0], z[0]])
    unchanged = average_copies(agreeing, z[0].argmax(1), 2.0, swap=True)
    torch.testing.assert_close(unchanged, torch.softmax(z[0] / 2.0, 1))


def test_teacher_correction_of_a_certain_copy_stays_finite():
    z = torch.tensor([[[0.0, 2000.0, 0.0]]])
    teacher = average_copies(z, torch.tensor([1]), 1.0, correct_share=0.8)
    torch.testing.assert_close(teacher, torch.tensor([[0.1, 0.8, 0.1]]))


def test_ignored_rows_have_no_swap_and_no_gradient_in_zipf(impl, generator):
    z = torch.randn(4, 5, generator=generator).to(device_of(impl)).requires_grad_()
    y = torch.tensor([1, -100, 2, 3], device=z.device)
    dlb_fast.zipf_loss(z, y, impl=impl).backward()
    assert z.grad[1].abs().sum() == 0 and z.grad[0].abs().sum() > 0
    teacher = average_copies(z.detach()[None], y, 1.0, swap=True, correct_share=0.7)
    torch.testing.assert_close(teacher[1], torch.softmax(z.detach()[1], 0))
    assert teacher[0, 1].item() == pytest.approx(0.7)


def test_bake_targets_are_distributions_and_float32_under_autocast(generator):
    z, f = torch.randn(10, 4, generator=generator), torch.randn(10, 7, generator=generator)
    wanted = ref.bake_teacher(f, z, temperature=4.0, omega=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = ensemble_batch(f, z, 4.0, 0.5)
        assert (f @ f.T).dtype == torch.bfloat16  # autocast is really on
    assert ours.dtype == torch.float32 and not ours.requires_grad
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.sum(1), torch.ones(10))


def test_bake_sends_no_gradient_to_the_features(generator):
    f = torch.randn(6, 3, generator=generator, requires_grad=True)
    z = torch.randn(6, 4, generator=generator, requires_grad=True)
    dlb_fast.bake_loss(z, f, torch.arange(6) % 4).backward()
    assert f.grad is None and z.grad is not None


def reassigned(criterion, alpha):
    criterion.alpha = alpha
    return criterion


WRONG = {
    "omega": (lambda z, y: dlb_fast.bake_loss(z, z, y, omega=1.0), "omega must be a number in \\[0, 1\\)"),
    "features": (lambda z, y: dlb_fast.bake_loss(z, z[:2], y), "features must have shape"),
    "copies": (lambda z, y: dlb_fast.mr_kd_loss(z, y, z), "copies_logits must have shape \\(K"),
    "odd": (lambda z, y: dlb_fast.ddgsd_loss(z[:3], y[:3]), "an even number, got 3"),
    "share": (lambda z, y: dlb_fast.lsr_kd_loss(z, y, correct_share=1.5), "correct_share must be None"),
    "dense share": (lambda z, y: dlb_fast.lsr_kd_loss(z, z.softmax(1), correct_share=0.5), "needs labels"),
    "past": (lambda z, y: dlb_fast.ps_kd_loss(z, y, z[:2]), "past must be floating with the shape of the logits"),
    "partner": (lambda z, y: dlb_fast.cs_kd_loss(z, y, z[:, :2]), "partner_logits must be floating with the shape"),
    "fewer partners": (lambda z, y: dlb_fast.cs_kd_loss(z, y, z[:2]), "partner_logits must be floating with the sh"),
    "copies' share": (lambda z, y: dlb_fast.mr_kd_loss(z, y, z[None], correct_share=2.0), "correct_share must be No"),
    "cross entropy": (lambda z, y: dlb_fast.lsr_kd_loss(z, y, alpha=2.0), "lsr_kd_loss: alpha must be at most 1, got"),
    "the same on the CPU": (lambda z, y: dlb_fast.lsr_kd_loss(z, y, alpha=torch.tensor(2.0)), "alpha must be at most"),
    "module": (lambda z, y: dlb_fast.MrKDLoss(alpha=1.5), "MrKDLoss: alpha must be at most 1, got 1.5"),
    "reassigned": (lambda z, y: reassigned(dlb_fast.LsrKDLoss(), 1.5)(z, y), "LsrKDLoss: alpha must be at most 1"),
    "virtual": (lambda z, y: dlb_fast.tf_kd_reg_loss(z, y, temperature=0.0), "temperature must be finite and > 0"),
    "virtual share": (lambda z, y: dlb_fast.tf_kd_reg_loss(z, y, share=3.0), "correct_share must be None"),
    "multiplier": (lambda z, y: dlb_fast.tf_kd_reg_loss(z, y, multiplier=0.0), "multiplier must be finite and > 0"),
    "mask": (lambda z, y: dlb_fast.lsr_kd_loss(z, y, kd_mask=torch.ones(3).bool()), "kd_mask must be a bool"),
    "alpha": (lambda z, y: dlb_fast.zipf_loss(z, y, alpha=-1.0), "alpha must be finite and >= 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_misuse_is_named(name, generator):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 5, generator=generator), torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize(
    "call",
    [
        lambda z, y: dlb_fast.lsr_kd_loss([1.0], y),
        lambda z, y: dlb_fast.tf_kd_reg_loss([1.0], y),
        lambda z, y: dlb_fast.mr_kd_loss(z, y, [z]),
        lambda z, y: dlb_fast.bake_loss(z, [1.0], y),
        lambda z, y: dlb_fast.cs_kd_loss(z, y, None),
        lambda z, y: dlb_fast.ddgsd_loss([1.0], y),
        lambda z, y: dlb_fast.ps_kd_loss(z, y, [1.0]),
        lambda z, y: dlb_fast.zipf_loss(z, None),
    ],
)
def test_what_is_no_tensor_is_named(call, generator):
    with pytest.raises(TypeError, match=r"_loss: \w+ must be a torch.Tensor, got (list|NoneType)"):
        call(torch.randn(4, 5, generator=generator), torch.tensor([0, 1, 2, 3]))


def test_tf_kd_share_at_any_temperature():
    """The softmax of (share, rest, rest, ...) / temperature, also where its exponentials overflow."""
    for temperature in (1e-4, 1e-2, 1.0, 40.0):
        virtual = torch.tensor([0.99, *[0.01 / 4] * 4], dtype=torch.float64)
        wanted = torch.softmax(virtual / temperature, 0)[0].item()
        assert tf_kd_share(5, temperature) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("module", ["teachers", "memories", "lessons", "family", "family_losses"])
def test_examples_run(module):
    found = doctest.testmod(importlib.import_module(f"dlb_fast.{module}"))
    assert found.failed == 0 and found.attempted > 0


def test_zipf_with_a_large_power_teaches_the_best_wrong_class():
    z, y = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([0])
    _, parts = dlb_fast.zipf_loss(z, y, power=200.0, return_parts=True)
    assert abs(parts.lb.item() - torch.nn.functional.cross_entropy(z[:, 1:], torch.tensor([0])).item()) < 1e-6


def test_ps_kd_takes_dense_targets_and_none():
    z, past = torch.randn(3, 4), torch.softmax(torch.randn(3, 4), 1)
    y = torch.tensor([0, 3, 2])
    labels = dlb_fast.ps_kd_loss(z, y, past)
    torch.testing.assert_close(dlb_fast.ps_kd_loss(z, torch.eye(4)[y], past), labels)
    _, parts = dlb_fast.ps_kd_loss(z, None, past, return_parts=True)
    assert parts.ce == 0 and parts.lb > 0


def test_an_ignored_label_leaves_ps_kd_as_a_function_too():
    z, y, past = torch.randn(3, 4), torch.tensor([0, -100, 2]), torch.softmax(torch.randn(3, 4), 1)
    _, both = dlb_fast.ps_kd_loss(z, y, past, return_parts=True)
    _, kept = dlb_fast.ps_kd_loss(z[[0, 2]], y[[0, 2]], past[[0, 2]], return_parts=True)
    torch.testing.assert_close(both, kept)
