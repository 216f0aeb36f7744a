"""Test the tracker's client against a server that accepts connections and never responds."""

import os
import socket
import time

import pytest
from mlflow.exceptions import MlflowException

from infra.tracker import SHORT_REQUEST_TIMEOUT_S, StepMetrics, Tracker


@pytest.mark.slow
def test_tracker_with_short_timeout_does_not_wait_for_minutes(stores):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        tracker = Tracker(stores.model_copy(update={"mlflow_url": url}))
        start = time.monotonic()
        with pytest.raises(MlflowException, match="read timeout"), tracker.use_short_timeout():
            tracker.log("0" * 32, [StepMetrics(1, {"train/loss": 1.0})])
    assert time.monotonic() - start < 10 * SHORT_REQUEST_TIMEOUT_S
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
