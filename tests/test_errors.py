"""Bad input: every message names the operation, the argument, what was expected and what came."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from method_cases import BANKS, SIBLINGS, function_of, make
from method_cases import CASES as CASES_OF

from dlb_fast import (
    LastBatchLoss,
    LogitBuffer,
    LsrKDLoss,
    PsKDLoss,
    _backends,
    distillation_loss,
    dlb_step,
    fused_lb_loss,
    ops,
    zipf_loss,
)
from dlb_fast.methods import METHODS

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
    assert str(caught.value).startswith("fused_lb_loss:")


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
    with pytest.raises(ValueError, match="fused_lb_loss: impl='cuda' needs tensors on a cuda device, got cpu.*doctor"):
        fused_lb_loss(Z, Y, impl="cuda")
    monkeypatch.setattr(_backends, "load_library", lambda: "it was left out on purpose")
    with pytest.raises(RuntimeError, match="fused_lb_loss: impl='cpu' is not available: it was left out on purpose"):
        fused_lb_loss(Z, Y, impl="cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1|triton is not installed"):
        fused_lb_loss(Z, Y, impl="triton")


def test_a_limit_of_an_implementation_is_told_with_the_operation(monkeypatch):
    def limited(*args):
        raise RuntimeError("last_batch: the kernels take at most 3 classes\nException raised from unpack at ...")

    monkeypatch.setattr(ops, "op_for", lambda impl, name: limited)
    for op, call in (
        ("fused_lb_loss", lambda: fused_lb_loss(Z, Y, impl="cpu")),
        ("LsrKDLoss", lambda: LsrKDLoss(impl="cpu")(Z, Y)),
    ):
        with pytest.raises(RuntimeError, match=f"^{op}: impl='cpu': the kernels take at most 3 classes$"):
            call()


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
    with pytest.raises(ValueError, match="fused_lb_loss: DLB_FAST_BACKEND must be 'auto' or one of"):
        fused_lb_loss(Z, Y)
    monkeypatch.setenv("DLB_FAST_BACKEND", "torch")
    _backends.forget_picks()
    assert _backends.pick("auto", torch.device("cpu")) == "torch"


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
    for made in (lambda impl: LastBatchLoss(4, impl=impl), lambda impl: LsrKDLoss(impl=impl)):
        with pytest.raises(ValueError, match="Loss: impl must be 'auto' or one of cuda, triton, cpu, torch, got 'foo'"):
            made("foo")
        made("cuda")  # a name: whether it runs is asked where there are tensors
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
    for op, made in (
        ("LogitBuffer", lambda: LogitBuffer(3, 2, dtype)),
        ("LastBatchLoss", lambda: LastBatchLoss(3, dtype=dtype)),
    ):
        with pytest.raises(TypeError, match=f"{op}: dtype must be torch.float32, float16, bfloat16 or float64, got"):
            made()


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


# --- Every public function and module against a table of wrong arguments -------------------------------------------

B, C = 6, 5
ROWS, LABELS = torch.randn(B, C, generator=torch.Generator().manual_seed(0)), torch.arange(B) % C
SOFT, MASK = ROWS.softmax(1), torch.ones(B, dtype=torch.bool)
COMPLEX, META = ROWS.to(torch.complex64), torch.device("meta")
NAN, INF = float("nan"), float("inf")
NUMBERS = [NAN, "a", None, True, np.bool_(True), np.ones(2), [1.0], 1j]
WRONG = {
    "logits": [
        None, [1.0], ROWS.numpy(), ROWS[0], torch.zeros(()), torch.zeros(2, 3, C), torch.zeros(B, 0), ROWS.long(),
        ROWS > 0, COMPLEX, ROWS.to_sparse(), ROWS.to_mkldnn(), ROWS.to(torch.float8_e4m3fn),
    ],
    "target": [
        [0] * B, LABELS.numpy(), LABELS[:3], LABELS[:, None], LABELS.float(), LABELS > 0, LABELS.to(torch.uint64),
        torch.nn.functional.one_hot(LABELS, C), SOFT.T, SOFT[:, None], SOFT[:, :3], torch.tensor(1), LABELS.to(META),
        COMPLEX, LABELS + C, LABELS - 1, LABELS.to_sparse(), SOFT.to_sparse(), LABELS[None],
    ],
    "alpha": [
        *NUMBERS, -1, INF, 1e39, 10**400, torch.ones(2), torch.tensor(1), torch.tensor(-1.0), torch.tensor(INF),
        torch.tensor(1.0).to_sparse(),
    ],
    "temperature": [
        *NUMBERS, 0, -1, INF, torch.ones(2), torch.tensor(1), torch.tensor(0.0), torch.tensor(NAN),
    ],
    "label_smoothing": [*NUMBERS, -0.1, 1.1, torch.ones(2)],
    "weight": [torch.ones(3), torch.ones(C, 1), torch.ones(C).long(), torch.ones(C).to_sparse(), COMPLEX[0]],
    "ignore_index": [1.5, None, True, np.float32(1), "a", 2**70, torch.ones(2)],
    "reduction": ["average", None, 1, ["mean"]],
    "impl": ["gpu", None, 1, "cuda", "CPU"],
    "kd_mask": [torch.ones(B), MASK[:2], [True] * B, MASK.to(META), "a", MASK[:, None]],
    "ids": [[0] * B, LABELS[:3], LABELS.float(), LABELS.to(META), MASK, "a", LABELS[:, None], 5],
}  # fmt: skip
WRONG_PAIRS = {
    "target_b": [[0] * B, LABELS[:3], LABELS.float(), SOFT, LABELS + C, None, LABELS.to(META)],
    "lam": [
        *NUMBERS,
        -1,
        2,
        torch.tensor(2.0),
        torch.tensor(1),
        torch.rand(3),
        torch.rand(B, 1),
        torch.rand(B).to(META),
    ],
}
WRONG_OPTIONS = {
    "ce_weight": [*NUMBERS, -1, 1e39, INF, torch.ones(2)],
    "ce_alpha": [*NUMBERS, 1e39, INF, torch.ones(2)],
    "omega": [*NUMBERS, 1.0, -0.1],
    "power": [*NUMBERS, -1, 1e39],
    "q": [*NUMBERS, 0.0, -0.1, 1.1, INF, torch.ones(2), torch.tensor(0.5)],
    "beta": [*NUMBERS, -0.1, 1e39, INF, torch.ones(2), torch.tensor(0.5)],
    "multiplier": [*NUMBERS, 0.0, 1e39],
    "kind": ["a", None, 1],
    "upstream": [*NUMBERS, -1, torch.ones(2)],
    "num_old": [1.5, "a", True, -1, B + 1],
    "again": [1, "a", 0.5],
    "num_classes": [0, 1.5, "a", True, torch.ones(2)],
    "capacity": [0, 1.5, "a", True],
    "num_samples": [0, 1.5, "a", True],
    "epochs": [0, 1.5, "a", True],
    "copies": [0, 1.5, "a", True],
    "copy_every": [0, 1.5, "a", True],
    "ensemble_lr": [NAN, "a", True, 0.0, -1],
    "device": ["nonsense", 1.5],
    "memory_device": ["nonsense", 1.5],
    "dtype": ["float32", torch.int32, 1],
    "memory_dtype": ["float32", torch.int32, 1],
    "correct_share": [NAN, "a", True, np.ones(2), -1, 2],
}
TEACHERS = [[1.0], "a", torch.zeros(B + 1, C), torch.zeros(B, C - 1), ROWS.long(), ROWS.to(META), ROWS.to_sparse()]


def public_functions():
    made = {
        "fused_lb_loss": (fused_lb_loss, {"last_logits": ROWS}),
        "distillation_loss": (distillation_loss, {"teacher": ROWS}),
        "dlb_step": (dlb_step, {"buffer": None}),
    }
    extra = torch.Generator().manual_seed(0)
    for name in SIBLINGS:
        extras = {key: value.float() for key, value in CASES_OF[name].extras(ROWS, extra).items()}
        made[function_of(name).__name__] = (function_of(name), extras)
    return made


FUNCTIONS = public_functions()


def refused(op, argument, value, call):
    """The call must be refused in our words, which name the operation and the argument."""
    shown = f"{op}({argument}={value!r})"
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        said = str(error)
        assert type(error) in (ValueError, TypeError, RuntimeError), f"{shown}: {type(error).__name__}: {said}"
        assert said.startswith(f"{op}: ") and argument in said.removeprefix(op), f"{shown}: {said}"
    else:
        pytest.fail(f"{shown} is not refused")


@pytest.mark.parametrize("op", FUNCTIONS)
def test_every_function_refuses_every_wrong_argument_by_its_name(impl, op):
    function, extras = FUNCTIONS[op]
    taken = inspect.signature(function).parameters
    tables = {**WRONG, **{name: TEACHERS for name in extras}}
    tables.update({name: values for name, values in WRONG_OPTIONS.items() if name in taken})
    if "buffer" in extras:
        tables["buffer"] = [None, "a", LogitBuffer(C + 1, B), LogitBuffer(C, B, device="meta"), ROWS]
    if "features" in extras:
        tables["features"] = [value for value in TEACHERS if not isinstance(value, torch.Tensor) or len(value) != B]
    if "copies_logits" in extras:
        tables["copies_logits"] = [
            v[None] if isinstance(v, torch.Tensor) and v.layout is torch.strided else v for v in TEACHERS
        ]
    for argument, values in tables.items():
        for value in values if argument in taken else ():
            given = {"logits": ROWS, "target": LABELS, "impl": impl, **extras}
            if "buffer" in extras:
                given["buffer"] = LogitBuffer(C, B)
            if argument == "correct_share" and op == "distillation_loss":
                given.update(kind="uniform", teacher=None)
            given[argument] = value
            refused(op, argument, value, lambda given=given: function(**given))
    for argument, values in WRONG_PAIRS.items():
        for value in values if "lam" in taken else ():
            given = {"logits": ROWS, "target": LABELS, "target_b": LABELS, "lam": 0.5, "impl": impl, **extras}
            given[argument] = value
            refused(op, argument, value, lambda given=given: function(**given))


@pytest.mark.parametrize("name", [name for name in CASES_OF if name != "two_view"])
def test_every_module_refuses_every_wrong_argument_by_its_name(impl, name):
    cls = METHODS[name].criterion
    op, taken = cls.__name__, inspect.signature(cls).parameters
    for argument, values in {**WRONG, **WRONG_OPTIONS}.items():
        if argument in taken and argument not in ("impl", "weight"):
            for value in values:
                if value is None and taken[argument].default is None:
                    continue
                refused(op, argument, value, lambda change={argument: value}: make(name, **change))

    for value in ([1.0] * C, "a", 1.0, torch.ones(C).to_sparse()):
        refused(op, "weight", value, lambda value=value: make(name, weight=value))

    def run(criterion, **change):
        criterion.setup(torch.nn.Linear(3, C))
        for _ in range(2):
            criterion.step()
        given = {"logits": ROWS, "target": LABELS, "ids": torch.arange(B), "images": torch.zeros(B, 3), "epoch": 0}
        if name == "bake":
            given["features"] = ROWS
        return criterion(**{**given, **change})

    for argument in ("logits", "target", "ids", "kd_mask"):
        for value in WRONG[argument]:
            refused(op, argument, value, lambda a=argument, v=value: run(make(name, impl=impl), **{a: v}))
    for argument, values in WRONG_PAIRS.items():
        for value in values if cls.mixes and name != "mr_kd" else ():
            pair = {"target_b": LABELS, "lam": 0.5, argument: value}
            refused(op, argument, value, lambda pair=pair: run(make(name, impl=impl), **pair))
    for argument in ("alpha", "temperature", "label_smoothing", "ignore_index", "reduction", "weight", "impl"):
        for value in WRONG[argument]:
            criterion = make(name, impl=impl)
            setattr(criterion, argument, value)  # a schedule, or a mistake, between two batches
            refused(op, argument, value, lambda criterion=criterion: run(criterion))


def test_the_remedy_for_masks_ids_and_weights_of_another_form(impl):
    for change, said in (
        (
            {"last_logits": T, "kd_mask": torch.ones(6, dtype=torch.bool)},
            r"only the first 3 rows have one: pass kd_mask\[:3\]",
        ),
        ({"last_logits": T, "kd_mask": torch.ones(3)}, r"got torch.float32 \(3,\); use kd_mask.bool\(\)"),
        ({"weight": torch.ones(4, dtype=torch.long)}, r"use weight.float\(\)"),
    ):
        with pytest.raises(ValueError, match=said):
            fused_lb_loss(Z, Y, impl=impl, **change)
    with pytest.raises(ValueError, match=r"use ids.long\(\)"):
        LastBatchLoss(4, impl=impl)(Z, Y, torch.arange(6.0))


@pytest.mark.parametrize("ids", [[0, 8], [0, -1], [2**40, 0]])
@pytest.mark.parametrize("name", BANKS)
def test_an_id_outside_the_bank_is_named(impl, ids, name):
    criterion = make(name, impl=impl)  # of 8 samples
    for before in ([7, 0], [1, 2]):
        with pytest.raises(ValueError, match=r"Loss: ids must be in \[0, 8\), num_samples of the criterion, got"):
            criterion(ROWS[:2], LABELS[:2], torch.tensor(ids), epoch=0)
        criterion(ROWS[:2], torch.tensor([1, -100]), torch.tensor(before), epoch=0)


def test_the_buffer_refuses_what_it_cannot_store():
    for argument in ("logits", "ids"):
        for value in WRONG[argument]:
            given = {"logits": ROWS, "ids": LABELS, argument: value}
            refused("LogitBuffer.update", argument, value, lambda given=given: LogitBuffer(C, B).update(**given))
    for value in WRONG_OPTIONS["num_old"]:
        refused("LogitBuffer.update", "num_old", value, lambda v=value: LogitBuffer(C, B).update(ROWS, num_old=v))
    with pytest.raises(ValueError, match=r"LogitBuffer.update: logits must have C = 4 classes on cpu, got 5 on cpu"):
        LogitBuffer(4, B).update(ROWS)


STRANGE = {
    "nested": (lambda z: torch.nested.nested_tensor([z[:2], z[2:]]), r"a nested tensor; .*torch.cat\(logits.unbind"),
    "quantized": (lambda z: torch.quantize_per_tensor(z, 0.1, 0, torch.quint8), r"logits.dequantize\(\)"),
    "masked": (lambda z: torch.masked.masked_tensor(z, z > 0), r"a MaskedTensor; pass logits.get_data\(\)"),
    "sparse": (lambda z: z.to_sparse(), r"layout torch.sparse_coo; pass logits.to_dense\(\)"),
    "complex": (lambda z: z.to(torch.complex64), "float32, bfloat16, float16 or float64, got torch.complex64"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STRANGE)
def test_logits_that_are_no_plain_tensor_are_named_with_the_way_out(impl, name):
    made, said = STRANGE[name]
    with pytest.raises(TypeError, match=f"fused_lb_loss: logits must be .*{said}"):
        fused_lb_loss(made(ROWS), LABELS, impl=impl)
    criterion = LastBatchLoss(C, impl=impl)
    criterion(ROWS[:3], LABELS[:3])
    with pytest.raises(TypeError, match=f"LastBatchLoss: logits must be .*{said}"):
        criterion(made(ROWS), LABELS)


@pytest.mark.slow  # torch takes seconds to import DTensor
def test_a_sharded_tensor_is_named_with_the_way_out():
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = DTensor.from_local(ROWS.requires_grad_(False), init_device_mesh("cpu", (1,)), [Replicate()])
        for impl in ("auto", "torch"):
            for call in (fused_lb_loss, LastBatchLoss(C), LsrKDLoss(impl=impl)):
                with pytest.raises(TypeError, match=r"logits must be a plain tensor, got a DTensor .*full_tensor\(\)"):
                    call(sharded, LABELS)
        with pytest.raises(TypeError, match="weight must be a plain tensor, got a DTensor"):
            fused_lb_loss(ROWS, LABELS, weight=sharded[0])
        fused_lb_loss(sharded.full_tensor(), LABELS)
    finally:
        dist.destroy_process_group()


def image_logits(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1))


cross_entropy = torch.nn.functional.cross_entropy
SHAPES = {  # logits, target, the loss that is meant
    "one sample": (image_logits(C), torch.tensor(2), cross_entropy),
    "one sample with probabilities": (image_logits(C), SOFT[0], cross_entropy),
    "one sample, its label in a row": (image_logits(C), torch.tensor([2]), lambda z, y: cross_entropy(z, y[0])),
    "pixels": (image_logits(2, C, 3, 4), torch.arange(24).view(2, 3, 4) % C, cross_entropy),
    "a line of pixels": (image_logits(2, C, 3), torch.arange(6).view(2, 3) % C, cross_entropy),
    "tokens": (image_logits(2, 3, C), torch.arange(6).view(2, 3) % C, lambda z, y: cross_entropy(z.mT, y)),
    "pixels, a channel of labels": (
        image_logits(2, C, 3, 4),
        torch.arange(24).view(2, 1, 3, 4) % C,
        lambda z, y: cross_entropy(z, y[:, 0]),
    ),
    "tokens, a column of labels": (
        image_logits(2, 3, C),
        torch.arange(6).view(2, 3, 1) % C,
        lambda z, y: cross_entropy(z.mT, y[:, :, 0]),
    ),
    "tokens, flat labels": (image_logits(2, 3, C), LABELS, lambda z, y: cross_entropy(z.flatten(0, 1), y)),
    "pixels, flat labels": (image_logits(2, C, 3), LABELS, lambda z, y: cross_entropy(z, y.view(2, 3))),
    "a binary model": (
        image_logits(4),
        torch.tensor([0, 1, 1, 0]),
        lambda z, y: torch.nn.functional.binary_cross_entropy_with_logits(z, y.float()),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_remedy_for_logits_of_another_shape_gives_the_loss_that_was_meant(name):
    logits, target, meant = SHAPES[name]
    with pytest.raises(ValueError, match=r"logits must have shape \(B, C\)") as caught:
        fused_lb_loss(logits, target)
    said = str(caught.value)
    ways = re.findall(r"(?:torch\.stack\(\[.*?\], 1\)|(?:logits|target)(?:\[None\]|\.\w+\([-\d, ]*\))+)", said)
    named = {"torch": torch, "logits": logits, "target": target}
    rows = [eval(way, named) for way in ways if not way.startswith("target")]
    labels = [eval(way, named) for way in ways if way.startswith("target")] or [target]
    assert len(rows) == len(labels) == 1, said
    torch.testing.assert_close(fused_lb_loss(rows[0], labels[0]), meant(logits, target))


def test_where_the_target_does_not_tell_both_ways_are_named():
    for target in (None, torch.zeros(2, 4, 4), torch.zeros(2, 4, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"are the last.*logits.flatten.*second, as in torch's.*logits.movedim\(1"):
            fused_lb_loss(torch.zeros(2, 4, 4), target)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (LABELS[:, None], r"got \(6, 1\); pass target.squeeze\(1\)$"),
        (LABELS[:, None].float(), r"got \(6, 1\); pass target.squeeze\(1\).long\(\)$"),
        (torch.nn.functional.one_hot(LABELS, C), r"one-hot rows become labels by target.argmax\(1\)"),
        (LABELS.float(), r"got torch.float32; use target.long\(\)"),
        (LABELS.to(torch.uint64), r"got torch.uint64; use target.long\(\)"),
        (LABELS > 2, r"got torch.bool; use target.long\(\)"),
        (SOFT.T, r"got \(5, 6\); pass target.T$"),
    ],
)
def test_the_remedy_for_a_target_of_another_form(impl, target, said):
    with pytest.raises((ValueError, TypeError), match=f"fused_lb_loss: target .*{said}"):
        fused_lb_loss(ROWS, target, impl=impl)
    with pytest.raises((ValueError, TypeError), match=f"LsrKDLoss: target .*{said}"):
        LsrKDLoss(impl=impl)(ROWS, target)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("name", ["fused_lb_loss", *(function_of(name).__name__ for name in SIBLINGS)])
def test_labels_of_every_integer_type_mean_the_same(impl, dtype, name):
    """In uint8, -100 is 156; in int8, 1000 classes are -24, and ignore_index 256 is 0."""
    function = FUNCTIONS[name][0]
    z = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0), requires_grad=True)
    label = torch.tensor([0, 100, 7, 100]) if dtype == torch.int8 else torch.tensor([0, 156, 232, 255])
    sibling = next((s for s in SIBLINGS if function_of(s) is function), None)
    extras = {} if sibling is None else CASES_OF[sibling].extras(z, torch.Generator().manual_seed(0))
    extras = {key: value.float() for key, value in extras.items()}
    for ignored in (-100, 256, int(label[3])):

        def graded(target, ignored=ignored):
            loss = function(logits=z, target=target, ignore_index=ignored, impl=impl, **extras)
            return loss, torch.autograd.grad(loss, z)[0]

        wanted, found = graded(label), graded(label.to(dtype))
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


# --- Numbers --------------------------------------------------------------------------------------------------------

NUMPY = [np.float32, np.float64, np.float16, lambda value: np.array(value), lambda value: np.array(value, np.float32)]


@pytest.mark.parametrize("number", NUMPY, ids=["float32", "float64", "float16", "array", "float32 array"])
def test_numbers_of_numpy_are_numbers(impl, number):
    """0.5, 2.0 and integers are the same number in all of them."""
    z = ROWS.clone().requires_grad_()

    def graded(loss):
        return loss.item(), torch.autograd.grad(loss, z)[0]

    def both(call):
        wanted, found = graded(call(lambda value: value, int)), graded(call(number, np.int64))
        assert found[0] == wanted[0] and torch.equal(found[1], wanted[1])

    for op, (function, extras) in FUNCTIONS.items():
        taken = inspect.signature(function).parameters
        fractions = {"alpha": 0.5, "temperature": 2.0, "label_smoothing": 0.25, "correct_share": 0.5, "omega": 0.25}
        fractions |= {"power": 2.0, "multiplier": 4.0, "ce_weight": 0.5, "ce_alpha": 0.5}
        fractions = {name: value for name, value in fractions.items() if name in taken}
        if op == "distillation_loss":
            del fractions["correct_share"]
        if op == "dlb_step":
            plain, other = (
                dlb_step(
                    ROWS, LABELS, LogitBuffer(whole(C), whole(B)), upstream=real(0.5), num_old=whole(0), impl=impl,
                    **{name: real(value) for name, value in fractions.items()},
                )
                for real, whole in ((float, int), (number, np.int64))
            )  # fmt: skip
            assert torch.equal(plain[0], other[0]) and torch.equal(plain[1], other[1])
            continue
        both(
            lambda real, whole, f=function, fr=fractions, ex=extras: f(
                logits=z, target=LABELS, ignore_index=whole(2), impl=impl,
                **ex, **{name: real(value) for name, value in fr.items()},
            )
        )  # fmt: skip
    both(
        lambda real, whole: fused_lb_loss(
            z, LABELS, ROWS + 1, target_b=LABELS.flip(0), lam=real(0.25), alpha=real(0.5), impl=impl
        )
    )

    def module(real, whole):
        criterion = LastBatchLoss(
            whole(C), capacity=whole(3), alpha=real(0.5), temperature=real(2.0), label_smoothing=real(0.25),
            ignore_index=whole(2), impl=impl,
        )  # fmt: skip
        criterion(ROWS[3:], LABELS[3:])
        criterion.alpha = real(0.75)
        return criterion(z, LABELS, num_old=whole(3))

    both(module)


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("kind", ["logits", "uniform"])
def test_a_temperature_is_refused_where_float32_would_lose_the_loss(impl, spread, kind):
    """Within the range the value is right to 1e-3, plus what tau^2 makes of a rounding error; the gradient to 1e-3."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(16, 10, generator=generator, dtype=torch.float64)
    t = z + spread * torch.randn(16, 10, generator=generator, dtype=torch.float64)

    def graded(z, tau, impl):
        z = z.clone().requires_grad_()
        teacher = t.to(z.dtype) if kind == "logits" else None
        loss = distillation_loss(z, None, teacher, kind=kind, temperature=tau, impl=impl)
        return loss.detach().double(), torch.autograd.grad(loss, z)[0].double()

    for tau in (1e-18, 1e-9, 1e-3, 0.1, 3.0, 30.0, 100.0):
        wanted, found = graded(z, tau, "torch"), graded(z.float(), tau, impl)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=tau * tau * 3e-7)
        torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=1e-3 * float(wanted[1].abs().max()))
    half_variance = 0.5 * (z - (t if kind == "logits" else 0)).var(1, correction=0).mean()
    torch.testing.assert_close(graded(z, 1e5, impl)[0], half_variance, rtol=1e-3, atol=1e-4)
    for wrap in (float, torch.tensor):
        for tau in (101.0, 1e4, 1e5):
            with pytest.raises(ValueError, match="distillation_loss: temperature must be between 1e-18 and 100, got"):
                graded(z.float(), wrap(tau), impl)
        for tau in (1e-19, 1e-30, 1e7, 1e10, 1e30):
            with pytest.raises(ValueError, match="distillation_loss: temperature must be between 1e-18 and 1"):
                graded(z, wrap(tau), impl)


