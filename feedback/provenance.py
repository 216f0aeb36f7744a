"""Check that a report refers to a registered version and to a response that its reporter received."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.accounts import InvalidField, NotFound
from feedback.contracts import FeedbackIn
from feedback.tables import ModelVersion, Response
from yuan.data.text import make_printable, make_storable

COMPARED_FIELDS = ("prompt", "response", "model_version")


def check_provenance(session: Session, account_id: str, report: FeedbackIn, registered: set[int]) -> None:
    """Compare a report with the version and the recorded response that it names.

    A report without `response_id` may be about any response of any registered version.

    Args:
        registered: cache of the registered versions, to which this adds.

    Raises:
        NotFound: if the version was never registered, or the contributor received no response with this id.
        InvalidField: if prompt, response or version differ from the recorded ones.
    """
    if report.model_version not in registered:
        version = select(ModelVersion.version).where(ModelVersion.version == report.model_version)
        if session.scalar(version) is None:
            raise NotFound(
                f"there is no version {report.model_version}; use the version that the /v1 response names",
                "model_version",
            )
        registered.add(report.model_version)
    if report.response_id is None:
        return
    recorded = session.get(Response, report.response_id)
    if recorded is None or recorded.contributor_id != account_id:
        raise NotFound(
            f"you received no response {make_printable(report.response_id)}; use a response_id from your /v1 responses",
            "response_id",
        )
    for name in COMPARED_FIELDS:
        stored, sent = getattr(recorded, name), getattr(report, name)
        if sent != (make_storable(stored) if isinstance(stored, str) else stored):
            raise InvalidField(f"differs from the {name} of response {recorded.id}; send the recorded text", name)
