"""The contenders for one step of the loss: loss, gradient, and the new half's logits kept for the next step.

Each is there by two paths. `autograd`: forward, then `loss.backward()` into the logits' `.grad`, as in training.
`gradient`: the loss and its gradient as tensors (`torch.autograd.grad`; ours: the public `dlb_step`, which needs no
autograd node). `NAME-op` is our bare op, without the checks around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlb_fast import LastBatchLoss, LogitBuffer, _backends, _options, dlb_step, functional, ops

from .shapes import Shape

TAU = 3.0
OURS = ("cuda", "triton", "cpu")
PATHS = ("autograd", "gradient")
NAMES = ("eager", "official", "compile", "compile-ro", "liger", *OURS)

Key = tuple[str, str]  # variant, path
Loss = Callable[[Tensor, Tensor], Tensor]


def eager_loss(logits: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
    """The formula as written everywhere: float32 losses, as autocast does it."""
    half = teacher.shape[0]
    z, t = logits.float(), teacher.float()
    kl = F.kl_div(F.log_softmax(z[:half] / TAU, 1), F.softmax(t / TAU, 1), reduction="batchmean")
    return F.cross_entropy(z, target) + kl * TAU**2


def official_loss(old: Tensor, new: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
    """The official code's form: two forwards give two tensors."""
    z = torch.cat([old, new]).float()
    kl = F.kl_div(F.log_softmax(old.float() / TAU, 1), F.softmax(teacher.float() / TAU, 1), reduction="batchmean")
    return F.cross_entropy(z, target) + kl * TAU**2


def liger_loss(target: Tensor) -> Loss:
    """Liger's CE and KL kernels, composed as its users have to; ImportError where it is not installed."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    def loss(z: Tensor, t: Tensor) -> Tensor:
        student = F.log_softmax(z[: len(t)].float() / TAU, 1)
        kl = LigerKLDivLossFunction.apply(student, F.softmax(t.float() / TAU, 1), "batchmean")
        # Liger's CE writes its gradient over its input: a copy keeps the logits for the KL and the buffer.
        return LigerCrossEntropyFunction.apply(z * 1, target)[0] + kl * TAU**2

    return loss


def variants(
    shape: Shape, dtype: torch.dtype, device: str, wanted: list[str], paths: list[str]
) -> tuple[dict[Key, Callable[[], object]], list[str]]:
    """(variant, path) -> one step of the loss; and what was wanted but cannot run here, with the reason."""
    generator = torch.Generator(device).manual_seed(0)  # a thousand million numbers take a CPU half a minute
    rows, classes, half = shape.rows, shape.classes, shape.rows // 2
    values = (2 * torch.randn(rows, classes, generator=generator, device=device)).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=generator, device=device)
    teacher = values[:half] + 0.1 * torch.randn(half, classes, generator=generator, device=device).to(dtype)
    found: dict[Key, Callable[[], object]] = {}
    missing: list[str] = []

    def add(name: str, loss: Loss) -> None:
        """Both paths of a loss of logits and teacher."""
        leaf, memory = values.clone().requires_grad_(), teacher.clone()

        def autograd() -> tuple[Tensor | None]:
            leaf.grad = None
            loss(leaf, memory).backward()
            memory.copy_(leaf.detach()[half:])
            return (leaf.grad,)

        def gradient() -> tuple[Tensor, ...]:
            grads = torch.autograd.grad(loss(leaf, memory), leaf)
            memory.copy_(leaf.detach()[half:])
            return grads

        found[name, "autograd"], found[name, "gradient"] = autograd, gradient

    for name in wanted:
        if name == "eager":
            add(name, lambda z, t: eager_loss(z, target, t))
        elif name == "official":
            add(name, lambda z, t: official_loss(z[:half], z[half:], target, t))
        elif name == "compile":
            compiled = torch.compile(eager_loss)
            add(name, lambda z, t, f=compiled: f(z, target, t))  # type: ignore[misc]
        elif name in ("compile-ro", "liger") and device != "cuda":
            missing.append(f"{name} (needs a CUDA GPU)")
        elif name == "compile-ro":
            replayed = torch.compile(eager_loss, mode="reduce-overhead")
            add(name, lambda z, t, f=replayed: f(z, target, t))  # type: ignore[misc]
        elif name == "liger":
            try:
                add(name, liger_loss(target))
            except Exception as error:
                missing.append(f"liger ({type(error).__name__}: {error})")
        elif (reason := unusable(name, device)) is not None:
            missing.append(f"{name} ({reason})")
        else:
            found |= ours(name, values, target, teacher)
    return {key: work for key, work in found.items() if key[1] in paths}, missing


def unusable(impl: str, device: str) -> str | None:
    """Why one of our implementations cannot run on this device, or None."""
    if (impl == "cpu") != (device == "cpu"):
        return "needs a CUDA GPU" if device == "cpu" else "needs --device cpu"
    known = _backends.implementations()[impl]
    return None if known.available else known.reason


def ours(impl: str, values: Tensor, target: Tensor, teacher: Tensor) -> dict[Key, Callable[[], object]]:
    """The criterion, the public step without an autograd node, and the op below both."""
    half, classes = teacher.shape

    def buffer() -> LogitBuffer:
        made = LogitBuffer(classes, half, values.dtype, values.device)
        dlb_step(teacher, target[:half], made, impl=impl)
        return made

    criterion = LastBatchLoss(
        classes, capacity=half, dtype=values.dtype, device=values.device, temperature=TAU, impl=impl
    )
    criterion(teacher, target[:half])
    leaf, logits, kept, rolled = values.clone().requires_grad_(), values.clone(), buffer(), buffer()

    def autograd() -> tuple[Tensor | None]:
        leaf.grad = None
        criterion(leaf, target).backward()
        return (leaf.grad,)

    op = ops.op_for(impl, "last_batch_update")
    given = {"target": target}
    options = (*map(given.get, _options.TENSORS), *functional.prepare("bench", temperature=TAU).numbers, True)
    return {
        (impl, "autograd"): autograd,
        (impl, "gradient"): functools.partial(dlb_step, logits, target, kept, temperature=TAU, impl=impl),
        (f"{impl}-op", "gradient"): lambda: op(logits, rolled.rows, rolled.slots, None, -1, 0, *options),
    }


def check_alike(work: dict[Key, Callable[[], Any]]) -> None:
    """Raise RuntimeError unless all variants give the same gradient, by eight of its rows."""
    first: tuple[str, Tensor] | None = None
    for (name, _), step in work.items():
        step()  # after this, every variant's teacher is the new half of the same logits
        whole = step()[-1].detach()
        rows = whole[:: max(1, len(whole) // 8)].float().clone()
        first = first or (name, rows)
        off, size = (rows - first[1]).abs().max().item(), first[1].abs().max().item()
        if not off <= 0.02 * size:
            raise RuntimeError(f"the gradients of {name} and {first[0]} differ by {off:.3g}; their size: {size:.3g}")