@pytest.mark.parametrize("tau", [1e-19, 1e7, 1e10])
def test_no_method_takes_a_temperature_that_loses_the_loss(tau):
    for name, (function, extras) in FUNCTIONS.items():
        if "temperature" in inspect.signature(function).parameters:
            given = {**extras, "buffer": LogitBuffer(C, B)} if name == "dlb_step" else extras
            with pytest.raises(ValueError, match=f"{name}: temperature must be between 1e-18 and 1"):
                function(logits=ROWS, target=LABELS, temperature=tau, **given)
    for name in CASES_OF:
        if "temperature" in inspect.signature(METHODS[name].criterion).parameters:
            with pytest.raises(ValueError, match="Loss: temperature must be between 1e-18 and 1"):
                make(name, temperature=tau)


def test_a_large_alpha_is_refused_before_it_makes_nan_of_a_term_that_is_0(impl):
    for alpha in (1e31, 1e39, 10**400, torch.tensor(1e35)):
        with pytest.raises(ValueError, match=r"alpha must be between 0 and 1e\+30, got"):
            fused_lb_loss(ROWS, LABELS, ROWS, alpha=alpha, impl=impl)
    loss = fused_lb_loss(ROWS, LABELS, ROWS, alpha=1e30, impl=impl)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(ROWS, LABELS))


