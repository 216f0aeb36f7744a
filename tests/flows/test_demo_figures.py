"""Test the figures of the demo: the contributor's JSON output and the printed summary."""

import json

from feedback.promotion_decision import PassRate, SuiteComparison
from flows.demo.contributor import Contribution, Refusal
from flows.demo.scenario import DemoFigures
from yuan.data.rows import BadRow

REFUSED = [
    Refusal(
        request="malformed file",
        status=422,
        reason="2 rows are malformed",
        rows=[BadRow(row=2, reason="answer is missing")],
    ),
    Refusal(request="oversized report", status=413, reason="send less"),
]


def test_contribution_survives_a_json_round_trip():
    contribution = Contribution(num_questions=1200, num_reports=120, num_rows=5000, refusals=REFUSED)
    printed = contribution.model_dump_json()
    assert Contribution.model_validate_json(printed) == contribution
    assert json.loads(printed)["refusals"][1] == {"what": "oversized report", "status": 413, "reason": "send less"}


def test_fresh_and_base_suite_pass_rates_have_separate_names():
    suites = tuple(
        SuiteComparison(suite=name, before=PassRate(passed=before, total=4), after=PassRate(passed=after, total=4))
        for name, before, after in (("base", 4, 3), ("fresh", 0, 4), ("fresh/reverse", 0, 4))
    )
    figures = DemoFigures(
        champion_before=1,
        champion_after=2,
        suites=suites,
        reports=120,
        submitted=120,
        refused=REFUSED,
        fixed=119,
        still_failing=1,
        notices=120,
        round_overhead_s=4.5,
        parts={"round": 60.0},
    ).to_json()
    assert [figures[name] for name in ("gate_before", "gate_after", "base_before", "base_after")] == [0, 1, 1, 0.75]
    assert [suite["suite"] for suite in figures["suites"]] == ["base", "fresh", "fresh/reverse"]
