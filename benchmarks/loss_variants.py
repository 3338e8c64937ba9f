"""The contenders for one step of the loss: loss, gradient, and the new half's logits kept for the next step.

Each is there by two paths. `autograd`: forward, then `loss.backward()` into the logits' `.grad`, as in training.
`gradient`: the loss and its gradient as tensors (`torch.autograd.grad`; ours: the public `dlb_step`, which needs no
autograd node). `NAME-op` is our bare op, without the checks around it.

`ce-NAME` is plain cross entropy, its sum over the rows, and keeps nothing: all that quack has a kernel for. It is to be
compared with `ce-cuda`, ours without a teacher, and not with the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dlb_fast import LastBatchLoss, LogitBuffer, _backends, _options, dlb_step, functional, fused_lb_loss, ops

from .shapes import Shape

TAU = 3.0
OURS = ("cuda", "triton", "cpu")
PATHS = ("autograd", "gradient")
NAMES = ("eager", "official", "compile", "compile-ro", "liger", *OURS)
CE_NAMES = tuple(f"ce-{name}" for name in ("eager", "compile", "liger", "quack", *OURS))
PICKED = 8  # rows of a gradient that are held against float64

Key = tuple[str, str]  # variant, path
Step = Callable[[], Any]  # the gradient is the last of what it returns
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
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_kl_div

    def loss(z: Tensor, t: Tensor) -> Tensor:
        student = F.log_softmax(z[: len(t)].float() / TAU, 1)
        kl = liger_kl_div(student, F.softmax(t.float() / TAU, 1), reduction="batchmean")
        # Liger's CE writes its gradient over its input: a copy keeps the logits for the KL and the buffer.
        return liger_cross_entropy(z * 1, target) + kl * TAU**2

    return loss


def cross_entropies(name: str, values: Tensor, target: Tensor) -> dict[Key, Step]:
    """Both paths of a plain cross entropy; ImportError where its package is not installed."""
    leaf, logits = values.clone().requires_grad_(), values
    fast: Step | None = None

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z.float(), target, reduction="sum")

    if name == "compile":
        loss = torch.compile(loss)
    elif name == "liger":
        from liger_kernel.transformers.functional import liger_cross_entropy

        def loss(z: Tensor) -> Tensor:
            return liger_cross_entropy(z * 1, target, reduction="sum")

    elif name == "quack":
        from quack.cross_entropy import cross_entropy, cross_entropy_fwd

        def loss(z: Tensor) -> Tensor:
            return cross_entropy(z, target, reduction="sum")

        def fast() -> tuple[Tensor, ...]:  # loss and gradient in one kernel, as ours
            rows, gradient = cross_entropy_fwd(logits, target, return_dx=True)
            return rows.sum(), gradient

    elif name != "eager":

        def loss(z: Tensor) -> Tensor:
            return fused_lb_loss(z, target, reduction="sum", impl=name)

    def autograd() -> tuple[Tensor | None]:
        leaf.grad = None
        loss(leaf).backward()
        return (leaf.grad,)

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(leaf), leaf)

    return {(f"ce-{name}", "autograd"): autograd, (f"ce-{name}", "gradient"): fast or gradient}


class Problem(NamedTuple):
    """One step's logits, labels and teacher, the same for every contender."""

    values: Tensor
    target: Tensor
    teacher: Tensor

    def share_of_allowed(self, gradient: Tensor, plain: bool) -> float:
        """The largest error of some rows' gradient, against float64, as a share of what its dtype explains.

        That is four roundings of either term (two tensors added, each rounded, to one that is rounded) and float32
        probabilities, which nearly cancel: the error is theirs. A term left out or scaled wrongly is far beyond it.
        """
        rows, half = len(self.values), len(self.teacher)
        picked = torch.arange(0, rows, max(1, rows // PICKED), device=self.values.device)
        z, y = self.values[picked].double(), self.target[picked, None]
        p = torch.softmax(z, 1) * (1.0 if plain else 1 / rows)
        ce = p.scatter_add(1, y, torch.full_like(z[:, :1], -1.0 if plain else -1 / rows))
        kl, shares = torch.zeros_like(ce), p
        if not plain:
            old = picked[picked < half]
            student = torch.softmax(z[: len(old)] / TAU, 1) * (TAU / half)
            kl[: len(old)] = student - torch.softmax(self.teacher[old].double() / TAU, 1) * (TAU / half)
            shares = p.index_add(0, torch.arange(len(old), device=p.device), student)
        eps = torch.finfo(gradient.dtype).eps
        allowed = 4 * eps * (ce.abs() + kl.abs()) + 1e-5 * shares
        allowed += 6e-8 if gradient.dtype == torch.float16 else 1e-37  # the smallest that is not flushed to zero
        return ((gradient[picked].double() - ce - kl).abs() / allowed).nan_to_num(torch.inf, torch.inf).max().item()


def right(work: dict[Key, Step], problem: Problem) -> tuple[dict[Key, Step], list[str]]:
    """The contenders whose first step gives this problem's gradient; and the others, each with the reason."""
    found: dict[Key, Step] = {}
    wrong: list[str] = []
    for (name, path), step in work.items():
        try:
            off = problem.share_of_allowed(step()[-1].detach(), name.startswith("ce-"))
            reason = "" if off <= 1 else f"computes something else: its gradient is off by {off:.3g} times the allowed"
        except Exception as error:  # the others are worth having
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if reason:
            wrong.append(f"{name} ({path}: {reason})")
        else:
            found[name, path] = step
    return found, wrong


def variants(
    shape: Shape, dtype: torch.dtype, device: str, wanted: list[str], paths: list[str]
) -> tuple[dict[Key, Step], list[str], Problem]:
    """(variant, path) -> one step of the loss; what was wanted but cannot run here, with the reason; and the inputs."""
    generator = torch.Generator(device).manual_seed(0)  # a thousand million numbers take a CPU half a minute
    rows, classes, half = shape.rows, shape.classes, shape.rows // 2
    values = (2 * torch.randn(rows, classes, generator=generator, device=device)).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=generator, device=device)
    teacher = values[:half] + 0.1 * torch.randn(half, classes, generator=generator, device=device).to(dtype)
    found: dict[Key, Step] = {}
    missing: list[str] = []

    def add(name: str, loss: Loss) -> None:
        """Both paths of a loss of logits and teacher."""
        leaf, kept, rolled = values.clone().requires_grad_(), teacher.clone(), teacher.clone()

        def autograd() -> tuple[Tensor | None]:
            leaf.grad = None
            loss(leaf, kept).backward()
            kept.copy_(leaf.detach()[half:])
            return (leaf.grad,)

        def gradient() -> tuple[Tensor, ...]:
            grads = torch.autograd.grad(loss(leaf, rolled), leaf)
            rolled.copy_(leaf.detach()[half:])
            return grads

        found[name, "autograd"], found[name, "gradient"] = autograd, gradient

    for name in wanted:
        plain = name.removeprefix("ce-")
        if plain in ("compile-ro", "liger", "quack") and device != "cuda":
            missing.append(f"{name} (needs a CUDA GPU)")
        elif plain in OURS and (reason := unusable(plain, device)) is not None:
            missing.append(f"{name} ({reason})")
        elif name == "eager":
            add(name, lambda z, t: eager_loss(z, target, t))
        elif name == "official":
            add(name, lambda z, t: official_loss(z[:half], z[half:], target, t))
        elif name == "compile":
            compiled = torch.compile(eager_loss)
            add(name, lambda z, t, f=compiled: f(z, target, t))  # type: ignore[misc]
        elif name == "compile-ro":
            replayed = torch.compile(eager_loss, mode="reduce-overhead")
            add(name, lambda z, t, f=replayed: f(z, target, t))  # type: ignore[misc]
        else:
            try:
                if name == "liger":
                    add(name, liger_loss(target))
                else:
                    found |= (
                        cross_entropies(plain, values, target) if plain != name else ours(name, values, target, teacher)
                    )
            except Exception as error:
                missing.append(f"{name} ({type(error).__name__}: {error})")
    return {key: work for key, work in found.items() if key[1] in paths}, missing, Problem(values, target, teacher)


def unusable(impl: str, device: str) -> str | None:
    """Why one of our implementations cannot run on this device, or None."""
    if (impl == "cpu") != (device == "cpu"):
        return "needs a CUDA GPU" if device == "cpu" else "needs --device cpu"
    known = _backends.implementations()[impl]
    return None if known.available else known.reason


def ours(impl: str, values: Tensor, target: Tensor, teacher: Tensor) -> dict[Key, Step]:
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
