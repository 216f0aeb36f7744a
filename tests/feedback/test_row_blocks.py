"""Blocks of lines have the rows, numbers and faults of the file, parsed in this process or in others."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback import row_blocks, row_workers
from feedback.row_blocks import StagingRules, compute_salted_fraction, process_block, read_row_blocks
from feedback.row_workers import RowWorkerKilled, RowWorkers, process_rows
from infra.confinement import Confinement, build_confined_environment
from tests.waiting import wait_until
from yuan.data.rows import MAX_LINE_BYTES, BadRow, Row, parse_rows

COUNT_ROWS = """
import io
from feedback.row_workers import process_rows

file = io.BytesIO(b'{"answer": "%s"}\\n' % (b"a" * 1000) * 3000)
print(sum(result.num_rows for result in process_rows(file, None, 2)))
"""
RULES = StagingRules("salt", 0.5)
LINES = st.lists(
    st.sampled_from(
        [
            b'{"answer": "a"}',
            b'{"prompt": "p", "answer": "back\\\\slash \\t tab", "checker": {"type": "contains", "values": ["b"]}}',
            '{"prompt": "问，", "answer": "答"}'.encode(),
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
            b'{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}',
            b"",
            b" \r",
            b"1",
            b'\xef\xbb\xbf{"answer": "a"}',
        ]
    ),
    max_size=12,
)


def read_whole(data):
    """Return the rows by number and the faults with their numbers, read at once."""
    rows = list(enumerate(parse_rows(data)))
    faults = [(number, row) for number, row in rows if isinstance(row, BadRow)]
    return {number: row for number, row in rows if isinstance(row, Row)}, faults


def read_staged(copy_lines):
    """Parse lines of COPY; return the fields of each row by its number."""
    fields = [line.split("\t") for line in copy_lines.decode().split("\n")[:-1]]
    return {int(number): rest for number, *rest in fields}


def check_equal(results, data):
    rows, faults = read_whole(data)
    assert [fault for result in results for fault in result.faults] == faults
    assert sum(result.num_rows for result in results) == len(rows) + len(faults)
    staged = read_staged(b"".join(result.copy_lines for result in results))
    assert staged.keys() == rows.keys()
    for number, row in rows.items():
        key, prompt_key, split_key, fraction, body, others = staged[number]
        assert (key, prompt_key) == (row.key, row.prompt_key)
        expected_others = set() if row.messages is None else row.prompt_keys - {row.prompt_key}
        assert set(filter(None, others[1:-1].split(","))) == expected_others
        expected_fraction = compute_salted_fraction(row.split_key, RULES.salt)
        if row.checker is None or expected_fraction >= RULES.held_out_share:
            assert split_key == fraction == body == r"\N"
        else:
            assert (split_key, float(fraction)) == (row.split_key, expected_fraction)
            assert Row.model_validate_json(body.replace(r"\\", "\\")) == row


@given(LINES, st.booleans())
def test_blocks_have_the_rows_of_the_file(lines, has_last_newline):
    data = b"\n".join(lines) + b"\n" * has_last_newline
    for size in (1, 30, 2**20):
        row_blocks.BLOCK_BYTES, before = size, row_blocks.BLOCK_BYTES
        try:
            check_equal(list(process_rows(io.BytesIO(data), RULES, 0)), data)
        finally:
            row_blocks.BLOCK_BYTES = before


def test_line_that_is_too_long_is_one_fault_of_its_block():
    data = b'{"answer": "a"}\n' + b"x" * (MAX_LINE_BYTES + 3 * 2**20) + b'\n{"answer": "b"}\n'
    results = list(process_rows(io.BytesIO(data), RULES, 0))
    (fault,) = [fault for result in results for fault in result.faults]
    assert (fault[0], fault[1].row) == (1, 2) and "has more than" in fault[1].reason
    assert sorted(read_staged(b"".join(result.copy_lines for result in results))) == [0, 2]


def test_child_processes_return_the_results_of_this_process_in_order():
    data = b"".join(
        json.dumps({"prompt": f"p{number}", "answer": "ü" * 900} if number % 700 else number).encode() + b"\n"
        for number in range(4_000)
    )
    results = list(process_rows(io.BytesIO(data), RULES, 2))
    assert len(results) > 10 and results == list(process_rows(io.BytesIO(data), RULES, 0))


def test_child_processes_start_within_the_confinement_of_a_flow(tmp_path):
    confinement = Confinement(write=(tmp_path,), accelerators="descendants", connect=None)
    command = confinement.command(sys.executable, "-c", COUNT_ROWS)
    environment = build_confined_environment(tmp_path)
    counted = subprocess.run(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=300)
    assert (counted.returncode, counted.stdout) == (0, "3000\n")


def test_no_more_bytes_than_the_limit_are_read_ahead(monkeypatch):
    monkeypatch.setattr(row_workers, "MAX_PENDING_BYTES", 2 * row_blocks.BLOCK_BYTES)
    stream = io.BytesIO(b'{"answer": "%s"}\n' % (b"a" * 1000) * 20_000)
    with contextlib.closing(process_rows(stream, RULES, 8)) as results:
        for number, _ in enumerate(results, start=1):
            assert stream.tell() <= (number + 3) * row_blocks.BLOCK_BYTES


def test_block_whose_process_is_killed_is_parsed_by_another_one():
    (block,) = read_row_blocks(io.BytesIO(b'{"answer": "a"}\n'))
    with RowWorkers(1) as workers:
        workers.run(block, RULES)
        (pid,) = workers.pids
        os.kill(pid, signal.SIGKILL)
        assert workers.run(block, RULES) == process_block(block, RULES)


def test_block_that_costs_two_processes_is_reported_as_too_large_for_memory():
    (block,) = read_row_blocks(io.BytesIO(b'{"answer": "a"}\n'))
    is_over = threading.Event()

    def kill_all(workers):
        while not is_over.wait(0.002):
            for pid in workers.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    with RowWorkers(1) as workers:
        killer = threading.Thread(target=kill_all, args=[workers])
        killer.start()
        try:
            with pytest.raises(RowWorkerKilled, match="was killed 2 times; if memory is out, free some"):
                workers.run(block, RULES)
        finally:
            is_over.set()
            killer.join()


def test_processes_exit_when_reading_stops_early():
    data = b'{"answer": "%s"}\n' % (b"a" * 1000) * 5_000
    others = find_children()
    results = process_rows(io.BytesIO(data), RULES, 2)
    next(results)
    children = find_children() - others
    assert children
    results.close()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children))


def find_children():
    """Return the ids of this process's children."""
    pids = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{task}/children") as file:
            pids.update(file.read().split())
    return pids
