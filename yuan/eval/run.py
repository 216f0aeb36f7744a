"""Entry of an evaluation: `python -m yuan.eval.run VERSION FOLDER CASES.jsonl RESULTS.jsonl`.

The version, such as v7, is fetched from the tracker into the folder, with the account in the environment. Cases are
rows with an id; results give each case's answer and whether its checker takes it.
"""

import json
import logging
import os
import sys
from pathlib import Path

import torch
from pydantic import BaseModel

from infra.launch import leave_with_parent
from infra.logs import configure_logging
from infra.settings import TrackerAccess, load_settings
from infra.tracker import Tracker
from yuan.data.checkers import Checker
from yuan.generate.answers import generate
from yuan.generate.sampling import Sampling
from yuan.model.weights import load, load_tokenizer

log = logging.getLogger(__name__)

EXTRA_TOKENS = 8


class EvalCase(BaseModel):
    """One question of an evaluation."""

    id: str
    prompt: str
    expected: str
    checker: Checker


def evaluate(model_dir: Path, cases: list[EvalCase]) -> list[dict[str, object]]:
    """Answer every case without chance and judge the answers; a prompt beyond the window fails."""
    model, tokenizer = load(model_dir), load_tokenizer(model_dir)
    longest = max((len(tokenizer.encode(case.expected)) for case in cases), default=0)
    fitting = [case for case in cases if len(tokenizer.encode(case.prompt)) + 1 < model.config.seq_len]
    answers = generate(model, tokenizer, [case.prompt for case in fitting], Sampling(max_tokens=longest + EXTRA_TOKENS))
    texts = {case.id: answer.text for case, answer in zip(fitting, answers, strict=True)}
    return [
        {"case_id": c.id, "answer": texts.get(c.id, ""), "passed": c.id in texts and c.checker.check(texts[c.id])}
        for c in cases
    ]


def main() -> int:
    configure_logging()
    leave_with_parent()
    torch.set_num_threads(os.cpu_count() or 1)
    folder, cases_file, results_file = map(Path, sys.argv[2:5])
    model_dir = Tracker(load_settings(TrackerAccess)).download(int(sys.argv[1].removeprefix("v")), folder)
    cases = [EvalCase.model_validate_json(line) for line in cases_file.read_text().splitlines()]
    results = evaluate(model_dir, cases)
    scratch = results_file.with_suffix(".part")
    scratch.write_text("".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results))
    scratch.replace(results_file)
    log.info("evaluated %d cases, %d passed", len(results), sum(bool(result["passed"]) for result in results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
