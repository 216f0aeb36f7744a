"""One logging format for every process entry."""

import logging


def configure_logging(level: int = logging.INFO) -> None:
    """Send log lines to stderr; call once, in a process entry."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", force=True)
    for name in ("httpx", "httpx2", "botocore", "urllib3", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
