"""Data order: sources mixed by weight, reshuffled each epoch, as a pure function of the position.

A run's data is an endless sequence of windows, and its whole state is one integer, the position. The sequence consists
of blocks. In each block every source has its quota of places, shuffled for that block. A source's places, in order of
positions, iterate over its windows in the source's `ReadOrder`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from yuan.data.read_order import ReadOrder
from yuan.data.shuffle import Int64Array, derive_keys, permute

PositionSpan = tuple[int, int]  # positions [first, end)

MAX_BLOCK_PLACES = 2**20  # places of the largest block; a rarer source would hardly differ from a missing one
MIN_PLACES_PER_SOURCE = 32  # so that rounding to whole places changes a weight by about 3 % at most
MIN_BLOCK_PLACES = 1024


@dataclass(frozen=True)
class Mixture:
    """Map positions to windows.

    A block of more than MAX_BLOCK_PLACES consists of sections, among which the quotas are divided evenly. The sources
    of one section are listed in memory, so that the places of a source ascend with the positions.

    Attributes:
        orders: the order of the windows of each source.
        quotas: places of each source in a block.
        seed: seed of the shuffles.

    Raises:
        ValueError: if there is no source, or one has no place.
    """

    orders: tuple[ReadOrder, ...]
    quotas: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        if not self.orders or len(self.orders) != len(self.quotas) or min(self.quotas) < 1:
            raise ValueError(
                f"every source needs a place in a block, got {len(self.orders)} sources and {self.quotas} places; "
                "leave empty sources out"
            )

    @property
    def block_size(self) -> int:
        return sum(self.quotas)

    def locate_windows(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return, for each position, the source number and the window number within that source."""
        sources, places = np.empty_like(positions), np.empty_like(positions)
        sections, indices = self._locate_sections(positions)
        for section in np.unique(sections):
            is_in_section = sections == section
            layout = _lay_out_section(self.quotas, self.seed, int(section))
            index = indices[is_in_section]
            sources[is_in_section] = layout.sources[index]
            places[is_in_section] = layout.first_places[layout.sources[index]] + layout.ranks[index]

        windows = np.empty_like(positions)
        for number in np.unique(sources):
            is_source = sources == number
            windows[is_source] = self.orders[number].locate_windows(
                places[is_source], _derive_source_seed(self.seed, int(number))
            )
        return sources, windows

    def _locate_sections(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the number of each position's section, counted over all blocks, and its index in the section."""
        num_sections = _count_sections(self.quotas)
        block, place = np.divmod(positions, self.block_size)
        section = place * num_sections // self.block_size
        # Rounding of each quota moves the end of a section forward by less than the number of sources.
        section += _sum_places(self.quotas, section + 1) <= place
        return block * num_sections + section, place - _sum_places(self.quotas, section)


@dataclass(frozen=True)
class _SectionLayout:
    """The places of a section.

    Attributes:
        sources: the source of each.
        ranks: the number of earlier places of the same source in the section.
        first_places: of each source, the number of its places before the section.
    """

    sources: npt.NDArray[np.int32]
    ranks: npt.NDArray[np.int32]
    first_places: Int64Array


@lru_cache(maxsize=4)  # a batch has positions of two adjacent ones; training and validation may alternate
def _lay_out_section(quotas: tuple[int, ...], seed: int, number: int) -> _SectionLayout:
    num_sections = _count_sections(quotas)
    block, section = divmod(number, num_sections)
    quota = np.array(quotas, np.int64)
    first_places = quota * section // num_sections
    counts = quota * (section + 1) // num_sections - first_places

    # Consecutive ranges of shuffled places belong to the sources.
    size = int(counts.sum())
    place = permute(np.arange(size), size, derive_keys(seed, np.full(size, number)))
    sources = np.searchsorted(np.cumsum(counts), place, side="right")
    ranks = np.empty(size, np.int32)
    ranks[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return _SectionLayout(sources.astype(np.int32), ranks, first_places + block * quota)


def _count_sections(quotas: Sequence[int]) -> int:
    """Return the number of sections of a block."""
    return -(-sum(quotas) // MAX_BLOCK_PLACES)


def _sum_places(quotas: Sequence[int], section: Int64Array) -> Int64Array:
    """Return the places of a block before each section."""
    num_sections = _count_sections(quotas)
    places = np.zeros_like(section)
    for quota in quotas:
        places += quota * section // num_sections
    return places


def _derive_source_seed(seed: int, number: int) -> int:
    return seed ^ (number + 1) << 32  # differs from the seed that shuffles the blocks


@dataclass(frozen=True)
class UnorderedMixture:
    """Map positions to windows as earlier releases did, for runs in progress after an upgrade.

    Within a block, the places of a source do not ascend with the positions.

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
            windows[is_source] = permute(index, size, derive_keys(_derive_source_seed(self.seed, number), epoch))
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
