"""The demo's contributor, a separate process that uses only the public client.

`COTRAIN_TOKEN=... python -m flows.demo.contributor URL SKILLS.py SEED` queries the champion, reports wrong answers,
pushes a dataset, and prints one JSON object.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feedback.client import Client, PortalError
from feedback.contracts import FeedbackIn
from yuan.data.rows import Row, dump_rows
from yuan.data.skills import Skill, load_skills

REPORTS_PER_SKILL = 60
DATASET_ROWS = 5000
QUESTIONS_PER_REQUEST, MAX_QUESTIONS_PER_SKILL = 40, 600
MALFORMED_DATASET = b'{"prompt": "2+2", "answer": "4"}\n{"prompt": "3+3"}\nnot json\n'


def main() -> int:
    url, skills_file, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    skills = load_skills(skills_file)
    with Client(url, os.environ["COTRAIN_TOKEN"]) as client:
        num_questions, num_reports = 0, 0
        for skill in skills:
            wrong = list(find_wrong_answers(client, skill, seed))
            num_questions += sum(number for number, _ in wrong)
            num_reports += sum(
                report_wrong_answer(client, row, answer, wanted) for _, rows in wrong for row, answer, wanted in rows
            )
        refused = [push_malformed(client), submit_oversized(client)]
        rows = build_dataset_rows(skills, seed)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "corrections.jsonl"
            file.write_bytes(dump_rows(rows))
            dataset = client.push_dataset(file, idempotency_key=f"demo-dataset-{seed}")
    print(json.dumps({"asked": num_questions, "reports": num_reports, "refused": refused, "rows": dataset.num_rows}))
    return 0


def find_wrong_answers(client: Client, skill: Skill, seed: int) -> Any:
    """Query the champion until REPORTS_PER_SKILL answers are wrong; yield (queried, [(row, choice, version)])."""
    rows = skill.make_rows(MAX_QUESTIONS_PER_SKILL, seed=seed + 7, at_least=1)
    found = 0
    for start in range(0, len(rows), QUESTIONS_PER_REQUEST):
        batch = rows[start : start + QUESTIONS_PER_REQUEST]
        answer = client.complete([row.prompt for row in batch])
        version = int(answer["model"].removeprefix("yuan-v"))
        wrong = [
            (row, choice, version)
            for row, choice in zip(batch, answer["choices"], strict=True)
            if row.checker is not None and not row.checker.check(choice["text"])
        ][: REPORTS_PER_SKILL - found]
        found += len(wrong)
        yield len(batch), wrong
        if found == REPORTS_PER_SKILL:
            return


def report_wrong_answer(client: Client, row: Row, choice: dict[str, Any], version: int) -> int:
    """Report one wrong answer with its correction."""
    client.submit(
        FeedbackIn(
            kind="correction",
            prompt=row.prompt,
            response=choice["text"],
            response_id=choice["response_id"],
            model_version=version,
            expected=row.answer,
            checker=row.checker,
        )
    )
    return 1


def push_malformed(client: Client) -> dict[str, Any]:
    """Push a file with two bad rows and return the refusal."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "malformed.jsonl"
        file.write_bytes(MALFORMED_DATASET)
        try:
            client.push_dataset(file)
        except PortalError as error:
            return {
                "what": "malformed file",
                "status": error.status,
                "reason": error.body.message,
                "rows": error.body.rows,
            }
    raise RuntimeError("the portal took a malformed file")


def submit_oversized(client: Client) -> dict[str, Any]:
    """Send a report beyond the size limit and return the refusal."""
    huge = FeedbackIn.model_construct(
        kind="correction", prompt="x" * 200_000, response="y", model_version=1, expected="z"
    )
    try:
        client.submit(huge)
    except PortalError as error:
        return {"what": "oversized report", "status": error.status, "reason": error.body.message}
    raise RuntimeError("the portal took an oversized report")


def build_dataset_rows(skills: Sequence[Skill], seed: int) -> list[Row]:
    """Make an equal share of DATASET_ROWS correct examples per skill, or fewer if a skill has fewer distinct ones."""
    rows_per_skill = -(-DATASET_ROWS // len(skills))
    return [row for skill in skills for row in skill.make_rows(rows_per_skill, seed=seed + 13, at_least=1)]


if __name__ == "__main__":
    sys.exit(main())
