"""What only a GPU can show: graph replay, no synchronisation, streams, more than 2^31 elements, a second device.

Run by `make gpu-check`; the tests shared with the CPU run there too, with the GPU implementations added.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import available, eager_official, float32_error

from dlb_fast import LastBatchLoss, LogitBuffer, dlb_step, fused_lb_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(params=["cuda", "triton"])
def gpu(request: pytest.FixtureRequest) -> str:
    """A GPU implementation; one that was not built fails here, because this is the run that is meant to prove it."""
    if not available(request.param):
        pytest.fail(f"{request.param} is not available on this machine")
    return str(request.param)


SIZES = [
    (2, 1), (256, 10), (256, 100), (256, 128), (64, 129), (512, 1000), (64, 1024), (64, 1025), (33, 4096), (16, 8192),
    (16, 16384), (8, 16385), (8, 21841), (8, 32000), (4, 50257), (4, 128256),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_regime(gpu, size, dtype):
    rows, classes = size
    torch.manual_seed(0)
    z = (3 * torch.randn(rows, classes, device="cuda")).to(dtype)
    t = (z[: rows // 2] + 0.1 * torch.randn(rows // 2, classes, device="cuda")).to(dtype)
    y = torch.randint(0, classes, (rows,), device="cuda")
    results = []
    for values, function in (
        (z, lambda v: fused_lb_loss(v, y, t, impl=gpu)),
        (z.double(), lambda v: eager_official(v, y, t.double())),
    ):
        leaf = values.clone().requires_grad_()
        loss = function(leaf)
        (loss * 0.7).backward()
        results.append((loss.double(), leaf.grad.double()))
    (loss, grad), (true_loss, true_grad) = results
    assert (loss - true_loss).abs() <= 1e-6 * (1 + z.double().abs().max())
    # Two roundings, when the kernel stores it and when backward scales it (float16's smallest step, where it is
    # subnormal), and the float32 behind them; and, as roundings go either way, half of that in the mean. Not what eager
    # PyTorch is off by, which rounds once: right kernels would fail.
    rounding = 0.0 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    step = 6e-8 if dtype == torch.float16 else 0.0
    allowed = 0.7 * float32_error(z, ce=4 / rows, kl=3.0 / (rows // 2)) + 2e-6 * true_grad.abs()
    allowed += 2 * rounding * true_grad.abs() + step
    assert ((grad - true_grad).abs() <= allowed).all()
    assert (grad - true_grad).norm() <= 0.5 * allowed.norm()


def test_captured_loop_equals_eager_loop(gpu):
    """One graph over many steps: the first without a teacher, alpha and temperature changing; then a short batch."""
    torch.manual_seed(0)
    steps, rows, classes = 12, 64, 100
    logits = torch.randn(steps, rows, classes, device="cuda")
    labels = torch.randint(0, classes, (steps, rows), device="cuda")
    schedule = torch.linspace(0.1, 2.0, steps, device="cuda")

    def fresh() -> LastBatchLoss:
        return LastBatchLoss(
            classes, capacity=rows // 2, device="cuda", impl=gpu, alpha=torch.zeros((), device="cuda"),
            temperature=torch.ones((), device="cuda"),
        )  # fmt: skip

    eager = fresh()
    want = []
    for i in range(steps):
        eager.alpha, eager.temperature = schedule[i].clone(), 1 + schedule[i].clone()
        leaf = logits[i].clone().requires_grad_()
        loss = eager(leaf, labels[i])
        loss.backward()
        want.append((loss.detach().clone(), leaf.grad.clone()))

    criterion = fresh()
    leaf, target = logits[0].clone().requires_grad_(), labels[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            criterion(leaf, target).backward()
    torch.cuda.current_stream().wait_stream(stream)
    criterion.reset()
    leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = criterion(leaf, target)
        loss.backward()
    criterion.reset()
    for i in range(steps):
        with torch.no_grad():
            leaf.copy_(logits[i])
        target.copy_(labels[i])
        criterion.alpha.copy_(schedule[i])
        criterion.temperature.copy_(1 + schedule[i])
        leaf.grad.zero_()
        graph.replay()
        assert torch.equal(loss, want[i][0]), i
        torch.testing.assert_close(leaf.grad, want[i][1], rtol=0, atol=0)
    assert torch.equal(criterion.buffer.logits, eager.buffer.logits)
    criterion.buffer.count = rows // 2
    short = torch.randn(rows - 5, classes, device="cuda")
    assert torch.equal(criterion(short, labels[0][:-5]), eager(short, labels[0][:-5]))


def test_no_synchronisation(gpu):
    criterion = LastBatchLoss(10, capacity=4, device="cuda", impl=gpu)
    z = torch.randn(8, 10, device="cuda", requires_grad=True)
    y, ids = torch.zeros(8, dtype=torch.long, device="cuda"), torch.arange(8, device="cuda")
    criterion(z, y, ids).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            criterion(z, y, ids + 4).backward()
            (criterion(z, y, ids) * 0.5).backward()
            _ = criterion.parts
            fused_lb_loss(z, y, z.detach()[:4], target_b=y, lam=0.3, impl=gpu).backward()
            dlb_step(z, y, criterion.buffer, upstream=2.0, impl=gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.alone
def test_one_launch(gpu):
    """And two of a backward, which do nothing: torch fills a 1, ours reads it. See docs/own-loop.md, the fast loop."""
    from benchmarks import harness

    for rows, classes in ((512, 1000), (256, 100)):
        criterion = LastBatchLoss(classes, capacity=rows // 2, device="cuda", impl=gpu)
        z = torch.randn(rows, classes, device="cuda")
        y = torch.zeros(rows, dtype=torch.long, device="cuda")
        buffer = LogitBuffer(classes, rows // 2, device="cuda")
        loss = criterion(z.clone().requires_grad_(), y)
        dlb_step(z, y, buffer, impl=gpu)
        works = {
            "loss": lambda c=criterion, z=z, y=y: c(z, y),
            "backward": loss.backward,
            "step": lambda b=buffer, z=z, y=y: dlb_step(z, y, b, impl=gpu),
        }
        counts = harness.launches(works)
        if not counts:
            pytest.skip("the profiler sees no kernels on this machine")
        assert counts == {"loss": 1, "backward": 2, "step": 1}


def test_another_stream_and_bit_identical_runs(gpu):
    torch.manual_seed(0)
    z, t = torch.randn(4096, 1000, device="cuda"), torch.randn(2048, 1000, device="cuda")
    y = torch.randint(0, 1000, (4096,), device="cuda")

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = z.clone().requires_grad_()
        loss = fused_lb_loss(leaf, y, t, impl=gpu)
        loss.backward()
        return loss.detach(), leaf.grad

    first = once()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for stream in streams * 3:
        with torch.cuda.stream(stream):
            results.append(once())
    torch.cuda.synchronize()
    assert all(torch.equal(first[0], loss) and torch.equal(first[1], grad) for loss, grad in results)


def test_two_captured_graphs_replayed_at_once(gpu):
    """Both were captured on torch's one capture stream; they share neither ticket nor partial sums."""
    torch.manual_seed(0)
    inputs, graphs = [], []
    for rows, classes in ((2048, 1000), (5000, 200)):  # the second counts its rows in a launch of its own
        z = torch.randn(rows, classes, device="cuda")
        inputs.append((z, torch.randint(0, classes, (rows,), device="cuda"), torch.randn_like(z[: rows // 2])))
    want = [fused_lb_loss(*values, impl=gpu) for values in inputs]
    for values in inputs:
        graphs.append((torch.cuda.CUDAGraph(), []))
        with torch.cuda.graph(graphs[-1][0]):
            graphs[-1][1].extend(fused_lb_loss(*values, impl=gpu) for _ in range(20))
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for loss, (_, losses) in zip(want, graphs, strict=True):
            assert all(torch.equal(loss, other) for other in losses)
            for other in losses:
                other.fill_(torch.nan)
        torch.cuda.synchronize()


@pytest.mark.alone
def test_graphs_that_are_gone_hold_no_memory(gpu):
    z, y = torch.randn(64, 100, device="cuda"), torch.zeros(64, dtype=torch.long, device="cuda")

    def capture() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fused_lb_loss(z, y, z[:32], impl=gpu)
        graph.replay()
        torch.cuda.synchronize()

    def free() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    fused_lb_loss(z, y, z[:32], impl=gpu)
    capture()
    before = free()
    for _ in range(640):  # 40 MiB of workspaces
        capture()
    assert before - free() < 16 << 20


FIRST_IN_A_PROCESS = """
import torch
from dlb_fast import fused_lb_loss

torch.manual_seed(0)
z, t = torch.randn(4096, 1000, device="cuda"), torch.randn(2048, 1000, device="cuda")
y = torch.randint(0, 1000, (4096,), device="cuda")
want = fused_lb_loss(z.double(), y, t.double(), impl="torch").item()
call = lambda: fused_lb_loss(z, y, t, impl="cuda")
check = lambda losses: [torch.testing.assert_close(v.item(), want, rtol=1e-5, atol=0) for v in losses]
streams = [torch.cuda.Stream() for _ in range(2)]
torch.cuda.synchronize()
"""
FIRST_CALLS = {
    # Nothing was ever launched: the workspaces come into being while capturing, and no replay may touch them otherwise.
    "in a capture": """
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = call()
check([call()])  # before the first replay
torch.cuda.synchronize()
for _ in range(50):
    with torch.cuda.stream(streams[0]):
        graph.replay()
    with torch.cuda.stream(streams[1]):
        losses = [call() for _ in range(5)]
    torch.cuda.synchronize()
    check([captured, *losses])
""",
    # One more stream than there are workspaces at a time, the last of them captured.
    "in a capture that finds no workspace": """
raw = [torch.cuda.Stream() for _ in range(30)]
for stream in raw:
    with torch.cuda.stream(stream):
        losses = [call()]
graphs = []
for _ in range(40):
    graphs.append((torch.cuda.CUDAGraph(), []))
    with torch.cuda.graph(graphs[-1][0]):
        graphs[-1][1].append(call())
for graph, _ in graphs:
    graph.replay()
torch.cuda.synchronize()
check([*losses, *(kept[0] for _, kept in graphs)])
""",
    # The first stream is busy when the second one launches: nothing of the second may wait for the first.
    "on two streams": """
with torch.cuda.stream(streams[0]):
    torch.cuda._sleep(1 << 30)
    first = call()
with torch.cuda.stream(streams[1]):
    losses = [call() for _ in range(20)]
streams[1].synchronize()
check(losses)
torch.cuda.synchronize()
check([first])
""",
}


@pytest.mark.parametrize("name", FIRST_CALLS, ids=lambda name: f"cuda-{name}")
def test_the_first_calls_of_a_process(name):
    if not available("cuda"):
        pytest.fail("cuda is not available on this machine")
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IN_A_PROCESS + FIRST_CALLS[name]], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_labels_out_of_range_poison_their_row(gpu):
    z = torch.randn(6, 10, device="cuda", requires_grad=True)
    y = torch.tensor([0, 1, 10, 3, -5, 5], device="cuda")
    rows = fused_lb_loss(z, y, reduction="none", impl=gpu)
    rows.sum().backward()
    assert rows.isnan().tolist() == [False, False, True, False, True, False]
    assert z.grad.isnan().any(1).tolist() == [False, False, True, False, True, False]


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(gpu):
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of device memory")
    classes = 128256
    rows = (1 << 31) // classes + 64
    z = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    y = torch.randint(0, classes, (rows,), device="cuda")
    half = rows // 2
    t = z[:half].clone()
    leaf = z.requires_grad_()
    loss_rows = fused_lb_loss(leaf, y, t, reduction="none", impl=gpu)
    loss_rows.sum().backward()
    for part in (slice(0, 4), slice(half - 2, half + 2), slice(rows - 4, rows)):
        old = t[part] if part.stop <= half else None
        small = z.detach()[part].clone().requires_grad_()
        if part.start < half < part.stop:
            continue
        want = fused_lb_loss(small, y[part], old, reduction="none", impl="torch")
        want.sum().backward()
        torch.testing.assert_close(loss_rows[part], want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(leaf.grad[part], small.grad, rtol=2e-2, atol=1e-6)


def test_second_device(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    z = torch.randn(8, 100, device="cuda:1", requires_grad=True)
    y = torch.zeros(8, dtype=torch.long, device="cuda:1")
    loss = fused_lb_loss(z, y, z.detach()[:4], impl=gpu)
    loss.backward()
    want = eager_official(z.detach().double(), y, z.detach()[:4].double())
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
