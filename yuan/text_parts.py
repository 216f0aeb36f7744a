"""Encode short texts by their parts, whose token ids are remembered: most of a text is words that occurred before."""

from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

MAX_KNOWN_PARTS = 2**16  # about 200 bytes each
MAX_KNOWN_PART_CHARS = 64
PART_END = "\0"  # which no text of a row has
NUM_CODE_POINTS = 0x110000

PartIds = npt.NDArray[np.int32]


class KnownParts(dict[str, bytes]):
    """Remember the token ids of parts, as bytes; a part that is not known is encoded.

    Args:
        encode: returns the token ids of a part.
    """

    def __init__(self, encode: Callable[[str], PartIds]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, part: str) -> bytes:
        ids = self._encode(part).tobytes()
        if len(part) <= MAX_KNOWN_PART_CHARS:
            if len(self) >= MAX_KNOWN_PARTS:
                self.clear()
            self[part] = ids
        return ids


class PartEncoder:
    """Encode many texts, cut at every place at which `TextCutter` may cut them.

    Args:
        pairs: the neighboring characters between which no text is cut.
        space_mark: the model's mark for spaces in them.
        prefix: see `TextCutter`.
        encode_first: returns the token ids of a text.
        encode_other: returns those of a text's part that is not its first.
    """

    def __init__(
        self,
        pairs: Iterable[str],
        *,
        space_mark: str,
        prefix: str,
        encode_first: Callable[[str], PartIds],
        encode_other: Callable[[str], PartIds],
    ) -> None:
        codes = np.array([[ord(pair[0]), ord(pair[1])] for pair in pairs], np.int64).reshape(-1, 2)
        chars = np.unique(codes)
        self._numbers = np.zeros(NUM_CODE_POINTS, np.int32)  # of the characters of pairs, from 1; 0 for all others
        self._numbers[chars] = np.arange(1, len(chars) + 1)
        self._num_numbers = len(chars) + 1
        index = self._number_pairs(self._numbers[codes[:, 0]], self._numbers[codes[:, 1]])
        self._is_pair = np.zeros(self._num_numbers**2 // 8 + 1, np.uint8)  # a bit for each pair
        np.bitwise_or.at(self._is_pair, index >> 3, np.uint8(1) << (index & 7).astype(np.uint8))

        # Number 0 is in no pair.
        prefix_number = self._numbers[ord(prefix)] if prefix else np.int32(0)
        self._numbers[ord(" ")] = self._numbers[ord(space_mark)]
        all_numbers = np.arange(self._num_numbers)
        self._can_begin = ~self._find_pairs(np.full_like(all_numbers, prefix_number), all_numbers)
        self._first, self._others = KnownParts(encode_first), KnownParts(encode_other)

    def _number_pairs(self, first: npt.NDArray[np.integer], second: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        return first.astype(np.int64) * self._num_numbers + second

    def _find_pairs(self, first: npt.NDArray[np.integer], second: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        index = self._number_pairs(first, second)
        is_pair: npt.NDArray[np.bool_] = (self._is_pair[index >> 3] >> (index & 7).astype(np.uint8) & 1).astype(
            np.bool_
        )
        return is_pair

    def encode(self, texts: list[str]) -> list[PartIds]:
        """Return the token ids of each text; none is empty, and none has PART_END."""
        codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
        numbers = self._numbers[codes]
        begins_part = np.ones(len(codes), np.bool_)
        begins_part[1:] = ~self._find_pairs(numbers[:-1], numbers[1:]) & self._can_begin[numbers[1:]]
        lengths = np.array([len(text) for text in texts])
        starts = np.cumsum(lengths) - lengths
        begins_part[starts] = True

        # A PART_END before each part: a part's characters move by the number of parts up to it.
        num_parts = np.cumsum(begins_part)
        ended = np.full(len(codes) + int(num_parts[-1]), ord(PART_END), np.uint32)
        ended[np.arange(len(codes)) + num_parts] = codes
        parts = ended.tobytes().decode("utf-32-le").split(PART_END)
        first_parts = num_parts[starts]
        numbered_firsts = [(number, parts[number]) for number in first_parts.tolist()]
        for number, _ in numbered_firsts:
            parts[number] = ""
        ids = list(map(self._others.__getitem__, parts))
        for number, part in numbered_firsts:
            ids[number] = self._first[part]

        joined = np.frombuffer(b"".join(ids), np.int32)
        num_ids = np.fromiter(map(len, ids), np.int64, len(ids)) // joined.itemsize
        bounds = np.append(np.cumsum(num_ids) - num_ids, len(joined))
        text_bounds = bounds[np.append(first_parts, len(ids))].tolist()
        return [joined[start:end] for start, end in pairwise(text_bounds)]
