"""The result of a check of machine or stack: the last success, and a fault with its fix."""

from dataclasses import KW_ONLY, dataclass
from datetime import datetime, timezone
from typing import Any


@dataclass(frozen=True)
class Finding:
    """Hold the result of one check.

    Attributes:
        subject: what was checked, as operators read it.
        succeeded_at: time of the last success; None if there was none, or its time is unknown.
        fault: the fault, if there is one.
        fix: what to do about the fault.
        or_later: true if it may also have succeeded after `succeeded_at`.
        never_succeeded: true if a fault without a time has never succeeded according to the records.
    """

    subject: str
    _: KW_ONLY
    succeeded_at: datetime | None = None
    fault: str | None = None
    fix: str = ""
    or_later: bool = False
    never_succeeded: bool = False

    @property
    def state(self) -> str:
        return "fault" if self.fault else "ok" if self.succeeded_at else "never yet"

    def describe_last_success(self) -> str:
        if self.succeeded_at is None:
            return "never" if self.never_succeeded else "unknown"
        return f"{self.succeeded_at.astimezone():%F %T}{' or later' if self.or_later else ''}"

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON data; `mend` is a deprecated copy of `fix`."""
        return {
            "what": self.subject,
            "state": self.state,
            "succeeded_at": self.succeeded_at.isoformat(timespec="seconds") if self.succeeded_at else None,
            "or_later": self.or_later,
            "fault": self.fault,
            "fix": self.fix,
            "mend": self.fix,
        }


def get_utc_now() -> datetime:
    return datetime.now(timezone.utc)


def convert_timestamp(seconds: float) -> datetime:
    """Convert a time in seconds since 1970 to a datetime in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc)
