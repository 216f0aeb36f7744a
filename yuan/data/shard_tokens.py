"""Token files of one shard of rows: its lines shuffled, encoded and packed, with memory for one line and the index.

The result depends on the shard, the tokenizer and the sample rules only, so rounds share it under `compute_digest`. A
folder of token files has those of the rows that train, those of the rows that validate, and a report.
"""

import codecs
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from yuan.data.packing import PackingStats
from yuan.data.rows import MAX_LINE_BYTES, BadRow, Row, parse_line
from yuan.data.samples import Sample, TargetAnswers, encode_fill_in_middle, encode_row, encode_rows
from yuan.data.shuffle import Int64Array, derive_keys, permute
from yuan.data.text import make_printable, parse_json
from yuan.data.tokens import write_token_files
from yuan.safe_files import read_file
from yuan.tokenizer import Tokenizer

SAMPLE_RULE_VERSION = 3  # raise it when the same rows and tokenizer give other token files
TRAINING_FOLDER = "training"
VALIDATION_FOLDER = "validation"
SHARD_REPORT_FILE = "report.json"
SHARD_REPORT_SCHEMA = 1
MAX_REPORTED_ROWS = 10_000  # excluded rows of a shard that are named; all are counted
MAX_EXCLUSION_REASON_CHARACTERS = 500
MAX_SHARD_REPORT_BYTES = 16 * 2**20
LINE_SCAN_BYTES = 2**20
SHUFFLE_CHUNK_LINES = 2**16
BATCH_ROWS = 256  # encoded at once
BATCH_CHARS = 2**18  # from which on a batch is complete

LineResult = tuple[int, int, Row | BadRow]  # number and hash of a line, and its row


@dataclass(frozen=True, kw_only=True)
class SampleRules:
    """Rules by which rows become windows.

    Attributes:
        target_answers: answers of a conversation that are trained on.
        fim_rate: probability that a document is rearranged for fill-in-the-middle.
        fim_spm_share: share of these in the order suffix, prefix, middle.
        validation_share: share of the prompts and documents that validate.
    """

    seq_len: int
    target_answers: TargetAnswers = "each"
    fim_rate: float = 0.0
    fim_spm_share: float = 0.5
    validation_share: float = 0.0
    version: int = SAMPLE_RULE_VERSION


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """The result of tokenizing a shard.

    Attributes:
        rows: lines of the shard that are not empty.
        excluded: rows that could not be encoded, or are no rows by today's rules.
        reasons: why, by the row's key, or by `line N` for a line that is no row; the first MAX_REPORTED_ROWS.
    """

    rows: int
    excluded: int
    reasons: dict[str, str]
    training: PackingStats
    validation: PackingStats

    def dump(self) -> bytes:
        """Return the content of the report's file."""
        return json.dumps({"schema": SHARD_REPORT_SCHEMA, **asdict(self)}, ensure_ascii=False, indent=1).encode()

    @classmethod
    def parse(cls, content: bytes) -> "ShardReport":
        """Read the content of the report's file.

        Raises:
            ValueError: if it is damaged or of another schema.
        """
        data = parse_json(content)
        if not isinstance(data, dict) or data.pop("schema", None) != SHARD_REPORT_SCHEMA:
            raise ValueError(f"it is no report of schema {SHARD_REPORT_SCHEMA}")
        try:
            training, validation = PackingStats(**data.pop("training")), PackingStats(**data.pop("validation"))
            report = cls(**data, training=training, validation=validation)
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no report: {error}") from None
        numbers = [report.rows, report.excluded, *asdict(report.training).values(), *asdict(report.validation).values()]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("it has a count that is none")
        if not isinstance(report.reasons, dict) or not all(isinstance(text, str) for text in report.reasons.values()):
            raise ValueError("its reasons are not texts")
        return report


@dataclass
class _Exclusions:
    """Rows that are left out: their number, and the reasons of the first ones."""

    count: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        self.count += 1
        if len(self.reasons) < MAX_REPORTED_ROWS:
            self.reasons[name] = make_printable(reason)[:MAX_EXCLUSION_REASON_CHARACTERS]


