"""Pseudo-random permutation of any range, computed only for the requested elements.

Shuffling a list of all windows takes memory and time for all of them, at every start on every rank. A Feistel network
permutes 2^2k numbers without a list; results outside the range go through it again (cycle walking).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

FEISTEL_ROUNDS = 6
MIN_HALF_BITS = 2  # with fewer bits the network has too few outcomes to look random
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def permute(index: Int64Array, size: int, key: npt.NDArray[np.uint64]) -> Int64Array:
    """Map each index by the permutation of range(size) that its key selects.

    Args:
        index: numbers in range(size).
        key: the key of each index, from `derive_keys`.

    Returns:
        Numbers in range(size); under one key, different indices give different numbers.

    Source: Luby and Rackoff 1988 (Feistel networks as permutations); Black and Rogaway 2002, section 4 (cycle walking).

    >>> sorted(permute(np.arange(5), 5, derive_keys(7, np.zeros(5, np.int64))).tolist())
    [0, 1, 2, 3, 4]
    """
    # The network permutes numbers of 2 · half bits, the fewest that hold every index.
    half = np.uint64(max((int(size - 1).bit_length() + 1) // 2, MIN_HALF_BITS))
    mask = np.uint64((1 << int(half)) - 1)

    # Cycle walking: apply the network again to results that are not in range(size).
    out = index.astype(np.uint64)
    is_outside = np.ones(len(out), np.bool_)
    while is_outside.any():
        out[is_outside] = _apply_feistel_network(out[is_outside], half, mask, key[is_outside])
        is_outside = out >= size
    return out.astype(np.int64)


def derive_keys(seed: int, number: Int64Array) -> npt.NDArray[np.uint64]:
    """Return a key for each number under one seed."""
    seeds = np.full(number.shape, seed & (2**64 - 1), np.uint64)
    keys: npt.NDArray[np.uint64] = _mix_bits(_mix_bits(seeds) + number.astype(np.uint64) * GOLDEN_GAMMA)
    return keys


def _apply_feistel_network(value: Any, half: Any, mask: Any, key: Any) -> Any:
    left, right = value >> half, value & mask
    for feistel_round in range(FEISTEL_ROUNDS):
        round_constant = GOLDEN_GAMMA * np.full(len(right), feistel_round, np.uint64)
        mixed = _mix_bits(right + key + round_constant) & mask
        left, right = right, left ^ mixed
    return left << half | right


def _mix_bits(value: Any) -> Any:
    """Mix the bits of 64-bit integers. Source: the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
