"""Time to check an answer with `exact`, `numeric` and `choice`: `python benchmarks/eval_checkers.py`, half a minute.

The answers are those of `tests/yuan/checker_answers.jsonl`, in turns; the goal is 10 microseconds of processor time an
answer. The growth compares answers of 20,000 and 2,000 characters of patterns on which regular expressions backtrack:
linear time gives 10, quadratic time 100.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pairs import make_line, print_lines
from pydantic import TypeAdapter

from yuan.data.checkers import Checker

ANSWERS = Path(__file__).parents[1] / "tests/yuan/checker_answers.jsonl"
ROUNDS = 200
MAX_MICROSECONDS, MAX_GROWTH = 10.0, 25.0
PATTERNS: list[str] = json.loads(ANSWERS.with_name("repeated_answer_parts.json").read_text())


def measure_answers(kind: str) -> list[float]:
    """Return microseconds per answer of each round over the labelled answers of a kind."""
    adapter: TypeAdapter[Checker] = TypeAdapter(Checker)
    entries = [json.loads(text) for text in ANSWERS.read_text("utf-8").splitlines()]
    cases = [
        (adapter.validate_python({"type": kind, "value": entry["value"]}), answer)
        for entry in entries
        if entry["type"] == kind
        for answer in (*entry["accept"], *entry["refuse"])
    ]
    rounds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for checker, answer in cases:
            checker.check(answer)
        rounds.append((time.process_time() - began) / len(cases) * 1e6)
    return rounds


def measure_growth(kind: str) -> float:
    """Return the largest ratio of the times for 20,000 and 2,000 characters of one pattern."""
    value = {"numeric": "5", "choice": "B", "exact": "abc"}[kind]
    checker: Checker = TypeAdapter(Checker).validate_python({"type": kind, "value": value})

    def measure_s(part: str, length: int) -> float:
        text = part * (length // len(part))  # whole parts, as a cut one may be read by other rules
        durations = []
        for _ in range(5):
            began = time.process_time()
            checker.check(text)
            durations.append(time.process_time() - began)
        return min(durations)

    return max(measure_s(part, 20_000) / measure_s(part, 2_000) for part in PATTERNS)


def measure() -> Iterator[dict[str, Any]]:
    for kind in ("exact", "numeric", "choice"):
        microseconds = statistics.median(measure_answers(kind))
        yield make_line(
            f"{kind}: time of a check",
            microseconds,
            "us",
            goal=f"at most {MAX_MICROSECONDS:g}",
            ok=microseconds <= MAX_MICROSECONDS,
        )
        growth = measure_growth(kind)
        yield make_line(
            f"{kind}: growth of the time for ten times the text",
            growth,
            "x",
            goal=f"at most {MAX_GROWTH:g}",
            ok=growth <= MAX_GROWTH,
        )


if __name__ == "__main__":
    sys.exit(not print_lines(*measure()))
