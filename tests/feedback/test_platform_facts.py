"""The platform's health facts from the database, on a session that is rolled back."""

from datetime import datetime, timedelta, timezone

from feedback import platform_facts
from feedback.accounts import add_contributor, audit
from feedback.contracts import FeedbackIn
from feedback.tables import new_id
from tests.records import add_feedback


def test_facts_without_recorded_events_are_none(session):
    facts = platform_facts.read_platform_facts(session)
    last_moments = (facts.last_answer, facts.last_reproduction, facts.last_notice, facts.last_upload)
    assert (facts.champion, facts.running, facts.oldest_report, *last_moments) == (None,) * 7


def test_review_counts_as_reproduction_only_with_a_decision(session):
    audit(session, "reproduction", "reviewed", "v1", accepted=0, rejected=0, disputed=0)
    session.flush()
    assert platform_facts.read_platform_facts(session).last_reproduction is None
    audit(session, "reproduction", "reviewed", "v1", accepted=0, rejected=2, disputed=0)
    session.flush()
    assert platform_facts.read_platform_facts(session).last_reproduction is not None


def test_pending_reports_are_counted_with_the_oldest_timestamp(session):
    reporter = add_contributor(session, new_id()).contributor
    form = FeedbackIn(kind="correction", prompt="p", response="?", model_version=1, expected="x")
    for _ in range(2):
        add_feedback(session, reporter, form)
    session.flush()
    facts = platform_facts.read_platform_facts(session)
    assert facts.num_reports_waiting == 2
    assert datetime.now(timezone.utc) - facts.oldest_report < timedelta(minutes=5)
