"""Check that a report is about something that exists: a version, and an answer that its reporter was given."""

from sqlalchemy.orm import Session

from feedback.accounts import InvalidField, NotFound
from feedback.contracts import FeedbackIn
from feedback.tables import Contributor, ModelVersion, Response
from yuan.data.text import make_printable, make_storable

COMPARED_FIELDS = ("prompt", "response", "model_version")


def check_provenance(session: Session, contributor: Contributor, report: FeedbackIn) -> None:
    """Compare a report with the version and the recorded response it names.

    A report without `response_id` may be about any answer of any registered version.

    Raises:
        NotFound: if the version was never registered, or the contributor was given no answer with this id.
        Refused: if prompt, response or version differ from the recorded ones.
    """
    if session.get(ModelVersion, report.model_version) is None:
        raise NotFound(f"there is no version {report.model_version}; /v1 names the answering one", "model_version")
    if report.response_id is None:
        return
    recorded = session.get(Response, report.response_id)
    if recorded is None or recorded.contributor_id != contributor.id:
        raise NotFound(f"you were given no response {make_printable(report.response_id)}", "response_id")
    for name in COMPARED_FIELDS:
        stored, sent = getattr(recorded, name), getattr(report, name)
        if sent != (make_storable(stored) if isinstance(stored, str) else stored):
            raise InvalidField(f"differs from the {name} of response {recorded.id}; send it as it was", name)
