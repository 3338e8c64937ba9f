"""dlb_fast: self-distillation from the last mini-batch, fused and free.

>>> from dlb_fast import LastBatchLoss, fused_lb_loss
"""

from ._version import __version__ as __version__
from .buffer import LogitBuffer as LogitBuffer
from .functional import LossParts as LossParts
from .functional import fused_lb_loss as fused_lb_loss
from .losses import LastBatchLoss as LastBatchLoss

__all__ = ["LastBatchLoss", "LogitBuffer", "LossParts", "fused_lb_loss", "__version__"]
