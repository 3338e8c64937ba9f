"""The loss on the CPU by every face, and what feeds it, one thread. Run by `python -m benchmarks.regress`.

Not part of the test suite's run; a test there runs them once each with `--benchmark-disable`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from benchmarks.loss_variants import ours
from dlb_fast import LastBatchLoss, _backends
from dlb_fast.data import OverlapBatchSampler, ResidentLoader, train_transform

ROWS = 256
IMPL = "cpu" if _backends.implementations()["cpu"].available else "torch"
each_shape = pytest.mark.parametrize("classes", [100, 1000, 21843])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(classes, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(ROWS, classes, generator=generator)).to(dtype)
    return logits, torch.randint(0, classes, (ROWS,), generator=generator)


def describe(benchmark, what, classes, dtype):
    benchmark.group = f"{what}, C = {classes}, {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info.update(rows=ROWS, classes=classes, dtype=str(dtype).removeprefix("torch."), impl=IMPL)


@each_dtype
@each_shape
def test_criterion_forward(benchmark, classes, dtype):
    describe(benchmark, "criterion, forward", classes, dtype)
    logits, target = inputs(classes, dtype)
    criterion = LastBatchLoss(classes, capacity=ROWS // 2, dtype=dtype, impl=IMPL)
    leaf = logits.requires_grad_()
    loss = benchmark(lambda: criterion(leaf, target))
    assert loss.isfinite()
    assert criterion.buffer.count == ROWS // 2


@each_dtype
@each_shape
def test_criterion_forward_backward(benchmark, classes, dtype):
    describe(benchmark, "criterion, forward and backward", classes, dtype)
    logits, target = inputs(classes, dtype)
    criterion = LastBatchLoss(classes, capacity=ROWS // 2, dtype=dtype, impl=IMPL)
    leaf = logits.requires_grad_()

    def step():
        leaf.grad = None
        criterion(leaf, target).backward()

    benchmark(step)
    assert leaf.grad.isfinite().all()


@pytest.mark.skipif(IMPL != "cpu", reason="the compiled CPU op is not there")
@pytest.mark.parametrize("face", ["cpu", "cpu-op"])
@each_dtype
@each_shape
def test_without_autograd(benchmark, classes, dtype, face):
    describe(benchmark, {"cpu": "dlb_step", "cpu-op": "op alone"}[face], classes, dtype)
    logits, target = inputs(classes, dtype)
    step = ours("cpu", logits, target, logits[: ROWS // 2].clone())[face, "gradient"]
    assert benchmark(step)[-1].isfinite().all()


def test_resident_loader_step(benchmark):
    benchmark.group = "ResidentLoader, one batch of 32 x 32 pixels with crop and flip"
    benchmark.extra_info.update(rows=ROWS, pixels=32)
    pixels = torch.randint(0, 256, (4096, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = SimpleNamespace(images=pixels, targets=torch.arange(4096) % 100)
    with ResidentLoader(images, ROWS, transform=train_transform("small", 32)) as loader:
        stream = (batch for _ in count() for batch in loader)
        next(stream)  # the only one without an old half
        batch = benchmark(lambda: next(stream))
    assert len(batch.targets) == ROWS


def test_sampler_next(benchmark):
    benchmark.group = "OverlapBatchSampler, one batch of ImageNet's length"
    benchmark.extra_info.update(rows=ROWS, length=1_281_167)
    sampler = OverlapBatchSampler(1_281_167, ROWS)
    stream: Iterator[list[int]] = (batch for _ in count() for batch in sampler)
    next(stream)
    assert len(benchmark(lambda: next(stream))) == ROWS
