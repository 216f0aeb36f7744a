"""How a plain function becomes a step of a flow."""

from collections.abc import Callable
from typing import Any

import httpx
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.exceptions import MlflowException
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from sqlalchemy.exc import OperationalError

IO_ERRORS = (httpx.HTTPError, BotoCoreError, ClientError, MlflowException, OperationalError, ConnectionError)


def is_io(task_: Any, run: TaskRun, state: State[Any]) -> bool:
    """Only what a network or a restarting server did is worth another try."""
    try:
        state.result()
    except IO_ERRORS:
        return True
    except Exception:  # any other error is ours and comes back the same
        return False
    return False


def step(function: Callable[..., Any], name: str) -> Any:
    """Make a task of a step: never cached, repeated on I/O errors only."""
    made = task(
        name=name, cache_policy=NO_CACHE, retries=6, retry_delay_seconds=[1, 2, 4, 8, 15, 30], retry_condition_fn=is_io
    )
    return made(function)


def show_table(key: str, rows: list[dict[str, Any]]) -> None:
    """Show rows as a table artifact; no rows, no artifact."""
    if rows and rows[0]:
        create_table_artifact(key=key, table=rows)
