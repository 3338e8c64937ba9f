"""A step as one CUDA graph: for networks so small that the host cannot launch their kernels fast enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dlb_fast import LastBatchLoss
from dlb_fast.data import Batch

from .config import TrainConfig
from .methods import CrossEntropy

__all__ = ["GraphedStep", "check_graph"]

WARM_UP = 3  # ordinary steps before the capture; libraries choose their algorithms and allocate in them
CAPTURABLE = (LastBatchLoss, CrossEntropy, nn.CrossEntropyLoss)  # nothing on the host changes from step to step


def check_graph(config: TrainConfig, criterion: nn.Module, device: torch.device, kind: str) -> None:
    """Raise ValueError where `config.graph` asks for something that cannot be captured."""
    if not config.graph:
        return
    if device.type != "cuda":
        raise ValueError(f"config: graph=True expects a CUDA device, got {device}; leave it out")
    if kind != "none":
        raise ValueError(f"config: graph=True expects one process, got distributed={kind}; use --compile there")
    if not isinstance(criterion, CAPTURABLE):
        names = ", ".join(c.__name__ for c in CAPTURABLE)
        raise ValueError(
            f"config: graph=True expects a criterion whose host side does not change from step to step ({names}; "
            f"methods dlb, two_view, ce), got {type(criterion).__name__}; leave it out"
        )


class Recorder(Protocol):
    """How work is warmed up, captured and replayed; there to be replaced where there is no GPU."""

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the work as the capture will see it."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Note the work without doing it: where its result will be, and what does it."""


class CudaRecorder:
    """CUDA's own capture, with the warm-up on a side stream as it must be."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's threads may allocate and copy meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = work()
        return result, graph.replay


class GraphedStep:
    """Forward, loss and backward of a batch, replayed from a graph once batches look alike.

    The first batches are ordinary steps. After `WARM_UP` of one form (shapes, strides, dtypes, repeated rows) the next
    one is captured; from then on a batch is copied to the captured addresses and the graph replayed. A batch of another
    form, such as the first half batch, stays an ordinary step. So every batch is one step, captured or not.

    Args:
        work: `batch -> loss`, which also runs the backward.
        parameters: whose gradients it makes; the caller may set them to None after each step.
        recorder: None: CUDA's.
    """

    def __init__(
        self, work: Callable[[Batch], Tensor], parameters: Iterable[nn.Parameter], recorder: Recorder | None = None
    ) -> None:
        self.work, self.parameters = work, list(parameters)
        self.recorder: Recorder = recorder or CudaRecorder()
        self.seen: tuple[Any, ...] | None = None  # the form of the last ordinary batch
        self.alike = 0  # how many of it came in a row
        self.form: tuple[Any, ...] | None = None  # the captured one
        self._batch: Batch | None = None
        self._grads: list[Tensor | None] = []

    def __call__(self, batch: Batch) -> Tensor:
        """The loss `()`; valid until the next call."""
        form = _form(batch)
        if form == self.form:
            return self._again(batch)
        if self.form is None:
            self.alike = self.alike + 1 if form == self.seen else 1
            self.seen = form
            if self.alike > WARM_UP:
                return self._capture(batch, form)
        return self.recorder.warm_up(lambda: self.work(batch))

    def _capture(self, batch: Batch, form: tuple[Any, ...]) -> Tensor:
        copies: dict[str, Any] = {name: value.clone() for name, value in _tensors(batch)}
        static = dataclasses.replace(batch, **copies)
        for parameter in self.parameters:
            parameter.grad = None  # so that the backward writes gradients instead of adding to them
        self._loss, self._replay = self.recorder.record(lambda: self.work(static))
        self._grads = [parameter.grad for parameter in self.parameters]
        self._batch, self.form = static, form
        return self._again(batch)

    def _again(self, batch: Batch) -> Tensor:
        assert self._batch is not None
        for name, value in _tensors(batch):
            getattr(self._batch, name).copy_(value)
        for parameter, grad in zip(self.parameters, self._grads, strict=True):
            parameter.grad = grad
        self._replay()
        return self._loss


def _tensors(batch: Batch) -> list[tuple[str, Tensor]]:
    values = [(f.name, getattr(batch, f.name)) for f in dataclasses.fields(batch)]
    return [(name, value) for name, value in values if isinstance(value, Tensor)]


def _form(batch: Batch) -> tuple[Any, ...]:
    """What has to be equal for a graph to fit."""
    tensors = tuple((name, v.shape, v.stride(), v.dtype) for name, v in _tensors(batch))
    return (batch.num_old, *tensors)
