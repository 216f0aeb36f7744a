"""Evaluation beside the decoder alone, and verdicts in another order: `python benchmarks/loop_evaluate.py`, 15 minutes.

A model of the demo's size answers 10,000 short prompts. Ours reads cases from a file, decodes, judges each answer in
the checker's process and writes each result; the peer is the decoder on the same prompts in one call, with the same
threads. Goal: at least 0.9 of its answers per second.

Then the same cases in another order and with other numbers of rows: no verdict may differ in fp32, and at most 0.2 %
of them in bf16. Half of the checkers accept exactly the answer of the first evaluation. Prints one JSON line for each.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from pairs import make_at_least_line, make_line, measure_ratios, print_lines

from yuan import tokenizer as tokenizers
from yuan.config import tiny
from yuan.data.checkers import Exact
from yuan.data.judge import AnswerJudge
from yuan.eval.results import CASES_FILE, RESULTS_FILE, dump_results
from yuan.eval.run import EvalCase, evaluate, iter_cases, make_sampling
from yuan.generate.answers import answer_each
from yuan.model.transformer import Yuan
from yuan.recipe import DEFAULT_EVALUATION
from yuan.tokenizer import Tokenizer

NUM_CASES = 10_000
MIN_SPEED_RATIO = 0.9
MAX_FLIP_RATES = {torch.float32: 0.0, torch.bfloat16: 0.002}
WEIGHT_STD = 0.3  # so that different prompts get different answers
OTHER_ROWS = (128, 17)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=NUM_CASES, help="number of cases")
    arguments = parser.parse_args()
    tokenizer = tokenizers.train(["abcdefghijklmnopqrstuvwxyz 0123456789 + - = 加减乘除"], vocab_size=512)
    is_ok = True
    for dtype, max_flip_rate in MAX_FLIP_RATES.items():
        model = make_model(tokenizer, dtype)
        cases = make_cases(model, tokenizer, arguments.cases)
        if dtype == torch.float32:
            is_ok &= compare_speed(model, tokenizer, cases)
        is_ok &= compare_verdicts(model, tokenizer, cases, max_flip_rate)
    return 0 if is_ok else 1


def make_model(tokenizer: Tokenizer, dtype: torch.dtype) -> Yuan:
    torch.manual_seed(0)
    model = Yuan(tiny(len(tokenizer))).eval()
    for parameter in model.layers.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=WEIGHT_STD)
    return model.to(dtype)


def make_cases(model: Yuan, tokenizer: Tokenizer, number: int) -> list[EvalCase]:
    """Make cases with prompts of 4 to 30 characters; the checkers of every other one accept the model's answer."""
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789+-="
    cases = []
    for index in range(number):
        prompt = "".join(generator.choices(letters, k=generator.randrange(4, 31)))
        expected = "".join(generator.choices(letters, k=generator.randrange(2, 9)))
        cases.append(EvalCase(id=f"{index:06}", prompt=prompt, expected=expected, checker=Exact(value=expected)))
    answers = answer_cases(model, tokenizer, cases)
    return [
        case.model_copy(update={"checker": Exact(value=answer)}) if index % 2 and answer.strip() else case
        for index, (case, answer) in enumerate(zip(cases, answers, strict=True))
    ]


def answer_cases(model: Yuan, tokenizer: Tokenizer, cases: Sequence[EvalCase]) -> list[str]:
    """Answer the cases by the decoder alone."""
    samplings = [make_sampling(case, tokenizer, DEFAULT_EVALUATION) for case in cases]
    answers = answer_each(model, tokenizer, [case.prompt for case in cases], samplings)
    return ["" if isinstance(answer, Exception) else answer.text for answer in answers]


def evaluate_cases(
    model: Yuan, tokenizer: Tokenizer, cases: Sequence[EvalCase], folder: Path, max_rows: int = 128
) -> dict[str, bool]:
    """Evaluate the cases as the process of an evaluation does, from file to file; return the verdicts."""
    (folder / CASES_FILE).write_text("".join(case.model_dump_json() + "\n" for case in cases))
    verdicts = {}
    with AnswerJudge() as judge, (folder / RESULTS_FILE).open("wb", buffering=0) as out:
        for result in evaluate(model, tokenizer, iter_cases(folder / CASES_FILE), judge, max_rows=max_rows):
            out.write(dump_results([result]))
            verdicts[result.case_id] = result.passed
    return verdicts


def compare_speed(model: Yuan, tokenizer: Tokenizer, cases: Sequence[EvalCase]) -> bool:
    """Compare the answers per second with those of the decoder alone."""
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as name:

        def measure_ours() -> float:
            began_at = time.perf_counter()
            evaluate_cases(model, tokenizer, cases, Path(name))
            rates.append(len(cases) / (time.perf_counter() - began_at))
            return rates[-1]

        def measure_decoder() -> float:
            began_at = time.perf_counter()
            answer_cases(model, tokenizer, cases)
            return len(cases) / (time.perf_counter() - began_at)

        ratios = measure_ratios(measure_ours, measure_decoder)
    line = make_at_least_line(
        f"evaluating {len(cases):,} short cases",
        ratios,
        MIN_SPEED_RATIO,
        figure=round(statistics.median(rates)),
        unit="cases/s",
        peer="the decoder alone",
    )
    return print_lines(line)


def compare_verdicts(model: Yuan, tokenizer: Tokenizer, cases: list[EvalCase], max_flip_rate: float) -> bool:
    """Compare verdicts in another order and with other numbers of rows."""
    precision = str(next(model.parameters()).dtype).removeprefix("torch.")
    shuffled = random.Random(1).sample(cases, len(cases))
    with tempfile.TemporaryDirectory() as name:
        expected = evaluate_cases(model, tokenizer, cases, Path(name))
        flip_rates = []
        for max_rows in OTHER_ROWS:
            verdicts = evaluate_cases(model, tokenizer, shuffled, Path(name), max_rows)
            flip_rates.append(sum(verdicts[case_id] != passed for case_id, passed in expected.items()) / len(cases))
    num_passed = sum(expected.values())
    line = make_line(
        f"verdicts that differ in another order, {precision}, {num_passed:,} of {len(cases):,} pass",
        max(flip_rates),
        "share",
        goal=f"at most {max_flip_rate}",
        ok=max(flip_rates) <= max_flip_rate,
    )
    return print_lines({**line, "by_rows": dict(zip(map(str, OTHER_ROWS), flip_rates, strict=True))})


if __name__ == "__main__":
    sys.exit(main())
