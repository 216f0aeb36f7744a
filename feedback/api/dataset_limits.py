"""Limits of what an account may send, which the routes of reports and datasets share."""

import math

from sqlalchemy.orm import Session

from feedback import datasets
from feedback.accounts import Account, compute_quota_wait_s
from feedback.api.access import Forbidden, StorageQuotaExceeded, TooManyRequests
from feedback.states import AccountRole, DatasetPurpose
from feedback.tables import Dataset


def check_purpose(account: Account, purpose: DatasetPurpose, name: str) -> None:
    """Check that an account may send a dataset with this purpose, and that a suite may have this name.

    Raises:
        Forbidden: if the purpose needs an operator's account.
        InvalidField: as `datasets.check_suite_name`.
    """
    if purpose != DatasetPurpose.MIXTURE and account.role != AccountRole.OPERATOR:
        raise Forbidden(f"a dataset for the purpose {purpose} needs an operator's token; leave purpose out")
    if purpose == DatasetPurpose.SUITE:
        datasets.check_suite_name(name)


def make_limit_error(wait_s: float, daily_limit: int, noun: str) -> TooManyRequests:
    """Return the error of a request beyond a daily limit."""
    return TooManyRequests(
        f"an account may send {daily_limit:,} {noun} within 24 hours, and you have; "
        f"send the next in {math.ceil(wait_s / 60):,} min, or ask the operator for a higher limit",
        math.ceil(wait_s),
    )


def check_daily_datasets(session: Session, account: Account, key: str | None, limit: int) -> None:
    """Refuse a dataset beyond the daily limit before it arrives, unless its key is that of an earlier dataset.

    A few parallel requests may exceed the limit together.
    """
    if key is not None and datasets.is_key_of_dataset(session, account.id, key):
        return
    wait_s = compute_quota_wait_s(session, Dataset, account.id, limit)
    if wait_s is not None:
        raise make_limit_error(wait_s, limit, "datasets")


def check_storage_quota(
    session: Session, account: Account, num_bytes: int, limit: int, *, besides: str | None = None
) -> None:
    """Refuse a file beyond the account's storage limit; uploads in one request that are in progress do not count.

    Args:
        besides: sha256 of the file, of which equal ones do not count.
    """
    stored = datasets.count_stored_bytes(session, account.id, besides=besides)
    if stored + num_bytes > limit:
        raise StorageQuotaExceeded(
            f"your stored files have {stored:,} bytes and this one {num_bytes:,}, an account may have {limit:,}; "
            "send fewer rows, or ask the operator for more room"
        )
