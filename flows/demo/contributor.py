"""The demo's contributor, a separate process that uses only the public client.

`COTRAIN_TOKEN=... python -m flows.demo.contributor URL SKILLS.py SEED` queries the champion, reports wrong answers,
pushes a dataset, and prints one JSON object.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from feedback.client import Client, PortalError
from feedback.contracts import FeedbackIn
from yuan.data.rows import BadRow, Row, dump_rows
from yuan.data.skills import Skill, load_skills
from yuan.version_names import parse_model_name

REPORTS_PER_SKILL = 60
DATASET_ROWS = 5000
QUESTIONS_PER_REQUEST = 40
MAX_QUESTIONS_PER_SKILL = 600
MALFORMED_DATASET = b'{"prompt": "2+2", "answer": "4"}\n{"prompt": "3+3"}\nnot json\n'


class Refusal(BaseModel):
    """The portal's response to a request that it must refuse.

    Attributes:
        request: describes the request; `what` in JSON.
        status: HTTP status.
        rows: the bad rows that the response lists, if any.
    """

    model_config = ConfigDict(frozen=True, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    request: str = Field(alias="what")
    status: int
    reason: str
    rows: list[BadRow] | None = Field(default=None, exclude_if=lambda rows: rows is None)


class Contribution(BaseModel):
    """Summary of the contributor's requests.

    Attributes:
        num_questions: prompts that it sent to the champion.
        num_reports: reports of wrong answers.
        num_rows: rows of its dataset.
        refusals: of the requests that had to be refused.
    """

    model_config = ConfigDict(frozen=True)

    num_questions: int
    num_reports: int
    num_rows: int
    refusals: list[Refusal]


@dataclass(frozen=True)
class WrongAnswer:
    """An answer of the champion that the row's checker rejects."""

    row: Row
    response: str
    response_id: str
    version: int


@dataclass(frozen=True)
class QuestionBatch:
    """Number of the prompts of one request, and the wrong answers to them that are to be reported."""

    num_questions: int
    wrong_answers: list[WrongAnswer]


def main() -> int:
    url, skills_file, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with Client(url, os.environ["COTRAIN_TOKEN"]) as client:
        contribution = contribute(client, load_skills(skills_file), seed)
    print(contribution.model_dump_json(ensure_ascii=True))
    return 0


def contribute(client: Client, skills: Sequence[Skill], seed: int) -> Contribution:
    """Report wrong answers in each skill, send two requests that must be refused, and push a dataset."""
    num_questions = num_reports = 0
    for skill in skills:
        for batch in find_wrong_answers(client, skill, seed):
            num_questions += batch.num_questions
            num_reports += len(batch.wrong_answers)
            for wrong_answer in batch.wrong_answers:
                report_wrong_answer(client, wrong_answer)

    refusals = [push_malformed(client), submit_oversized(client)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "corrections.jsonl"
        file.write_bytes(dump_rows(build_dataset_rows(skills, seed)))
        dataset = client.push_dataset(file, idempotency_key=f"demo-dataset-{seed}")
    return Contribution(
        num_questions=num_questions, num_reports=num_reports, num_rows=dataset.num_rows, refusals=refusals
    )


def find_wrong_answers(client: Client, skill: Skill, seed: int) -> Iterator[QuestionBatch]:
    """Query the champion until REPORTS_PER_SKILL answers are wrong; yield one batch per request."""
    rows = skill.make_rows(MAX_QUESTIONS_PER_SKILL, seed=seed + 7, at_least=1)
    num_missing = REPORTS_PER_SKILL
    for start in range(0, len(rows), QUESTIONS_PER_REQUEST):
        batch_rows = rows[start : start + QUESTIONS_PER_REQUEST]
        completion = client.complete([row.prompt for row in batch_rows])
        version = parse_model_name(completion.model)

        wrong_answers = [
            WrongAnswer(row, choice.text, choice.response_id, version)
            for row, choice in zip(batch_rows, completion.choices, strict=True)
            if row.checker is not None and not row.checker.check(choice.text)
        ]
        wrong_answers = wrong_answers[:num_missing]
        yield QuestionBatch(len(batch_rows), wrong_answers)
        num_missing -= len(wrong_answers)
        if num_missing == 0:
            return


def report_wrong_answer(client: Client, wrong_answer: WrongAnswer) -> None:
    """Report one wrong answer with its correction."""
    client.submit(
        FeedbackIn(
            kind="correction",
            prompt=wrong_answer.row.prompt,
            response=wrong_answer.response,
            response_id=wrong_answer.response_id,
            model_version=wrong_answer.version,
            expected=wrong_answer.row.answer,
            checker=wrong_answer.row.checker,
        )
    )


def push_malformed(client: Client) -> Refusal:
    """Push a file with two bad rows and return the refusal."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "malformed.jsonl"
        file.write_bytes(MALFORMED_DATASET)
        try:
            client.push_dataset(file)
        except PortalError as error:
            rows = error.body.rows or []
            return Refusal(request="malformed file", status=error.status, reason=error.body.message, rows=rows)
    raise RuntimeError("the portal must refuse a malformed file, and accepted it")


def submit_oversized(client: Client) -> Refusal:
    """Send a report beyond the size limit and return the refusal."""
    huge = FeedbackIn.model_construct(
        kind="correction", prompt="x" * 200_000, response="y", model_version=1, expected="z"
    )
    try:
        client.submit(huge)
    except PortalError as error:
        return Refusal(request="oversized report", status=error.status, reason=error.body.message)
    raise RuntimeError("the portal must refuse an oversized report, and accepted it")


def build_dataset_rows(skills: Sequence[Skill], seed: int) -> list[Row]:
    """Make an equal share of DATASET_ROWS correct examples per skill, or fewer if a skill has fewer distinct ones."""
    rows_per_skill = -(-DATASET_ROWS // len(skills))
    return [row for skill in skills for row in skill.make_rows(rows_per_skill, seed=seed + 13, at_least=1)]


if __name__ == "__main__":
    sys.exit(main())
