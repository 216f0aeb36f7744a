"""Token files of a shard: the same bytes for the same rows, bounded memory, bad rows alone, and counts that add up."""

import dataclasses
import hashlib
import itertools
import os
import signal
import threading
import time

import numpy as np
import pytest

from yuan import tokenizer as tokenizers
from yuan.data.packing import PackingStats, pack_samples
from yuan.data.rows import Row, dump_rows
from yuan.data.samples import encode_row, encode_rows
from yuan.data.shard_tokens import (
    SampleRules,
    ShardReport,
    compute_digest,
    encode_by_rules,
    find_line_starts,
    is_validating,
    read_shard_report,
    write_shard_tokens,
)
from yuan.data.token_workers import MAX_IN_PROCESS_BYTES, TokenizingFailed, TokenJob, TokenWorkers
from yuan.data.tokens import TokenFiles
from yuan.text_chunks import CHUNK_CHARS

ROWS = [Row(prompt=f"Reverse: {n}", answer=str(n)[::-1]) for n in range(100, 160)]
ROWS += [Row(answer=f"document {n} " * n) for n in range(1, 40)]
RULES = SampleRules(seq_len=32, validation_share=0.3)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(["abcdefghijklmnopqrstuvwxyz0123456789 :R"], vocab_size=330)


def write_shard(tmp_path, tokenizer, data, rules=RULES, name="tokens"):
    file, folder = tmp_path / "rows.jsonl", tmp_path / name
    file.write_bytes(data)
    folder.mkdir()
    sha256 = hashlib.sha256(data).hexdigest()
    report = write_shard_tokens(file, folder, shard_sha256=sha256, tokenizer=tokenizer, rules=rules)
    return folder, report


def read_files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_beginnings_of_a_conversation_validate_with_it():
    num_validating = 0
    for number in range(200):
        texts = [f"question {number}", "one", "and then?", "two"]
        messages = [
            {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=True)
        ]
        beginnings = [
            Row(prompt=texts[0], answer="one"),
            *(Row.model_validate({"messages": messages[:n]}) for n in (2, 4)),
        ]
        results = {is_validating(row, 0.3) for row in beginnings}
        assert len(results) == 1
        num_validating += results == {True}
    assert 30 < num_validating < 90


def test_every_row_is_in_one_of_the_two_sets_in_a_shuffled_order(tmp_path, tokenizer):
    folder, report = write_shard(tmp_path, tokenizer, dump_rows(ROWS))
    validating = [row for row in ROWS if is_validating(row, 0.3)]
    assert 10 < len(validating) < 60
    assert (report.rows, report.excluded) == (len(ROWS), 0)
    assert (report.training.samples, report.validation.samples) == (len(ROWS) - len(validating), len(validating))
    for name, counts in (("training", report.training), ("validation", report.validation)):
        files = TokenFiles(folder / name, seq_len=32, pad=0)
        packed = files.read(np.arange(len(files)))
        rows = [row for row in ROWS if (row in validating) == (name == "validation")]
        samples = [sample for row in rows for sample in encode_row(row, tokenizer)]
        num_predictions = sum(len(sample.tokens) - 1 for sample in samples)
        assert counts.windows == len(files) and counts.targets == packed.loss_mask.sum()
        assert counts.targets + counts.masked == num_predictions - counts.dropped == (packed.documents >= 0).sum()
        assert counts.targets + counts.masked + counts.padding == packed.tokens.size
        in_order = pack_samples(samples, seq_len=32, pad=0)
        assert in_order.tokens.shape != packed.tokens.shape or (in_order.tokens != packed.tokens).any()
    assert read_shard_report(folder) == report


def test_files_depend_on_rows_tokenizer_and_rules_only(tmp_path, tokenizer):
    first = read_files(write_shard(tmp_path, tokenizer, dump_rows(ROWS))[0])
    assert read_files(write_shard(tmp_path, tokenizer, dump_rows(ROWS), name="again")[0]) == first
    assert len(first) == 11
    digest = compute_digest("a" * 64, tokenizer, RULES)
    others = [
        compute_digest("b" * 64, tokenizer, RULES),
        compute_digest("a" * 64, tokenizers.train(["abc"], vocab_size=300), RULES),
        *(
            compute_digest("a" * 64, tokenizer, SampleRules(**{"seq_len": 32, "validation_share": 0.3} | change))
            for change in ({"seq_len": 64}, {"validation_share": 0.2}, {"fim_rate": 0.1}, {"fim_spm_share": 0.1})
        ),
    ]
    assert len({digest, *others}) == 7 and compute_digest("a" * 64, tokenizer, RULES) == digest


def test_bad_row_costs_itself(tmp_path, tokenizer):
    lines = dump_rows(ROWS).split(b"\n")
    data = b"\n".join([*lines[:3], b'{"prompt": "?"}', b"", b"{" + b" " * 2**21, *lines[3:-1]])  # no newline at the end
    _, report = write_shard(tmp_path, tokenizer, data)
    assert (report.rows, report.excluded) == (len(ROWS) + 2, 2)
    assert set(report.reasons) == {"line 4", "line 6"}
    assert report.training.samples + report.validation.samples == len(ROWS)


