"""dlb_fast: self-distillation from the last mini-batch, fused and free.

>>> from dlb_fast import LastBatchLoss, fused_lb_loss
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .buffer import LogitBuffer
    from .family import (
        bake_loss,
        cs_kd_loss,
        ddgsd_loss,
        lsr_kd_loss,
        mr_kd_loss,
        ps_kd_loss,
        tf_kd_reg_loss,
        zipf_loss,
    )
    from .family_losses import (
        BakeLoss,
        CsKDLoss,
        DdgsdLoss,
        LsrKDLoss,
        MrKDLoss,
        PsKDLoss,
        TaughtLoss,
        TfKDRegLoss,
        ZipfLoss,
    )
    from .functional import LossParts, dlb_step, fused_lb_loss
    from .losses import LastBatchLoss
    from .memories import FeatureTap, LogitBank, ModelCopies
    from .teachers import Lesson, NoTeacher, Scene, Teacher, VirtualTeacher

# The same names for run time. They load when first used, so that `dlb-fast --help` is quick and `dlb-fast doctor` can
# report on a torch that does not import. A test compares the two lists.
_FACES = {
    "buffer": "LogitBuffer",
    "family": "bake_loss cs_kd_loss ddgsd_loss lsr_kd_loss mr_kd_loss ps_kd_loss tf_kd_reg_loss zipf_loss",
    "family_losses": "BakeLoss CsKDLoss DdgsdLoss LsrKDLoss MrKDLoss PsKDLoss TaughtLoss TfKDRegLoss ZipfLoss",
    "functional": "LossParts dlb_step fused_lb_loss",
    "losses": "LastBatchLoss",
    "memories": "FeatureTap LogitBank ModelCopies",
    "teachers": "Lesson NoTeacher Scene Teacher VirtualTeacher",
}
_HOME = {name: module for module, names in _FACES.items() for name in names.split()}

__all__ = [
    "LastBatchLoss", "LogitBuffer", "LossParts", "dlb_step", "fused_lb_loss",
    "bake_loss", "cs_kd_loss", "ddgsd_loss", "lsr_kd_loss", "mr_kd_loss", "ps_kd_loss", "tf_kd_reg_loss", "zipf_loss",
    "BakeLoss", "CsKDLoss", "DdgsdLoss", "LsrKDLoss", "MrKDLoss", "PsKDLoss", "TaughtLoss", "TfKDRegLoss", "ZipfLoss",
    "Lesson", "NoTeacher", "Scene", "Teacher", "VirtualTeacher", "FeatureTap", "LogitBank", "ModelCopies",
    "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dlb_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
