"""Whole training steps that do the same work on the same rows, each written as its users write it.

A step is forward, loss, backward and SGD. The variants of a run take turns on one network, because two copies of one
need not take the same time. The batch is ``[old | new]``, two views of as many samples. ``official`` is the published
loop (Meta-knowledge-Lab/DLB@8949a46 ``dlb.py``): the loader's two-view batch and the one before it wait on the host and
are both moved in every step, the halves go through the network one after the other, the last logits are kept with their
graph, and loss and accuracy are read on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlb_fast import LastBatchLoss
from dlb_fast.data import Batch
from dlb_fast.train.loop import accepted_inputs, training_loss
from dlb_fast.train.models import create_model

TAU, ALPHA = 3.0, 1.0
VARIANTS = {
    "ce": "plain cross entropy over the same rows, one forward",
    "ce_again": "the same once more: what this measurement calls a difference where there is none",
    "dlb": "LastBatchLoss, one forward",
    "eager": "the DLB loss in plain PyTorch with a copied buffer, one forward",
    "official": "the official code's loop: two forwards, eager loss",
}


@dataclass(frozen=True)
class Setting:
    """What all variants of a run share. ``mode``: eager, or compile (the network)."""

    model: str
    rows: int
    classes: int
    size: int
    device: str
    mode: str
    bf16: bool

    def network(self) -> nn.Module:
        """The model in training mode, the same weights every time."""
        torch.manual_seed(0)
        model = create_model(self.model, self.classes, 3).to(self.device).train()
        return model.to(memory_format=torch.channels_last) if self.device == "cuda" else model

    def autocast(self) -> Any:
        """A new context for one forward."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bf16)


class PlainCrossEntropy(nn.Module):
    """torch's, in float32 as autocast does it."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), target)


class EagerLastBatchLoss(nn.Module):
    """The DLB loss as anyone would write it, its teacher at a fixed address."""

    def __init__(self, half: int, classes: int, device: str) -> None:
        super().__init__()
        self.memory = torch.zeros(half, classes, device=device)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        z, half = logits.float(), len(self.memory)
        student, teacher = F.log_softmax(z[:half] / TAU, 1), F.softmax(self.memory / TAU, 1)
        loss = F.cross_entropy(z, target) + ALPHA * TAU**2 * F.kl_div(student, teacher, reduction="batchmean")
        self.memory.copy_(z.detach()[half:])
        return loss


def two_views(setting: Setting) -> tuple[Tensor, Tensor]:
    """The official loader's item on the host: views ``(n, 2, 3, size, size)`` and labels ``(n,)``, pinned for a GPU."""
    generator = torch.Generator().manual_seed(0)
    half = setting.rows // 2
    views = torch.randn(half, 2, 3, setting.size, setting.size, generator=generator)
    labels = torch.randint(0, setting.classes, (half,), generator=generator)
    return (views.pin_memory(), labels.pin_memory()) if setting.device == "cuda" else (views, labels)


class Rig:
    """The network that is trained, as it is called (compiled or not), and its optimiser."""

    def __init__(self, setting: Setting, lr: float = 1e-3) -> None:
        self.model = setting.network()
        self.network: Any = torch.compile(self.model) if setting.mode == "compile" else self.model
        numbers = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, **numbers)


def build(variant: str, setting: Setting, rig: Rig) -> Callable[[], Any]:
    """One training step of a variant."""
    return official_step(setting, rig) if variant == "official" else joint_step(variant, setting, rig)


def joint_step(variant: str, setting: Setting, rig: Rig) -> Callable[[], Tensor]:
    """As the trainer does it, with the batch on the device already."""
    model, network, optimizer = rig.model, rig.network, rig.optimizer
    half, device = setting.rows // 2, setting.device
    criterion: nn.Module
    if variant == "dlb":
        criterion = LastBatchLoss(setting.classes, capacity=half, temperature=TAU, alpha=ALPHA, device=device)
    elif variant == "eager":
        criterion = EagerLastBatchLoss(half, setting.classes, device)
    else:
        criterion = PlainCrossEntropy()
    views, labels = two_views(setting)
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    images = torch.cat((views[:, 1], views[:, 0])).to(device, memory_format=layout)
    ids = torch.arange(half, device=device).repeat(2)
    batch = Batch(images, labels.repeat(2).to(device), ids, half, epoch=0, step=1)
    inputs = accepted_inputs(criterion)

    def step() -> Tensor:
        loss = training_loss(network, criterion, batch, autocast=setting.autocast(), inputs=inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    if variant == "dlb":  # the first batch of a stream: new rows only
        training_loss(model, criterion, Batch(batch.new, batch.targets[half:], ids[half:], 0, 0, 0))
    return step


def official_step(setting: Setting, rig: Rig) -> Callable[[], tuple[float, float]]:
    """The published loop's body; gives the loss and the accuracy that it reads."""
    network, optimizer, device = rig.network, rig.optimizer, setting.device
    loader_item = two_views(setting)
    held: tuple[Tensor, Tensor] | None = None
    held_logits: Tensor | None = None

    def step() -> tuple[float, float]:
        nonlocal held, held_logits
        views, labels = (value.to(device) for value in loader_item)
        with setting.autocast():
            logits = network(views[:, 0])
            if held is None or held_logits is None:
                loss = F.cross_entropy(logits, labels)
            else:
                old_views, old_labels = (value.to(device) for value in held)
                old = network(old_views[:, 1])
                student, teacher = F.log_softmax(old / TAU, 1), F.softmax(held_logits.detach() / TAU, 1)
                loss = F.cross_entropy(torch.cat((old, logits)), torch.cat((old_labels, labels)))
                loss = loss + ALPHA * TAU**2 * F.kl_div(student, teacher, reduction="batchmean")
        seen = loss.item(), (logits.argmax(1) == labels).float().mean().item()
        held, held_logits = loader_item, logits
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return seen

    return step
