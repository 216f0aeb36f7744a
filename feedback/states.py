"""States and roles that database columns store; the values are part of the HTTP API and of stored records."""

from enum import StrEnum


class ReportState(StrEnum):
    """The state of a report, from its receipt to its decision."""

    RECEIVED = "received"
    IN_REVIEW = "in_review"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    DISPUTED = "disputed"
    WITHDRAWN = "withdrawn"


class Screening(StrEnum):
    """The result of screening a report: only a checkable one can be reproduced without a reviewer."""

    CHECKABLE = "checkable"
    NEEDS_REVIEWER = "needs a reviewer"


class DatasetState(StrEnum):
    """The state of a dataset; one that is sent in parts begins as uploading, others as checked."""

    UPLOADING = "uploading"
    CHECKING = "checking"
    CHECKED = "checked"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    WITHDRAWN = "withdrawn"


class DatasetPurpose(StrEnum):
    """Purpose of a dataset: training, the base that rounds replay, or a suite of held-out cases."""

    MIXTURE = "mixture"
    BASE = "base"
    SUITE = "suite"


class CaseRole(StrEnum):
    """Permitted use of a case: training and regression tests, or tests only."""

    TRAIN = "train"
    HELD_OUT = "held_out"


class RowRole(StrEnum):
    """Use of a dataset's row; a duplicate has the key of an earlier row, and is not used."""

    TRAIN = "train"
    HELD_OUT = "held_out"
    DUPLICATE = "duplicate"


class RoundState(StrEnum):
    """The state of a round: running, or how it ended."""

    RUNNING = "running"
    PROMOTED = "promoted"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"


class AccountRole(StrEnum):
    """The role of an account: operators may start rounds, withdraw any record, and upload suites and the base."""

    CONTRIBUTOR = "contributor"
    OPERATOR = "operator"


def list_values(values: type[StrEnum]) -> str:
    """List the values of an enum, for the comment of its column.

    >>> list_values(CaseRole)
    'train | held_out'
    """
    return " | ".join(values)
