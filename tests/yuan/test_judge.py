"""Judging answers: a checker that raises, hangs or crashes fails its own check only."""

import os
import signal
from pathlib import Path

import pytest

from yuan.data.checkers import Exact
from yuan.data.judge import JUDGE_MEMORY_BYTES, AnswerJudge, CheckFailed

RULE = Exact(value="a\u2028b")


class UnknownChecker(Exact):
    """Define a checker that the judge's process does not know."""

    value: int


@pytest.fixture
def judge():
    with AnswerJudge(limit_s=1) as judge:
        yield judge


def test_judge_returns_the_verdict_of_the_checker(judge):
    assert judge.check(RULE, " a\u2028b\n") and not judge.check(RULE, "a\nb")
    assert judge.check(Exact(value="x" * 2000), "x" * 2000)


def test_checker_error_is_reported_and_the_next_answer_is_judged(judge):
    with pytest.raises(CheckFailed, match="the checker raised ValidationError"):
        judge.check(UnknownChecker.model_construct(value=7), "7")
    assert judge.check(RULE, RULE.value)


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGSTOP, "within 1 s"), (signal.SIGKILL, "ended the process")])
def test_hung_or_killed_checker_process_is_restarted(judge, number, reason):
    judge.check(RULE, "")
    os.kill(judge.pid, number)
    with pytest.raises(CheckFailed, match=reason):
        judge.check(RULE, "x" * 200_000)
    assert judge.check(RULE, RULE.value)


def test_checker_process_has_a_memory_limit(judge):
    judge.check(RULE, "")
    limits = Path(f"/proc/{judge.pid}/limits").read_text()
    allowed = next(line for line in limits.splitlines() if line.startswith("Max address space"))
    assert allowed.split()[3] == str(JUDGE_MEMORY_BYTES)


def test_checker_process_exits_with_the_context_manager():
    with AnswerJudge() as judge:
        judge.check(RULE, "")
        pid = judge.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
