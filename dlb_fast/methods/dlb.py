"""DLB, the method of this package: the rows of the last mini-batch, repeated, learn from their last logits.

The criterion is `LastBatchLoss` in `losses.py`, its function `fused_lb_loss` in `functional.py`, its definition
`reference.py`. Here it is registered, with the control that isolates the KL: the same batches with `alpha=0`.
Source: Shen et al., CVPR 2022; official code Meta-knowledge-Lab/DLB, `dlb.py`.
"""

from __future__ import annotations

from typing import Any

from ..losses import LastBatchLoss
from .registry import Method, register

_shared: dict[str, Any] = {
    "card": "dlb",
    "batches": "overlap",
    "hidden": ("dtype", "device", "keep", "k"),
}

register(
    Method(
        "two_view",
        LastBatchLoss,
        "the same batches with alpha=0: two views, no KL",
        fixed={"alpha": 0.0},
        variants={"two_view": ("two views, alpha=0", {})},
        **_shared,
    )
)
register(
    Method("dlb", LastBatchLoss, "self-distillation from the last mini-batch", variants={"dlb": ("DLB", {})}, **_shared)
)
