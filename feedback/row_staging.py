"""Stage the keys of a file's rows in a temporary table, so that set operations on any number of rows are done in SQL.

The file is read once, as a stream, before the transaction takes a lock that others wait for.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from sqlalchemy import text
from sqlalchemy.orm import Session

from feedback.items import MAX_NAMED_ROWS
from feedback.row_blocks import STAGED_COLUMNS, StagingRules
from feedback.row_workers import choose_num_workers, process_rows
from yuan.data.rows import BadRow

# Memory of a sort or hash of the transaction; the default of 4 MB makes many passes over millions of keys.
SORT_MEMORY = "64MB"
# The columns are
#   number: the row's position in the file, from 0
#   key: hash of its prompt and answer; a row with the key of an earlier one is a duplicate
#   prompt_key: hash of its prompt
#   split_key: coarser hash of its prompt; null if the row cannot be held out
#   fraction: number by which the held-out prompts are chosen; null if the row cannot be held out
#   body: the row as JSON; null if the row cannot be held out
#   other_prompt_keys: hashes of the other prompts of a conversation; see `Row.prompt_keys`
CREATE_STAGED_ROWS = text(
    "create temporary table staged_row (number integer, key text, prompt_key text, split_key text, "
    "fraction double precision, body text, other_prompt_keys text[]) on commit drop"
)
INSERT_CONVERSATION_PROMPTS = text("""
    insert into conversation_prompt (dataset_id, number, prompt_key)
    select dataset_id, number, unnest(other_prompt_keys)
    from staged_row join dataset_row using (number)
    where dataset_id = :dataset_id and other_prompt_keys <> '{}'
    on conflict do nothing
""")


@dataclass(frozen=True)
class StagedFaults:
    """The rows of a staged file that today's rules refuse; an older release accepted them.

    Attributes:
        bad_rows: the first 20 of them.
    """

    num_bad: int
    bad_rows: list[BadRow]


@contextlib.contextmanager
def stage_rows(session: Session, stream: BinaryIO, num_bytes: int, rules: StagingRules) -> Iterator[StagedFaults]:
    """Copy a file's rows into the temporary table `staged_row` of the transaction, which the block may query.

    Args:
        num_bytes: of the file.
    """
    session.execute(text(f"set local work_mem = '{SORT_MEMORY}'"))
    session.execute(CREATE_STAGED_ROWS)
    connection = session.connection().connection.driver_connection
    assert connection is not None, "a session's connection is open"
    num_bad, bad_rows = 0, list[BadRow]()
    with (
        contextlib.closing(process_rows(stream, rules, choose_num_workers(num_bytes))) as results,
        connection.cursor().copy(f"copy staged_row ({STAGED_COLUMNS}) from stdin") as copy,
    ):
        for result in results:
            copy.write(result.copy_lines)
            num_bad += result.num_bad
            bad_rows += [fault for _, fault in result.faults[: MAX_NAMED_ROWS - len(bad_rows)]]
    session.execute(text("create unique index on staged_row (number)"))
    session.execute(text("analyze staged_row"))
    yield StagedFaults(num_bad, bad_rows)
    session.execute(text("drop table staged_row"))
