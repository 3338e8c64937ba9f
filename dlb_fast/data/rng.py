"""Counter-based random numbers: all randomness of this package comes from here.

Every random choice (an epoch's order, a view's crop) is a pure function of integers: SplitMix64's finaliser folded over
(seed, domain, fields). It is integer arithmetic modulo 2**64, so scalar Python, NumPy and every platform give the same
bits, and there is no generator state to save. `ViewRng` serves one view, `ViewRngs` all views of a batch at once; both
give the same numbers for the same view, independent of threads, ranks and resumes.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

MASK = 0xFFFFFFFFFFFFFFFF
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, SplitMix64's increment
MIX1, MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

# Domains separate the streams of one seed: an epoch's order must not be correlated with its crops.
ORDER = 0x6F72646572
VIEW = 0x76696577
SPLIT = 0x73706C6974
NOISE = 0x6E6F697365
SUBSET = 0x737562736574
SYNTHETIC = 0x73796E7468
FLIP = 0x666C6970
MIX = 0x6D6978
ERASE = 0x6572617365
COMPANION = 0x636F6D70616E
SUBSTITUTE = 0x73756273
GLOBAL = 0x676C6F62

U64 = NDArray[np.uint64]
_S30, _S27, _S31, _M1, _M2 = (np.uint64(value) for value in (30, 27, 31, MIX1, MIX2))
_TO_UNIT = 2.0**-24  # 24 bits are exact in float32 and float64


def mix(z: int) -> int:
    """SplitMix64's finaliser of one integer below 2**64: a bijection with good avalanche."""
    z = ((z ^ (z >> 30)) * MIX1) & MASK
    z = ((z ^ (z >> 27)) * MIX2) & MASK
    return z ^ (z >> 31)


def mix_array(z: U64) -> U64:
    """`mix` of every element; a new array."""
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


def fold(key: int, field: int) -> int:
    """The key derived from a key and one integer (negative integers wrap modulo 2**64)."""
    return mix(((key ^ (field & MASK)) + GOLDEN) & MASK)


def fold_array(key: int | U64, field: NDArray[np.int64] | U64) -> U64:
    """`fold` on arrays: element i is `fold(key[i] or key, field[i])`."""
    absorbed = np.asarray(field).astype(np.uint64) ^ (np.uint64(key) if isinstance(key, int) else key)
    return mix_array(absorbed + np.uint64(GOLDEN))


def key_of(seed: int, *fields: int) -> int:
    """The 64-bit key of a seed and a tuple of integers; their order matters."""
    key = mix((seed + GOLDEN) & MASK)
    for field in fields:
        key = fold(key, field)
    return key


def permutation(key: int, length: int) -> NDArray[np.int64]:
    """A permutation of range(length): the order of hashed keys (stable, so ties cannot differ between platforms)."""
    hashed = fold_array(key, np.arange(length, dtype=np.int64))
    return np.argsort(hashed, kind="stable").astype(np.int64, copy=False)


@functools.lru_cache(maxsize=64)
def _epoch_key(seed: int, epoch: int) -> int:
    return key_of(seed, VIEW, epoch)


def view_key(seed: int, epoch: int, sample: int, view: int) -> int:
    """The 64-bit key of one view.

    Args:
        seed: the run's seed.
        epoch: the epoch in which the sample was new, also for a second view that falls into the next epoch.
        sample: sample id.
        view: 0 for the first view (a new row), 1 for the second (a repeated row).
    """
    return fold(_epoch_key(int(seed), int(epoch)), 2 * int(sample) + int(view))


