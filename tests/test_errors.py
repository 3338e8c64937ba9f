"""Bad input: every message names the operation, the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dlb_fast import LastBatchLoss, LogitBuffer, LsrKDLoss, PsKDLoss, _backends, fused_lb_loss, zipf_loss

Z, Y, T = torch.zeros(6, 4), torch.zeros(6, dtype=torch.long), torch.zeros(3, 4)

CASES = {
    "logits not a tensor": (dict(logits=[1.0]), TypeError, "logits must be a torch.Tensor, got list"),
    "logits 3-d": (dict(logits=torch.zeros(2, 3, 4)), ValueError, r"shape \(B, C\).*got \(2, 3, 4\)"),
    "no class": (dict(logits=torch.zeros(6, 0)), ValueError, r"C >= 1, got \(6, 0\)"),
    "integer logits": (dict(logits=Z.long()), TypeError, "got torch.int64"),
    "target length": (dict(target=Y[:5]), ValueError, r"\(6,\) for labels or \(6, 4\).*got \(5,\)"),
    "float labels": (dict(target=Y.float()), TypeError, r"target.long\(\)"),
    "integer distribution": (dict(target=Z.long()), TypeError, "must hold probabilities"),
    "target device": (dict(target=Y.to("meta")), ValueError, r"device of the logits \(cpu\), got meta"),
    "label too large": (dict(target=torch.tensor([0, 1, 4, 0, 0, 0])), ValueError, r"target\[2\] = 4 is not a class"),
    "label negative": (dict(target=torch.tensor([0, -1, 0, 0, 0, 0])), ValueError, r"target\[1\] = -1.*-100"),
    "teacher rows": (dict(last_logits=torch.zeros(7, 4)), ValueError, r"H <= 6 and C = 4, got \(7, 4\)"),
    "teacher classes": (dict(last_logits=torch.zeros(3, 10)), ValueError, "made for another dataset"),
    "teacher dtype": (dict(last_logits=T.long()), TypeError, "last_logits must be floating point"),
    "mask shape": (dict(kd_mask=torch.ones(6, dtype=torch.bool)), ValueError, r"bool tensor of shape \(3,\)"),
    "mask dtype": (dict(kd_mask=torch.ones(3)), ValueError, r"got torch.float32 \(3,\)"),
    "mask alone": (dict(kd_mask=torch.ones(3, dtype=torch.bool), last_logits=None), ValueError, "without last_logits"),
    "nothing": (dict(target=None, last_logits=None), ValueError, "nothing is left to compute"),
    "weight": (dict(weight=torch.ones(3)), ValueError, r"shape \(4,\).*got torch.float32 \(3,\)"),
    "alpha": (dict(alpha=-0.1), ValueError, "alpha must be finite and >= 0, got -0.1"),
    "alpha nan": (dict(alpha=float("nan")), ValueError, "alpha"),
    "alpha tensor": (dict(alpha=torch.ones(2)), ValueError, r"0-d and floating point, got torch.float32 \(2,\)"),
    "alpha type": (dict(alpha="1"), TypeError, "got str"),
    "temperature": (dict(temperature=0.0), ValueError, "temperature must be finite and > 0, got 0.0"),
    "temperature negative": (dict(temperature=-3), ValueError, "> 0, got -3"),
    "temperature infinite": (dict(temperature=float("inf")), ValueError, "temperature"),
    "temperature tensor": (dict(temperature=torch.tensor(-1.0)), ValueError, "must be finite and > 0, got -1"),
    "alpha tensor value": (dict(alpha=torch.tensor(float("nan"))), ValueError, "must be finite and >= 0, got nan"),
    "smoothing": (dict(label_smoothing=1.5), ValueError, "between 0 and 1, got 1.5"),
    "smoothing type": (dict(label_smoothing="0.1"), TypeError, "label_smoothing must be a number, got str"),
    "ignore_index": (dict(ignore_index=None), TypeError, "ignore_index must be an integer, got NoneType.*-100"),
    "ignore_index bool": (dict(ignore_index=True), TypeError, "ignore_index must be an integer, got bool"),
    "lam tensor": (dict(target_b=Y, lam=torch.tensor(5.0)), ValueError, "lam must be between 0 and 1, got 5 to 5"),
    "lam nan": (dict(target_b=Y, lam=torch.full((6,), float("nan"))), ValueError, "lam must be between 0 and 1"),
    "lam dtype": (dict(target_b=Y, lam=torch.tensor(1)), TypeError, "lam must be floating point, got torch.int64"),
    "lam type": (dict(target_b=Y, lam="a"), TypeError, "lam must be a number or a tensor, got str"),
    "reduction": (dict(reduction="avg"), ValueError, "mean, sum, none, got 'avg'"),
    "impl": (dict(impl="gpu"), ValueError, "'auto' or one of cuda, triton, cpu, torch, got 'gpu'"),
}


@pytest.fixture(autouse=True)
def undecided() -> Iterator[None]:
    """Each test decides anew what is available, and leaves no decision behind."""
    _backends.forget_picks()
    yield
    _backends.forget_picks()


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    change, kind, said = CASES[name]
    arguments = {"logits": Z, "target": Y, "last_logits": T, **change}
    with pytest.raises(kind, match=said) as caught:
        fused_lb_loss(**arguments)
    assert str(caught.value).startswith("fused_lb_loss:") or name == "impl"


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_label_range_on_every_cpu_implementation(impl):
    if not _backends.implementations()[impl].available:
        pytest.skip(_backends.implementations()[impl].reason)
    with pytest.raises(ValueError, match=r"fused_lb_loss: target\[0\] = 9 is not a class.*num_classes"):
        fused_lb_loss(Z, torch.full((6,), 9), impl=impl)
    fused_lb_loss(Z, torch.full((6,), 9), ignore_index=9, impl=impl)
    with pytest.raises(ValueError, match=r"fused_lb_loss: target_b\[5\] = 4 is not a class.*num_classes"):
        fused_lb_loss(Z, Y, target_b=torch.tensor([0, 0, 0, 0, 0, 4]), lam=0.5, impl=impl)


def test_a_named_implementation_never_falls_back(monkeypatch):
    with pytest.raises(ValueError, match="impl='cuda' needs tensors on a cuda device, got cpu.*dlb-fast doctor"):
        fused_lb_loss(Z, Y, impl="cuda")
    monkeypatch.setattr(_backends, "load_library", lambda: "it was left out on purpose")
    with pytest.raises(RuntimeError, match="impl='cpu' is not available: it was left out on purpose; run `dlb-fast"):
        fused_lb_loss(Z, Y, impl="cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1|triton is not installed"):
        fused_lb_loss(Z, Y, impl="triton")


def test_auto_falls_back_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(_backends, "load_library", lambda: "it was left out on purpose")
    monkeypatch.setenv("DLB_FAST_BACKEND", "auto")
    with caplog.at_level("INFO", logger="dlb_fast"):
        assert fused_lb_loss(Z, Y, T).isfinite()
        fused_lb_loss(Z, Y, T)
    said = [r.getMessage() for r in caplog.records if r.name == "dlb_fast"]
    assert said == ["dlb_fast: impl=\"auto\" runs 'torch' on cpu (it was left out on purpose)"]


def test_backend_variable(monkeypatch):
    monkeypatch.setenv("DLB_FAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="DLB_FAST_BACKEND must be 'auto' or one of"):
        fused_lb_loss(Z, Y)
    monkeypatch.setenv("DLB_FAST_BACKEND", "torch")
    _backends.forget_picks()
    assert _backends.pick("auto", "cpu") == "torch"


def test_module_messages():
    with pytest.raises(ValueError, match="LastBatchLoss: num_classes must be at least 1, got 0"):
        LastBatchLoss(0)
    with pytest.raises(ValueError, match="LastBatchLoss: temperature must be finite and > 0"):
        LastBatchLoss(4, temperature=-1)
    for wrong in (torch.ones(3), torch.ones(4, 1), torch.ones(4, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"LastBatchLoss: weight must be floating with shape \(4,\), one entry"):
            LastBatchLoss(4, weight=wrong)
    with pytest.raises(TypeError, match="LastBatchLoss: weight must be a torch.Tensor, got list"):
        LastBatchLoss(4, weight=[1.0] * 4)
    for make in (lambda impl: LastBatchLoss(4, impl=impl), lambda impl: LsrKDLoss(impl=impl)):
        with pytest.raises(ValueError, match="Loss: impl must be 'auto' or one of cuda, triton, cpu, torch, got 'foo'"):
            make("foo")
        make("cuda")  # a name: whether it runs is asked where there are tensors
    criterion = LastBatchLoss(4)
    with pytest.raises(ValueError, match="LastBatchLoss: logits must have C = 4 classes, got 5"):
        criterion(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"LastBatchLoss: ids must be an integer tensor of shape \(6,\)"):
        criterion(Z, Y, torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="LastBatchLoss: kd_mask"):
        criterion(Z, Y, kd_mask=torch.ones(3, dtype=torch.bool))
    for wrong in (1.5, "a", True):
        with pytest.raises(TypeError, match="LastBatchLoss: num_old must be an integer or None, got"):
            criterion(Z, Y, num_old=wrong)


def test_a_buffer_made_in_inference_mode_serves_training():
    criterion = LastBatchLoss(4, impl="torch")
    with torch.inference_mode():
        criterion.buffer = LogitBuffer(4, 9)
    criterion(torch.zeros(9, 4, requires_grad=True), torch.zeros(9, dtype=torch.long)).backward()
    assert criterion.buffer.count == 9


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, "float32"])
def test_a_buffer_keeps_what_the_kernels_read(dtype):
    for op, make in (
        ("LogitBuffer", lambda: LogitBuffer(3, 2, dtype)),
        ("LastBatchLoss", lambda: LastBatchLoss(3, dtype=dtype)),
    ):
        with pytest.raises(TypeError, match=f"{op}: dtype must be torch.float32, float16, bfloat16 or float64, got"):
            make()


@pytest.mark.parametrize("make", [lambda i: LastBatchLoss(3, ignore_index=i), lambda i: LsrKDLoss(ignore_index=i)])
def test_a_criterion_is_refused_at_once_where_it_could_not_run(make):
    with pytest.raises(TypeError, match="ignore_index must be an integer, got float"):
        make(1.5)


def test_ps_kd_refuses_logits_of_another_number_of_classes():
    criterion = PsKDLoss(num_samples=4, num_classes=3)
    with pytest.raises(ValueError, match="PsKDLoss: logits must have C = 3 classes, .* got 5"):
        criterion(torch.zeros(2, 5), torch.tensor([0, 1]), torch.tensor([0, 1]))


@pytest.mark.parametrize("power", [float("nan"), -1.0])
def test_a_power_of_zipf(power):
    with pytest.raises(ValueError, match="zipf_loss: power must be finite and >= 0"):
        zipf_loss(Z, Y, power=power)
