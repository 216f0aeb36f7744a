"""How a plain function becomes a step of a flow.

What a flow raises, Prefect stores and shows to everybody who has its password, with the traceback; so steps raise
errors of this module, which say what went wrong without the text that was worked on.
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
    """A step could not be done; another attempt at the round may."""


class ServerUnavailable(StepFailed):
    """A network or a restarting server kept a step from being done; it is worth another try at once."""


class StepUnrecoverable(StepFailed):
    """A step cannot be done, however often it is tried."""


@contextlib.contextmanager
def hide_error_text(name: str) -> Iterator[None]:
    """Let nothing out of the block but errors that Prefect may show; where it happened is logged.

    Raises:
        RoundEnded, RunCancelled: as they are.
        StepFailed: for anything else.
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
    """Whether a network or a restarting server failed; what a server refuses, it refuses again."""
    if isinstance(error, MlflowException):  # its client says 500 for a server that it does not reach
        return bool(error.get_http_status_code() >= 500)
    return is_transient_error(error)


def is_server_unavailable(task_: Any, run: TaskRun, state: State[Any]) -> bool:
    """Whether a step's task failed for want of a server."""
    try:
        state.result()
    except ServerUnavailable:
        return True
    except Exception:  # any other error is ours and comes back the same
        return False
    return False


def make_step(function: Callable[..., Any], name: str) -> Any:
    """Make a task of a step: never cached, repeated on I/O errors only, its errors without anybody's text."""

    @functools.wraps(function)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        with hide_error_text(name):
            return function(*args, **kwargs)

    made = task(
        name=name,
        cache_policy=NO_CACHE,
        retries=6,
        retry_delay_seconds=[1, 2, 4, 8, 15, 30],
        retry_condition_fn=is_server_unavailable,
    )
    return made(quiet)
