"""The Triton kernels against the float64 reference: in the interpreter on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from conftest import op_options, row_loss

from dlb_fast import ops, reference

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU these tests need TRITON_INTERPRET=1 (conftest sets it)", allow_module_level=True)
# NumPy, under the interpreter, reports the inf - inf and log 0 of lanes whose value is not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAN, INF = float("nan"), float("inf")


def problem(batch, half, classes, dtype=F32, seed=0, drift=None):
    """Logits, labels and teacher logits; with ``drift`` the teacher is the student a small step away."""
    g = torch.Generator().manual_seed(seed + 97 * classes + batch)
    z = (3 * torch.randn(batch, classes, generator=g, dtype=F64)).to(dtype)
    t = 3 * torch.randn(half, classes, generator=g, dtype=F64)
    if drift is not None:
        t = z[:half].double() + drift * t
    y = torch.randint(0, classes, (batch,), generator=g)
    return z.to(DEVICE), y.to(DEVICE), t.to(dtype).to(DEVICE)


def backward(impl, z, y, upstream, dtype, **options):
    """Loss, parts and gradient of one implementation with the logits in ``dtype``."""
    z = z.detach().to(dtype).requires_grad_()
    moved = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    y = y.to(dtype) if y is not None and y.is_floating_point() else y
    loss, parts = row_loss("test", impl, z, y, **moved)
    up = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    (grad,) = torch.autograd.grad(loss, z, up)
    return loss.detach().double(), parts.double(), grad.double()


def check(z, y, upstream=None, **options):
    """The rule: no further from float64 than eager PyTorch in the same dtype, plus a few units of float32."""
    exact = backward("torch", z, y, upstream, F64, **options)
    eager = backward("torch", z, y, upstream, z.dtype, **options)
    mine = backward("triton", z, y, upstream, z.dtype, **options)
    unit = 1e-12 if z.dtype == F64 else 1.5e-6
    if upstream is not None and z.dtype in (BF16, F16):  # it multiplies what is already rounded: half a unit more
        unit += torch.finfo(z.dtype).eps / 2
    for name, right, usual, got in zip(("loss", "parts", "gradient"), exact, eager, mine, strict=True):
        if name == "parts":
            right, usual, got = right[:4], usual[:4], got[:4]
        assert got.shape == right.shape
        torch.testing.assert_close(got.isnan(), right.isnan(), msg=f"{name}: NaN in other places")
        torch.testing.assert_close(got.isinf(), right.isinf(), msg=f"{name}: inf in other places")
        if got.numel() == 0:
            continue
        error, usual_error = (torch.nan_to_num(x - right, posinf=0, neginf=0).abs().max() for x in (got, usual))
        size = torch.nan_to_num(right, posinf=0, neginf=0).abs().max()
        assert error <= usual_error + unit * (size + 1e-2), f"{name}: error {error:.3g}, eager {usual_error:.3g}"
    return mine


@pytest.mark.parametrize("classes", [1, 2, 10, 100, 1000, 1001, 9001])
def test_every_regime_of_c(classes):
    z, y, t = problem(5, 2, classes)
    check(z, y, teacher=t, temperature=2.5, alpha=0.75)


def test_a_long_row_in_several_tiles_with_everything_on():
    z, y, t = problem(3, 2, 17000)
    weight = torch.linspace(0.5, 2.0, 17000, device=DEVICE)
    z[0, 4096:8192] = -INF  # a whole tile without mass, and the peak in the last tile
    z[0, 16999] = 9.0
    t[1, :9000] = -INF
    y[0] = 16999
    check(z, y, teacher=t, temperature=2.0, weight=weight)
    dense = torch.softmax(z.clamp(min=-50), 1)
    check(z.clamp(min=-50), dense, teacher=t.clamp(min=-50), weight=weight, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [BF16, F16, F64])
@pytest.mark.parametrize("classes", [10, 1000])
def test_dtypes_with_a_near_equal_teacher(dtype, classes):
    z, y, t = problem(6, 3, classes, dtype, drift=1e-3)
    check(z, y, torch.tensor(0.5, device=DEVICE), teacher=t, temperature=3.0)


def test_the_bfloat16_gradient_is_rounded_to_nearest_even():
    z, _, t = problem(4, 4, 300, BF16)
    exact = backward("torch", z, None, None, F64, teacher=t)[2]
    mine = backward("triton", z, None, None, BF16, teacher=t)[2]
    same = (exact.float().to(BF16) == mine.to(BF16)).double().mean()
    assert same > 0.995  # truncation: about half


def test_float16_with_a_loss_scale_does_not_underflow():
    z, y, t = problem(16, 4, 1000, F16)
    exact = backward("torch", z, y, torch.tensor(65536.0, dtype=F64), F64, teacher=t)[2]
    mine = backward("triton", z, y, torch.tensor(65536.0), F16, teacher=t)[2]
    torch.testing.assert_close(mine, exact, rtol=1.1e-3, atol=2e-7 * exact.abs().max().item())
    assert (mine == 0).double().mean() < 0.01


def test_float16_with_several_right_classes_and_with_weightless_rows():
    z, y, _ = problem(4, 2, 300, F16)
    right = (torch.arange(300, device=z.device) < 200).to(F16).expand(4, 300)  # a row of its sums to 200, not to 1
    check(z, right, torch.tensor(8.0))
    weight = torch.ones(300, device=z.device).index_fill(0, y, 0.0)
    loss, _, grad = check(z, y, weight=weight, label_smoothing=0.5)
    assert loss == 0 and grad.abs().max() == 0


TEACHERS = {
    "none": {},
    "logits": {"teacher": "logits", "temperature": 2.0, "alpha": 0.5},
    "temperature-1": {"teacher": "logits", "temperature": 1.0},
    "probabilities": {"teacher": "probabilities", "teacher_kind": "probabilities", "temperature": 2.0},
    "uniform": {"teacher_kind": "virtual", "temperature": 2.0, "alpha": 0.25},
    "corrected": {"teacher_kind": "virtual", "correct_share": 0.75, "ce_weight": 1.0, "ce_alpha": -1.0, "alpha": 0.5},
}
TARGETS = {
    "labels": {},
    "smooth": {"label_smoothing": 0.125},
    "weights": {"weight": True, "ignored": True},
    "weights-smooth": {"weight": True, "label_smoothing": 0.25, "ignored": True},
    "pair": {"pair": 0.75, "ignored": True, "weight": True},
    "pair-rows-smooth": {"pair": "rows", "label_smoothing": 0.125},
    "dense": {"dense": True},
    "dense-weights-smooth": {"dense": True, "weight": True, "label_smoothing": 0.125},
    "absent": {"target": None},
}


def build(teacher, target, batch=6, half=3, classes=20, dtype=F32):
    """The arguments of one cell of the table teachers x targets."""
    z, y, t = problem(batch, half, classes, dtype)
    g = torch.Generator().manual_seed(5)
    options = {**TEACHERS[teacher]}
    rule = dict(TARGETS[target])
    if options.get("teacher") == "logits":
        options["teacher"] = t
    elif options.get("teacher") == "probabilities":
        p = torch.softmax(t.float(), 1).to(dtype)
        p[0, 3] = 0.0  # a class without mass, facing an impossible class
        z[0, 3] = -INF
        y[0] = 1
        options["teacher"] = p
    if rule.pop("ignored", False):
        y[1], y[batch - 1] = -100, -100
        z[batch - 1] = NAN if options.get("teacher_kind") != "virtual" or "correct_share" in options else 1.0
    if rule.pop("weight", False):
        rule["weight"] = (torch.rand(classes, generator=g) + 0.25).to(DEVICE)
    lam = rule.pop("pair", None)
    if lam is not None:
        rule["target_b"] = torch.randint(0, classes, (batch,), generator=g).to(DEVICE)
        rule["target_b"][2] = -100
        rule["lam"] = torch.tensor(lam, device=DEVICE) if lam != "rows" else torch.rand(batch, generator=g).to(DEVICE)
    if rule.pop("dense", False):
        y = torch.softmax(torch.randn(batch, classes, generator=g), 1).to(DEVICE)
        y[0] = 0
        y[0, 5] = 1
    if "target" in rule:
        y = rule.pop("target")
    if "label_smoothing" in rule:
        z[z == -INF] = -20.0  # torch's smoothing of an impossible class is infinite
    return z, y, {**options, **rule}


CELLS = [(a, b) for a in TEACHERS for b in TARGETS]
IMPOSSIBLE = {
    ("none", "absent"),
    ("corrected", "dense"),
    ("corrected", "dense-weights-smooth"),
    ("corrected", "absent"),
}
REDUCTIONS = ("mean", "none", "sum")


@pytest.mark.parametrize(
    ("teacher", "target", "reduction"),
    [(*cell, REDUCTIONS[i % 3]) for i, cell in enumerate(CELLS) if cell not in IMPOSSIBLE],
)
def test_teachers_by_targets(teacher, target, reduction):
    z, y, options = build(teacher, target)
    upstream = torch.rand(z.shape[0] if reduction == "none" else (), generator=torch.Generator().manual_seed(2)) + 0.5
    check(z, y, upstream.to(DEVICE), reduction=reduction, **options)


@pytest.mark.parametrize("target", ["weights", "pair", "dense-weights-smooth"])
def test_mean_and_sum_agree_with_the_reference_for_each_target(target):
    for reduction in ("mean", "sum"):
        z, y, options = build("logits", target, dtype=F16)
        check(z, y, reduction=reduction, **options)


def test_kd_mask_shorter_than_the_batch_and_no_valid_row():
    z, y, t = problem(6, 4, 30)
    z[1] = NAN
    y[1] = -100
    t[1] = NAN
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    _, parts, grad = check(z, y, teacher=t, kd_mask=mask)
    assert grad[1].eq(0).all() and parts[2] > 0
    _, parts, grad = check(z, y, teacher=t, kd_mask=torch.zeros_like(mask))
    assert parts[2] == 0
    y[:] = -100
    loss, _, grad = check(z, y, teacher=t, kd_mask=torch.zeros_like(mask))
    assert loss == 0 and grad.eq(0).all()


def test_a_mask_shorter_than_the_teacher_teaches_only_its_rows():
    z, y, t = problem(6, 4, 30)
    mask = torch.ones(2, dtype=torch.bool, device=DEVICE)
    op = ops.op_for("triton", "last_batch")
    _, parts, grad = op(z, t, 1, *op_options(y, kd_mask=mask[:1]))
    wanted, _, right = op(z, t[:1], 1, *op_options(y))
    assert parts[5] == 1
    torch.testing.assert_close((parts[0], grad), (wanted, right))


def test_a_pair_row_with_one_label_does_not_count_even_when_it_holds_nan():
    z, y, t = problem(5, 2, 30)
    z[4] = NAN
    second = y.roll(1)
    second[4] = -100
    _, _, grad = check(z, y, teacher=t, target_b=second, lam=torch.tensor(0.5, device=DEVICE))
    assert grad[4].eq(0).all()


def test_scalars_from_the_device_and_counts_of_valid_rows():
    z, y, t = problem(6, 3, 30)
    alpha, tau = torch.tensor(0.3, device=DEVICE), torch.tensor(2.2, device=DEVICE)
    check(z, y, teacher=t, alpha=alpha, temperature=tau, ce_weight=1.0, ce_alpha=-1.0)
    mask = torch.tensor([True, False, True], device=DEVICE)
    _, parts = row_loss("test", "triton", z, y, teacher=t, kd_mask=mask)
    assert parts.tolist()[4:] == [1.0, 2.0]


def test_infinite_and_nan_logits():
    z, y, t = problem(6, 6, 40)
    z[0, 7], t[1, 7] = -INF, -INF
    z[2, 3], t[2, 3] = -INF, -INF
    z[3, 5] = NAN
    t[4, 5] = NAN
    z[5, 1] = -INF
    y[:] = torch.tensor([1, 2, 4, 6, 8, 1])  # the last label is impossible: an infinite loss
    t[0, 7] = -INF
    t[5, 1] = -INF
    up = torch.ones(6, device=DEVICE)
    loss, _, grad = check(z, y, up, teacher=t, reduction="none")
    assert loss.isnan().tolist() == [False, False, False, True, False, False] and loss[5] == INF
    assert grad[3].isnan().all() and grad[[0, 4]].isfinite().all()  # a teacher row that holds NaN does not teach


def test_large_common_offset():
    z, y, t = problem(4, 2, 50)
    check(z + 30000.0, y, teacher=t - 20000.0)


def test_strided_offset_and_expanded_inputs():
    z, y, t = problem(6, 3, 33)
    wide = torch.randn(7, 90, device=DEVICE)
    wide[1:, 5:38] = z
    labels = torch.stack([y, y + 1], 1)[:, 0]
    check(wide[1:, 5:38], labels, teacher=wide[1:4, 40:73])
    check(torch.randn(33, 6, device=DEVICE).t(), y, teacher=t)
    check(z, torch.cat([y[:1], y])[1:], teacher=t[:1].expand(3, 33))
    check(z[:1].expand(6, 33), y[:1].expand(6), teacher=t.double())


def test_empty_batches_and_missing_gradient():
    z, y, t = problem(4, 2, 12)
    loss, parts = row_loss("test", "triton", z[:0], y[:0])
    assert loss == 0 and parts.tolist() == [0, 0, 0, 0, 1, 0]
    check(z, y, teacher=t[:0])
    quiet, parts = row_loss("test", "triton", z, y, teacher=t)
    wanted, right = row_loss("test", "torch", z, y, teacher=t)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, wanted)
    torch.testing.assert_close(parts[:4], right)


def test_a_label_outside_the_classes_poisons_its_row_only():
    z, y, t = problem(4, 2, 12)
    y[1], y[2] = 12, -7
    loss, parts, grad = ops.op_for("triton", "last_batch")(z, t, 1, *op_options(y, reduction="none"))
    assert loss.isnan().tolist() == [False, True, True, False] and parts[0].isnan()
    assert grad.isnan().all(1).tolist() == [False, True, True, False] and grad[[0, 3]].isfinite().all()


def test_the_counting_kernel_gives_the_same_bits(monkeypatch):
    from dlb_fast.kernels import launch

    z, y, options = build("logits", "weights", batch=9, half=4)
    options["kd_mask"] = torch.tensor([True, True, False, True], device=DEVICE)
    here = backward("triton", z, y, None, F32, **options)
    monkeypatch.setattr(launch, "COUNT_HERE_ROWS", 4)
    monkeypatch.setattr(launch, "COUNT_CHUNK", 4)
    for one, two in zip(here, backward("triton", z, y, None, F32, **options), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7, equal_nan=True)
    check(z, y, **options)


def test_more_tiles_than_programs_and_repeated_calls(monkeypatch):
    from dlb_fast.kernels import last_batch_triton

    z, y, t = problem(11, 5, 600)
    first = backward("triton", z, y, None, F32, teacher=t)
    again = backward("triton", z, y, None, F32, teacher=t)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    import triton.language as tl

    monkeypatch.setattr(last_batch_triton, "MAX_PROGRAMS", tl.constexpr(2))
    check(z, y, teacher=t)


def test_upstream_gradients_in_place_and_retained():
    z, y, t = problem(5, 2, 700)
    z.requires_grad_()
    loss, _ = row_loss("test", "triton", z, y, teacher=t, reduction="none")
    up = torch.tensor([1.0, 0.0, -2.0, 1.0, 0.5], device=DEVICE)
    (plain,) = torch.autograd.grad(loss, z, torch.ones(5, device=DEVICE), retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, z, up, retain_graph=True)
    (strided,) = torch.autograd.grad(loss, z, torch.stack([up, up], 1)[:, 0])
    torch.testing.assert_close(scaled, plain * up[:, None])
    assert torch.equal(scaled, strided)


def test_reference_and_kernel_name_the_same_dtypes():
    from dlb_fast.kernels.last_batch_triton import _DTYPES, last_batch

    assert set(_DTYPES) == {F32, BF16, F16, F64}
    assert all(reference.compute_dtype(d) in (F32, F64) for d in _DTYPES)
    with pytest.raises(TypeError, match="logits must be float32"):
        last_batch(torch.zeros(2, 3, dtype=torch.int32, device=DEVICE), None, 0, *op_options(None))


def test_tilings_respect_the_limits_of_every_machine():
    from dlb_fast.kernels.launch import tiling

    for classes in (1, 2, 10, 100, 128, 129, 1000, 1024, 1025, 8192, 8193, 21841, 128256):
        for itemsize in (2, 4, 8):
            for aligned in (True, False):
                for warp in (32, 64):
                    t = tiling(classes, itemsize, aligned, warp)
                    assert t.block * t.tiles >= classes > t.block * (t.tiles - 1)
                    assert t.rows * t.block <= 16384 and t.rows <= 32 and (t.tiles == 1 or t.rows == 1)
                    assert 2 <= t.warps <= 16 and t.vector >= 1 and t.block % t.vector == 0


def test_a_failed_launch_leaves_no_used_ticket(monkeypatch):
    from dlb_fast.kernels import last_batch_triton, launch

    class Broken:
        def __getitem__(self, grid):
            def stop(*args, **kwargs):
                args[14].fill_(3)  # some programs have drawn tickets
                raise RuntimeError("launch failed")

            return stop

    z, y, t = problem(4, 2, 12)
    wanted = row_loss("test", "triton", z, y, teacher=t)[0]
    with monkeypatch.context() as patch:
        patch.setattr(last_batch_triton, "last_batch_kernel", Broken())
        with pytest.raises(RuntimeError, match="launch failed"):
            row_loss("test", "triton", z, y, teacher=t)
    assert torch.equal(row_loss("test", "triton", z, y, teacher=t)[0], wanted)
    assert not any(space.ticket.any() for space in launch._workspaces.values())


def test_a_workspace_lies_outside_of_graph_pools_and_a_captured_one_inside(monkeypatch):
    """torch sends what a thread allocates to the pool that it uses: CUDA graph trees warm up like that."""
    from dlb_fast.kernels import launch

    made, waited, device = [], [], torch.device("cuda", 0)
    stream = type("Stream", (), {"cuda_stream": 7, "synchronize": lambda self: waited.append(threading.get_ident())})()

    def new(device, dtype):
        made.append(threading.get_ident())
        return launch.Workspace(*torch.zeros(3, 1))

    monkeypatch.setattr(launch, "_new_workspace", new)
    monkeypatch.setattr(launch, "_workspaces", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    key, eager = launch.workspace(device, torch.float32)
    assert made == waited and made != [threading.get_ident()]
    assert launch.workspace(device, torch.float32)[1] is eager and len(made) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = [launch.workspace(device, torch.float32) for _ in range(2)]
    assert made[1:] == [threading.get_ident()] * 2 and list(launch._workspaces) == [key]
    assert captured[0][0] is None and captured[0][1] is not captured[1][1]
    launch.drop_workspace(None)
