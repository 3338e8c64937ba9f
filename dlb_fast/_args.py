"""The checkers of arguments. A message names the operation, the argument, what was expected, what came and the remedy.

Checks look at shapes, dtypes, devices and Python numbers; values on a device are never read, because that would wait
for it. The compiled CPU op checks the labels while it reads them, and `check_label_range` does it for CPU tensors on
the other implementations. On a GPU a label outside [0, C) makes its row NaN.
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

IMPLEMENTATIONS = ("cuda", "triton", "cpu", "torch")
CUDA_LARGEST = 1 << 24  # rows or classes of the CUDA kernels, as in csrc/cuda/plan.h
FLOAT32_INTEGERS = 1 << 24  # below it every integer is a float32
REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

LARGEST = 1e30
"""Of a weight: its product with a loss and with tau^2 must stay in float32."""
TEMPERATURES = (1e-18, 100.0, 1e6)
"""Smallest tau, and the largest for float32 arithmetic and for float64 logits. tau^2 KL is a product of a large and a
small number, and the small one has the rounding error of the two entropies whose difference it is: the value is off by
tau^2 * 6e-8 in float32 (6e-4 at 100, 600 at 1e5) and by tau^2 * 1e-16 in float64. Below 1e-18, tau^2 leaves float32."""

_INSTEAD = {
    "DTensor": "a DTensor (sharded_lb_loss takes split classes); pass {0}.full_tensor(), or {0}.to_local() where every "
    "rank computes the loss of whole rows of its own",
    "MaskedTensor": "a MaskedTensor; pass {0}.get_data(), and leave rows out by ignore_index and kd_mask",
    "nested": "a nested tensor; join its rows with torch.cat({0}.unbind())",
    "quantized": "a quantized tensor; pass {0}.dequantize()",
    "layout": "a tensor of layout {1}; pass {0}.to_dense()",
}


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the nearest known name, or "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def as_int(value: object, op: str, name: str, minimum: int, expected: str = "an integer") -> int:
    """``value`` as an int >= ``minimum``; NumPy's integers are integers, bools and floats are not."""
    if type(value) is int:
        number = value
    else:
        try:
            if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
                raise TypeError
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{op}: {name} must be {expected}, got {value!r} ({type(value).__name__})") from None
    if number < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {number}")
    return number


def as_number(op: str, name: str, value: object, expected: str = "a number") -> float:
    """``value`` as a Python number; NumPy's numbers and arrays of shape () are numbers, bools are not."""
    kind = type(value)
    if kind is float or kind is int:
        return value  # type: ignore[return-value]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if getattr(value, "ndim", None) == 0 and not isinstance(value, Tensor):
        return as_number(op, name, value.item(), expected)  # type: ignore[attr-defined]
    one = value.numel() == 1 if isinstance(value, Tensor) else getattr(value, "size", 0) == 1
    hint = f"; use {name}.item()" if one else ""
    raise TypeError(f"{op}: {name} must be {expected}, got {kind.__name__}{hint}")


def has_values(value: Tensor) -> bool:
    """Whether a tensor has values that Python can read: not on meta, not traced, not fake, not batched by vmap."""
    if value.is_meta or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    mode = torch._C._TorchDispatchModeKey
    return not isinstance(value, FakeTensor) and not any(map(torch._C._get_dispatch_mode, (mode.FAKE, mode.PROXY)))


def readable(value: Tensor) -> bool:
    """Whether to read a value for a check: it is on the CPU, so nothing has to wait for a device."""
    return value.is_cpu and has_values(value)