# --- Empty batches --------------------------------------------------------------------------------------------------

NO_ROWS, NO_LABELS = torch.zeros(0, C), torch.zeros(0, dtype=torch.long)
EMPTY = {
    "labels": {"target": NO_LABELS},
    "probabilities": {"target": NO_ROWS},
    "pair": {"target": NO_LABELS, "target_b": NO_LABELS, "lam": 0.5},
    "pair, a share each": {"target": NO_LABELS, "target_b": NO_LABELS, "lam": torch.zeros(0)},
}


def assert_nothing(call, reduction):
    z = NO_ROWS.clone().requires_grad_()
    loss = call(z)
    assert loss.shape == ((0,) if reduction == "none" else ()) and not loss.any()
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert grad.shape == (0, C)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("implementation", ["torch", "cpu", "triton"])
def test_an_empty_batch_has_loss_0_in_every_form(implementation, reduction):
    if not _backends.implementations()[implementation].available or torch.cuda.is_available():
        pytest.skip(f"{implementation} does not run on CPU tensors here")
    shared = {"impl": implementation, "reduction": reduction}
    no_mask = torch.zeros(0, dtype=torch.bool)
    for form in EMPTY.values():
        for more in (
            {},
            {"last_logits": NO_ROWS},
            {"last_logits": NO_ROWS, "kd_mask": no_mask},
            {"weight": torch.ones(C)},
        ):
            assert_nothing(lambda z, m={**form, **more}: fused_lb_loss(z, **m, **shared), reduction)
        for more in ({"kind": "uniform"}, {"kind": "probabilities", "teacher": NO_ROWS}, {"teacher": NO_ROWS}):
            for mask in ({}, {"kd_mask": no_mask}):
                given = {**form, **more, **mask}
                assert_nothing(lambda z, given=given: distillation_loss(z, **given, **shared), reduction)
    corrected = {"kind": "uniform", "correct_share": 0.9}
    assert_nothing(lambda z: distillation_loss(z, NO_LABELS, **corrected, **shared), reduction)
    assert_nothing(lambda z: fused_lb_loss(z, None, NO_ROWS, **shared), reduction)
    for name in SIBLINGS:
        case = CASES_OF[name]
        extras = {k: v.float() for k, v in case.extras(NO_ROWS, torch.Generator()).items()}
        for settings in case.settings:
            for form in EMPTY.values():
                single = (
                    name in ("tf_kd_reg", "zipf", "gce", "sce") or settings.get("swap") or settings.get("correct_share")
                )
                if not single or form is EMPTY["labels"]:
                    given = {**form, **extras, **settings, **shared}
                    assert_nothing(lambda z, n=name, given=given: function_of(n)(logits=z, **given), reduction)


