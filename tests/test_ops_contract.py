"""What torch is promised of the ops: schema, fake tensors, one graph under torch.compile, honest derivatives."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from conftest import available, eager_official, op_options
from functorch.compile import aot_function, nop
from method_cases import BANKS, CLASSES, make
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from dlb_fast import LastBatchLoss, LogitBuffer, _backends, _options, functional, fused_lb_loss, ops
from dlb_fast.methods import METHODS

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


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_opcheck_of_every_argument(generator, name, reduction):
    """With every kind of teacher and every tensor that an op may be given; Triton's forms in the interpreter."""
    if not available(name):
        pytest.skip(f"no {name} here")
    z, y, t = problem(generator)
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    learned = {"alpha_t": draw(1)[0], "temperature_t": draw(1)[0] + 1, "weight": draw(12)}
    pair = {"target_b": y.flip(0), "lam": draw(8)}
    op, mask = ops.op_for(name, "last_batch"), torch.tensor([True, False, True, True])
    for args in (
        (z, t, 1, *options(y, reduction=reduction, kd_mask=mask)),
        (z, None, 0, *options(y, reduction=reduction, need_grad=False)),
        (z, t.softmax(1), 2, *options(draw(8, 12), reduction=reduction, **learned)),
        (z, None, 3, *options(y, reduction=reduction, **pair)),
    ):
        torch.library.opcheck(op, args)
    buffer = LogitBuffer(12, 4)
    buffer.update(t)
    for ids, again in ((torch.arange(8), -1), (None, 1)):
        args = (z, buffer.rows, buffer.slots, ids, -1, again, *options(y, reduction=reduction))
        torch.library.opcheck(ops.op_for(name, "last_batch_update"), args)
    loss, parts, grad = op(z, t, 1, *options(y, reduction=reduction))
    torch.library.opcheck(ops.op_for(name, "scale_grad_"), (grad, torch.full_like(loss, 0.5), parts))


@needs_cpu_op
def test_opcheck_of_the_crops():
    """Also where nobody has imported the loaders."""
    image = torch.arange(3 * 9 * 11, dtype=torch.uint8).reshape(3, 9, 11)
    crops, view = torch.ops.dlb_fast.resized_crops_.default, (0, 1, 5, 6, True)
    torch.library.opcheck(crops, (image, torch.zeros(2, 4, 4, 3).byte(), 0, *view, None, 0, *view, None))
    images, table = torch.zeros(2, 4, 4, 3), torch.rand(3, 256)
    torch.library.opcheck(crops, (image, images, 0, *view, images.clone(), 1, *view, table))


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


