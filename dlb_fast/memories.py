"""What the teachers of the family remember: a row per sample, copies of the model, the features of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FeatureTap", "LogitBank", "ModelCopies", "shown_size"]


def shown_size(count: int) -> str:
    """A number of bytes for people.

    >>> shown_size(20_000_000)
    '19.1 MiB'
    """
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _check_count(op: str, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{op}: {name} must be an integer >= 1, got {value!r}")
    return value


def _check_device(op: str, device: torch.device | str | None) -> torch.device | str | None:
    """None, or what torch knows as a device."""
    try:
        return device if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{op}: device must be None or one such as 'cpu' or 'cuda:0', got {device!r}") from error


class LogitBank:
    """The last prediction for every sample of a set: ``(num_samples, C)`` log-probabilities, found by sample id.

    Log-probabilities rather than logits: the classes that matter lie near 0, where float16 is finest (relative error
    of a probability ``p``: ``5e-4 |log p|``), and any temperature can still be applied, because softmax does not see
    the shift. float16 takes ``2 * num_samples * C`` bytes; the official PS-KD keeps float32 probabilities on the host.

    Args:
        num_samples: samples of the whole set; ids are in ``[0, num_samples)``.
        num_classes: ``C``.
        dtype: storage dtype.
        device: where to keep it. None: beside the logits when it takes at most a quarter of that device's free memory,
            else on the host (rows then travel every step).

    Errors: ValueError for sizes below 1; an id outside the bank raises on a CPU and is an error of the device on a GPU.
    Source of the idea: ``all_predictions`` of the official PS-KD code.

    >>> bank = LogitBank(num_samples=4, num_classes=2)
    >>> bank.store(torch.tensor([2]), torch.tensor([[0.0, 0.0]]))
    >>> rows, seen = bank.rows(torch.tensor([2, 0]), "cpu")
    >>> rows[0].exp().tolist(), seen.tolist()
    ([0.5, 0.5], [True, False])
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        self.num_samples = _check_count("LogitBank", "num_samples", num_samples)
        self.num_classes = _check_count("LogitBank", "num_classes", num_classes)
        self.dtype = dtype
        self._device = _check_device("LogitBank", device)
        self._rows: Tensor | None = None  # made when the first logits show the device
        self._seen: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """What the bank takes."""
        return self.num_samples * (self.num_classes * self.dtype.itemsize + 1)

    def place(self, near: torch.device | str) -> torch.device:
        """Where the bank is kept for logits on ``near``."""
        if self._device is not None:
            return torch.device(self._device)
        near = torch.device(near)
        if near.type == "cuda" and self.nbytes > torch.cuda.mem_get_info(near)[0] // 4:
            return torch.device("cpu")
        return near

    def _ready(self, near: torch.device | str) -> tuple[Tensor, Tensor]:
        if self._rows is None or self._seen is None:
            self._device = self.place(near)
            self._rows = torch.zeros(self.num_samples, self.num_classes, dtype=self.dtype, device=self._device)
            self._seen = torch.zeros(self.num_samples, dtype=torch.bool, device=self._device)
        return self._rows, self._seen

    def rows(self, ids: Tensor, near: torch.device | str) -> tuple[Tensor, Tensor]:
        """Stored log-probabilities (n, C) of these samples and which (n,) have any, on device ``near``."""
        rows, seen = self._ready(near)
        at = ids.to(rows.device, torch.int64)  # bytes would select as a mask
        return rows[at].to(near), seen[at].to(near)

    @torch.no_grad()
    def store(self, ids: Tensor, logits: Tensor) -> None:
        """Replace the rows of these samples by ``log_softmax(logits)``; of repeated ids the last one counts."""
        rows, seen = self._ready(logits.device)
        values = torch.log_softmax(logits.detach().float(), 1).to(rows.device, self.dtype)
        at = ids.to(rows.device, torch.int64)
        rows.index_copy_(0, at, values)
        seen.index_fill_(0, at, True)

    def reset(self) -> None:
        """Forget every row."""
        if self._seen is not None:
            self._seen.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Rows and which are filled, on the CPU; empty before the first batch."""
        if self._rows is None or self._seen is None:
            return {}
        return {"rows": self._rows.cpu().clone(), "seen": self._seen.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``; ValueError when it belongs to another set or number of classes."""
        self._rows = self._seen = None
        if not state:
            return
        wanted, got = (self.num_samples, self.num_classes), tuple(state["rows"].shape)
        if got != wanted:
            raise ValueError(f"LogitBank: expected {wanted} (samples, classes), the saved bank holds {got}")
        device = torch.device(self._device or "cpu")
        self._rows, self._seen = state["rows"].to(device, self.dtype), state["seen"].to(device)


