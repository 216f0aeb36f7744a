"""Stage the keys of a file's rows in a temporary table, so that set operations on any number of rows are done in SQL.

The file is read once, as a stream, before the transaction takes a lock that others wait for.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from sqlalchemy import text
from sqlalchemy.orm import Session

from feedback.items import MAX_NAMED_ROWS
from yuan.data.rows import BadRow, Row, parse_rows

# Memory of a sort or hash of the transaction; the default of 4 MB makes many passes over millions of keys.
SORT_MEMORY = "64MB"
STAGED_COLUMNS = "number, key, prompt_key, split_key, fraction, body, other_prompt_keys"
INSERT_CONVERSATION_PROMPTS = text("""
    insert into conversation_prompt (dataset_id, number, prompt_key)
    select dataset_id, number, unnest(other_prompt_keys)
    from staged_row join dataset_row using (number) where dataset_id = :dataset_id
    on conflict do nothing
""")


@dataclass(frozen=True)
class StagedRow:
    """A row of a file with its keys, as it is staged.

    Attributes:
        number: its position in the file, from 0.
        key: hash of its prompt and answer; a row with the key of an earlier one is a duplicate.
        prompt_key: hash of its prompt.
        split_key: coarser hash of its prompt; None if the row cannot be held out.
        fraction: number by which the held-out prompts are chosen; None if the row cannot be held out.
        body: the row as JSON; None if the row cannot be held out.
        other_prompt_keys: hashes of the other prompts of a conversation; see `Row.prompt_keys`.
    """

    number: int
    key: str
    prompt_key: str
    split_key: str | None = None
    fraction: float | None = None
    body: str | None = None
    other_prompt_keys: tuple[str, ...] = ()


def stage_row(number: int, row: Row) -> StagedRow:
    """Return a row with its keys, to be staged as one that cannot be held out."""
    key, prompt_key = row.key_pair
    others = () if row.messages is None else tuple(sorted(row.prompt_keys - {prompt_key}))
    return StagedRow(number, key, prompt_key, other_prompt_keys=others)


class NumberedRows:
    """The valid rows of a file with their positions, from 0, read once.

    Attributes:
        num_bad: number of rows read that today's rules refuse; an older release accepted them.
        bad_rows: the first 20 of them.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.num_bad = 0
        self.bad_rows: list[BadRow] = []

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        for number, row in enumerate(parse_rows(self._stream)):
            if isinstance(row, Row):
                yield number, row
            else:
                self.num_bad += 1
                if len(self.bad_rows) < MAX_NAMED_ROWS:
                    self.bad_rows.append(row)


@contextmanager
def stage_rows(session: Session, rows: Iterable[StagedRow]) -> Iterator[None]:
    """Copy rows into the temporary table `staged_row` of the session's transaction, which the block may query."""
    session.execute(text(f"set local work_mem = '{SORT_MEMORY}'"))
    session.execute(
        text(
            "create temporary table staged_row (number integer, key text, prompt_key text, split_key text, "
            "fraction double precision, body text, other_prompt_keys text[]) on commit drop"
        )
    )
    connection = session.connection().connection.driver_connection
    assert connection is not None, "a session's connection is open"
    with connection.cursor().copy(f"copy staged_row ({STAGED_COLUMNS}) from stdin") as copy:
        for row in rows:
            keys = (row.key, row.prompt_key, row.split_key)
            copy.write_row((row.number, *keys, row.fraction, row.body, list(row.other_prompt_keys)))
    session.execute(text("create unique index on staged_row (number)"))
    session.execute(text("analyze staged_row"))
    yield
    session.execute(text("drop table staged_row"))
