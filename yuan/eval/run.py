"""Entry point of an evaluation: `python -m yuan.eval.run FOLDER`.

FOLDER has what to do in `evaluation.json` and the cases, rows with an id, in `cases.jsonl`; each result, with the
answer and the checker's verdict, is appended to `results.jsonl` as soon as it is there, and `ready` is made once the
model has decoded a token. It computes on the accelerators that the environment grants, on as few as hold the model, or
on processors. A case that cannot be read, answered or judged fails with the reason; the other cases are not affected.
"""

import contextlib
import json
import logging
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from infra.logs import configure_logging
from infra.machine import measure_available_memory_gib
from infra.process_group import exit_with_parent
from yuan.data.checkers import Checker, Exact
from yuan.data.judge import AnswerJudge, CheckFailed
from yuan.data.rule_text import describe_errors
from yuan.device_faults import (
    DEVICE_LOST_STATUS,
    OUT_OF_MEMORY_STATUS,
    describes_lack_of_memory,
    describes_lost_device,
)
from yuan.eval.results import CASES_FILE, DEVICE_FAULT_FILE, READY_FILE, RESULTS_FILE, EvalResult, dump_results
from yuan.eval.spec import EvaluationSpec
from yuan.generate.answers import Completion, iter_answers
from yuan.generate.cache_slots import CacheBudget
from yuan.generate.decoder import check_decoding
from yuan.generate.limits import MAX_BATCH_ROWS, Sampling
from yuan.generate.placement import choose_fewest_devices, load_over_devices, measure_cache_room
from yuan.model.accelerator import check_accelerators, list_devices
from yuan.model.transformer import Yuan
from yuan.model.weights import load_tokenizer
from yuan.recipe import DEFAULT_EVALUATION, EvaluationSection
from yuan.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_EVAL_REASON_CHARACTERS = 500
MAX_UNJUDGED_ANSWERS = 1024  # in memory
EVAL_CACHE_SHARE = 0.5  # of the memory that is available once the weights are loaded, for the decoding cache


class EvalCase(BaseModel):
    """One case of an evaluation."""

    id: str
    prompt: str
    expected: str
    checker: Checker


def evaluate(
    model: Yuan,
    tokenizer: Tokenizer,
    cases: Iterable[EvalCase],
    judge: AnswerJudge,
    limits: EvaluationSection = DEFAULT_EVALUATION,
    *,
    budget: CacheBudget | None = None,
    max_rows: int = MAX_BATCH_ROWS,
) -> Iterator[EvalResult]:
    """Answer a stream of cases with greedy decoding, each up to its own number of tokens, and judge the answers.

    Yields each result as soon as it is there: answers are judged in a thread while others are decoded. With one row a
    case has its result before the next one is decoded, so that the one that ends the process is the first without one.
    """
    open_cases: dict[int, EvalCase] = {}

    def iter_prompts() -> Iterator[tuple[str, Sampling]]:
        for number, case in enumerate(cases):
            open_cases[number] = case
            yield case.prompt, make_sampling(case, tokenizer, limits)

    max_unjudged = MAX_UNJUDGED_ANSWERS if max_rows > 1 else 0
    judged: deque[Future[EvalResult]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="judge") as judging:
        for number, answer in iter_answers(model, tokenizer, iter_prompts(), budget, max_rows=max_rows):
            judged.append(judging.submit(judge_answer, open_cases.pop(number), answer, judge))
            while judged and (judged[0].done() or len(judged) > max_unjudged):
                yield judged.popleft().result()
        yield from (future.result() for future in judged)


def make_sampling(case: EvalCase, tokenizer: Tokenizer, limits: EvaluationSection) -> Sampling:
    """Return the sampling of a case: greedy, with room for the expected answer."""
    # An exact answer is wrong once it is longer, any other may explain itself.
    num_extra = limits.extra_tokens_exact if isinstance(case.checker, Exact) else limits.extra_tokens
    max_tokens = max(1, _count_tokens(case.expected, tokenizer) + num_extra)
    return Sampling(max_tokens=min(max_tokens, limits.max_answer_tokens or max_tokens))


