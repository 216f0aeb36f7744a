"""What the demo does, step by step, and what it found."""

import json
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
from flows.demo.demo_corpus import REPORTED_SKILLS, build_base_rows, build_fresh_rows
from yuan.data.rows import Row, dump_rows
from yuan.data.skills import load_skills

BASE_ROUND: dict[str, Any] = {"max_steps": 950, "learning_rate": 2e-3}
DEMO_ROUND: dict[str, Any] = {"max_steps": 1150, "learning_rate": 1.5e-3, "replay_rows": 9000}
FRESH_SUITE, FRESH_PER_SKILL = "fresh", 200
SERVICE_TIMEOUT_S = 60.0
NOTICE_TIMEOUT_S = 30.0

PrintLine = Callable[[str], None]
FollowRound = Callable[[Client, str], RoundOut]


class DemoFailed(RuntimeError):
    """A round did not end in a promotion, or a promise of the demo was not kept."""


@dataclass(frozen=True)
class DemoAccess:
    """Where the demo knocks: the portal's address and the operator's client."""

    url: str
    operator: Client


def run_demo(
    doors: DemoAccess, skills_file: Path | None, seed: int, say: PrintLine, follow: FollowRound
) -> dict[str, Any]:
    """Run base round, contributor and round two, and return the figures.

    Raises:
        DemoFailed: if a round is not promoted.
        ValueError: if the skill file is not one.
    """
    skills_file = skills_file or REPORTED_SKILLS
    skills = load_skills(skills_file)
    timer = Timer()
    say(f"base model: documents and exercises without {', '.join(skill.name for skill in skills)}")
    push_rows(doors.operator, "base", "base", build_base_rows(skills, seed))
    push_rows(doors.operator, FRESH_SUITE, "suite", build_fresh_rows(skills, seed, FRESH_PER_SKILL))
    first = run_round(doors, RoundParameters(**BASE_ROUND, seed=seed), follow)
    wait_for_version(doors.operator, int(first.candidate_version or 0))
    timer.lap("base round")
    account = doors.operator.add_contributor(f"demo-{seed}-{int(time.time())}")
    say("a contributor asks, reports wrong answers and pushes a dataset")
    told = run_contributor(doors.url, account.token, skills_file, seed)
    say(f"{told['asked']} questions, {told['reports']} reports, a dataset of {told['rows']} rows; 2 refused on purpose")
    timer.lap("contributor")
    second = run_round(doors, RoundParameters(**DEMO_ROUND, seed=seed), follow)
    timer.lap("round")
    with Client(doors.url, account.token) as client:
        return gather_figures(client, first, second, told, timer.laps)


class Timer:
    """Seconds of each part."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 1)
        self._last = now


def push_rows(client: Client, name: str, purpose: str, rows: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.jsonl"
        file.write_bytes(dump_rows(rows))
        client.push_dataset(file, name=name, purpose=purpose)


def run_round(doors: DemoAccess, parameters: RoundParameters, follow: FollowRound) -> RoundOut:
    done = follow(doors.operator, doors.operator.start_round(parameters).id)
    if done.state != "promoted":
        raise DemoFailed(f"round {done.number} is {done.state}: {done.reason}")
    return done


def wait_for_version(client: Client, version: int) -> None:
    """Wait until the portal answers with this version."""
    end, reason = time.monotonic() + SERVICE_TIMEOUT_S, "it was not asked"
    while time.monotonic() < end:
        try:
            served = client.complete(["1+1"], max_tokens=1)["model"]
            if served == f"yuan-v{version}":
                return
            reason = f"{served} answers"
        except Exception as error:  # not in service yet; the last reason is told below
            reason = str(error)
        time.sleep(0.3)
    raise DemoFailed(f"v{version} is not in service after {SERVICE_TIMEOUT_S:.0f} s: {reason}")


def run_contributor(url: str, token: str, skills_file: Path, seed: int) -> dict[str, Any]:
    """Run the contributor's process."""
    command = [sys.executable, "-m", "flows.demo.contributor", url, str(skills_file), str(seed)]
    env = {**os.environ, "COTRAIN_TOKEN": token}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise DemoFailed(f"the contributor failed: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(done.stdout))


def gather_figures(
    contributor: Client, first: RoundOut, second: RoundOut, told: dict[str, Any], laps: dict[str, float]
) -> dict[str, Any]:
    """Gather what the demo promises, read back through the contributor's own door."""
    assert second.decision is not None, "a promoted round has a decision"
    suites = second.decision["suites"]
    by_name = {suite["suite"]: suite for suite in suites}
    accepted = [report for report in contributor.all_feedback() if report.state == "accepted"]
    notices = wait_for_notices(contributor, len(accepted))
    return {
        "champion_before": first.candidate_version,
        "champion_after": second.candidate_version,
        "gate_before": by_name[FRESH_SUITE]["before"]["rate"],
        "gate_after": by_name[FRESH_SUITE]["after"]["rate"],
        "base_before": by_name["base"]["before"]["rate"],
        "base_after": by_name["base"]["after"]["rate"],
        "reports": len(accepted),
        "submitted": told["reports"],
        "refused": told["refused"],
        "fixed": sum(report.verdict == "fixed" for report in accepted),
        "still_failing": sum(report.verdict == "still_failing" for report in accepted),
        "notices": len(notices),
        "suites": suites,
        "round_overhead_s": compute_overhead_s(second),
        "parts": laps,
    }


def wait_for_notices(contributor: Client, expected: int) -> list[NoticeOut]:
    """The contributor's notices, once there are as many as expected or time is up."""
    end = time.monotonic() + NOTICE_TIMEOUT_S
    while True:
        notices = contributor.notices()
        if len(notices) >= expected or time.monotonic() > end:
            return notices
        time.sleep(0.2)


def compute_overhead_s(training_round: RoundOut) -> float:
    """Seconds of a round that are neither training nor evaluation."""
    assert training_round.finished_at is not None, "the round has ended"
    began = {event.text: event.at for event in reversed(training_round.timeline)}
    spent = (began["train"] - training_round.created_at) + (training_round.finished_at - began["decide"])
    return round(spent.total_seconds(), 1)
