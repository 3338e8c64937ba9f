"""The randomness of a view: a pure function of (seed, epoch the sample was drawn in, sample id, use).

`ViewRng` serves one view, `ViewRngs` a whole batch at once; both give the same numbers for the same view, so a batched
transform on the device and a per-image transform in a worker thread cut the same crop. No global, worker or thread
generator takes part: a view is the same whatever the thread count, the world size, the tier or the number of resumes.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from dlb_fast.data import _hash

_TO_UNIT = 2.0**-24  # 24 bits: exact in float32 and float64 alike


@functools.lru_cache(maxsize=64)
def _epoch_key(seed: int, epoch: int) -> int:
    return _hash.key_of(seed, _hash.VIEW, epoch)


def view_key(seed: int, epoch: int, sample: int, use: int) -> int:
    """The 64-bit key of one view.

    Args:
        seed: the run's seed.
        epoch: epoch in which the sample was drawn; the second use keeps it, also when it falls into the next epoch.
        sample: sample id.
        use: 0 for the first use (a new row), 1 for the second (an old row).
    """
    return _hash.fold(_epoch_key(int(seed), int(epoch)), 2 * int(sample) + int(use))


class ViewRng:
    """The random numbers of one view, counted from 0; cheap to make (about two microseconds).

    Args:
        seed, epoch, sample, use: see `view_key`.

    Example:
        >>> ViewRng(0, 0, 7, 0).integer(10) == ViewRng(0, 0, 7, 0).integer(10)
        True
    """

    __slots__ = ("counter", "epoch", "key", "sample", "seed", "use")

    def __init__(self, seed: int, epoch: int, sample: int, use: int) -> None:
        self.seed, self.epoch, self.sample, self.use = seed, epoch, sample, use
        self.key = view_key(seed, epoch, sample, use)
        self.counter = 0

    def bits(self) -> int:
        """The next 64 random bits."""
        self.counter += 1
        return _hash.mix((self.key + self.counter * _hash.GOLDEN) & _hash.MASK)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float in [low, high), 24 bits fine."""
        return low + (high - low) * ((self.bits() >> 40) * _TO_UNIT)

    def integer(self, bound: int) -> int:
        """An integer in [0, bound), bound <= 2**32; the bias is below bound / 2**32."""
        return ((self.bits() >> 32) * bound) >> 32

    def skip(self, count: int) -> None:
        """Leave out `count` draws, so that a transform with a varying number of them takes a fixed share."""
        self.counter += count

    def torch_generator(self) -> torch.Generator:
        """A torch generator seeded by this view, for transforms that take one (some ten microseconds)."""
        return torch.Generator().manual_seed(self.bits() >> 1)

    def numpy_generator(self) -> np.random.Generator:
        """A NumPy generator seeded by this view, for transforms that take one."""
        return np.random.Generator(np.random.PCG64(self.bits()))


class Draws:
    """Random numbers of n independent keys at once, counted from 0.

    Args:
        keys: (n,) uint64, one per row.
    """

    __slots__ = ("counter", "keys")

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        self.keys = keys
        self.counter = 0

    def __len__(self) -> int:
        return len(self.keys)

    def bits(self) -> NDArray[np.uint64]:
        """The next 64 random bits of every row, (n,) uint64."""
        self.counter += 1
        return _hash.mix_array(self.keys + np.uint64(self.counter * _hash.GOLDEN & _hash.MASK))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> NDArray[np.float64]:
        """(n,) float64 in [low, high)."""
        unit = (self.bits() >> np.uint64(40)).astype(np.float64) * _TO_UNIT
        return low + (high - low) * unit

    def integer(self, bound: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) int64 in [0, bound); `bound` may differ per row."""
        scaled = (self.bits() >> np.uint64(32)) * np.asarray(bound).astype(np.uint64)
        return (scaled >> np.uint64(32)).astype(np.int64)

    def skip(self, count: int) -> None:
        """Leave out `count` draws of every row."""
        self.counter += count


class ViewRngs(Draws):
    """The random numbers of n views at once, equal to those of n `ViewRng`s.

    Args:
        seed: the run's seed.
        epochs, samples, uses: integers or (n,) integer arrays, broadcast against each other; see `view_key`.
    """

    __slots__ = ("epochs", "samples", "seed", "uses")

    def __init__(self, seed: int, epochs: ArrayLike, samples: ArrayLike, uses: ArrayLike) -> None:
        epoch, sample, use = np.broadcast_arrays(*(np.asarray(a, dtype=np.int64) for a in (epochs, samples, uses)))
        self.seed, self.epochs, self.samples, self.uses = seed, epoch, sample, use
        keys = np.empty(sample.shape, dtype=np.uint64)
        for one in np.unique(epoch):  # one or two epochs in a batch
            rows = epoch == one
            keys[rows] = _hash.fold_array(_epoch_key(seed, int(one)), 2 * sample[rows] + use[rows])
        super().__init__(keys)
