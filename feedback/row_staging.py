"""Stage the keys of a file's rows in a temporary table, so that set operations on any number of rows are done in SQL.

The rows are read once, as a stream, before the transaction takes a lock that others wait for.
"""

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import psycopg
from botocore.exceptions import ClientError
from sqlalchemy import text
from sqlalchemy.orm import Session

from feedback.items import MAX_NAMED_ROWS
from feedback.row_blocks import STAGED_COLUMNS, BlockResult
from infra.error_text import describe_error
from yuan.data.row_shards import ShardDamageError
from yuan.data.rows import BadRow

log = logging.getLogger(__name__)

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
def stage_rows(session: Session, *sources: Callable[[], Generator[BlockResult]]) -> Iterator[StagedFaults]:
    """Copy a file's rows into the temporary table `staged_row` of the transaction, which the block may query.

    Args:
        sources: each reads the rows of all blocks; one that is damaged is left, and the next one is read.

    Raises:
        Exception: as the last source.
    """
    session.execute(text(f"set local work_mem = '{SORT_MEMORY}'"))
    session.execute(CREATE_STAGED_ROWS)
    faults = _copy_first(session, sources)
    session.execute(text("create unique index on staged_row (number)"))
    session.execute(text("analyze staged_row"))
    yield faults
    session.execute(text("drop table staged_row"))


def _copy_first(session: Session, sources: Sequence[Callable[[], Generator[BlockResult]]]) -> StagedFaults:
    """Copy the rows of the first source that is whole."""
    *stored, last = sources
    for read in stored:
        try:
            with session.begin_nested():
                return _copy_rows(session, read())
        except (ShardDamageError, ClientError, psycopg.DataError) as error:
            log.warning("stored rows are lost or damaged, so their file is parsed: %s", describe_error(error))
    return _copy_rows(session, last())


def _copy_rows(session: Session, blocks: Generator[BlockResult]) -> StagedFaults:
    connection = session.connection().connection.driver_connection
    assert connection is not None, "a session's connection is open"
    num_bad, bad_rows = 0, list[BadRow]()
    with (
        contextlib.closing(blocks) as results,
        connection.cursor().copy(f"copy staged_row ({STAGED_COLUMNS}) from stdin") as copy,
    ):
        for result in results:
            copy.write(result.copy_lines)
            num_bad += result.num_bad
            bad_rows += [fault for _, fault in result.faults[: MAX_NAMED_ROWS - len(bad_rows)]]
    return StagedFaults(num_bad, bad_rows)
