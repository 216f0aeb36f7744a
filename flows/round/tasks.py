"""Turn plain functions into steps (tasks) of a flow.

Prefect stores the errors that a flow raises, with traceback, and shows them to everybody who has its password. So steps
raise the errors of this module, whose messages do not contain the processed text.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from mlflow.exceptions import MlflowException
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from feedback.rounds import RoundOwnershipLost
from flows.round.progress import RunCancelled
from infra.error_text import describe_error, format_redacted_traceback
from infra.faults import is_transient_error

log = logging.getLogger(__name__)


class StepFailed(Exception):
    """A step failed; another attempt at the round may succeed."""


class ServerUnavailable(StepFailed):
    """A step failed because a server is unreachable or restarting; the task is retried."""


class StepUnrecoverable(StepFailed):
    """A step failed with an error that retries cannot fix."""


@contextlib.contextmanager
def hide_error_text(name: str) -> Iterator[None]:
    """Convert errors of the block to errors that Prefect may show; the redacted traceback is logged.

    Raises:
        RoundOwnershipLost, RunCancelled: unchanged.
        StepFailed: for any other error.
    """
    try:
        yield
    except (StepFailed, RoundOwnershipLost, RunCancelled):
        raise
    except Exception as error:
        if is_retryable(error):
            log.warning("%s: a server does not answer: %s", name, describe_error(error))
            raise ServerUnavailable(describe_error(error)) from None
        log.error("%s failed: %s", name, format_redacted_traceback(error))
        kind = StepUnrecoverable if isinstance(error, (ValueError, RuntimeError)) else StepFailed
        raise kind(describe_error(error)) from None


def is_retryable(error: Exception) -> bool:
    """Return True if a network or server outage caused the error; a request that a server rejects is not retried."""
    if isinstance(error, MlflowException):  # its client reports status 500 for an unreachable server
        return bool(error.get_http_status_code() >= 500)
    return is_transient_error(error)


def is_server_unavailable(task_: Any, run: TaskRun, state: State[Any]) -> bool:
    """Return True if a step's task failed because a server was unavailable."""
    try:
        state.result()
    except ServerUnavailable:
        return True
    except Exception:  # any other error is our own and would repeat
        return False
    return False


def make_task(function: Callable[..., Any], name: str) -> Any:
    """Make a Prefect task of a step: never cached, retried on I/O errors only, errors without processed text.

    Args:
        name: as Prefect shows and stores it.
    """

    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        with hide_error_text(name):
            return function(*args, **kwargs)

    decorate = task(
        name=name,
        cache_policy=NO_CACHE,
        retries=6,
        retry_delay_seconds=[1, 2, 4, 8, 15, 30],
        retry_condition_fn=is_server_unavailable,
    )
    return decorate(step)