class ModelCopies:
    """A ring of the model's own past weights, evaluated without gradient.

    ``update()`` counts optimiser steps and takes a copy every ``interval`` of them, over the oldest one once ``copies``
    are there. A copy is evaluated in eval mode (its own running BatchNorm statistics, no dropout: our choice, the
    papers' text was not available), by ``torch.func.functional_call``, so the model itself is never touched.

    Args:
        copies: how many. interval: optimiser steps between two.
        dtype: storage dtype of floating weights (torch.bfloat16 halves them); None keeps the model's.
        device: where to keep them ("cpu" saves device memory and pays a transfer per step); None: beside the model.

    Errors: RuntimeError when it is asked before ``attach(model)``. Source: idea of MrKD, arXiv 2009.05226 (abstract).
    """

    def __init__(
        self,
        copies: int = 2,
        interval: int = 100,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.copies = _check_count("ModelCopies", "copies", copies)
        self.interval = _check_count("ModelCopies", "interval", interval)
        self.dtype, self.device = dtype, _check_device("ModelCopies", device)
        self.steps = 0
        self.ring: list[dict[str, Tensor]] = []
        self._next = 0
        self._model: tuple[nn.Module, ...] = ()

    def __len__(self) -> int:
        return len(self.ring)

    def attach(self, model: nn.Module) -> None:
        """Remember whose copies these are (a DistributedDataParallel wrapper is looked through)."""
        inner = getattr(model, "module", model)
        self._model = (inner if isinstance(inner, nn.Module) else model,)

    @property
    def model(self) -> nn.Module:
        """The model."""
        if not self._model:
            raise RuntimeError("ModelCopies: no model yet; call criterion.attach(model) once before training")
        return self._model[0]

    @property
    def nbytes(self) -> int:
        """What a full ring takes."""
        tensors = self._tensors().values()
        return self.copies * sum(t.numel() * self._stored(t).itemsize for t in tensors)

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def _stored(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype

    @torch.no_grad()
    def update(self) -> None:
        """Count an optimiser step; copy the weights when one is due."""
        self.steps += 1
        if self.steps % self.interval:
            return
        taken = {
            name: tensor.detach().to(self.device or tensor.device, self._stored(tensor), copy=True)
            for name, tensor in self._tensors().items()
        }
        if len(self.ring) < self.copies:
            self.ring.append(taken)
        else:
            self.ring[self._next] = taken
        self._next = (self._next + 1) % self.copies

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (K, B, C) of the K copies there are, K >= 1."""
        model, now = self.model, self._tensors()
        with _evaluating(model):
            return torch.stack([
                torch.func.functional_call(
                    model, {n: t.to(now[n].device, now[n].dtype) for n, t in one.items()}, (images,)
                )
                for one in self.ring
            ])  # fmt: skip

    def reset(self) -> None:
        """Forget all copies."""
        self.ring, self.steps, self._next = [], 0, 0

    def state_dict(self) -> dict[str, Any]:
        """The copies on the CPU, and the place in the ring."""
        ring = [{name: tensor.cpu().clone() for name, tensor in one.items()} for one in self.ring]
        return {"steps": self.steps, "next": self._next, "ring": ring}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``; ValueError when more copies were saved than are kept here."""
        if len(state["ring"]) > self.copies:
            raise ValueError(f"ModelCopies: {len(state['ring'])} copies were saved, here {self.copies} are kept")
        home = self.device or next(iter(self._tensors().values())).device
        self.steps, self._next = state["steps"], state["next"] % self.copies
        self.ring = [{name: tensor.to(home) for name, tensor in one.items()} for one in state["ring"]]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and back to what every single module was in (frozen BatchNorms stay frozen)."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


class FeatureTap:
    """What goes into a layer, caught by a forward hook: no model has to be rewritten.

    Args:
        model: any module.
        layer: the layer or its name; None takes the last ``nn.Linear``, whose input is the pooled feature of nearly
            every classifier.

    Errors: ValueError when there is no such layer.

    >>> model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> tap = FeatureTap(model)
    >>> _ = model(torch.zeros(4, 3))
    >>> tap.take().shape
    torch.Size([4, 5])
    """

    def __init__(self, model: nn.Module, layer: nn.Module | str | None = None) -> None:
        found: nn.Module | None
        if isinstance(layer, str):
            found = dict(model.named_modules()).get(layer)
        elif layer is None:
            linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
            found = linear[-1] if linear else None
        else:
            found = layer
        if found is None:
            raise ValueError(
                f"FeatureTap: {type(model).__name__} has no {'nn.Linear' if layer is None else f'layer {layer!r}'}; "
                "pass the layer whose input is the feature, or its name (dict(model.named_modules()) lists them)"
            )
        self._caught: Tensor | None = None
        self._handle = found.register_forward_pre_hook(self._catch)

    def _catch(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training:
            self._caught = inputs[0].detach().flatten(1)

    def take(self) -> Tensor:
        """The features (B, D) of the last training forward, detached; each forward can be taken once."""
        if self._caught is None:
            raise RuntimeError("FeatureTap: no forward in training mode since the last take(); run the model first")
        caught, self._caught = self._caught, None
        return caught

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()
