"""What every test shares: the interpreter switch, implementations, dtypes, and the rule of accuracy."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # Has to be set before Triton is first imported: without a GPU its kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # tiny tensors on many workers: threads of threads only wait for each other

import pytest

from dlb_fast import _backends, _options, functional

SLOW_FILE = re.compile(r"^pytestmark = \[?\s*pytest\.mark\.slow", re.M)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The fast tier does not even import files whose tests are all slow: the frameworks alone take seconds."""
    if config.getoption("markexpr") != "not slow" or collection_path.suffix != ".py":
        return None
    return True if SLOW_FILE.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_collection_finish() -> None:
    """Take what the imports made out of the garbage collector's sight: tests that collect would walk it every time."""
    gc.collect()
    gc.freeze()


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def available(impl: str) -> bool:
    """Whether an implementation runs on this machine."""
    return _backends.implementations()[impl].available


def device_of(impl: str) -> str:
    """Where the tensors of an implementation live."""
    return "cuda" if impl == "cuda" or (impl in ("triton", "auto") and torch.cuda.is_available()) else "cpu"


def eager_official(logits, target, last_logits, *, alpha=1.0, temperature=3.0, **ce):
    """The official code's objective in eager PyTorch, in the dtype it is given (under AMP: losses in float32)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    loss = torch.nn.functional.cross_entropy(z, target, **ce)
    if last_logits is not None and len(last_logits):
        t = last_logits.to(z.dtype)
        student = torch.log_softmax(z[: len(t)] / temperature, 1)
        teacher = torch.softmax(t / temperature, 1)
        kl = torch.nn.functional.kl_div(student, teacher, reduction="batchmean")
        loss = loss + alpha * kl * temperature**2
    return loss


def float32_error(logits, *, ce, kl, temperature=3.0):
    """(B, C): by how much a gradient may be off in float32, before it is rounded to the dtype of the logits.

    The gradient is a difference of probabilities that nearly cancel, and its error is that of the probabilities: of
    exponentials to 2 units in the last place, as the GPU's are, and of sums over C terms. ``ce`` and ``kl`` are their
    coefficients. A rule by the error of eager PyTorch alone is a matter of luck where the gradient is small.
    """
    z = logits.detach().double().nan_to_num()
    return 2e-6 * (ce * torch.softmax(z, 1) + kl * torch.softmax(z / temperature, 1) + (ce + kl) / z.shape[1])


def op_options(target, *, reduction="mean", need_grad=True, **given):
    """An op's arguments from ``target`` on, in the order of options.h: tensors, then numbers."""
    tensors = {"target": target, **{name: given.pop(name) for name in _options.TENSORS if name in given}}
    numbers = functional.prepare("test", reduction=reduction, **given).numbers
    return (*map(tensors.get, _options.TENSORS), *numbers, need_grad)


def row_loss(op, impl, logits, target, **given):
    """``functional.row_loss`` with its options given beside the tensors."""
    names = functional.Options._fields
    options = {name: given.pop(name) for name in names if name in given}
    buffer = given.get("buffer")
    stored = None if buffer is None else buffer.stored_rows(logits.shape[0], given.get("num_old"))
    result = functional.row_loss(functional.prepare(op, impl=impl, **options), logits, target, **given)
    if buffer is not None:
        buffer.count = stored
    return result


ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")]


def require(impl: str) -> None:
    """Skip the test where an implementation does not run, or fail it where the build should have made it."""
    if not available(impl):
        reason = f"{impl}: {_backends.implementations()[impl].reason}"
        if impl == "cpu" and os.environ.get("DLB_FAST_BUILD") in ("require", "cpu", "cuda"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(params=["torch", "cpu", *(ON_GPU if torch.cuda.is_available() else [])])
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation that runs here at full speed (Triton's interpreter has its own, smaller, tests).

    Tensors that a test makes without naming a device are made where the implementation runs.
    """
    require(request.param)
    with torch.device(device_of(request.param)):
        yield request.param


@pytest.fixture(params=["cpu", *(ON_GPU if torch.cuda.is_available() else [])])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Like `impl`, without plain PyTorch."""
    require(request.param)
    with torch.device(device_of(request.param)):
        yield request.param


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A seeded generator on the device of the test: tests never depend on the global one."""
    device = device_of(request.getfixturevalue("impl")) if "impl" in request.fixturenames else "cpu"
    return torch.Generator(device).manual_seed(1234)


@pytest.fixture(scope="session")
def process_group():
    """Two ranks on the CPU that call a test module's functions: `process_group(function, *arguments)`."""
    from process_group import ProcessGroup

    made = ProcessGroup()
    yield made
    made.close()


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dlb-fast train` without the page of the run, whose pictures take longer than a small run."""
    monkeypatch.setattr("dlb_fast.cli._write_page", lambda folder, quiet: None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small tensors: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