def _count_tokens(text: str, tokenizer: Tokenizer) -> int:
    try:
        return len(tokenizer.encode(text))
    except ValueError:
        return 0


def judge_answer(case: EvalCase, answer: Completion | Exception, judge: AnswerJudge) -> EvalResult:
    """Return the result of one case."""
    if isinstance(answer, Exception):
        return make_failed_result(case.id, str(answer))
    try:
        passed = judge.check(case.checker, answer.text)
    except CheckFailed as error:
        return make_failed_result(case.id, str(error), answer.text)
    return EvalResult(case.id, answer.text, passed)


def make_failed_result(case_id: str, reason: str, answer: str = "") -> EvalResult:
    return EvalResult(case_id, answer, passed=False, reason=reason[:MAX_EVAL_REASON_CHARACTERS])


def iter_cases(file: Path) -> Iterator[EvalCase]:
    """Yield the valid cases of a file in their order."""
    with file.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(ValidationError):
                yield EvalCase.model_validate_json(line)


def iter_invalid_cases(file: Path) -> Iterator[EvalResult]:
    """Yield a failed result for each invalid line of a file that has an id."""
    with file.open("rb") as lines:
        for line in lines:
            try:
                EvalCase.model_validate_json(line)
            except ValidationError as error:
                if (case_id := _find_case_id(line)) is not None:
                    yield make_failed_result(case_id, describe_errors(error))
                else:
                    log.warning("skipped a line without a case id in %s: %s", file, describe_errors(error))


def _find_case_id(line: bytes) -> str | None:
    """Return the id in a line that is not a valid case; None if it has none."""
    try:
        return str(json.loads(line)["id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def main() -> int:
    configure_logging()
    exit_with_parent()
    torch.set_num_threads(os.cpu_count() or 1)
    folder = Path(sys.argv[1])
    try:
        run_evaluation(folder)
    except (RuntimeError, MemoryError) as error:  # as torch's errors of devices are
        if describes_lost_device(str(error)):
            status = DEVICE_LOST_STATUS
        elif describes_lack_of_memory(error):
            status = OUT_OF_MEMORY_STATUS
        else:
            raise
        log.exception("the evaluation ends, since a device is lost or has no memory left")
        (folder / DEVICE_FAULT_FILE).write_text(str(error)[:MAX_EVAL_REASON_CHARACTERS])
        return status
    return 0


def run_evaluation(folder: Path) -> None:
    """Evaluate the cases of a folder."""
    spec = EvaluationSpec.read(folder)
    check_accelerators(spec.num_accelerators)
    devices = choose_fewest_devices(spec.model, list_devices())
    model, tokenizer = load_over_devices(spec.model, devices), load_tokenizer(spec.model)
    check_decoding(model, tokenizer)
    (folder / READY_FILE).touch()

    room_bytes = measure_cache_room(model, lambda: int(measure_available_memory_gib() * 2**30))
    budget = CacheBudget(min(spec.max_cache_bytes or room_bytes, int(EVAL_CACHE_SHARE * room_bytes)))
    num_results = num_passed = num_unjudged = 0
    with AnswerJudge() as judge, (folder / RESULTS_FILE).open("ab", buffering=0) as out:
        cases = iter_cases(folder / CASES_FILE)
        evaluated = evaluate(model, tokenizer, cases, judge, spec.limits, budget=budget, max_rows=spec.max_rows)
        for result in chain(iter_invalid_cases(folder / CASES_FILE), evaluated):
            out.write(dump_results([result]))
            num_results += 1
            num_passed += result.passed
            num_unjudged += result.reason is not None
    log.info("evaluated %d cases: %d passed, %d could not be judged", num_results, num_passed, num_unjudged)


if __name__ == "__main__":
    sys.exit(main())
