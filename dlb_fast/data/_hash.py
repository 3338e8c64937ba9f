"""Counter-based 64-bit hashing: the one source of randomness of this room.

Everything random here (the epochs' orders, every view's crop) is a pure function of integers: SplitMix64's finaliser
folded over (seed, domain, fields). It is integer arithmetic modulo 2**64, so scalar Python, NumPy and every platform
give the same bits, nothing depends on the version of a random generator, and there is no generator state to save.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MASK = 0xFFFFFFFFFFFFFFFF
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, SplitMix64's increment
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB

# Domains keep the streams of one seed apart: an epoch's order must not be correlated with its crops.
ORDER = 0x6F72646572
VIEW = 0x76696577
SPLIT = 0x73706C6974
NOISE = 0x6E6F697365
SUBSET = 0x737562736574
SYNTHETIC = 0x73796E7468
FLIP = 0x666C6970
MIX = 0x6D6978
ERASE = 0x6572617365
WORKERS = 0x776F726B657273

U64 = NDArray[np.uint64]


def mix(z: int) -> int:
    """SplitMix64's finaliser on one Python integer below 2**64: a bijection with good avalanche."""
    z = ((z ^ (z >> 30)) * _M1) & MASK
    z = ((z ^ (z >> 27)) * _M2) & MASK
    return z ^ (z >> 31)


def fold(key: int, field: int) -> int:
    """Absorb one integer (negative ones wrap modulo 2**64) into a 64-bit key."""
    return mix(((key ^ (field & MASK)) + GOLDEN) & MASK)


def key_of(seed: int, *fields: int) -> int:
    """The 64-bit key of a seed and a tuple of integers; the order of the fields matters."""
    key = mix((seed + GOLDEN) & MASK)
    for field in fields:
        key = fold(key, field)
    return key


def mix_array(z: U64) -> U64:
    """`mix` on a uint64 array; returns a new array."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_M1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_M2)
    return z ^ (z >> np.uint64(31))


def fold_array(key: int | U64, field: NDArray[np.int64] | U64) -> U64:
    """`fold` on arrays: element i is `fold(key[i] or key, field[i])`."""
    absorbed = np.asarray(field).astype(np.uint64) ^ (np.uint64(key) if isinstance(key, int) else key)
    return mix_array(absorbed + np.uint64(GOLDEN))


def permutation(key: int, length: int) -> NDArray[np.int64]:
    """A permutation of range(length): the order of hashed keys (stable, so ties cannot differ between platforms)."""
    hashed = fold_array(key, np.arange(length, dtype=np.int64))
    return np.argsort(hashed, kind="stable").astype(np.int64, copy=False)
