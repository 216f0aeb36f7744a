"""A pseudo-random permutation of any range, computed for the elements that are asked for and no others.

Shuffling a list of all windows takes memory and time of all of them, at every start on every rank. A Feistel network
permutes 2^2k numbers without a list, and numbers that fall outside of the range are sent through it again.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

FEISTEL_ROUNDS = 6
MIN_HALF_BITS = 2  # below, a network has too few outcomes to look random
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def permute(index: Int64Array, size: int, key: npt.NDArray[np.uint64]) -> Int64Array:
    """Where the permutation of range(size) that a key chooses puts each index.

    Args:
        index: numbers in range(size).
        key: for each index the permutation it is asked of, as `keyed` makes them.

    Returns:
        Numbers in range(size); for one key, different ones for different indices.

    Source: Luby and Rackoff 1988 (Feistel networks as permutations); Black and Rogaway 2002, section 4 (cycle walking).

    >>> sorted(permute(np.arange(5), 5, derive_keys(7, np.zeros(5, np.int64))).tolist())
    [0, 1, 2, 3, 4]
    """
    half = np.uint64(max((int(size - 1).bit_length() + 1) // 2, MIN_HALF_BITS))
    mask = np.uint64((1 << int(half)) - 1)
    out = index.astype(np.uint64)
    walking = np.ones(len(out), np.bool_)
    while walking.any():
        out[walking] = _apply_feistel_network(out[walking], half, mask, key[walking])
        walking = out >= size
    return out.astype(np.int64)


def derive_keys(seed: int, number: Int64Array) -> npt.NDArray[np.uint64]:
    """A key for each number under one seed."""
    seeds = np.full(number.shape, seed & (2**64 - 1), np.uint64)
    keys: npt.NDArray[np.uint64] = _mix_bits(_mix_bits(seeds) + number.astype(np.uint64) * GOLDEN_GAMMA)
    return keys


def _apply_feistel_network(value: Any, half: Any, mask: Any, key: Any) -> Any:
    left, right = value >> half, value & mask
    for turn in range(FEISTEL_ROUNDS):
        left, right = (
            right,
            left ^ (_mix_bits(right + key + GOLDEN_GAMMA * np.full(len(right), turn, np.uint64)) & mask),
        )
    return left << half | right


def _mix_bits(value: Any) -> Any:
    """Spread 64 bits over each other: the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
