"""Parse the rows of a large file in child processes of low priority: `python -m feedback.row_workers` is one of them.

They get blocks of lines on standard input and return results on standard output, each as a line of JSON and then bytes.
They exit when the caller does.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import IO, Any, BinaryIO

from feedback.row_blocks import BlockResult, RowBlock, StagingRules, process_block, read_row_blocks
from yuan.data.rows import BadRow
from yuan.data.text import make_printable
from yuan.data.worker_pool import MAX_ITEM_TRIES, WorkerDied, WorkerPool

MIN_BYTES_OF_WORKERS = 32 * 2**20  # of a file; starting processes takes a second
MAX_ROW_WORKERS = 8
MAX_PENDING_BYTES = 64 * 2**20  # of blocks that were read and whose results were not returned
LOW_PRIORITY = 10  # of `nice`: the flow comes first, and other sessions too where Linux does not group by session


class RowWorkerKilled(MemoryError):
    """Two processes were killed that parsed the same block, as the kernel does when memory is out."""


def choose_num_workers(num_bytes: int) -> int:
    """Return the number of child processes for a file of this size; 0 to parse it in this process.

    One core is left to the portal and its stores, if there is more than one.
    """
    num_cores = len(os.sched_getaffinity(0))
    return 0 if num_bytes < MIN_BYTES_OF_WORKERS else min(MAX_ROW_WORKERS, max(1, num_cores - 1))


def parse_file_rows(stream: BinaryIO, num_bytes: int, rules: StagingRules) -> Generator[BlockResult]:
    """Stage the rows of a file of this size, as `process_rows` does with as many processes as suit it."""
    return process_rows(stream, rules, choose_num_workers(num_bytes))


def process_rows(stream: BinaryIO, rules: StagingRules | None, num_workers: int) -> Generator[BlockResult]:
    """Parse the rows of a file from its start; yield the results of its blocks in order.

    Close the iterator, as `contextlib.closing` does, to end the processes before its end.

    Args:
        rules: how rows are staged; None to check them only.
        num_workers: child processes; 0 to parse in this one.
    """
    blocks = read_row_blocks(stream)
    if not num_workers:
        for block in blocks:
            yield process_block(block, rules)
        return
    pending: deque[tuple[Future[BlockResult], int]] = deque()
    num_pending_bytes = 0
    with ThreadPoolExecutor(num_workers) as threads, RowWorkers(num_workers) as workers:
        for block in blocks:
            pending.append((threads.submit(workers.run, block, rules), len(block.data)))
            num_pending_bytes += len(block.data)
            del block  # a long line is held once
            while len(pending) > 2 * num_workers or num_pending_bytes > MAX_PENDING_BYTES:
                future, num_bytes = pending.popleft()
                num_pending_bytes -= num_bytes
                yield future.result()
        while pending:
            yield pending.popleft()[0].result()


class RowWorkers(WorkerPool):
    """Child processes, each of which parses one block at a time.

    Args:
        count: processes at most, and threads that call `run`.
    """

    def __init__(self, count: int) -> None:
        super().__init__("feedback.row_workers", count)

    def run(self, block: RowBlock, rules: StagingRules | None) -> BlockResult:
        """Parse a block, once there is a free process; one that dies is replaced, and the block tried again.

        Raises:
            RowWorkerKilled: if two processes died of it.
            RuntimeError: if parsing fails for another reason, or the processes are ended.
        """
        try:
            reply, copy_lines = self.process(lambda blocks, results: _exchange(blocks, results, block, rules))
        except WorkerDied:
            raise RowWorkerKilled(
                f"the process that reads the rows after row {block.first_row:,} was killed {MAX_ITEM_TRIES} times; "
                "if memory is out, free some"
            ) from None
        if reply["error"] is not None:
            raise RuntimeError(f"the rows after row {block.first_row:,} cannot be read: {reply['error']}")
        faults = [(number, BadRow(row=line, reason=reason)) for number, line, reason in reply["faults"]]
        return BlockResult(reply["num_rows"], reply["num_bad"], faults, copy_lines)


def _exchange(
    blocks: IO[bytes], results: IO[bytes], block: RowBlock, rules: StagingRules | None
) -> tuple[dict[str, Any], bytes] | None:
    """Send a block and wait for its result; None if the process died."""
    rule_fields = None if rules is None else asdict(rules)
    header = {"first_line": block.first_line, "first_row": block.first_row, "rules": rule_fields}
    _send(blocks, header, block.data)
    return _receive(results)


def _send(pipe: IO[bytes], header: dict[str, Any], data: bytes) -> None:
    pipe.write(json.dumps({**header, "num_bytes": len(data)}).encode() + b"\n")
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """Read a header and its bytes; None if the other end has closed the pipe before their end."""
    line = pipe.readline()
    if not line.endswith(b"\n"):
        return None
    header = json.loads(line)
    data = pipe.read(header["num_bytes"])
    return (header, data) if len(data) == header["num_bytes"] else None


def main() -> None:
    """Parse the blocks that arrive on standard input until its end."""
    os.nice(LOW_PRIORITY)
    while (message := _receive(sys.stdin.buffer)) is not None:
        header, data = message
        reply: dict[str, Any] = {"error": None}
        copy_lines = b""
        try:
            rules = None if header["rules"] is None else StagingRules(**header["rules"])
            result = process_block(RowBlock(data, header["first_line"], header["first_row"]), rules)
        except MemoryError:
            raise  # this process ends, and the caller retries the block in another one
        except Exception as error:  # reported to the caller, which decides
            reply["error"] = make_printable(f"{type(error).__name__}: {error}")
        else:
            copy_lines = result.copy_lines
            faults = [(number, fault.row, fault.reason) for number, fault in result.faults]
            reply |= {"num_rows": result.num_rows, "num_bad": result.num_bad, "faults": faults}
        _send(sys.stdout.buffer, reply, copy_lines)


if __name__ == "__main__":
    main()
