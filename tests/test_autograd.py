"""The derivative of the losses: what backward gives, and what the compiled ones refuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import available
from method_cases import BANKS, CASES, CLASSES, SIBLINGS, function_of, make, takes
from torch import nn
from torch.autograd import forward_ad, gradcheck

from dlb_fast import (
    DistillationLoss,
    LastBatchLoss,
    LogitBuffer,
    Teacher,
    distillation_loss,
    dlb_step,
    functional,
    fused_lb_loss,
)
from dlb_fast.methods import METHODS

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


def tensors(generator):
    """Every tensor of a loss that may be learned, in float64, and the rest of its arguments."""
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {
        "logits": draw(6, 5), "soft": draw(6, 5).softmax(1), "hot": torch.eye(5).double()[[0, 4, 2, 2, 1, 3]],
        "target": torch.tensor([3, 0, 4, 4, 1, 2]), "target_b": torch.tensor([1, 1, 0, 2, 3, 3]), "t": 2 * draw(3, 5),
        "weight": draw(5).abs() + 0.5, "lam": draw(6).sigmoid(), "alpha": torch.tensor(0.7, dtype=torch.float64),
        "temperature": torch.tensor(2.5, dtype=torch.float64),
    }  # fmt: skip


def formula(v, kind, smoothing=0.1):
    """The objective by hand, with reduction="mean"."""
    z, w, tau = v["logits"], v["weight"], v["temperature"]
    log_p, rows, classes = torch.log_softmax(z, 1), *z.shape
    if kind in ("soft", "hot"):
        q, norm = v[kind], rows
    else:
        q, norm = F.one_hot(v["target"], classes).double(), w[v["target"]].sum()
        if kind == "pair":
            other = F.one_hot(v["target_b"], classes).double()
            q, norm = v["lam"][:, None] * q + (1 - v["lam"][:, None]) * other, rows
    q = (1 - smoothing) * q + smoothing / classes
    p = torch.softmax(v["t"] / tau, 1)
    kl = (p * (p.log() - torch.log_softmax(z[: len(p)] / tau, 1))).sum() / len(p)
    return -(q * w * log_p).sum() / norm + v["alpha"] * tau**2 * kl


LEARNED = {
    "soft": ("logits", "soft", "weight", "alpha", "temperature"),
    "hot": ("logits", "hot", "weight", "alpha", "temperature"),  # also the classes without a share have a gradient
    "labels": ("logits", "weight", "alpha", "temperature"),
    "pair": ("logits", "lam", "weight", "alpha", "temperature"),
}


def call_with(v, kind, impl):
    pair = {"target_b": v["target_b"], "lam": v["lam"]} if kind == "pair" else {}
    return fused_lb_loss(
        v["logits"], v[kind] if kind in ("soft", "hot") else v["target"], v["t"], alpha=v["alpha"],
        temperature=v["temperature"], weight=v["weight"], label_smoothing=0.1, impl=impl, **pair,
    )  # fmt: skip


@pytest.mark.parametrize("impl", ["torch", "auto"])
@pytest.mark.parametrize("kind", LEARNED)
def test_plain_torch_differentiates_everything(generator, kind, impl):
    found = []
    for loss_of in (lambda v: call_with(v, kind, impl), lambda v: formula(v, kind)):
        v = tensors(generator.manual_seed(2))
        leaves = [v[name].requires_grad_() for name in LEARNED[kind]]
        found.append(torch.autograd.grad(loss_of(v), leaves))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert all(grad.abs().max() > 0 for grad in found[0])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_plain_torch_passes_gradcheck_in_everything(generator, reduction):
    v = tensors(generator)
    names = LEARNED["soft"]

    def loss(*given):
        u = {**v, **dict(zip(names, given, strict=True))}
        return fused_lb_loss(
            u["logits"], u["soft"], u["t"], alpha=u["alpha"], temperature=u["temperature"], weight=u["weight"],
            label_smoothing=0.1, reduction=reduction, impl="torch",
        )  # fmt: skip

    leaves = [v[name].requires_grad_() for name in names]
    assert gradcheck(loss, leaves, check_batched_grad=True)


def test_a_learned_temperature_has_a_gradient_beside_masked_classes(generator):
    """A class at -inf has no part in it: 0 * inf is not NaN."""
    found = []
    for masked in (True, False):
        v = tensors(generator.manual_seed(3))
        z, t, tau = v["logits"], v["t"], v["temperature"].requires_grad_()
        if masked:
            z, t = (torch.cat([x, torch.full_like(x[:, :1], -torch.inf)], 1) for x in (z, t))
        (grad,) = torch.autograd.grad(fused_lb_loss(z, v["target"], t, temperature=tau, impl="torch"), tau)
        found.append(grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", [*LEARNED, "alone"])
def test_a_compiled_implementation_refuses_what_it_would_drop(generator, kernel, kind):
    for name in LEARNED.get(kind, ("alpha", "temperature"))[1 if kind in LEARNED else 0 :]:
        v = tensors(generator)
        v[name].requires_grad_()
        shown = "target" if name in ("soft", "hot") else name
        words = f"fused_lb_loss: impl={kernel!r} has no gradient of {shown}.*{shown}.detach.*use impl='torch'"
        with pytest.raises(RuntimeError, match=words):
            call_with(v, kind, kernel)
        with torch.no_grad():  # no gradient is wanted
            plain = call_with(v, kind, kernel)
        v[name].requires_grad_(False)
        assert torch.equal(plain, call_with(v, kind, kernel))


def test_triton_refuses_what_it_would_drop(generator):
    if not available("triton"):
        pytest.skip("no Triton here")
    v = tensors(generator)
    v["temperature"].requires_grad_()
    with pytest.raises(RuntimeError, match="impl='triton' has no gradient of temperature"):
        call_with(v, "labels", "triton")


@pytest.mark.parametrize("name", [n for n in SIBLINGS if takes(n, "alpha")])
def test_every_sibling_learns_alpha_in_plain_torch_and_refuses_it_compiled(generator, kernel, name):
    function = function_of(name)
    z = torch.randn(6, CLASSES, generator=generator, dtype=torch.float64)
    y, extras = torch.tensor([0, 1, 2, 3, 4, 0]), CASES[name].extras(z, generator)
    z.requires_grad_()
    loss = lambda impl, alpha: function(z, target=y, alpha=alpha, impl=impl, **extras)  # noqa: E731
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for impl in ("torch", "auto"):
        assert gradcheck(lambda alpha, impl=impl: loss(impl, alpha), alpha)
    with pytest.raises(RuntimeError, match=f"{function.__name__}: impl={kernel!r} has no gradient of alpha"):
        loss(kernel, alpha)


def steps(name, criterion, rows=6):
    """The loss of a batch with a teacher."""
    g = torch.Generator().manual_seed(4)
    model = nn.Linear(4, CLASSES)
    criterion.setup(model)
    given = {"images": torch.randn(rows, 4, generator=g), "epoch": 1}
    more = {"features": given["images"]} if name == "bake" else {}
    y = torch.randint(0, CLASSES, (rows,), generator=g)
    for step in range(3):
        count = rows // 2 if step == 0 and isinstance(criterion, LastBatchLoss) else rows
        x = torch.randn(count, 4, generator=g)
        ids = torch.arange(count) + (0 if name in BANKS else step * rows // 2 - (step > 0) * rows // 2)
        kwargs = {key: given[key][:count] if key == "images" else 1 for key in given if key in criterion.needs}
        if name == "bake":
            kwargs["features"] = more["features"][:count]
        loss = criterion(model(x), y[:count], ids, **kwargs)
        criterion.step()
    return loss


def has(name, option):
    """Whether the loss depends on it: a KL to a teacher does on both, another loss on what it has as an argument."""
    method = METHODS[name]
    return method.criterion.objective is DistillationLoss.objective or option in method.arguments


@pytest.mark.parametrize(
    ("name", "option"),
    [(n, o) for n in METHODS if n not in ("ce", "two_view") for o in ("alpha", "temperature") if has(n, o)],
)
def test_a_parameter_of_a_criterion_learns_or_is_refused(kernel, name, option):
    for impl in ("torch", "auto", kernel):
        criterion = make(name, impl=impl)
        setattr(criterion, option, nn.Parameter(torch.tensor(0.5)))
        assert [n for n, _ in criterion.named_parameters()] == [option]
        if (name, option) == ("tf_kd_reg", "temperature"):  # of the teacher, which is a constant
            with pytest.raises(TypeError, match="TfKDRegLoss: temperature must be a number"):
                steps(name, criterion)
            continue
        if impl == kernel:
            with pytest.raises(RuntimeError, match=f"{type(criterion).__name__}: impl={kernel!r} has no gradient of"):
                steps(name, criterion)
            continue
        steps(name, criterion).backward()
        (learned,) = criterion.parameters()
        assert learned.grad is not None and learned.grad.isfinite()
        if name != "ps_kd":  # whose batch is evaluated again here: its first teacher is the label
            assert learned.grad != 0


def test_a_parameter_that_cannot_learn_is_refused_at_construction(kernel):
    with pytest.raises(RuntimeError, match=f"LastBatchLoss: impl={kernel!r} has no gradient of temperature"):
        LastBatchLoss(5, temperature=nn.Parameter(torch.tensor(2.0)), impl=kernel)
    frozen = LastBatchLoss(5, temperature=nn.Parameter(torch.tensor(2.0), requires_grad=False), impl=kernel)
    frozen(torch.zeros(2, 5), torch.tensor([0, 1]))


def test_a_learned_temperature_goes_down_the_gradient():
    g = torch.Generator().manual_seed(0)
    z, y, t = torch.randn(8, 5, generator=g), torch.randint(0, 5, (8,), generator=g), torch.randn(4, 5, generator=g)
    criterion = LastBatchLoss(5, temperature=nn.Parameter(torch.tensor(2.0)), capacity=4)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    criterion(t, y[:4])
    loss = criterion(z, y)
    loss.backward()
    tau = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    p = torch.softmax(t.double() / tau, 1)
    kl = (p * (p.log() - torch.log_softmax(z[:4].double() / tau, 1))).sum() / 4
    (want,) = torch.autograd.grad(tau**2 * kl, tau)
    assert criterion.temperature.grad.item() == pytest.approx(want.item(), rel=1e-5)
    optimizer.step()
    assert criterion.temperature.item() == pytest.approx(2.0 - 0.1 * want.item(), rel=1e-6)


@pytest.mark.parametrize("impl", ["torch", "auto", "cpu"])
@pytest.mark.parametrize("name", ["target", "weight", "alpha", "temperature", "upstream"])
def test_a_step_without_a_graph_refuses_every_gradient_but_that_of_the_logits(generator, impl, name):
    v = tensors(generator)
    given = {"target": v["soft"], "weight": v["weight"], "alpha": v["alpha"], "temperature": v["temperature"]}
    given["upstream"] = torch.tensor(2.0, dtype=torch.float64)
    given[name].requires_grad_()
    buffer = LogitBuffer(5, 6, torch.float64)
    with pytest.raises(RuntimeError, match=f"dlb_step: .*has no gradient of {name}.*{name}.detach"):
        dlb_step(v["logits"], buffer=buffer, impl=impl, **given)
    assert buffer.count == 0
    with torch.no_grad():
        dlb_step(v["logits"], buffer=buffer, impl=impl, **given)


def test_a_teacher_is_detached_in_every_part_of_the_loss(generator):
    """Also in the entropy that a teacher may add."""
    v = tensors(generator)
    for impl in ("torch", "cpu"):
        t = torch.softmax(v["t"], 1).requires_grad_()
        teacher = Teacher("probabilities", t, add_entropy=True)
        loss, _ = functional.distill(
            "test", v["logits"].requires_grad_(), v["target"], teacher, alpha=0.5, temperature=1.0, impl=impl
        )
        assert torch.autograd.grad(loss, t, allow_unused=True) == (None,)


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_teacher_row_that_is_not_finite_does_not_teach(impl, generator, kind, bad):
    v = tensors(generator)
    t = v["t"] if kind == "logits" else torch.softmax(v["t"], 1)
    spoilt = t.clone()
    spoilt[1, 2] = bad
    found = []
    for teacher, mask in ((spoilt, None), (t, torch.tensor([True, False, True, True, True, True]))):
        z = v["logits"].clone().requires_grad_()
        loss = distillation_loss(
            z, v["target"], teacher, kind=kind, alpha=0.6, temperature=2.0, kd_mask=mask, impl=impl
        )
        found.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    torch.testing.assert_close(*found)
    z = v["logits"].clone()
    z[0, 0] = bad  # in the student it shows
    assert not distillation_loss(z, v["target"], t, kind=kind, impl=impl).isfinite()


def test_the_entropy_of_a_teacher_row_that_is_not_finite_is_not_added(impl, generator):
    v = tensors(generator)
    t = torch.softmax(v["t"], 1)
    spoilt = t.clone()
    spoilt[1] = torch.nan
    keep = torch.tensor([True, False, True])
    losses = [
        functional.distill(
            "test", v["logits"], v["target"], Teacher("probabilities", teacher, mask=mask, add_entropy=True), alpha=0.5,
            temperature=1.0, impl=impl,
        )[0]
        for teacher, mask in ((spoilt, None), (t, keep))
    ]  # fmt: skip
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_batched_gradients(kernel, dtype, reduction):
    """As `torch.autograd.grad(is_grads_batched=True)` and `jacobian(vectorize=True)` ask for them."""
    z, y, t = batch(dtype)
    z.requires_grad_()
    loss = fused_lb_loss(z, y, t, reduction=reduction, impl=kernel)
    weights = torch.linspace(-2, 3, 4 * loss.numel()).reshape(4, *loss.shape).to(loss.dtype)
    (found,) = torch.autograd.grad(loss, z, weights, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(loss, z, weight, retain_graph=True)[0] for weight in weights]
    torch.testing.assert_close(found, torch.stack(one_by_one))
    (vmapped,) = torch.func.vmap(lambda weight: torch.autograd.grad(loss, z, weight, retain_graph=True))(weights)
    assert torch.equal(vmapped, found)


def test_batched_gradients_of_a_criterion(kernel):
    z, y, _ = batch(torch.float64)
    found = []
    for impl in (kernel, "torch"):
        criterion = LastBatchLoss(11, impl=impl, reduction="none")
        criterion(z[4:] + 1, y[4:])
        call = lambda z, criterion=criterion: criterion(z, y)  # noqa: E731
        found.append(torch.autograd.functional.jacobian(call, z, vectorize=True))
    torch.testing.assert_close(*found)


def test_gradcheck_of_a_compiled_loss(kernel):
    z, y, t = batch(torch.float64)
    loss = lambda z: fused_lb_loss(z, y, t, impl=kernel)  # noqa: E731
    assert gradcheck(loss, z.requires_grad_(), check_batched_grad=True)


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


def test_who_holds_what_was_saved_finds_it_unchanged(kernel):
    z, y, t = batch()
    leaf, plain, held = z.clone().requires_grad_(), z.clone().requires_grad_(), []
    keep = lambda s: held.append((s, s.clone())) or s  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda s: s):
        loss = fused_lb_loss(leaf, y, t, impl=kernel)
    (3 * loss).backward()
    (3 * fused_lb_loss(plain, y, t, impl=kernel)).backward()
    assert torch.equal(leaf.grad, plain.grad)
    assert held and all(torch.equal(saved, before) for saved, before in held)


REMEMBERING = {
    "dlb": lambda criterion, z, y: criterion(z, y),
    "ps_kd": lambda criterion, z, y: criterion(z, y, torch.arange(len(y)), epoch=0),
}


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("transform", [n for n in TRANSFORMS if n != "vmap"])
def test_a_criterion_that_remembers_says_why_it_cannot_be_transformed(name, transform):
    z, y = torch.zeros(4, CLASSES, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    criterion = make(name)
    call = lambda z: REMEMBERING[name](criterion, z, y)  # noqa: E731
    with pytest.raises(RuntimeError, match="in train.. it remembers the batch, which a transform of torch.func"):
        TRANSFORMS[transform](call, z)
    criterion.eval()
    assert TRANSFORMS[transform](lambda z: criterion(z, y), z).isfinite().all()


def test_a_criterion_that_was_transformed_is_copied_and_pickled():
    z, y = torch.zeros(4, CLASSES, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    criterion = make("lsr_kd")
    torch.func.grad(lambda z: criterion(z, y))(z)
    copied, pickled = copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))
    assert copied.parts.ce.item() == pickled.parts.ce.item() == pytest.approx(torch.tensor(5.0).log().item())


@pytest.mark.parametrize("name", ["target", "alpha", "temperature", "lam", "weight"])
def test_a_forward_derivative_of_another_argument_is_not_dropped_either(generator, name):
    kind = {"target": "soft", "lam": "pair"}.get(name, "labels")
    v = tensors(generator)
    key = "soft" if name == "target" else name
    with forward_ad.dual_level():
        v[key] = forward_ad.make_dual(v[key], torch.ones_like(v[key]))
        with pytest.raises(RuntimeError, match="does not know forward mode"):
            call_with(v, kind, "cpu")
        tangent = forward_ad.unpack_dual(call_with(v, kind, "auto")).tangent
        want = forward_ad.unpack_dual(formula(v, kind)).tangent
    torch.testing.assert_close(tangent, want)


def test_a_refused_batch_is_refused_in_our_words():
    z, y, t = batch()
    with pytest.raises(ValueError, match="target"):
        fused_lb_loss(z.requires_grad_(), y + 11, t, impl="cpu")


def test_under_no_grad_no_node_is_made():
    z, y, t = batch()
    with torch.no_grad():
        assert fused_lb_loss(z.requires_grad_(), y, t, impl="cpu").grad_fn is None