def compute_digest(shard_sha256: str, tokenizer: Tokenizer, rules: SampleRules) -> str:
    """Return the address of a shard's token files: equal addresses have equal files."""
    tokenizer_sha256 = hashlib.sha256(tokenizer.model).hexdigest()
    return hashlib.sha256(json.dumps([shard_sha256, tokenizer_sha256, asdict(rules)]).encode()).hexdigest()


def write_shard_tokens(
    rows_file: Path, folder: Path, *, shard_sha256: str, tokenizer: Tokenizer, rules: SampleRules
) -> ShardReport:
    """Write the token files of a shard and their report into an existing folder.

    A row that cannot be encoded is left out, and named in the report. A row validates by a hash of its first prompt,
    or of its text if it has none, so that it does in every round.

    Args:
        rows_file: the shard's lines.
        shard_sha256: of the lines; it seeds their shuffle.

    Raises:
        OSError: if a file cannot be read or written.
    """
    exclusions = _Exclusions()
    with rows_file.open("rb") as stream:
        starts = find_line_starts(stream)
        order = _shuffle_lines(len(starts) - 1, int(shard_sha256[:16], 16))
        validating: list[int] = []
        num_rows = 0

        def read_training_rows() -> Iterator[LineResult]:
            nonlocal num_rows
            for number in order:
                line = _read_line(stream, starts, number)
                row = parse_line(line)
                num_rows += row is not None
                if isinstance(row, Row) and is_validating(row, rules.validation_share):
                    validating.append(number)
                elif row is not None:
                    yield number, _hash_line(line), row

        def read_validation_rows() -> Iterator[LineResult]:
            for number in validating:
                line = _read_line(stream, starts, number)
                row = parse_line(line)
                assert row is not None, "it was read before"
                yield number, _hash_line(line), row

        encoder = _RowEncoder(tokenizer, rules, exclusions)
        training = _write_packed(folder / TRAINING_FOLDER, encoder.encode(read_training_rows()), rules.seq_len)
        validation = _write_packed(folder / VALIDATION_FOLDER, encoder.encode(read_validation_rows()), rules.seq_len)
    report = ShardReport(
        rows=num_rows,
        excluded=exclusions.count,
        reasons=exclusions.reasons,
        training=training,
        validation=validation,
    )
    (folder / SHARD_REPORT_FILE).write_bytes(report.dump())
    return report


def read_shard_report(folder: Path) -> ShardReport:
    """Read the report of a folder of token files.

    Raises:
        OSError, ValueError: if it is missing or damaged.
    """
    return ShardReport.parse(read_file(folder, SHARD_REPORT_FILE, MAX_SHARD_REPORT_BYTES))


def is_validating(row: Row, share: float) -> bool:
    """Return True if a row validates: by a hash, so that a row that validates once always does, at the same share.

    Of a conversation its first question decides, so that no row which is its beginning trains while it validates.
    """
    if not share:
        return False
    digest = hashlib.sha256(f"validation {row.first_prompt_key if row.prompt else row.key}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def encode_by_rules(row: Row, tokenizer: Tokenizer, rules: SampleRules) -> list[Sample]:
    """Encode a row; a document may be rearranged for fill-in-the-middle, in the same way in every round."""
    if row.prompt or not rules.fim_rate:
        return encode_row(row, tokenizer, target_answers=rules.target_answers)
    sample = encode_fill_in_middle(
        row.answer,
        tokenizer,
        fim_probability=rules.fim_rate,
        spm_share=rules.fim_spm_share,
        seed=row.key,
    )
    return [sample]


def find_line_starts(stream: BinaryIO) -> Int64Array:
    """Return the offset of each line of a file, and that of its end; eight bytes of memory for each line."""
    stream.seek(0)
    offset, starts = 0, [np.zeros(1, np.int64)]
    last_byte = b"\n"
    while chunk := stream.read(LINE_SCAN_BYTES):
        starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset + 1)
        offset += len(chunk)
        last_byte = chunk[-1:]
    if last_byte != b"\n":
        starts.append(np.array([offset], np.int64))
    return np.concatenate(starts)


