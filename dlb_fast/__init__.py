"""dlb_fast: self-distillation from the last mini-batch, fused and free.

>>> from dlb_fast import LastBatchLoss, fused_lb_loss
"""

from .buffer import LogitBuffer as LogitBuffer
from .functional import LossParts as LossParts
from .functional import fused_lb_loss as fused_lb_loss
from .losses import LastBatchLoss as LastBatchLoss

__version__ = "0.1.0"
__all__ = ["LastBatchLoss", "LogitBuffer", "LossParts", "fused_lb_loss"]
