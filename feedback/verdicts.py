"""Names for results of a report's case: verdicts against the replaced champion, and changes between versions."""

import logging
from collections.abc import Iterable
from enum import StrEnum

log = logging.getLogger(__name__)


class Verdict(StrEnum):
    """Effect of a promotion on a report: the case's result with the new champion and with the replaced one.

    A verdict is stored with its notice. A summary names `ResultChange` instead, which includes candidates that were not
    promoted.
    """

    FIXED = "fixed"
    STILL_FAILING = "still_failing"
    REGRESSED = "regressed"
    PASSING = "passing"


class ResultChange(StrEnum):
    """Change of a case's result from the preceding evaluated version, promoted or not; derived, never stored."""

    FAILING = "failing"
    FIXED = "fixed"
    PASSING = "passing"
    REGRESSED = "regressed"


def parse_verdict(stored: str, feedback_id: str) -> Verdict | None:
    """Parse the stored verdict on a report; None if this release does not know it, with a line in the log."""
    try:
        return Verdict(stored)
    except ValueError:
        log.warning("report %s has the unknown verdict %r; it is shown without a verdict", feedback_id, stored)
        return None


def derive_verdict(*, passed_before: bool, passed: bool) -> Verdict:
    """Derive the verdict on a report when a version replaces the champion.

    Args:
        passed_before: whether the replaced champion passed the case. False also if it has no result: the case was
            accepted because a version failed it.
        passed: whether the new champion passed it.

    >>> derive_verdict(passed_before=False, passed=True).value
    'fixed'
    """
    if passed:
        return Verdict.PASSING if passed_before else Verdict.FIXED
    return Verdict.REGRESSED if passed_before else Verdict.STILL_FAILING


def derive_result_changes(results: Iterable[tuple[int, bool]]) -> list[tuple[int, ResultChange]]:
    """Derive how a case's result changed at each version, from (version, passed) pairs in version order.

    A case without an earlier result is not fixed by the first version that passes it.

    >>> [f"{change} in v{version}" for version, change in derive_result_changes([(5, False), (6, True), (9, False)])]
    ['failing in v5', 'fixed in v6', 'regressed in v9']
    """
    changes: list[tuple[int, ResultChange]] = []
    passed_before: bool | None = None
    for version, passed in results:
        if passed:
            changes.append((version, ResultChange.FIXED if passed_before is False else ResultChange.PASSING))
        else:
            changes.append((version, ResultChange.REGRESSED if passed_before else ResultChange.FAILING))
        passed_before = passed
    return changes
