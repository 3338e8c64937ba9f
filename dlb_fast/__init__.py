"""dlb_fast: self-distillation from the last mini-batch, fused and free.

>>> from dlb_fast import LastBatchLoss, fused_lb_loss
"""

from ._version import __version__ as __version__
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
from .functional import LossParts, fused_lb_loss
from .losses import LastBatchLoss
from .memories import FeatureTap, LogitBank, ModelCopies
from .teachers import Lesson, NoTeacher, Scene, Teacher, VirtualTeacher

__all__ = [
    "LastBatchLoss", "LogitBuffer", "LossParts", "fused_lb_loss",
    "bake_loss", "cs_kd_loss", "ddgsd_loss", "lsr_kd_loss", "mr_kd_loss", "ps_kd_loss", "tf_kd_reg_loss", "zipf_loss",
    "BakeLoss", "CsKDLoss", "DdgsdLoss", "LsrKDLoss", "MrKDLoss", "PsKDLoss", "TaughtLoss", "TfKDRegLoss", "ZipfLoss",
    "Lesson", "NoTeacher", "Scene", "Teacher", "VirtualTeacher", "FeatureTap", "LogitBank", "ModelCopies",
    "__version__",
]  # fmt: skip