def train(name, device, impl):
    """A few steps of a criterion on its own model; the last loss."""
    with torch.device(device):
        model = torch.nn.Sequential(torch.nn.Linear(7, 6), torch.nn.ReLU(), torch.nn.Linear(6, CLASSES))
    criterion = make(name, impl=impl)
    criterion.setup(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        rows = 4 if step == 0 else 8
        x, y = torch.randn(rows, 7, device=device), torch.zeros(rows, dtype=torch.long, device=device)
        given = {key: value for key, value in {"images": x, "epoch": 0}.items() if key in criterion.needs}
        loss = criterion(model(x), y, torch.arange(rows, device=device), **given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        criterion.step()
    assert model[0].weight.grad.shape == (6, 7)
    assert criterion.eval()(model(x), y).shape == ()
    return loss


@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_on_fake_tensors(impl, name):
    """As estimators of memory run it, in eager mode."""
    with FakeTensorMode():
        loss = train(name, "cpu", impl)
    assert isinstance(loss, FakeTensor) and loss.shape == ()


@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_on_meta_tensors(name):
    assert train(name, "meta", "auto").is_meta


def step_of(impl, generator):
    """Loss and gradient as a function of tensors, its arguments, and what it is in eager mode."""

    def step(z, y, t):
        leaf = z.detach().requires_grad_()
        loss = fused_lb_loss(leaf, y, t, alpha=torch.tensor(0.5), impl=impl)
        return loss.detach(), torch.autograd.grad(3 * loss, leaf)[0]

    args = problem(generator)
    return step, args, step(*args)


@pytest.mark.parametrize("mode", ["real", *(pytest.param(m, marks=pytest.mark.slow) for m in ("fake", "symbolic"))])
def test_make_fx_traces_a_step(impl, generator, mode):
    step, args, want = step_of(impl, generator)
    traced = make_fx(step, tracing_mode=mode)(*args)
    torch.testing.assert_close(traced(*args), want)
    z, y, t = args
    torch.testing.assert_close(traced(z + 1, y, t), step(z + 1, y, t))


@pytest.mark.slow
def test_aot_function_traces_a_step(impl, generator):
    z, y, t = problem(generator)
    wanted, leaf = z.clone().requires_grad_(), z.clone().requires_grad_()
    call = lambda z, y, t: fused_lb_loss(z, y, t, impl=impl)  # noqa: E731
    (3 * call(wanted, y, t)).backward()
    (3 * aot_function(call, fw_compiler=nop, bw_compiler=nop)(leaf, y, t)).backward()
    torch.testing.assert_close(leaf.grad, wanted.grad)


@pytest.mark.parametrize("mode", [lambda: FlopCounterMode(display=False), torch.autograd.detect_anomaly, save_on_cpu,
                                  allow_mutation_on_saved_tensors])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_who_watches_a_step_changes_nothing(impl, generator, mode):
    step, args, want = step_of(impl, generator)
    with mode():
        found = step(*args)
    assert all(map(torch.equal, found, want))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_a_criterion_in_eval_is_exported(impl, generator, strict):
    class Scored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.criterion = torch.nn.Linear(12, 12), LastBatchLoss(12, impl=impl)

        def forward(self, x, y):
            return self.criterion(self.head(x), y)

    z, y, _ = problem(generator)
    module = Scored().eval()
    exported = torch.export.export(module, (z, y), strict=strict).module()
    torch.testing.assert_close(exported(z + 1, y), module(z + 1, y))


def compiled_steps(name, impl, compiled, dynamic, with_ids, change, sizes=(4, 8, 8)):
    """Loss, gradient and last-batch term of every step, and what is stored, from the very first batch on."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, criterion = torch.nn.Linear(7, CLASSES), make(name, impl=impl)
    criterion.setup(model)
    step = lambda x, y, ids, **given: criterion(model(x), y, ids, **given)  # noqa: E731
    if compiled:
        step = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    stream, found = torch.Generator().manual_seed(1), []
    for k, rows in enumerate(sizes):
        x, y = torch.randn(rows, 7, generator=stream), torch.randint(0, CLASSES, (rows,), generator=stream)
        given = {key: value for key, value in {"images": x, "epoch": 0}.items() if key in criterion.needs}
        if name == "bake":
            given["features"] = x
        if change == "number":
            criterion.alpha = 0.2 * (k + 1)
        elif change == "tensor":
            criterion.alpha = torch.tensor(0.2 * (k + 1))
        ids = torch.arange(rows) + (0 if name in BANKS else max(4 * (k - 1), 0))
        loss = step(x, y, ids if with_ids or "ids" in criterion.needs else None, **given)
        model.zero_grad()
        loss.backward()
        criterion.step()
        found.append((loss.detach(), model.weight.grad.clone(), criterion.parts.lb))
    assert criterion.parts.lb != 0  # ELR: negative
    copy.deepcopy(criterion)
    pickle.dumps(criterion)
    buffer = getattr(criterion, "buffer", None)
    return found if buffer is None else [*found, (buffer.logits, buffer.ids, buffer.slots)]


@pytest.mark.slow
@pytest.mark.parametrize("with_ids", [True, False])
def test_compile_from_the_first_batch_on(impl, with_ids):
    """Without a capacity, which the first batches tell."""
    given = "dlb", impl
    eager, compiled = (compiled_steps(*given, how, None, with_ids, "number") for how in (False, True))
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("dynamic", "change"), [(None, "number"), (True, "tensor")])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("ce", "two_view")])
def test_compile_every_criterion_from_the_first_batch_on(kernel, name, dynamic, change):
    if name == "zipf":
        dynamic = None  # with True there is an assertion in Dynamo (lift_tracked_freevar_to_input)
    eager, compiled = (compiled_steps(name, kernel, how, dynamic, True, change) for how in (False, True))
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compile_learns_what_is_learned_and_refuses_what_is_not(impl, generator):
    z, y, t = problem(generator)
    tau = torch.tensor(2.0, requires_grad=True)
    call = lambda z, tau: fused_lb_loss(z, y, t, temperature=tau, impl=impl)  # noqa: E731
    torch._dynamo.reset()
    if impl == "torch":
        found, want = (torch.autograd.grad(f(z, tau), tau)[0] for f in (compile_step(call), call))
        torch.testing.assert_close(found, want)
    else:
        with pytest.raises(Exception, match=f"impl={impl!r} has no gradient of temperature"):
            compile_step(call)(z, tau)


@pytest.mark.slow
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_compile_a_transform_of_torch_func(generator, transform):
    z, y, t = problem(generator)
    given = torch.stack([z, z + 1]) if transform is torch.func.vmap else z
    of = lambda impl: lambda z: transform(lambda z: fused_lb_loss(z, y, t, impl=impl))(z)  # noqa: E731
    torch._dynamo.reset()
    torch.testing.assert_close(compile_step(of("auto"))(given), of("torch")(given))


def compile_step(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


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
