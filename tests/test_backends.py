"""Which implementation a GPU gets, by a pretended GPU: what cannot start, what is refused, what comes next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import op_options

from dlb_fast import LogitBuffer, _backends, dlb_step, functional, fused_lb_loss
from dlb_fast._backends import Card
from dlb_fast._proof import Verdict

H200 = Card("NVIDIA H200", (9, 0), 150 << 30, 132, "1234", 13000)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DLB_FAST_BACKEND", raising=False)
    monkeypatch.delenv("DLB_FAST_PROOF", raising=False)
    _backends.forget_picks()
    yield
    _backends.forget_picks()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with one GPU and kernels for it; a test changes what it is about."""
    machine: dict[str, Any] = {"card": H200, "build": (("75", "80", "90", "100+ptx", "120"), 13000)}
    monkeypatch.setattr(_backends, "compiled_for", lambda device: "")
    monkeypatch.setattr(_backends, "_triton_missing", lambda: "")
    monkeypatch.setattr(_backends, "card", lambda index: machine["card"])
    monkeypatch.setattr(_backends, "cuda_build", lambda: machine["build"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", None)
    return machine


@pytest.mark.parametrize(
    ("archs", "runtime", "capability", "driver", "said"),
    [
        ("75,80,90,100+ptx,120", 13000, (7, 5), 13000, ""),
        ("75,80,90,100+ptx,120", 13000, (8, 9), 13000, ""),  # machine code of 8.0 runs on all of 8.x
        ("75,80,90,100+ptx,120", 13000, (11, 0), 13010, ""),  # compiled from PTX
        ("80,90,100+ptx", 13000, (7, 5), 13000, "capability 7.5, .* 80,90,100.ptx; .*CUDA_ARCHS=75"),
        ("89", 13000, (8, 6), 13000, "capability 8.6"),  # nor does newer code run on an older 8.x
        ("90", 13000, (12, 0), 13000, "capability 12.0"),
        ("90+ptx", 13000, (8, 0), 13000, "capability 8.0"),
        ("90", 13000, (9, 0), 12040, "CUDA 13, the driver supports CUDA 12.4; update.*toolkit of CUDA 12"),
        ("90", 12080, (9, 0), 12040, ""),  # any 12.x driver runs a 12.x runtime
        ("90+ptx", 12080, (12, 0), 12040, "PTX of CUDA 12.8, the driver compiles that of CUDA 12.4"),
    ],
)
def test_what_cannot_start_on_a_card_is_not_available(gpu, archs, runtime, capability, driver, said):
    gpu["build"] = (tuple(archs.split(",")), runtime)
    gpu["card"] = H200._replace(capability=capability, driver=driver)
    reason = _backends.cuda_missing(0)
    assert bool(reason) == bool(said)
    if said:
        found = _backends.implementations()["cuda"]
        assert not found.available and found.reason == reason
        with pytest.raises(RuntimeError, match=f"impl='cuda' is not available: .*{said}"):
            _backends.pick("cuda", CUDA)


def test_rocm_has_no_cuda_kernels(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in _backends.cuda_missing(0)


@pytest.fixture
def proven(gpu, monkeypatch) -> set[str]:
    """The names of what is proven on the GPU."""
    names = {"cuda"}
    monkeypatch.setattr(_backends, "verdict", lambda name, *args, **kwargs: Verdict(name in names, "here"))
    return names


def test_auto_takes_the_next_for_what_cuda_refuses(proven):
    assert [_backends.pick("auto", CUDA, beyond) for beyond in (False, True)] == ["cuda", "torch"]
    proven.add("triton")
    assert _backends.pick("auto", CUDA, True) == "torch"  # a choice stays
    _backends.forget_picks()
    assert [_backends.pick("auto", CUDA, beyond) for beyond in (False, True)] == ["cuda", "triton"]


def test_two_kinds_of_gpu_are_two_choices(proven, gpu, monkeypatch):
    cards = [H200, Card("Tesla P100", (6, 0), 16 << 30, 56, "5678", 13000)]
    monkeypatch.setattr(_backends, "card", cards.__getitem__)
    assert [_backends.pick("auto", torch.device("cuda", index)) for index in (0, 1)] == ["cuda", "torch"]


@pytest.mark.parametrize(
    ("dtype", "shape", "stored", "beyond"),
    [
        (torch.float32, (8, 10), None, False),
        (torch.bfloat16, (1 << 24, 1 << 24), torch.float32, False),
        (torch.float64, (8, 10), None, True),
        (torch.float32, (8, 10), torch.float64, True),
        (torch.float32, ((1 << 24) + 1, 10), None, True),
        (torch.float32, (2, (1 << 24) + 1), None, True),
    ],
)
def test_what_cuda_refuses_is_known_before_the_call(dtype, shape, stored, beyond):
    logits = torch.empty(shape, dtype=dtype, device="meta")
    assert functional._beyond_cuda(logits, None if stored is None else torch.empty(0, dtype=stored)) is beyond


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("rows", [0, 2])
def test_dlb_step_and_the_loss_choose_alike(rows, monkeypatch):
    """dlb_step asks before the loss does: with another answer it would return the parts as the gradient."""
    asked = []
    pick = lambda impl, device, beyond_cuda=False, op="": asked.append(beyond_cuda) or "torch"  # noqa: E731
    monkeypatch.setattr(_backends, "pick", pick)
    buffer = LogitBuffer(num_classes=3, capacity=2, dtype=torch.float64)
    _, grad = dlb_step(torch.zeros(rows, 3).as_subclass(OnGpu), torch.arange(rows), buffer)
    assert grad.shape == (rows, 3) and asked == [rows > 0] * 2


def test_a_refusal_and_an_error_of_cuda_are_told_apart(monkeypatch):
    """The op's own texts come with torch's function and file before them; an error of CUDA is passed on as it is."""
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    refusal = "launch, /x/csrc/last_batch_on_cuda.cpp:30, last_batch: no 2 MiB of device memory for counters"
    sticky = "CUDA error: an illegal memory access was encountered (seen when dlb_fast launched; perhaps ...)"
    for text, said in ((refusal, "^fused_lb_loss: impl='cpu': no 2 MiB"), (sticky, "^CUDA error: an illegal")):

        def op(*args: Any, text: str = text) -> None:
            raise RuntimeError(text)

        monkeypatch.setattr("dlb_fast.ops.op_for", lambda impl, name, op=op: op)
        with pytest.raises(RuntimeError, match=said):
            fused_lb_loss(z, y, impl="cpu")


@pytest.mark.skipif(bool(_backends.compiled_for("cpu")), reason="needs the compiled op")
def test_a_refusal_of_the_real_op_names_the_operation(monkeypatch):
    z = torch.zeros(2, 3)
    with pytest.raises(RuntimeError) as caught:
        torch.ops.dlb_fast.last_batch(z, None, 1, *op_options(torch.tensor([0, 1])))
    monkeypatch.setattr("dlb_fast.ops.op_for", lambda impl, name: lambda *args: (_ for _ in ()).throw(caught.value))
    with pytest.raises(RuntimeError, match="^fused_lb_loss: impl='cpu': this teacher_kind needs a teacher"):
        fused_lb_loss(z, torch.tensor([0, 1]), impl="cpu")


def test_a_library_without_cuda_says_what_is_missing(monkeypatch):
    """nvcc, or a torch with CUDA: the build looks for nvcc only beside such a torch."""
    monkeypatch.setattr(_backends, "load_library", lambda: "")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _backends.compiled_for("cuda") == f"the library was built without CUDA, because torch {torch.__version__} is"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "install the CUDA toolkit" in _backends.compiled_for("cuda")