def on_device(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number or a tensor as a detached tensor there. A number is filled in: its copy would wait for a GPU."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def check_tensor(op: str, name: str, value: object) -> Tensor:
    """A tensor of this process whose entries lie in memory: not sharded, nested, masked, quantized or sparse."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    kind = type(value)
    if kind is not Tensor and kind is not nn.Parameter:
        for base in kind.__mro__:
            if base.__name__ in _INSTEAD:
                raise TypeError(f"{op}: {name} must be a plain tensor, got {_INSTEAD[base.__name__].format(name)}")
    odd = "nested" if value.is_nested else "quantized" if value.is_quantized else "layout"
    if odd != "layout" or value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a plain tensor, got {_INSTEAD[odd].format(name, value.layout)}")
    return value


def check_same_device(op: str, name: str, value: Tensor, logits: Tensor) -> None:
    if value.device != logits.device:
        raise ValueError(
            f"{op}: {name} must be on the device of the logits ({logits.device}), got {value.device}; "
            f"move it with {name}.to(logits.device)"
        )


def check_logits(op: str, logits: Tensor, target: object = None) -> None:
    """Logits (B, C), C >= 1, floating point; ``target`` tells which remedy fits others."""
    check_tensor(op, "logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"{op}: logits must have shape (B, C), got {tuple(logits.shape)}; {_to_rows(logits, target)}")
    if logits.shape[1] < 1:
        raise ValueError(
            f"{op}: logits must have shape (B, C) with C >= 1, got {tuple(logits.shape)}; is the last layer's "
            "out_features the number of classes?"
        )
    if logits.dtype not in FLOATS:
        hint = "" if logits.is_complex() else "; pass logits.float()"
        raise TypeError(f"{op}: logits must be float32, bfloat16, float16 or float64, got {logits.dtype}{hint}")


def _to_rows(logits: Tensor, target: object) -> str:
    """How logits of another number of dimensions become rows, seen from the shape of the target."""
    shape, of = tuple(logits.shape), tuple(target.shape) if isinstance(target, Tensor) else None
    if len(shape) < 2:
        if not shape:
            return "there is no dimension of classes; do not reduce over it"
        if isinstance(target, Tensor) and of == shape and not target.is_floating_point():
            return (
                "one logit per row is a model of two classes whose first logit is 0: pass "
                "torch.stack([torch.zeros_like(logits), logits], 1)"
            )
        of_one = of is not None and (not of or of == shape)
        return f"add the batch dimension: logits[None]{' and target[None]' if of_one else ''}"
    last = "logits.flatten(0, -2)", "where the classes are the last dimension, "
    second = "logits.movedim(1, -1).flatten(0, -2)", "where they are the second, as in torch's cross entropy, "
    along_last, along_second = shape[:-1], (shape[0], *shape[2:])
    rows = {
        last: (along_last, (*along_last, 1), (math.prod(along_last),)),
        second: (along_second, (shape[0], 1, *shape[2:]), (math.prod(along_second),)),
    }
    fits = [how for how, shapes in rows.items() if of in shapes]
    if len(fits) == 1:
        of_rows = "" if len(of or ()) == 1 else " and target.flatten()"
        which = "the class dimension is the last" if fits[0] is last else "move the class dimension last, then flatten"
        return f"{which}: pass {fits[0][0]}{of_rows}"
    dense = of == shape
    pieces = []
    for way, when in (last, second):
        of_target = "" if of is None or len(of) == 1 else " and target.flatten()"
        of_target = f" and {way.replace('logits', 'target')}" if dense else of_target
        pieces.append(f"{when}pass {way}{of_target}")
    return "; ".join(pieces)


def check_target(op: str, logits: Tensor, target: Tensor, name: str = "target") -> Tensor:
    """Integer labels (B,) as int64, in which ``ignore_index`` is compared, or a floating distribution (B, C)."""
    check_tensor(op, name, target)
    check_same_device(op, name, target, logits)
    batch, classes = logits.shape
    if target.dim() == 1 and target.shape[0] == batch:
        if target.dtype not in INTEGERS:
            raise TypeError(
                f"{op}: {name} of shape (B,) must hold integer class labels, got {target.dtype}; "
                f"use {name}.long(), or a (B, C) tensor for class probabilities"
            )
        return target.long()
    if target.dim() == 2 and target.shape == logits.shape and (classes > 1 or target.is_floating_point()):
        if not target.is_floating_point():
            raise TypeError(
                f"{op}: {name} of shape (B, C) must hold probabilities (floating), got {target.dtype}; one-hot rows "
                f"become labels by {name}.argmax(1)"
            )
        return target
    remedies = {
        (batch, 1): f"; pass {name}.squeeze(1){'.long()' if target.is_floating_point() else ''}",
        (classes, batch): f"; pass {name}.T",
        (): f"; pass {name}[None]",
        (classes,): f"; pass {name}[None]" if batch == 1 and target.is_floating_point() else "",
    }
    raise ValueError(
        f"{op}: {name} must have shape ({batch},) for labels or ({batch}, {classes}) for probabilities, "
        f"got {tuple(target.shape)}{remedies.get(tuple(target.shape), '')}"
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
    labels = target.long()  # a narrow integer cannot be compared with every number of classes
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: {name}[{row}] = {int(target[row])} is not a class: expected 0 <= label < {classes} "
            f"or ignore_index ({ignore_index}); check num_classes and the label mapping of the dataset"
        )


def check_teacher(op: str, logits: Tensor, teacher: Tensor, name: str = "last_logits") -> None:
    """Teacher rows (H, C) with H <= B."""
    check_tensor(op, name, teacher)
    check_same_device(op, name, teacher, logits)
    batch, classes = logits.shape
    if teacher.dim() != 2 or teacher.shape[1] != classes or teacher.shape[0] > batch:
        what = "the previous logits" if name == "last_logits" else "the teachers"
        hint = " (was the buffer made for another dataset or batch size? then reset it)" * (name == "last_logits")
        raise ValueError(
            f"{op}: {name} must have shape (H, C) with H <= {batch} and C = {classes}, got {tuple(teacher.shape)}; "
            f"it holds {what} of the first H rows of this batch{hint}"
        )
    if teacher.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be floating point, got {teacher.dtype}; pass {name}.float()")


def check_kept(op: str, k: object, classes: int) -> int:
    """``k`` of the top k of ``classes`` logits, whose class numbers must be exact in float32."""
    number = as_int(k, op, "k", 1)
    if number > classes:
        raise ValueError(f"{op}: k must be at most the {classes} classes, got {number}; keep the logits instead")
    if classes > FLOAT32_INTEGERS:
        raise ValueError(f"{op}: the top k takes at most {FLOAT32_INTEGERS} classes, got {classes}; keep the logits")
    return number


def check_top_k(op: str, values: Tensor, indices: Tensor, logsumexp: Tensor) -> None:
    """The fields of a TopK: (H, k) floating, (H, k) integer and (H,) floating, on one device."""
    for name, value in (("values", values), ("indices", indices), ("logsumexp", logsumexp)):
        check_tensor(op, f"TopK.{name}", value)
        if value.device != values.device:
            raise ValueError(f"{op}: the fields of a TopK must be on one device, got {values.device}, {value.device}")
    if values.dim() != 2 or indices.shape != values.shape or logsumexp.shape != values.shape[:1]:
        raise ValueError(
            f"{op}: a TopK must have values (H, k), indices (H, k) and logsumexp (H,), got {tuple(values.shape)}, "
            f"{tuple(indices.shape)} and {tuple(logsumexp.shape)}; TopK.of(logits, k, temperature) makes them"
        )
    if values.dtype not in FLOATS or indices.dtype not in INTEGERS or logsumexp.dtype not in FLOATS:
        raise TypeError(
            f"{op}: a TopK must have floating values and logsumexp and integer indices, got {values.dtype}, "
            f"{logsumexp.dtype} and {indices.dtype}; use indices.long()"
        )


def check_packed(op: str, logits: Tensor, packed: Tensor) -> None:
    """A packed TopK (H, 2 k + 1), H <= B, in a dtype that holds the class numbers."""
    check_tensor(op, "teacher", packed)
    check_same_device(op, "teacher", packed, logits)
    batch, classes = logits.shape
    if packed.dim() != 2 or packed.shape[1] % 2 == 0 or packed.shape[1] < 3 or packed.shape[0] > batch:
        raise ValueError(
            f"{op}: a teacher of kind 'top_k' must have shape (H, 2 k + 1) with H <= {batch}, got "
            f"{tuple(packed.shape)}; TopK.of(logits, k, temperature).packed() makes it"
        )
    check_kept(op, packed.shape[1] // 2, classes)
    if packed.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: a teacher of kind 'top_k' must be float32 or float64, got {packed.dtype}")


def check_kd_mask(op: str, logits: Tensor, kd_mask: Tensor, rows: int, name: str = "kd_mask") -> None:
    """A bool per row with a teacher."""
    check_tensor(op, name, kd_mask)
    check_same_device(op, name, kd_mask, logits)
    if kd_mask.dtype != torch.bool or kd_mask.shape != (rows,):
        remedy = "" if kd_mask.dtype == torch.bool else f"; use {name}.bool()"
        if rows < logits.shape[0] and kd_mask.shape == logits.shape[:1]:
            remedy = f"; only the first {rows} rows have one: pass {name}[:{rows}]"
        raise ValueError(
            f"{op}: {name} must be a bool tensor of shape ({rows},), one entry per row with a teacher, "
            f"got {kd_mask.dtype} {tuple(kd_mask.shape)}{remedy}"
        )


def check_weight(op: str, logits: Tensor, weight: Tensor) -> None:
    """A weight per class, on the device of the logits."""
    check_tensor(op, "weight", weight)
    check_same_device(op, "weight", weight, logits)
    check_weight_form(op, weight, logits.shape[1])


def check_weight_form(op: str, weight: Tensor, classes: int) -> None:
    """A weight per class, on any device."""
    check_tensor(op, "weight", weight)
    if weight.shape != (classes,) or not weight.is_floating_point():
        raise ValueError(
            f"{op}: weight must be floating with shape ({classes},), one entry per class, "
            f"got {weight.dtype} {tuple(weight.shape)}{'; use weight.float()' if weight.dtype in INTEGERS else ''}"
        )


def check_rows(op: str, name: str, value: object, logits: Tensor) -> Tensor:
    """Floating rows (B, C), one for every row of the logits, on their device."""
    rows = check_tensor(op, name, value)
    check_same_device(op, name, rows, logits)
    if rows.shape != logits.shape or not rows.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be floating with the shape of the logits, {tuple(logits.shape)}, got {rows.dtype} "
            f"{tuple(rows.shape)}"
        )
    return rows


def check_ce_weight(op: str, alpha: float | Tensor, ce_weight: float, ce_alpha: float) -> tuple[float, float]:
    """``ce_weight >= 0`` and ``ce_weight + ce_alpha * alpha >= 0``: else training would drive the cross entropy up."""
    ce_weight = check_number(op, "ce_weight", ce_weight, positive=False)
    ce_alpha = as_number(op, "ce_alpha", ce_alpha)
    if not abs(ce_alpha) <= LARGEST:
        raise ValueError(f"{op}: ce_alpha must be finite, got {ce_alpha} (at most {LARGEST:g} in size)")
    if isinstance(alpha, Tensor):
        if not readable(alpha):
            return ce_weight, ce_alpha
        alpha = alpha.item()
    if ce_weight + ce_alpha * alpha < 0:
        raise ValueError(
            f"{op}: alpha must be at most {-ce_weight / ce_alpha:g}, got {alpha}: the cross entropy has the weight "
            f"{ce_weight:g} - {-ce_alpha:g} alpha, which must not be negative"
        )
    return ce_weight, ce_alpha


def check_ids(op: str, logits: Tensor, ids: Tensor) -> None:
    """An integer sample id per row."""
    check_tensor(op, "ids", ids)
    check_same_device(op, "ids", ids, logits)
    if ids.shape != (logits.shape[0],) or ids.dtype not in INTEGERS:
        raise ValueError(
            f"{op}: ids must be an integer tensor of shape ({logits.shape[0]},), one sample id per row, "
            f"got {ids.dtype} {tuple(ids.shape)}{'' if ids.dtype in INTEGERS else '; use ids.long()'}"
        )


def check_scalar(
    op: str,
    name: str,
    value: float | Tensor,
    *,
    positive: bool,
    most: float = LARGEST,
    least: float = 0.0,
    why: str = "",
) -> float | Tensor:
    """A finite number (> 0 or >= 0) in ``[least, most]``, as a Python number, or a 0-d floating tensor, whose value is
    read on the CPU only."""
    if isinstance(value, Tensor):
        check_tensor(op, name, value)
        if value.dim() != 0 or not value.is_floating_point():
            raise ValueError(
                f"{op}: {name} as a tensor must be 0-d and floating point, got {value.dtype} {tuple(value.shape)}"
            )
        if not readable(value):
            return value
        number = value.item()
    else:
        number = value = as_number(op, name, value, "a number or a 0-d tensor")
    if not (number > 0 if positive else number >= 0) or number == math.inf:
        raise ValueError(f"{op}: {name} must be finite and {'> 0' if positive else '>= 0'}, got {number}")
    if not least <= number <= most:
        raise ValueError(f"{op}: {name} must be between {least:g} and {most:g}, got {number}{why}")
    return value


def check_number(op: str, name: str, value: object, *, positive: bool) -> float:
    """A finite number, > 0 or >= 0; no tensor."""
    number = as_number(op, name, value)
    check_scalar(op, name, number, positive=positive)
    return number


def check_temperature(op: str, value: float | Tensor, dtype: torch.dtype = torch.float64) -> float | Tensor:
    """tau > 0, in the range where a loss over logits of ``dtype`` is right (see ``TEMPERATURES``)."""
    least, most, most64 = TEMPERATURES
    why = ": outside this range tau^2 KL is lost in rounding"
    if dtype != torch.float64:
        most64, why = most, f" with {dtype} logits{why}; float64 logits take up to {most64:g}"
    return check_scalar(op, "temperature", value, positive=True, least=least, most=most64, why=why)


def check_impl(op: str, impl: str) -> None:
    """The name of an implementation, whether or not it runs here."""
    if impl not in IMPLEMENTATIONS and impl != "auto":
        raise ValueError(f"{op}: impl must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def check_num_old(op: str, num_old: int | None) -> int | None:
    """A count of rows, or None."""
    return None if num_old is None else as_int(num_old, op, "num_old", 0, "an integer or None")


def check_reduction(op: str, reduction: str) -> None:
    """A known reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_share(op: str, name: str, value: object, expected: str = "a number") -> float:
    """A number in [0, 1]."""
    share = as_number(op, name, value, expected)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{op}: {name} must be between 0 and 1, got {share}")
    return share


def check_ignore_index(op: str, ignore_index: int) -> int:
    """An integer that a label can have."""
    try:
        number = as_int(ignore_index, op, "ignore_index", -(2**63))
    except TypeError:
        raise TypeError(
            f"{op}: ignore_index must be an integer, got {type(ignore_index).__name__}; "
            "leave it at -100 when no row is to be ignored"
        ) from None
    if number >= 2**63:
        raise ValueError(f"{op}: ignore_index must be below 2**63, got {number}; no label can be that large")
    return number


def check_pair(
    op: str, logits: Tensor, target: Tensor | None, target_b: Tensor | None, lam: float | Tensor | None
) -> float | Tensor:
    """The mixup pair form: two label vectors and a share, a number in [0, 1] or a tensor () or (B,); the share."""
    batch = logits.shape[0]
    if target is not None:
        check_target(op, logits, target)
    if target is None or target.dim() != 1 or target_b is None or lam is None:
        raise ValueError(f"{op}: the mixup pair form needs labels target (B,), labels target_b (B,) and lam together")
    check_target(op, logits, target_b, "target_b")
    if target_b.dim() != 1:
        raise ValueError(f"{op}: target_b must hold labels of shape ({batch},), got {tuple(target_b.shape)}")
    if not isinstance(lam, Tensor):
        return check_share(op, "lam", lam, "a number or a tensor")
    check_tensor(op, "lam", lam)
    if lam.shape not in ((), (batch,)) or lam.device != logits.device:
        raise ValueError(
            f"{op}: lam must have shape () or ({batch},) on {logits.device}, got {tuple(lam.shape)} on {lam.device}"
        )
    if not lam.is_floating_point():
        raise TypeError(f"{op}: lam must be floating point, got {lam.dtype}")
    if readable(lam) and not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"{op}: lam must be between 0 and 1, got {lam.min().item():g} to {lam.max().item():g}")
    return lam


def check_correct_share(op: str, correct_share: float | None) -> float | None:
    """None, or the probability of the right class in [0, 1]."""
    if correct_share is None:
        return None
    try:
        return check_share(op, "correct_share", correct_share)
    except (TypeError, ValueError):
        raise ValueError(
            f"{op}: correct_share must be None (uniform) or a number in [0, 1], got {correct_share!r}"
        ) from None


def check_dtype(op: str, name: str, dtype: object) -> None:
    """A dtype in which rows can be stored."""
    if dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be torch.float32, float16, bfloat16 or float64, got {dtype!r}")


def check_device(op: str, name: str, device: torch.device | str | None) -> torch.device | None:
    """None, or a device that torch knows."""
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{op}: {name} must be None or one such as 'cpu' or 'cuda:0', got {device!r}") from error