def _shuffle_lines(count: int, seed: int) -> Iterator[int]:
    """Yield the line numbers in a random order, computed in chunks."""
    for first in range(0, count, SHUFFLE_CHUNK_LINES):
        numbers = np.arange(first, min(first + SHUFFLE_CHUNK_LINES, count))
        yield from permute(numbers, count, derive_keys(seed, np.zeros_like(numbers))).tolist()


def _read_line(stream: BinaryIO, starts: Int64Array, number: int) -> bytes | None:
    """Read a line; None if it is longer than any row."""
    start = int(starts[number])
    num_bytes = int(starts[number + 1]) - start
    if num_bytes > MAX_LINE_BYTES + 1:
        return None
    return _read_exactly(stream.fileno(), num_bytes, start).removeprefix(codecs.BOM_UTF8)


def _hash_line(line: bytes | None) -> int:
    """Return 64 bits that name a row over rounds, whatever its shard, tokenizer and rules are."""
    digest = hashlib.blake2b(b"" if line is None else line.removesuffix(b"\n"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _read_exactly(descriptor: int, num_bytes: int, start: int) -> bytes:
    data = os.pread(descriptor, num_bytes, start)
    while len(data) < num_bytes:  # at most 2 GiB at once, or a signal
        part = os.pread(descriptor, num_bytes - len(data), start + len(data))
        if not part:
            raise OSError(errno.EIO, "the file of rows became shorter as it was read")
        data += part
    return data


class _RowEncoder:
    """Encode rows in batches, in order; a row that cannot be encoded costs itself."""

    def __init__(self, tokenizer: Tokenizer, rules: SampleRules, exclusions: _Exclusions) -> None:
        self._tokenizer, self._rules, self._exclusions = tokenizer, rules, exclusions

    def encode(self, lines: Iterator[LineResult]) -> Iterator[Sample]:
        """Yield the samples of all rows."""
        batch: list[Row] = []
        hashes: list[int] = []
        num_chars = 0
        for number, line_hash, row in lines:
            if isinstance(row, BadRow):
                self._exclusions.add(f"line {number + 1}", row.reason)
                continue
            batch.append(row)
            hashes.append(line_hash)
            num_chars += len(row.prompt) + len(row.answer)
            if num_chars >= BATCH_CHARS or len(batch) == BATCH_ROWS:
                yield from self._encode_batch(batch, hashes)
                batch, hashes, num_chars = [], [], 0
        yield from self._encode_batch(batch, hashes)

    def _encode_batch(self, rows: list[Row], hashes: list[int]) -> Iterator[Sample]:
        for samples, row_hash in zip(self._encode_rows(rows), hashes, strict=True):
            for sample in samples:
                sample.row = row_hash
                yield sample

    def _encode_rows(self, rows: list[Row]) -> Iterable[list[Sample]]:
        if self._rules.fim_rate:
            return map(self._encode_or_exclude, rows)
        try:
            return encode_rows(rows, self._tokenizer, target_answers=self._rules.target_answers)
        except (OSError, MemoryError):
            raise
        except Exception:  # of one of the rows; by itself, each is encoded or excluded
            return map(self._encode_or_exclude, rows)

    def _encode_or_exclude(self, row: Row) -> list[Sample]:
        try:
            return encode_by_rules(row, self._tokenizer, self._rules)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # of any kind: the row costs itself, never the shard
            self._exclusions.add(row.key, f"it cannot be encoded: {str(error) or type(error).__name__}")
            return []


def _write_packed(folder: Path, samples: Iterator[Sample], seq_len: int) -> PackingStats:
    """Write the token files of samples, none if no sample has a target, and return their counts."""
    first = next((sample for sample in samples if sample.num_targets), None)
    if first is None:
        return PackingStats()
    return write_token_files(folder, chain([first], samples), seq_len=seq_len)


def describe_shares(counts: PackingStats) -> dict[str, float]:
    """Return the shares of tokens that are cut and masked, and of places that are padding.

    >>> describe_shares(PackingStats(windows=2, targets=120, masked=30, padding=50, cut=75))
    {'cut_share': 0.5, 'masked_share': 0.2, 'padding_share': 0.25}
    """
    shares = {
        "cut_share": counts.cut_share,
        "masked_share": counts.masked_share,
        "padding_share": counts.padding_share,
    }
    return {name: round(share, 4) for name, share in shares.items()}