@pytest.mark.parametrize("name", [name for name in CASES_OF if name != "two_view"])
def test_an_empty_batch_has_loss_0_in_every_module_and_leaves_it_as_it_was(impl, name):
    for reduction in ("mean", "none"):
        criterion = make(name, impl=impl, reduction=reduction)
        criterion.setup(torch.nn.Linear(3, C))
        for _ in range(2):
            criterion.step()
        more = {"features": torch.zeros(0, 3)} if name == "bake" else {}
        rows = {"features": ROWS} if name == "bake" else {}
        given = {"ids": NO_LABELS, "images": torch.zeros(0, 3), "epoch": 0, **more}
        for training in (True, False):
            criterion.train(training)
            for form in EMPTY.values():
                single = not criterion.mixes or name == "mr_kd"  # which needs one class per row here
                if form is EMPTY["labels"] or not single:
                    assert_nothing(lambda z, c=criterion, given={**form, **given}: c(z, **given), reduction)
        criterion.train()
        given = {"ids": torch.arange(B), "images": torch.zeros(B, 3), "epoch": 0, **rows}
        assert criterion(ROWS, LABELS, **given).isfinite().all()


def test_an_empty_batch_leaves_the_buffer_as_it_was(impl):
    criterion, buffer = LastBatchLoss(C, impl=impl), LogitBuffer(C, B)
    criterion(ROWS[:3], LABELS[:3], torch.arange(3))
    dlb_step(ROWS[:3], LABELS[:3], buffer, impl=impl)
    wanted = copy.deepcopy(criterion)(ROWS, LABELS, torch.arange(B))
    assert float(criterion(NO_ROWS, NO_LABELS, NO_LABELS)) == 0.0
    loss, grad = dlb_step(NO_ROWS, NO_LABELS, buffer, impl=impl)
    assert float(loss) == 0.0 and grad.shape == (0, C) and buffer.count == criterion.buffer.count == 3
    torch.testing.assert_close(criterion(ROWS, LABELS, torch.arange(B)), wanted)
    torch.testing.assert_close(dlb_step(ROWS, LABELS, buffer, impl=impl)[0], wanted)
