"""The stored form of the gate's decisions, which pages, client and commands read."""

import json

import pytest

from feedback.promotion_decision import (
    AccountRegressions,
    PassRate,
    PromotionDecision,
    SuiteComparison,
    compute_wilson_interval,
)

ACCOUNT = {"account": "ab", "name": "ann", "counts": False, "regressed": 2, "gained": 3, "p": 0.8125, "reports": ["r"]}
HALF = PassRate(passed=1, total=2)
RATE = {"passed": 1, "total": 2, "rate": 0.5, "interval": list(compute_wilson_interval(1, 2))}
FIRST_RELEASE = {
    "promote": False,
    "reasons": ["base fell"],
    "champion": 1,
    "candidate": 2,
    "regressions": ["c1", "c2"],
    "suites": [{"suite": "base", "before": None, "after": RATE}, {"suite": "fresh", "before": RATE, "after": RATE}],
}
STORED = {**FIRST_RELEASE, "regressions_may_be_chance": True, "regressions_by_account": [ACCOUNT]}


def test_a_decision_is_stored_under_the_names_that_clients_read():
    decision = PromotionDecision(
        promote=False,
        reasons=("base fell",),
        champion=1,
        candidate=2,
        regressions=("c1", "c2"),
        regressions_may_be_chance=True,
        regressions_by_account=(
            AccountRegressions(
                account="ab",
                name="ann",
                is_significant=False,
                num_lost=2,
                num_gained=3,
                p_value=0.8125,
                reports=("r",),
            ),
        ),
        suites=(
            SuiteComparison(suite="base", before=None, after=HALF),
            SuiteComparison(suite="fresh", before=HALF, after=HALF),
        ),
    )
    assert decision.model_dump(mode="json") == STORED
    assert json.loads(decision.model_dump_json()) == STORED
    assert PromotionDecision.model_validate(json.loads(json.dumps({**STORED, "added_later": 1}))) == decision


def test_first_release_decision_without_chance_and_account_fields_can_be_read():
    decision = PromotionDecision.model_validate(FIRST_RELEASE)
    assert not decision.regressions_may_be_chance and decision.regressions_by_account == ()
    assert [suite.after for suite in decision.suites] == [HALF, HALF]
    added_fields = {"regressions_may_be_chance": False, "regressions_by_account": []}
    assert decision.model_dump(mode="json") == {**FIRST_RELEASE, **added_fields}


@pytest.mark.parametrize("counts", [True, False])
def test_account_regressions_are_significant_unless_stored_otherwise(counts):
    older = {name: value for name, value in ACCOUNT.items() if name != "counts"}
    assert AccountRegressions.model_validate(older).is_significant
    assert AccountRegressions.model_validate({**older, "counts": counts}).is_significant is counts


@pytest.mark.parametrize("rate", [{"passed": 5, "total": 3}, {"passed": -1, "total": 3}, {"passed": True, "total": 3}])
def test_impossible_pass_rate_is_rejected(rate):
    with pytest.raises(ValueError, match="passed"):
        PassRate.model_validate(rate)
