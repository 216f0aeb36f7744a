"""The scenario of the demo: its rounds and its contributor in order, and the collection of its results."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback.client import Client
from feedback.contracts import NoticeOut, RoundOut, RoundParameters
from feedback.promotion_decision import SuiteComparison
from feedback.round_steps import RoundStep
from feedback.states import DatasetPurpose, ReportState, RoundState
from feedback.tables import BASE_SUITE
from feedback.verdicts import Verdict
from flows.demo.contributor import Contribution, Refusal
from flows.demo.demo_corpus import REPORTED_SKILLS, build_base_rows, build_fresh_rows
from infra.polling import poll_until
from yuan.data.rows import Row, dump_rows
from yuan.data.skills import load_skills
from yuan.version_names import format_model_name

BASE_ROUND = RoundParameters(max_steps=950, learning_rate=2e-3)
DEMO_ROUND = RoundParameters(max_steps=1150, learning_rate=1.5e-3, replay_rows=9000)
FRESH_SUITE = "fresh"
FRESH_ROWS_PER_SKILL = 200
SERVICE_TIMEOUT_S = 60.0
NOTICE_TIMEOUT_S = 30.0

PrintLine = Callable[[str], None]
FollowRound = Callable[[Client, str], RoundOut]


class DemoFailed(RuntimeError):
    """A round was not promoted, or a step of the demo failed."""


@dataclass(frozen=True)
class DemoAccess:
    """The portal's URL, and a client with the operator's token."""

    url: str
    operator: Client


@dataclass(frozen=True, kw_only=True)
class DemoFigures:
    """Results of a demo.

    Attributes:
        suites: the pass rates on which the second round's champion was judged.
        reports: number of accepted reports, of `submitted` ones; `fixed` and `still_failing` are the verdicts on them.
        round_overhead_s: seconds of the second round that are neither training nor evaluation.
        parts: seconds of each part of the demo.
    """

    champion_before: int | None
    champion_after: int | None
    suites: tuple[SuiteComparison, ...]
    reports: int
    submitted: int
    refused: list[Refusal]
    fixed: int
    still_failing: int
    notices: int
    round_overhead_s: float
    parts: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as `cotrain demo --json` prints them, with the rates of two suites by name."""
        by_name = {suite.suite: suite for suite in self.suites}
        fresh, base = by_name[FRESH_SUITE], by_name[BASE_SUITE]
        assert fresh.before is not None and base.before is not None, "the base round's model is tested on both"
        return {
            "champion_before": self.champion_before,
            "champion_after": self.champion_after,
            "gate_before": fresh.before.rate,
            "gate_after": fresh.after.rate,
            "base_before": base.before.rate,
            "base_after": base.after.rate,
            "reports": self.reports,
            "submitted": self.submitted,
            "refused": [refusal.model_dump() for refusal in self.refused],
            "fixed": self.fixed,
            "still_failing": self.still_failing,
            "notices": self.notices,
            "suites": [suite.model_dump(mode="json") for suite in self.suites],
            "round_overhead_s": self.round_overhead_s,
            "parts": self.parts,
        }


def run_demo(
    access: DemoAccess, *, skills_file: Path | None, seed: int, print_line: PrintLine, follow_round: FollowRound
) -> DemoFigures:
    """Run the base round, the contributor and the second round, and return the results.

    Raises:
        DemoFailed: if a round is not promoted.
        ValueError: if the skill file is invalid.
    """
    skills_file = skills_file or REPORTED_SKILLS
    skills = load_skills(skills_file)
    timer = Timer()

    print_line(f"base model: documents and exercises without {', '.join(skill.name for skill in skills)}")
    push_rows(access.operator, BASE_SUITE, DatasetPurpose.BASE, build_base_rows(skills, seed))
    push_rows(access.operator, FRESH_SUITE, DatasetPurpose.SUITE, build_fresh_rows(skills, seed, FRESH_ROWS_PER_SKILL))
    first = run_round(access, BASE_ROUND.model_copy(update={"seed": seed}), follow_round)
    wait_for_version(access.operator, int(first.candidate_version or 0))
    timer.lap("base round")

    account = access.operator.add_contributor(f"demo-{seed}-{int(time.time())}")
    print_line("a contributor asks, reports wrong answers and pushes a dataset")
    contribution = run_contributor(access.url, account.token, skills_file, seed)
    counts = f"{contribution.num_questions} questions, {contribution.num_reports} reports"
    print_line(f"{counts}, a dataset of {contribution.num_rows} rows; 2 refused on purpose")
    timer.lap("contributor")

    second = run_round(access, DEMO_ROUND.model_copy(update={"seed": seed}), follow_round)
    timer.lap("round")

    with Client(access.url, account.token) as client:
        return gather_figures(client, first=first, second=second, contribution=contribution, laps=timer.laps)


