"""Records that tests store directly, without the portal."""

from feedback.tables import Feedback, new_id


def add_feedback(session, contributor, form):
    """Store a report as the portal does, within the session; return its row."""
    body = form.model_dump(mode="json", exclude_none=True)
    report = Feedback(id=new_id(), contributor_id=contributor.id, kind=form.kind, body=body)
    session.add(report)
    session.flush()
    return report
