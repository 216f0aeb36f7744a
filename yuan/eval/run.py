"""Entry point of an evaluation: `python -m yuan.eval.run MODEL CASES.jsonl RESULTS.jsonl LIMITS`.

MODEL is a model folder whose files the caller has verified. Cases are rows with an id; LIMITS is the section
`[evaluation]` of a recipe as JSON. A result has the case's answer and the checker's verdict. A case that cannot be
read, answered or judged fails with the reason; the other cases are not affected.
"""

import json
import logging
import os
import sys
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from infra.logs import configure_logging
from infra.process_group import exit_with_parent
from yuan.data.checkers import Checker, Exact
from yuan.data.judge import AnswerJudge, CheckFailed
from yuan.data.rule_text import describe_errors
from yuan.eval.results import EvalResult, dump_results
from yuan.generate.answers import Completion, answer_each
from yuan.generate.limits import Sampling
from yuan.model.weights import load, load_tokenizer
from yuan.recipe import DEFAULT_EVALUATION, EvaluationSection
from yuan.safe_files import replace_file_below
from yuan.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_EVAL_REASON_CHARACTERS = 500


class EvalCase(BaseModel):
    """One case of an evaluation."""

    id: str
    prompt: str
    expected: str
    checker: Checker


def evaluate(
    model_dir: Path, cases: list[EvalCase], judge: AnswerJudge, limits: EvaluationSection = DEFAULT_EVALUATION
) -> list[EvalResult]:
    """Answer every case with greedy decoding, up to the case's own number of tokens, and judge the answers."""
    model, tokenizer = load(model_dir, is_verified=True), load_tokenizer(model_dir)
    samplings = [make_sampling(case, tokenizer, limits) for case in cases]
    answers = answer_each(model, tokenizer, [case.prompt for case in cases], samplings)
    return [judge_answer(case, answer, judge) for case, answer in zip(cases, answers, strict=True)]


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


def read_cases(file: Path) -> tuple[list[EvalCase], list[EvalResult]]:
    """Read a file of cases; return the valid ones, and a failed result for each invalid line that has an id."""
    cases, failed_results = [], []
    for line in file.read_bytes().split(b"\n"):
        if line:
            try:
                cases.append(EvalCase.model_validate_json(line))
            except ValidationError as error:
                if (case_id := _find_case_id(line)) is not None:
                    failed_results.append(make_failed_result(case_id, describe_errors(error)))
                else:
                    log.warning("skipped a line without a case id in %s: %s", file, describe_errors(error))
    return cases, failed_results


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
    model_dir, cases_file, results_file = map(Path, sys.argv[1:4])
    limits = EvaluationSection.model_validate_json(sys.argv[4])
    cases, results = read_cases(cases_file)
    with AnswerJudge() as judge:
        results += evaluate(model_dir, cases, judge, limits)
    replace_file_below(results_file.parent, results_file.name, dump_results(results))
    num_passed = sum(result.passed for result in results)
    num_unjudged = sum(result.reason is not None for result in results)
    log.info("evaluated %d cases: %d passed, %d could not be judged", len(results), num_passed, num_unjudged)
    return 0


if __name__ == "__main__":
    sys.exit(main())