class Timer:
    """Measure the parts of the demo; `laps` has the seconds of each, by its name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 1)
        self._last = now


def push_rows(client: Client, name: str, purpose: DatasetPurpose, rows: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.jsonl"
        file.write_bytes(dump_rows(rows))
        client.push_dataset(file, name=name, purpose=purpose)


def run_round(access: DemoAccess, parameters: RoundParameters, follow_round: FollowRound) -> RoundOut:
    ended_round = follow_round(access.operator, access.operator.start_round(parameters).id)
    if ended_round.state != RoundState.PROMOTED:
        raise DemoFailed(
            f"round {ended_round.number} is {ended_round.state}: {ended_round.reason}; see `cotrain logs flows`"
        )
    return ended_round


def wait_for_version(client: Client, version: int) -> None:
    """Wait until the portal serves this version."""
    reason = ""

    def is_served() -> bool:
        nonlocal reason
        try:
            served = client.complete(["1+1"], max_tokens=1).model
        except Exception as error:  # not served yet; the last reason is reported below
            reason = str(error)
            return False
        reason = f"{served} is served"
        return served == format_model_name(version)

    if not poll_until(is_served, timeout_s=SERVICE_TIMEOUT_S, pause_s=0.3):
        raise DemoFailed(
            f"v{version} is not in service after {SERVICE_TIMEOUT_S:.0f} s: {reason}; see `cotrain doctor`"
        )


def run_contributor(url: str, token: str, skills_file: Path, seed: int) -> Contribution:
    """Run the contributor's process."""
    command = [sys.executable, "-m", "flows.demo.contributor", url, str(skills_file), str(seed)]
    env = {**os.environ, "COTRAIN_TOKEN": token}
    completed = subprocess.run(command, env=env, capture_output=True, text=True)
    if completed.returncode != 0:
        last_lines = completed.stderr.strip().splitlines()[-1:] or ["without output"]
        raise DemoFailed(f"the contributor's process ended with status {completed.returncode}: {last_lines[0]}")
    return Contribution.model_validate_json(completed.stdout)


def gather_figures(
    contributor: Client, *, first: RoundOut, second: RoundOut, contribution: Contribution, laps: dict[str, float]
) -> DemoFigures:
    """Collect the demo's results, read through the contributor's client."""
    assert second.decision is not None, "a promoted round has a decision"
    accepted = [report for report in contributor.all_feedback() if report.state == ReportState.ACCEPTED]
    notices = wait_for_notices(contributor, len(accepted))
    return DemoFigures(
        champion_before=first.candidate_version,
        champion_after=second.candidate_version,
        suites=second.decision.suites,
        reports=len(accepted),
        submitted=contribution.num_reports,
        refused=contribution.refusals,
        fixed=sum(report.verdict == Verdict.FIXED for report in accepted),
        still_failing=sum(report.verdict == Verdict.STILL_FAILING for report in accepted),
        notices=len(notices),
        round_overhead_s=compute_overhead_s(second),
        parts=laps,
    )


def wait_for_notices(contributor: Client, expected: int) -> list[NoticeOut]:
    """Return the contributor's notices when there are as many as expected, or after NOTICE_TIMEOUT_S."""
    notices: list[NoticeOut] = []

    def is_complete() -> bool:
        nonlocal notices
        notices = contributor.notices()
        return len(notices) >= expected

    poll_until(is_complete, timeout_s=NOTICE_TIMEOUT_S, pause_s=0.2)
    return notices


def compute_overhead_s(training_round: RoundOut) -> float:
    """Compute the seconds of a round that are neither training nor evaluation."""
    assert training_round.finished_at is not None, "the round has ended"
    started_at = {event.text: event.at for event in reversed(training_round.timeline)}
    overhead = (started_at[RoundStep.TRAIN] - training_round.created_at) + (
        training_round.finished_at - started_at[RoundStep.DECIDE]
    )
    return round(overhead.total_seconds(), 1)
