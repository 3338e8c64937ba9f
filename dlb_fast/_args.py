"""The checkers of arguments. A message names the operation, the argument, what was expected, what came and the remedy.

Checks look at shapes, dtypes, devices and Python numbers; values on a device are never read, because that would wait
for it. The compiled CPU op checks the labels while it reads them, and `check_label_range` does it for CPU tensors on
the other implementations. On a GPU a label outside [0, C) makes its row NaN.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

IMPLEMENTATIONS = ("cuda", "triton", "cpu", "torch")
REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def as_int(value: object, op: str, name: str, minimum: int) -> int:
    """``value`` as an int >= ``minimum``; NumPy's integers are integers, bools and floats are not."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r} ({type(value).__name__})")
    number = operator.index(value)
    if number < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {number}")
    return number


def has_values(value: Tensor) -> bool:
    """Whether a tensor has values that Python can read: not on meta, not traced, not fake, not batched by vmap."""
    if value.is_meta or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    mode = torch._C._TorchDispatchModeKey
    return not isinstance(value, FakeTensor) and not any(map(torch._C._get_dispatch_mode, (mode.FAKE, mode.PROXY)))


def readable(value: Tensor) -> bool:
    """Whether to read a value for a check: it is on the CPU, so nothing has to wait for a device."""
    return value.is_cpu and has_values(value)


def check_tensor(op: str, name: str, value: object) -> Tensor:
    """A tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def _same_device(op: str, name: str, value: Tensor, logits: Tensor) -> None:
    if value.device != logits.device:
        raise ValueError(
            f"{op}: {name} must be on the device of the logits ({logits.device}), got {value.device}; "
            f"move it with {name}.to(logits.device)"
        )


def check_logits(op: str, logits: Tensor) -> None:
    """Logits (B, C), C >= 1, floating point."""
    if not isinstance(logits, Tensor):
        check_tensor(op, "logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(
            f"{op}: logits must have shape (B, C) with C >= 1, got {tuple(logits.shape)}; "
            "flatten sequence or pixel dimensions into the batch first"
        )
    if logits.dtype not in FLOATS:
        raise TypeError(f"{op}: logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")


def check_target(op: str, logits: Tensor, target: Tensor) -> None:
    """Integer labels (B,) or a floating distribution (B, C)."""
    check_tensor(op, "target", target)
    _same_device(op, "target", target, logits)
    batch, classes = logits.shape
    if target.dim() == 1 and target.shape[0] == batch:
        if target.dtype not in INTEGERS:
            raise TypeError(
                f"{op}: target of shape (B,) must hold integer class labels, got {target.dtype}; "
                "use target.long(), or a (B, C) tensor for class probabilities"
            )
        return
    if target.dim() == 2 and target.shape == logits.shape:
        if not target.is_floating_point():
            raise TypeError(f"{op}: target of shape (B, C) must hold probabilities (floating), got {target.dtype}")
        return
    raise ValueError(
        f"{op}: target must have shape ({batch},) for labels or ({batch}, {classes}) for probabilities, "
        f"got {tuple(target.shape)}"
    )


def check_label_ranges(
    op: str, target: Tensor | None, target_b: Tensor | None, classes: int, ignore_index: int
) -> None:
    """:func:`check_label_range` of both labels of the mixup pair form, where they are given."""
    for name, labels in (("target", target), ("target_b", target_b)):
        if labels is not None:
            check_label_range(op, labels, classes, ignore_index, name)


def check_label_range(op: str, target: Tensor, classes: int, ignore_index: int, name: str = "target") -> None:
    """Every label in [0, C) or equal to ``ignore_index``; reads CPU labels only, see `readable`."""
    if target.dim() != 1 or not readable(target):
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: {name}[{row}] = {int(target[row])} is not a class: expected 0 <= label < {classes} "
            f"or ignore_index ({ignore_index}); check num_classes and the label mapping of the dataset"
        )


def check_teacher(op: str, logits: Tensor, teacher: Tensor, name: str = "last_logits") -> None:
    """Teacher rows (H, C) with H <= B."""
    check_tensor(op, name, teacher)
    _same_device(op, name, teacher, logits)
    batch, classes = logits.shape
    if teacher.dim() != 2 or teacher.shape[1] != classes or teacher.shape[0] > batch:
        what = "the previous logits" if name == "last_logits" else "the teachers"
        hint = " (was the buffer made for another dataset or batch size? then reset it)" * (name == "last_logits")
        raise ValueError(
            f"{op}: {name} must have shape (H, C) with H <= {batch} and C = {classes}, got {tuple(teacher.shape)}; "
            f"it holds {what} of the first H rows of this batch{hint}"
        )
    if teacher.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be floating point, got {teacher.dtype}")


def check_kd_mask(op: str, logits: Tensor, kd_mask: Tensor, rows: int, name: str = "kd_mask") -> None:
    """A bool per row with a teacher."""
    check_tensor(op, name, kd_mask)
    _same_device(op, name, kd_mask, logits)
    if kd_mask.dtype != torch.bool or kd_mask.shape != (rows,):
        raise ValueError(
            f"{op}: {name} must be a bool tensor of shape ({rows},), one entry per row with a teacher, "
            f"got {kd_mask.dtype} {tuple(kd_mask.shape)}"
        )


def check_weight(op: str, logits: Tensor, weight: Tensor) -> None:
    """A weight per class, on the device of the logits."""
    check_tensor(op, "weight", weight)
    _same_device(op, "weight", weight, logits)
    check_weight_form(op, weight, logits.shape[1])


def check_weight_form(op: str, weight: Tensor, classes: int) -> None:
    """A weight per class, on any device."""
    check_tensor(op, "weight", weight)
    if weight.shape != (classes,) or not weight.is_floating_point():
        raise ValueError(
            f"{op}: weight must be floating with shape ({classes},), one entry per class, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )


def check_rows(op: str, name: str, value: object, logits: Tensor) -> Tensor:
    """Floating rows (B, C), one for every row of the logits, on their device."""
    rows = check_tensor(op, name, value)
    _same_device(op, name, rows, logits)
    if rows.shape != logits.shape or not rows.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be floating with the shape of the logits, {tuple(logits.shape)}, got {rows.dtype} "
            f"{tuple(rows.shape)}"
        )
    return rows


def check_ce_weight(op: str, alpha: float | Tensor, ce_weight: float, ce_alpha: float) -> None:
    """``ce_weight >= 0`` and ``ce_weight + ce_alpha * alpha >= 0``: else training would drive the cross entropy up."""
    for name, value in (("ce_weight", ce_weight), ("ce_alpha", ce_alpha)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not 0 <= ce_weight < math.inf:
        raise ValueError(f"{op}: ce_weight must be finite and >= 0, got {ce_weight}")
    if not math.isfinite(ce_alpha):
        raise ValueError(f"{op}: ce_alpha must be finite, got {ce_alpha}")
    if isinstance(alpha, Tensor):
        if not readable(alpha):
            return
        alpha = alpha.item()
    if ce_weight + ce_alpha * alpha < 0:
        raise ValueError(
            f"{op}: alpha must be at most {-ce_weight / ce_alpha:g}, got {alpha}: the cross entropy has the weight "
            f"{ce_weight:g} - {-ce_alpha:g} alpha, which must not be negative"
        )


def check_ids(op: str, logits: Tensor, ids: Tensor) -> None:
    """An integer sample id per row."""
    check_tensor(op, "ids", ids)
    _same_device(op, "ids", ids, logits)
    if ids.shape != (logits.shape[0],) or ids.dtype not in INTEGERS:
        raise ValueError(
            f"{op}: ids must be an integer tensor of shape ({logits.shape[0]},), one sample id per row, "
            f"got {ids.dtype} {tuple(ids.shape)}"
        )


def check_scalar(op: str, name: str, value: float | Tensor, *, positive: bool) -> None:
    """A finite Python number (> 0 or >= 0), or a 0-d floating tensor, whose value is read on the CPU only."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise ValueError(
                f"{op}: {name} as a tensor must be 0-d and floating point, got {value.dtype} {tuple(value.shape)}"
            )
        if not readable(value):
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number or a 0-d tensor, got {type(value).__name__}")
    if not (value > 0 if positive else value >= 0) or value == math.inf:
        bound = "> 0" if positive else ">= 0"
        raise ValueError(f"{op}: {name} must be finite and {bound}, got {value}")