class ViewRng:
    """The random numbers of one view, counted from 0; it costs about two microseconds.

    Args:
        seed: see `view_key`.
        epoch: see `view_key`.
        sample: see `view_key`.
        view: see `view_key`.

    Example:
        >>> ViewRng(0, 0, 7, 0).integer(10) == ViewRng(0, 0, 7, 0).integer(10)
        True
    """

    __slots__ = ("counter", "epoch", "key", "sample", "seed", "view")

    def __init__(self, seed: int, epoch: int, sample: int, view: int) -> None:
        self.seed, self.epoch, self.sample, self.view = seed, epoch, sample, view
        self.key = view_key(seed, epoch, sample, view)
        self.counter = 0

    def bits(self) -> int:
        """The next 64 random bits."""
        self.counter += 1
        z = (self.key + self.counter * GOLDEN) & MASK  # `mix`, inlined because an image needs some forty calls
        z = ((z ^ (z >> 30)) * MIX1) & MASK
        z = ((z ^ (z >> 27)) * MIX2) & MASK
        return z ^ (z >> 31)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float in [low, high) with 24 random bits."""
        return low + (high - low) * ((self.bits() >> 40) * _TO_UNIT)

    def integer(self, bound: int) -> int:
        """An integer in [0, bound), bound <= 2**32; the bias is below bound / 2**32."""
        return ((self.bits() >> 32) * bound) >> 32

    def skip(self, count: int) -> None:
        """Skip `count` numbers, so that a transform always consumes the same number of them."""
        self.counter += count

    def torch_generator(self) -> torch.Generator:
        """A torch generator seeded by this view, for transforms that take one (some ten microseconds)."""
        return torch.Generator().manual_seed(self.bits() >> 1)

    def numpy_generator(self) -> np.random.Generator:
        """A NumPy generator seeded by this view, for transforms that take one."""
        return np.random.Generator(np.random.PCG64(self.bits()))

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Inside the block the global random numbers of torch, NumPy and Python follow from this view; afterwards they
        continue as if nothing had been drawn (without the second normal number that NumPy may have kept). For
        transforms that draw from them, in one thread; some 40 us.
        """
        key, generator = fold(self.key, GLOBAL), torch.default_generator  # no number of this view's own is used up
        kept, kept_python, kept_numpy = generator.get_state(), random.getstate(), np.random.mtrand.get_bit_generator()
        try:
            np.random.mtrand.set_bit_generator(_NUMPY)  # in place of `get_state`, which takes five times as long
            generator.manual_seed(key >> 1)
            np.random.seed(key & 0xFFFFFFFF)
            random.seed(key)
            yield
        finally:
            generator.set_state(kept)
            random.setstate(kept_python)
            np.random.mtrand.set_bit_generator(kept_numpy)


_NUMPY = np.random.MT19937(0)


class Draws:
    """Random numbers of n independent keys at once, counted from 0.

    Args:
        keys: (n,) uint64, one per row.
    """

    __slots__ = ("counter", "keys")

    def __init__(self, keys: U64) -> None:
        self.keys = keys
        self.counter = 0

    def __len__(self) -> int:
        return len(self.keys)

    def bits(self) -> U64:
        """The next 64 random bits of every row, (n,) uint64."""
        self.counter += 1
        z = self.keys + np.uint64(self.counter * GOLDEN & MASK)  # `mix_array`, inlined
        z = (z ^ (z >> _S30)) * _M1
        z = (z ^ (z >> _S27)) * _M2
        return z ^ (z >> _S31)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> NDArray[np.float64]:
        """(n,) float64 in [low, high)."""
        unit = (self.bits() >> np.uint64(40)).astype(np.float64) * _TO_UNIT
        return low + (high - low) * unit

    def integer(self, bound: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) int64 in [0, bound); `bound` may differ per row."""
        scaled = (self.bits() >> np.uint64(32)) * np.asarray(bound).astype(np.uint64)
        return (scaled >> np.uint64(32)).astype(np.int64)

    def skip(self, count: int) -> None:
        """Skip `count` numbers of every row."""
        self.counter += count


class ViewRngs(Draws):
    """The random numbers of n views at once, equal to those of n `ViewRng`s.

    Args:
        seed: the run's seed.
        epochs: integer or (n,) integers, see `view_key`.
        samples: (n,) integers.
        views: integer or (n,) integers.
    """

    __slots__ = ("epochs", "samples", "seed", "views")

    def __init__(self, seed: int, epochs: ArrayLike, samples: ArrayLike, views: ArrayLike) -> None:
        epoch, sample, view = np.broadcast_arrays(*map(_int64, (epochs, samples, views)))
        self.seed, self.epochs, self.samples, self.views = seed, epoch, sample, view
        self.counter = 0
        self.keys = np.empty(sample.shape, dtype=np.uint64)
        for one in np.unique(epoch):  # one or two epochs in a batch
            rows = epoch == one
            self.keys[rows] = fold_array(_epoch_key(seed, int(one)), 2 * sample[rows] + view[rows])


_int64 = functools.partial(np.asarray, dtype=np.int64)
