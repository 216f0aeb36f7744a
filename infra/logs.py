"""Configure logging: one format for every process entry."""

import logging
from typing import Any

from infra.error_text import format_redacted_traceback

QUIET_LOGGERS = ("httpx", "httpx2", "botocore", "alembic")
SILENT_LOGGERS = ("urllib3",)  # it warns of every retry; the caller reports the failure


class RedactingFormatter(logging.Formatter):
    """Format tracebacks without quoted data, since more people can read the logs than the data."""

    def formatException(self, ei: Any) -> str:
        return format_redacted_traceback(ei[1])


def configure_logging(level: int = logging.INFO) -> None:
    """Send log lines to stderr; call it once, in a process entry."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in SILENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
