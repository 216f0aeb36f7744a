"""Blocks of whole lines of a file of rows: each is checked, and its rows' keys are computed, by itself in any process.

A result has the rows as PostgreSQL's COPY reads them, so that the process that sends them has nothing to compute.
"""

import codecs
import hmac
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from feedback.states import DatasetPurpose
from yuan.data.rows import MAX_LINE_BYTES, SKIPPED_CHUNK_BYTES, BadRow, Row, parse_rows

BLOCK_BYTES = 2**20
MAX_BLOCK_FAULTS = 1000  # that a result lists
COPY_NULL = r"\N"
STAGED_COLUMNS = "number, key, prompt_key, split_key, fraction, body, other_prompt_keys"


@dataclass(frozen=True)
class RowBlock:
    """Whole lines of a file.

    Attributes:
        first_line: number of lines before it.
        first_row: number of rows before it, that is of lines that are not blank.
    """

    data: bytes
    first_line: int
    first_row: int


@dataclass(frozen=True)
class StagingRules:
    """The rules by which rows are staged, of which some may be held out.

    Attributes:
        salt: secret from which the choice of held-out prompts is derived.
        held_out_share: fraction of the checkable rows' prompts that may be held out, in [0, 1].
    """

    salt: str
    held_out_share: float

    def for_purpose(self, purpose: str) -> "StagingRules":
        """Return the rules of a dataset with this purpose; of a suite every checkable row is held out."""
        return replace(self, held_out_share=1.0) if purpose == DatasetPurpose.SUITE else self


STAGE_KEYS_ALONE = StagingRules(salt="", held_out_share=0.0)


@dataclass(frozen=True)
class BlockResult:
    """The rows of a block.

    Attributes:
        num_rows: malformed ones included.
        faults: the first 1,000 malformed rows, each with its number in the file, from 0.
        copy_lines: the valid rows, as `STAGED_COLUMNS` in the text format of COPY; empty if they were only checked.
    """

    num_rows: int
    num_bad: int
    faults: list[tuple[int, BadRow]]
    copy_lines: bytes


def compute_salted_fraction(key: str, salt: str) -> float:
    """Return a number in [0, 1) derived from a key; it cannot be predicted without the salt."""
    return int.from_bytes(hmac.digest(salt.encode(), key.encode(), "sha256")[:6]) / 2**48


def read_row_blocks(stream: BinaryIO) -> Iterator[RowBlock]:
    """Read a file from its start in blocks of about 1 MiB, of more if a line is longer.

    Of a line that is longer than a row can be, only as much is kept as shows that.
    """
    num_lines = num_rows = 0
    while data := stream.read(BLOCK_BYTES):
        if not data.endswith(b"\n"):
            data += _read_line_end(stream)
        yield RowBlock(data, num_lines, num_rows)
        num_rows += _count_rows(data if num_lines else data.removeprefix(codecs.BOM_UTF8))
        num_lines += data.count(b"\n")


def process_block(block: RowBlock, rules: StagingRules | None) -> BlockResult:
    """Parse the rows of a block, and stage them if there are rules for it."""
    # A byte order mark is left out at the start of the file; after a blank line another block does not begin so.
    prefix = b"\n" if block.first_line else b""
    num_rows = num_bad = 0
    faults: list[tuple[int, BadRow]] = []
    lines: list[str] = []
    for number, row in enumerate(parse_rows(prefix + block.data), start=block.first_row):
        num_rows += 1
        if isinstance(row, BadRow):
            num_bad += 1
            if len(faults) < MAX_BLOCK_FAULTS:
                line = row.row - len(prefix) + block.first_line
                faults.append((number, BadRow(row=line, reason=row.reason)))
        elif rules is not None:
            lines.append(_stage_row(number, row, rules))
    return BlockResult(num_rows, num_bad, faults, "".join(lines).encode())


def _stage_row(number: int, row: Row, rules: StagingRules) -> str:
    key, prompt_key = row.key_pair
    others = "" if row.messages is None else ",".join(sorted(row.prompt_keys - {prompt_key}))
    split_key = fraction = body = COPY_NULL
    if rules.held_out_share and row.checker is not None and row.prompt:
        candidate_key = row.split_key
        candidate_fraction = compute_salted_fraction(candidate_key, rules.salt)
        if candidate_fraction < rules.held_out_share:
            split_key, fraction = candidate_key, repr(candidate_fraction)
            body = row.model_dump_json(exclude_none=True).replace("\\", r"\\")  # JSON has no raw tab or line end
    return f"{number}\t{key}\t{prompt_key}\t{split_key}\t{fraction}\t{body}\t{{{others}}}\n"


def _read_line_end(stream: BinaryIO) -> bytes:
    rest = stream.readline(MAX_LINE_BYTES + 1)
    if len(rest) <= MAX_LINE_BYTES or rest.endswith(b"\n"):
        return rest
    while (piece := stream.readline(SKIPPED_CHUNK_BYTES)) and not piece.endswith(b"\n"):
        pass
    return rest + piece[-1:]


def _count_rows(data: bytes) -> int:
    """Count the lines for which `parse_rows` yields a row or its fault."""
    lines = data.split(b"\n")
    return sum(1 for line in lines if (line and not line.isspace()) or len(line) > MAX_LINE_BYTES)
