"""Verdicts on reports and changes of their cases' results, and the API's description of them."""

import pytest

from feedback.contracts import FeedbackOut, NoticeOut
from feedback.promotion import NOTICE_TEXTS
from feedback.tables import Outbox
from feedback.verdicts import Verdict, derive_result_changes, derive_verdict


@pytest.mark.parametrize(
    ("passed_before", "passed", "verdict", "last_change"),
    [
        (False, True, "fixed", "fixed"),
        (False, False, "still_failing", "failing"),
        (True, False, "regressed", "regressed"),
        (True, True, "passing", "passing"),
    ],
)
def test_verdict_and_result_change_of_two_results(passed_before, passed, verdict, last_change):
    assert derive_verdict(passed_before=passed_before, passed=passed) == verdict
    assert derive_result_changes([(1, passed_before), (2, passed)])[-1] == (2, last_change)


def test_first_version_that_passes_a_case_did_not_fix_it():
    assert derive_result_changes([(4, True)]) == [(4, "passing")]
    assert derive_result_changes([]) == []


def test_every_verdict_has_a_notice_text_and_is_in_the_api_description():
    values = ["fixed", "still_failing", "regressed", "passing"]
    assert list(Verdict) == list(NOTICE_TEXTS) == values
    for model in (FeedbackOut, NoticeOut):
        assert model.model_json_schema(mode="serialization")["$defs"]["Verdict"]["enum"] == values
    assert Outbox.__table__.columns["verdict"].comment == " | ".join(values)
