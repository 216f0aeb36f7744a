"""The public client: reports, datasets, questions and rounds over HTTP."""

import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel

from feedback.contracts import (
    AccountWithdrawalOut,
    ContributorOut,
    DatasetOut,
    ErrorBody,
    ErrorOut,
    FeedbackIn,
    FeedbackOut,
    NoticeOut,
    RoundOut,
    RoundParameters,
)

ResponseModel = TypeVar("ResponseModel", bound=BaseModel)
RETRIED_STATUSES = (502, 503, 504)
MAX_REQUEST_ATTEMPTS = 6
CLIENT_PAGE_SIZE = 200  # the most that the portal gives at once


class PortalError(Exception):
    """The portal refused a request; `body` says why, `status` is the HTTP status."""

    def __init__(self, status: int, body: ErrorBody) -> None:
        super().__init__(f"{status}: {body.message}")
        self.status, self.body = status, body


class Client:
    """One contributor's connection to the portal.

    Every write carries an idempotency key, so a request that is repeated after a lost answer has no second effect.
    Connection faults and 502 to 504 are retried with growing pauses, about 12 s in all.

    Raises:
        PortalError: from every method, when the portal refuses.
        httpx.TransportError: when it cannot be reached.
        ValueError: at its making, when there is no token, or none that can be sent.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float = 60.0) -> None:
        if not token.strip():
            raise ValueError("there is no token; set COTRAIN_TOKEN or give --token")
        if not (token.isascii() and token.isprintable()):
            raise ValueError("a token is of visible ASCII characters; see that COTRAIN_TOKEN or --token has no others")
        self._http = httpx.Client(base_url=url, timeout=timeout_s, headers={"Authorization": f"Bearer {token}"})

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def submit(self, report: FeedbackIn, *, idempotency_key: str | None = None) -> FeedbackOut:
        """Send a report."""
        body = report.model_dump(mode="json", exclude_none=True)
        return self._post(FeedbackOut, "/api/v1/feedback", idempotency_key, json=body)

    def feedback(self, feedback_id: str) -> FeedbackOut:
        """Read one of your reports with its timeline."""
        return self._get(FeedbackOut, f"/api/v1/feedback/{feedback_id}")

    def all_feedback(self) -> list[FeedbackOut]:
        """Read all your reports, oldest first."""
        return self._get_pages(FeedbackOut, "/api/v1/feedback")

    def notices(self) -> list[NoticeOut]:
        """Read what you were told about your reports, oldest first."""
        return self._get_pages(NoticeOut, "/api/v1/notices")

    def push_dataset(
        self, file: Path, *, name: str | None = None, purpose: str = "mixture", idempotency_key: str | None = None
    ) -> DatasetOut:
        """Upload a JSONL file of rows. A file with bad rows is refused whole; the error lists them."""
        query = {"name": name or file.stem, "purpose": purpose}
        return self._post(DatasetOut, "/api/v1/datasets", idempotency_key, params=query, content=file.read_bytes())

    def dataset(self, dataset_id: str) -> DatasetOut:
        """Read one of your datasets with its timeline."""
        return self._get(DatasetOut, f"/api/v1/datasets/{dataset_id}")

    def withdraw_feedback(self, feedback_id: str, reason: str) -> FeedbackOut:
        """Take a report back: one of your own, or any as an operator."""
        return self._post(FeedbackOut, f"/api/v1/feedback/{feedback_id}/withdraw", None, json={"reason": reason})

    def withdraw_dataset(self, dataset_id: str, reason: str) -> DatasetOut:
        """Take a dataset back: one of your own, or any as an operator."""
        return self._post(DatasetOut, f"/api/v1/datasets/{dataset_id}/withdraw", None, json={"reason": reason})

    def withdraw_account(self, account: str, reason: str, kind: str | None = None) -> AccountWithdrawalOut:
        """Take all reports and datasets of an account back, or those of one kind; operators only.

        Args:
            account: its id or name.
            kind: `reports` or `datasets`.

        Returns:
            How many were withdrawn; those that were out before are not counted.
        """
        form = {"account": account, "reason": reason, "kind": kind}
        reports = datasets = 0
        while True:
            batch = self._post(AccountWithdrawalOut, "/api/v1/contributors/withdraw", None, json=form)
            if not batch.reports and not batch.datasets:
                return batch.model_copy(update={"reports": reports, "datasets": datasets})
            reports, datasets = reports + batch.reports, datasets + batch.datasets

    def complete(self, prompts: list[str], *, max_tokens: int = 48) -> dict[str, Any]:
        """Ask the champion several questions; the answer is OpenAI's text completion."""
        body = {"model": "yuan", "prompt": prompts, "max_tokens": max_tokens, "temperature": 0}
        return dict(self._request("POST", "/v1/completions", json=body).json())

    def add_contributor(self, name: str) -> ContributorOut:
        """Make an account; operators only."""
        return self._post(ContributorOut, "/api/v1/contributors", None, json={"name": name})

    def start_round(self, parameters: RoundParameters, *, idempotency_key: str | None = None) -> RoundOut:
        """Request a round; operators only."""
        return self._post(RoundOut, "/api/v1/rounds", idempotency_key, json=parameters.model_dump())

    def round(self, round_id: str = "latest") -> RoundOut:
        """Read a round; operators only."""
        return self._get(RoundOut, f"/api/v1/rounds/{round_id}")

    def cancel_round(self, round_id: str) -> RoundOut:
        """Cancel a running round; operators only."""
        return self._post(RoundOut, f"/api/v1/rounds/{round_id}/cancel", None)

    def _get(self, model: type[ResponseModel], path: str) -> ResponseModel:
        return model.model_validate(self._request("GET", path).json())

    def _get_pages(self, model: type[ResponseModel], path: str) -> list[ResponseModel]:
        items: list[ResponseModel] = []
        params = httpx.QueryParams(limit=CLIENT_PAGE_SIZE)
        while True:
            answer = self._request("GET", path, params=params)
            items += [model.model_validate(item) for item in answer.json()]
            if "next" not in answer.links:
                return items
            # Of the link only the query: the token goes to no other address, whatever an answer says.
            params = httpx.URL(answer.links["next"]["url"]).params

    def _post(self, model: type[ResponseModel], path: str, key: str | None, **request: Any) -> ResponseModel:
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return model.model_validate(self._request("POST", path, headers=headers, **request).json())

    def _request(self, method: str, path: str, **request: Any) -> httpx.Response:
        for attempt in range(MAX_REQUEST_ATTEMPTS):
            last = attempt == MAX_REQUEST_ATTEMPTS - 1
            try:
                answer = self._http.request(method, path, **request)
            except httpx.TransportError:
                if last:
                    raise
            else:
                if answer.is_success:
                    return answer
                if answer.status_code not in RETRIED_STATUSES or last:
                    raise PortalError(answer.status_code, _parse_error_body(answer))
            time.sleep(0.4 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


def _parse_error_body(answer: httpx.Response) -> ErrorBody:
    try:
        return ErrorOut.model_validate(answer.json()).error
    except ValueError:
        return ErrorBody(message=answer.text[:300] or "no answer body", type="unknown")
