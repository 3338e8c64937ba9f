"""dlb_fast: self-distillation from the last mini-batch, fused and free.

>>> from dlb_fast import LastBatchLoss, fused_lb_loss
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

# torch loads with the first of these names, not with the package: `dlb-fast --help` is quick, and `dlb-fast doctor`
# reports on a torch that does not import.
_NAMES = {
    "buffer": ("LogitBuffer",),
    "functional": ("LossParts", "Teacher", "TopK", "distillation_loss", "dlb_step", "fused_lb_loss"),
    "linear": ("fused_linear_lb_loss",),
    "losses": ("DistillationLoss", "Inputs", "LastBatchLoss"),
    "methods.bake": ("BakeLoss", "FeatureHook", "bake_loss"),
    "methods.cs_kd": ("CsKDLoss", "cs_kd_loss"),
    "methods.ddgsd": ("DdgsdLoss", "ddgsd_loss"),
    "methods.elr": ("ElrLoss", "elr_loss"),
    "methods.gce": ("GceLoss", "gce_loss"),
    "methods.lsr_kd": ("LsrKDLoss", "lsr_kd_loss"),
    "methods.mr_kd": ("MrKDLoss", "WeightSnapshots", "mr_kd_loss"),
    "methods.ps_kd": ("LogitBank", "PsKDLoss", "ps_kd_loss"),
    "methods.r_drop": ("RDropLoss", "r_drop_loss"),
    "methods.sce": ("SceLoss", "sce_loss"),
    "methods.tf_kd": ("TfKDRegLoss", "tf_kd_reg_loss"),
    "methods.zipf": ("ZipfLoss", "zipf_loss"),
    "sharded": ("sharded_lb_loss",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [*_MODULE_OF, "__version__"]

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from .buffer import LogitBuffer as LogitBuffer
    from .functional import LossParts as LossParts
    from .functional import Teacher as Teacher
    from .functional import TopK as TopK
    from .functional import distillation_loss as distillation_loss
    from .functional import dlb_step as dlb_step
    from .functional import fused_lb_loss as fused_lb_loss
    from .linear import fused_linear_lb_loss as fused_linear_lb_loss
    from .losses import DistillationLoss as DistillationLoss
    from .losses import Inputs as Inputs
    from .losses import LastBatchLoss as LastBatchLoss
    from .methods.bake import BakeLoss as BakeLoss
    from .methods.bake import FeatureHook as FeatureHook
    from .methods.bake import bake_loss as bake_loss
    from .methods.cs_kd import CsKDLoss as CsKDLoss
    from .methods.cs_kd import cs_kd_loss as cs_kd_loss
    from .methods.ddgsd import DdgsdLoss as DdgsdLoss
    from .methods.ddgsd import ddgsd_loss as ddgsd_loss
    from .methods.elr import ElrLoss as ElrLoss
    from .methods.elr import elr_loss as elr_loss
    from .methods.gce import GceLoss as GceLoss
    from .methods.gce import gce_loss as gce_loss
    from .methods.lsr_kd import LsrKDLoss as LsrKDLoss
    from .methods.lsr_kd import lsr_kd_loss as lsr_kd_loss
    from .methods.mr_kd import MrKDLoss as MrKDLoss
    from .methods.mr_kd import WeightSnapshots as WeightSnapshots
    from .methods.mr_kd import mr_kd_loss as mr_kd_loss
    from .methods.ps_kd import LogitBank as LogitBank
    from .methods.ps_kd import PsKDLoss as PsKDLoss
    from .methods.ps_kd import ps_kd_loss as ps_kd_loss
    from .methods.r_drop import RDropLoss as RDropLoss
    from .methods.r_drop import r_drop_loss as r_drop_loss
    from .methods.sce import SceLoss as SceLoss
    from .methods.sce import sce_loss as sce_loss
    from .methods.tf_kd import TfKDRegLoss as TfKDRegLoss
    from .methods.tf_kd import tf_kd_reg_loss as tf_kd_reg_loss
    from .methods.zipf import ZipfLoss as ZipfLoss
    from .methods.zipf import zipf_loss as zipf_loss
    from .sharded import sharded_lb_loss as sharded_lb_loss


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dlb_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