def test_shard_without_a_usable_row_has_only_a_report(tmp_path, tokenizer):
    folder, report = write_shard(tmp_path, tokenizer, b"{}\n[]\n")
    assert report.training == report.validation == PackingStats() and report.excluded == 2
    assert list(read_files(folder)) == ["report.json"]


def test_rows_encoded_in_batches_have_the_samples_of_each(tokenizer):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    long = Row(answer="abc " * CHUNK_CHARS)
    special = Row(prompt="<sep>a", answer="b<eod>")
    for rows in ([], ROWS, [long], [ROWS[0], Row(messages=chat), special, long, ROWS[-1]]):
        by_row = [encode_row(row, tokenizer) for row in rows]
        in_batch = encode_rows(rows, tokenizer)
        assert in_batch == by_row
        for sample, expected in zip(itertools.chain(*in_batch), itertools.chain(*by_row), strict=True):
            assert (sample.num_targets, sample.first_target, sample.can_be_cut) == (
                expected.num_targets,
                expected.first_target,
                expected.can_be_cut,
            )


@pytest.mark.parametrize("data", [b"", b"\n", b"a", b"a\n", b"a\n\nbc", b"x" * 3_000_000 + b"\ny\n"])
def test_line_starts_are_those_of_the_lines(tmp_path, data):
    file = tmp_path / "lines"
    file.write_bytes(data)
    with file.open("rb") as stream:
        starts = find_line_starts(stream).tolist()
    lines = data.splitlines(keepends=True)
    assert [data[a:b] for a, b in itertools.pairwise(starts)] == lines


def test_documents_are_rearranged_in_the_same_way_in_every_round(tokenizer):
    rows = [Row(answer="abcdefgh" * 5 + str(n)) for n in range(200)]
    for rate, least, greatest in ((0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)):
        rules = SampleRules(seq_len=64, fim_rate=rate)
        samples = [encode_by_rules(row, tokenizer, rules)[0] for row in rows]
        num_rearranged = sum(tokenizer.special["<FIM_MIDDLE>"] in sample.tokens for sample in samples)
        assert least <= num_rearranged <= greatest
        again = [encode_by_rules(row, tokenizer, rules)[0] for row in rows]
        assert all((first.tokens == second.tokens).all() for first, second in zip(samples, again, strict=True))
        ((question,), (expected,)) = encode_by_rules(ROWS[0], tokenizer, rules), encode_row(ROWS[0], tokenizer)
        assert (question.tokens == expected.tokens).all()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"schema": 1}', b"[]", b'{"schema": 1, "rows": -1, "excluded": 0, "reasons": {}}']
)
def test_damaged_report_is_refused(content):
    with pytest.raises(ValueError, match=r"report|JSON"):
        ShardReport.parse(content)


@pytest.fixture(scope="module")
def large_shard(tmp_path_factory, tokenizer):
    """Return a folder with a tokenizer, and a function that makes a job on a shard that is not tokenized in-process."""
    folder = tmp_path_factory.mktemp("shard")
    tokenizer.save(folder)
    rows = [Row(answer=f"{n} " + "abcdefgh" * 100) for n in range(MAX_IN_PROCESS_BYTES // 800 + 100)]
    data = dump_rows(rows)
    (folder / "rows.jsonl").write_bytes(data)

    def make_job(name):
        (folder / name).mkdir()
        return TokenJob(
            rows_file=folder / "rows.jsonl",
            shard_sha256=hashlib.sha256(data).hexdigest(),
            folder=folder / name,
            tokenizer_folder=folder,
            rules=RULES,
        )

    return make_job


def test_killed_worker_is_replaced_and_the_files_are_the_same(large_shard):
    plain, job = large_shard("plain"), large_shard("killed")
    plain.run()
    with TokenWorkers(1) as workers:
        thread = threading.Thread(target=workers.run, args=(job,))
        thread.start()
        while thread.is_alive() and not (job.folder / "training" / "tokens.bin").exists():
            time.sleep(0.01)
        os.kill(workers.pids[0], signal.SIGKILL)
        thread.join()
        assert len(workers.pids) == 1
    assert workers.pids == []
    assert read_files(job.folder) == read_files(plain.folder)


def test_worker_that_dies_twice_ends_with_the_reason(large_shard):
    job, errors = large_shard("twice"), []

    def run(workers):
        try:
            workers.run(job)
        except TokenizingFailed as error:
            errors.append(str(error))

    with TokenWorkers(1) as workers:
        thread = threading.Thread(target=run, args=(workers,))
        thread.start()
        killed = set()
        while thread.is_alive():
            for pid in set(workers.pids) - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.01)
    assert len(killed) == 2 and "was killed by SIGKILL, 2 times" in errors[0]


def test_missing_file_is_an_error_of_the_machine(large_shard, tmp_path):
    job = dataclasses.replace(large_shard("missing"), tokenizer_folder=tmp_path)
    with TokenWorkers(1) as workers, pytest.raises(FileNotFoundError):
        workers.run(job)
