"""Host memory for batches that is used again once nobody holds it.

A batch of images is tens of megabytes; fresh from the system, its pages cost more time to map and clear than the
pixels take to write. Here memory is lent: a tensor's storage keeps a NumPy array alive, and when the last tensor, view
or NumPy alias of it is gone, that array dies and its memory returns. So what a consumer holds is never written again.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch

__all__ = ["BufferPool", "tensor_of"]

_ALIGN = 64


def tensor_of(value: Any) -> torch.Tensor:
    """A tensor where it is; an array as a tensor of the CPU, whatever the default device is.

    Example:
        >>> tensor_of(np.zeros(2)).device
        device(type='cpu')
    """
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")


class BufferPool:
    """Lends uninitialised host tensors and takes their memory back by itself.

    Args:
        keep: blocks kept for reuse; further ones go back to the system.

    Example:
        >>> pool = BufferPool()
        >>> first = pool.empty((4, 4), torch.float32)
        >>> address = first.data_ptr()
        >>> del first
        >>> pool.empty((4, 4), torch.float32).data_ptr() == address
        True
    """

    def __init__(self, keep: int | None = 4) -> None:
        self._free: deque[np.ndarray[Any, np.dtype[np.uint8]]] = deque(maxlen=keep)  # appends and pops are atomic

    def __reduce__(self) -> tuple[type[BufferPool], tuple[int | None]]:
        return BufferPool, (self._free.maxlen,)  # a copy has no use for what is free here

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor of one batch; its memory comes back when its storage dies."""
        size = math.prod(shape) * dtype.itemsize
        block = self._block(size + _ALIGN)
        start = -block.ctypes.data % _ALIGN
        lent = block[start : start + size]
        weakref.finalize(lent, self._free.append, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

    def _block(self, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        for _ in range(len(self._free)):
            try:
                block = self._free.popleft()
            except IndexError:  # another thread was faster
                break
            if size <= len(block) <= 2 * size:
                return block
            self._free.append(block)
        return np.empty(size, dtype=np.uint8)
