"""Data order: sources mixed by weight, reshuffled each epoch, as a pure function of the position.

A run's data is an endless sequence of windows, and its whole state is one integer, the position. The sequence consists
of blocks. In each block every source has its quota of places, shuffled for that block. A source's places iterate over
its windows, epoch after epoch, reshuffled for each epoch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yuan.data.shuffle import Int64Array, derive_keys, permute

PositionSpan = tuple[int, int]  # positions [first, end)

MAX_BLOCK_PLACES = 2**20  # places of the largest block; a rarer source would hardly differ from a missing one
MIN_PLACES_PER_SOURCE = 32  # so that rounding to whole places changes a weight by about 3 % at most
MIN_BLOCK_PLACES = 1024


@dataclass(frozen=True)
class Mixture:
    """Map positions to windows.

    Attributes:
        sizes: number of windows of each source.
        quotas: places of each source in a block.
        seed: seed of the shuffles.

    Raises:
        ValueError: if there is no source, or one has no window or no place.
    """

    sizes: tuple[int, ...]
    quotas: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.quotas) or min(self.sizes + self.quotas) < 1:
            raise ValueError(
                f"every source needs a window and a place in a block, got {self.sizes} windows and {self.quotas} "
                "places; leave empty sources out"
            )

    @property
    def block_size(self) -> int:
        return sum(self.quotas)

    def locate_windows(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return, for each position, the source number and the window number within that source."""
        block, place = np.divmod(positions, self.block_size)
        place = permute(place, self.block_size, derive_keys(self.seed, block))

        # Consecutive ranges of shuffled places belong to the sources, one quota each.
        ends = np.cumsum(self.quotas)
        sources = np.searchsorted(ends, place, side="right")

        windows = np.empty_like(place)
        for number, (size, quota, end) in enumerate(zip(self.sizes, self.quotas, ends, strict=True)):
            is_source = sources == number
            first_place = end - quota

            # Number the source's places across blocks; each `size` of them are an epoch over its windows.
            place_of_source = block[is_source] * quota + place[is_source] - first_place
            epoch, index = np.divmod(place_of_source, size)
            source_seed = self.seed ^ (number + 1) << 32  # differs from the seed that shuffles the blocks
            windows[is_source] = permute(index, size, derive_keys(source_seed, epoch))
        return sources.astype(np.int64), windows


def compute_quotas(sizes: Sequence[int], weights: Sequence[float] | None = None) -> tuple[int, ...]:
    """Return each source's places in a block, by weight; without weights each window has one, so a block is an epoch.

    Raises:
        ValueError: if a weight is not a positive number, or too small compared with the others.

    >>> compute_quotas((10, 20)), compute_quotas((10, 20), (1, 3))
    ((10, 20), (256, 768))
    """
    if weights is None:
        return tuple(sizes)
    if len(weights) != len(sizes) or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ValueError(
            f"every source needs a positive weight, got {list(weights)} for {len(sizes)} sources; "
            "leave a source without weight out"
        )

    shares = [weight / sum(weights) for weight in weights]
    block = max(MIN_BLOCK_PLACES, 2 ** math.ceil(math.log2(MIN_PLACES_PER_SOURCE / min(shares))))
    if block > MAX_BLOCK_PLACES:
        raise ValueError(
            f"the smallest weight is {min(shares):.2e} of the total, the minimum is "
            f"{MIN_PLACES_PER_SOURCE / MAX_BLOCK_PLACES:.2e}; raise it or leave the source out"
        )

    # Largest-remainder rounding: round down, then give the remaining places to the largest fractions.
    places = [int(share * block) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda n: places[n] - shares[n] * block)
    for number in by_remainder[: block - sum(places)]:
        places[number] += 1
    return tuple(places)


def find_unskipped_positions(start: int, count: int, skipped: Sequence[PositionSpan]) -> Int64Array:
    """Return `count` positions, beginning with the start-th one that is in no skipped span.

    Args:
        skipped: spans in ascending order that do not overlap.

    >>> find_unskipped_positions(1, 4, [(2, 4)]).tolist()
    [1, 4, 5, 6]
    """
    positions = np.arange(start, start + count, dtype=np.int64)
    for first, end in skipped:
        positions[positions >= first] += end - first
    return positions