def check_impl(op: str, impl: str) -> None:
    """The name of an implementation, whether or not it runs here."""
    if impl not in IMPLEMENTATIONS and impl != "auto":
        raise ValueError(f"{op}: impl must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def check_num_old(op: str, num_old: int | None) -> None:
    """A count of rows, or None."""
    if num_old is not None and (isinstance(num_old, bool) or not isinstance(num_old, int)):
        raise TypeError(f"{op}: num_old must be an integer or None, got {num_old!r}")


def check_options(op: str, label_smoothing: float, reduction: str) -> None:
    """``0 <= label_smoothing <= 1`` and a known reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"{op}: label_smoothing must be a number, got {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")


def check_ignore_index(op: str, ignore_index: int) -> None:
    """A Python integer."""
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(
            f"{op}: ignore_index must be an integer, got {type(ignore_index).__name__}; "
            "leave it at -100 when no row is to be ignored"
        )


def check_pair(
    op: str, logits: Tensor, target: Tensor | None, target_b: Tensor | None, lam: float | Tensor | None
) -> None:
    """The mixup pair form: two label vectors and a share, a number in [0, 1] or a tensor () or (B,)."""
    if target is None or target.dim() != 1 or target_b is None or lam is None:
        raise ValueError(f"{op}: the mixup pair form needs labels target (B,), labels target_b (B,) and lam together")
    check_target(op, logits, target_b)
    if target_b.dim() != 1:
        raise ValueError(f"{op}: target_b must hold labels of shape ({logits.shape[0]},), got {tuple(target_b.shape)}")
    if not isinstance(lam, Tensor):
        if not isinstance(lam, (int, float)):
            raise TypeError(f"{op}: lam must be a number or a tensor, got {type(lam).__name__}")
        if not 0.0 <= lam <= 1.0:
            raise ValueError(f"{op}: lam must be between 0 and 1, got {lam}")
    elif lam.shape not in ((), (logits.shape[0],)) or lam.device != logits.device:
        raise ValueError(
            f"{op}: lam must have shape () or ({logits.shape[0]},) on {logits.device}, got {tuple(lam.shape)} on "
            f"{lam.device}"
        )
    elif not lam.is_floating_point():
        raise TypeError(f"{op}: lam must be floating point, got {lam.dtype}")
    elif readable(lam) and not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"{op}: lam must be between 0 and 1, got {lam.min().item():g} to {lam.max().item():g}")


def check_correct_share(op: str, correct_share: float | None) -> None:
    """None, or the probability of the right class in [0, 1]."""
    if correct_share is None:
        return
    if isinstance(correct_share, bool) or not isinstance(correct_share, (int, float)) or not 0 <= correct_share <= 1:
        raise ValueError(f"{op}: correct_share must be None (uniform) or a number in [0, 1], got {correct_share!r}")


def check_device(op: str, name: str, device: torch.device | str | None) -> torch.device | None:
    """None, or a device that torch knows."""
    try:
        return None if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{op}: {name} must be None or one such as 'cpu' or 'cuda:0', got {device!r}") from error
