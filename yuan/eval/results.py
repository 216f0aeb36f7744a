"""Results of an evaluation: one JSON line a case, from the process that runs the model to the one that stores them."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

# In the folder of an evaluation.
EVALUATION_FILE, CASES_FILE = "evaluation.json", "cases.jsonl"
RESULTS_FILE, READY_FILE = "results.jsonl", "ready"
DEVICE_FAULT_FILE = "device_fault"  # why its device is lost or has no memory left


@dataclass(frozen=True)
class EvalResult:
    """The result of one case.

    Attributes:
        reason: why the answer could not be judged; the case then failed. None for a verdict of the checker.
    """

    case_id: str
    answer: str
    passed: bool
    reason: str | None = None


def dump_results(results: Iterable[EvalResult]) -> bytes:
    """Write results as JSON lines."""
    return b"".join(json.dumps(asdict(result)).encode() + b"\n" for result in results)


def parse_results(text: str) -> list[EvalResult]:
    """Parse JSON lines of results.

    Raises:
        ValueError: if a line is not a result; the message names the line but does not quote it.

    >>> parse_results('{"case_id": "a", "answer": "4", "passed": "yes", "reason": null}')
    Traceback (most recent call last):
    ValueError: line 1 is not a result
    """
    return [_parse_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line]


def _parse_line(number: int, line: str) -> EvalResult:
    try:
        result = EvalResult(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"line {number} is not a result") from None
    has_types = isinstance(result.case_id, str) and isinstance(result.answer, str) and isinstance(result.passed, bool)
    if not has_types or not isinstance(result.reason, str | None):
        raise ValueError(f"line {number} is not a result")
    return result
