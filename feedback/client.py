"""The portal's public HTTP client: reports, datasets, completions and training rounds."""

import itertools
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import httpx
from pydantic import TypeAdapter

from feedback.contracts import (
    AccountWithdrawalOut,
    ContributorOut,
    DatasetOut,
    DatasetUploadIn,
    DatasetUploadOut,
    ErrorBody,
    FeedbackIn,
    FeedbackOut,
    NoticeOut,
    PartAddressesOut,
    PartIn,
    PartsIn,
    ReceivedPartsOut,
    RoundOut,
    RoundParameters,
    StoredCompletion,
    VersionOut,
)
from feedback.part_sender import (
    PartSender,
    PushedFile,
    PushProgress,
    PushStage,
    ReportPushProgress,
    StoreUnreachable,
    UploadEnded,
    lock_file,
    read_pushed_file,
    wait_between_polls,
)
from feedback.portal_address import check_portal_url
from feedback.portal_responses import (
    PortalError,
    ResponseModel,
    make_refusal,
    make_unusable_error,
    parse_response,
    parse_response_list,
)
from feedback.states import DatasetPurpose, DatasetState
from yuan.config import FieldError
from yuan.data.file_formats import find_file_fault

__all__ = ["Client", "PortalError"]

RETRIED_STATUSES = (502, 503, 504)
MAX_REQUEST_ATTEMPTS = 6
CONNECT_TIMEOUT_S = 10.0
MAX_SINGLE_PART_BYTES = 16 * 2**20  # larger files are sent in parts
MAX_SINGLE_REQUEST_BYTES = 64 * 2**20  # the portal's default limit
MAX_LOCK_WAIT_S = 300.0  # for a process that has the file locked while no byte of it arrives
MAX_UPLOAD_ROUNDS = 3
CONFLICT_STATUS = 409
MALFORMED_FILE = "malformed"  # the portal's type of error for a file with malformed rows
CLIENT_PAGE_SIZE = 200  # the portal's largest page


class Client:
    """One contributor's connection to the portal.

    Every write has an idempotency key, so a retry after a lost response has no second effect. Connection errors and the
    statuses 502 to 504 are retried with exponential backoff, about 12 s in total; a server that has not answered this
    client before is not waited for.

    The portal may be newer: fields that this release does not know are ignored, states and roles are the portal's own
    words, and a verdict, decision or status that cannot be read is None.

    Raises:
        PortalError: from every method, when the portal refuses, or the answer is not a portal's.
        httpx.TransportError: when it cannot be reached.
        FieldError: from the constructor, when no portal can be at the URL, or the token is empty or cannot be sent.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float = 60.0) -> None:
        check_portal_url(url)
        if not token.strip():
            raise FieldError(["token"], "is needed, got none; set COTRAIN_TOKEN or use --token")
        if not (token.isascii() and token.isprintable()):
            raise FieldError(["token"], "must have visible ASCII characters only; remove the others")
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
        self._http = httpx.Client(base_url=url, timeout=timeout, headers={"Authorization": f"Bearer {token}"})
        self._has_connected = False

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
        """Fetch one of your reports with its timeline."""
        return self._get(FeedbackOut, f"/api/v1/feedback/{feedback_id}")

    def all_feedback(self) -> list[FeedbackOut]:
        """Fetch all your reports, oldest first."""
        return self._get_pages(FeedbackOut, "/api/v1/feedback")

    def notices(self) -> list[NoticeOut]:
        """Fetch all notices about your reports, oldest first."""
        return self._get_pages(NoticeOut, "/api/v1/notices")

    def push_dataset(
        self,
        file: Path,
        *,
        name: str | None = None,
        purpose: DatasetPurpose = DatasetPurpose.MIXTURE,
        idempotency_key: str | None = None,
        wait: bool = True,
        max_bytes_per_s: float | None = None,
        report_progress: ReportPushProgress = lambda progress: None,
    ) -> DatasetOut:
        """Upload a JSONL file of rows. A file with malformed rows is refused as a whole; the error lists them.

        A file of more than 16 MiB is sent in parts, straight to the store. If that is interrupted, the same call
        continues it, also from another process. Its rows are checked after the last part has arrived. A call in another
        process of this machine waits until the first one has sent the file.

        Args:
            wait: wait for the result of the check; otherwise a large file's dataset is returned while it is checked.
            max_bytes_per_s: limit of the rate at which parts are sent.
            report_progress: called from several threads, never by two at once.

        Raises:
            ValueError: if the file has another format or too many lines, and nothing is sent, or if it changes.
            StoreUnreachable: if the store does not answer at the address that the portal gives.
        """
        with file.open("rb") as stream:
            num_bytes = os.fstat(stream.fileno()).st_size
            if num_bytes <= MAX_SINGLE_PART_BYTES:
                return self._push_at_once(file, stream, name or file.stem, purpose, idempotency_key)
            pushed = read_pushed_file(file, stream, report_progress)
            form = DatasetUploadIn(
                name=name or file.stem, purpose=purpose, num_bytes=pushed.num_bytes, sha256=pushed.sha256
            )
            upload = self.begin_upload(form, idempotency_key=idempotency_key)

            def send() -> DatasetOut:
                return self._send_missing_parts(pushed, upload, report_progress, max_bytes_per_s)

            try:
                while True:
                    dataset = self._send_alone(pushed, upload.id, report_progress, send)
                    if not wait:
                        return dataset
                    dataset = self._poll_check(dataset, report_progress, (DatasetState.CHECKING,))
                    if dataset.state != DatasetState.UPLOADING:  # as it is again if the store has lost bytes
                        break
            except StoreUnreachable:
                # A portal on another machine may have its store on an address that only that machine reaches.
                if num_bytes > MAX_SINGLE_REQUEST_BYTES or self.received_parts(upload.id).numbers:
                    raise
                self.withdraw_dataset(upload.id, "sent in one request instead, since the store was not reachable")
                return self._push_at_once(file, stream, form.name, purpose, None)
        return self.wait_for_check(dataset, report_progress)

    def _push_at_once(
        self, file: Path, stream: BinaryIO, name: str, purpose: DatasetPurpose, idempotency_key: str | None
    ) -> DatasetOut:
        if fault := find_file_fault(stream):
            raise ValueError(f"{file}: {fault}")
        query = {"name": name, "purpose": purpose}
        return self._post(DatasetOut, "/api/v1/datasets", idempotency_key, params=query, content=file.read_bytes())

    def begin_upload(self, form: DatasetUploadIn, *, idempotency_key: str | None = None) -> DatasetUploadOut:
        """Begin a dataset that is sent in parts, or continue the one that an equal request began."""
        body = form.model_dump(mode="json")
        return self._post(DatasetUploadOut, "/api/v1/datasets/uploads", idempotency_key, json=body)

    def open_uploads(self) -> list[DatasetUploadOut]:
        """Fetch your uploads that still receive parts, oldest first."""
        return parse_response_list(self._request("GET", "/api/v1/datasets/uploads"), DatasetUploadOut)

    def received_parts(self, dataset_id: str) -> ReceivedPartsOut:
        """Fetch the numbers of an upload's parts that have arrived."""
        return self._get(ReceivedPartsOut, f"/api/v1/datasets/uploads/{dataset_id}/parts")

    def part_addresses(self, dataset_id: str, parts: Sequence[PartIn]) -> PartAddressesOut:
        """Fetch the addresses to which parts of an upload are sent, each valid for its bytes only."""
        body = PartsIn(parts=list(parts)).model_dump()
        return self._post(PartAddressesOut, f"/api/v1/datasets/uploads/{dataset_id}/parts", None, json=body)

    def complete_upload(self, dataset_id: str) -> DatasetOut:
        """Declare that all parts of an upload have been sent, so that the file is checked."""
        return self._post(DatasetOut, f"/api/v1/datasets/uploads/{dataset_id}/complete", None)

    def _send_alone(
        self, file: PushedFile, dataset_id: str, report_progress: ReportPushProgress, send: Callable[[], DatasetOut]
    ) -> DatasetOut:
        """Call `send` after any other process of this machine that sends the file, unless that one completes it.

        A process that has the file locked and sends nothing for five minutes is waited for no longer.
        """
        num_received, received_at = -1, time.monotonic()
        for attempt in itertools.count():
            with lock_file(file) as is_locked:
                if is_locked or time.monotonic() - received_at > MAX_LOCK_WAIT_S:
                    return send()
            dataset = self.dataset(dataset_id)
            if dataset.state != DatasetState.UPLOADING:
                break
            if dataset.num_received_bytes != num_received:
                num_received, received_at = dataset.num_received_bytes, time.monotonic()
            report_progress(PushProgress(PushStage.WAITING, dataset.num_received_bytes, dataset.num_bytes))
            wait_between_polls(attempt)
        return dataset

    def _send_missing_parts(
        self,
        file: PushedFile,
        upload: DatasetUploadOut,
        report_progress: ReportPushProgress,
        max_bytes_per_s: float | None,
    ) -> DatasetOut:
        """Send the parts that have not arrived, and complete the upload; another process may do the same meanwhile."""
        for attempt in range(MAX_UPLOAD_ROUNDS):
            dataset = self.dataset(upload.id)
            if dataset.state != DatasetState.UPLOADING:
                return dataset
            try:
                received = self.received_parts(upload.id)
                missing = sorted(set(range(1, upload.num_parts + 1)) - set(received.numbers))
                sender = PartSender(
                    file,
                    upload,
                    lambda parts: self.part_addresses(upload.id, parts),
                    report_progress,
                    received.num_received_bytes,
                    max_bytes_per_s,
                )
                if missing:
                    sender.send(missing)
                return self.complete_upload(upload.id)
            except UploadEnded:
                continue
            except PortalError as error:
                # 409: another process has completed the upload, or a part that had arrived is lost.
                if error.status != CONFLICT_STATUS or attempt + 1 == MAX_UPLOAD_ROUNDS:
                    raise
        raise StoreUnreachable(f"the store has lost the parts of dataset {upload.id}; push the same file again")

    def wait_for_check(
        self, dataset: DatasetOut, report_progress: ReportPushProgress = lambda progress: None
    ) -> DatasetOut:
        """Wait until a dataset's file has been checked, and return its record.

        Raises:
            PortalError: with status 422 and the malformed rows if the file was rejected, as for one sent at once.
        """
        dataset = self._poll_check(dataset, report_progress, (DatasetState.UPLOADING, DatasetState.CHECKING))
        if dataset.state != DatasetState.REJECTED:
            return dataset
        advice = ", correct the file and push it again" if dataset.bad_rows else ""
        message = f"dataset {dataset.id}: {dataset.reason}; no row was accepted{advice}"
        raise PortalError(422, ErrorBody(message=message, type=MALFORMED_FILE, rows=dataset.bad_rows))

    def _poll_check(
        self, dataset: DatasetOut, report_progress: ReportPushProgress, states: Sequence[DatasetState]
    ) -> DatasetOut:
        """Fetch a dataset's record until it is in none of these states."""
        for attempt in itertools.count():
            if dataset.state not in states:
                break
            report_progress(PushProgress(PushStage.CHECKING, dataset.num_checked_bytes, dataset.num_bytes))
            wait_between_polls(attempt)
            dataset = self.dataset(dataset.id)
        return dataset

    def dataset(self, dataset_id: str) -> DatasetOut:
        """Fetch one of your datasets with its timeline."""
        return self._get(DatasetOut, f"/api/v1/datasets/{dataset_id}")

    def all_datasets(self) -> list[DatasetOut]:
        """Fetch all your datasets, oldest first, each with its first 20 bad rows."""
        return self._get_pages(DatasetOut, "/api/v1/datasets")

    def withdraw_feedback(self, feedback_id: str, reason: str) -> FeedbackOut:
        """Withdraw a report: one of your own, or any as an operator."""
        return self._post(FeedbackOut, f"/api/v1/feedback/{feedback_id}/withdraw", None, json={"reason": reason})

    def withdraw_dataset(self, dataset_id: str, reason: str) -> DatasetOut:
        """Withdraw a dataset: one of your own, or any as an operator."""
        return self._post(DatasetOut, f"/api/v1/datasets/{dataset_id}/withdraw", None, json={"reason": reason})

    def withdraw_account(self, account: str, reason: str, kind: str | None = None) -> AccountWithdrawalOut:
        """Withdraw all reports and datasets of an account, or all of one kind; operators only.

        Args:
            account: its id or name.
            kind: `reports` or `datasets`; None for both.

        Returns:
            The numbers withdrawn by this call, without those that were withdrawn before.
        """
        request = {"account": account, "reason": reason, "kind": kind}
        reports = datasets = 0
        while True:
            batch = self._post(AccountWithdrawalOut, "/api/v1/contributors/withdraw", None, json=request)
            if not batch.reports and not batch.datasets:
                return batch.model_copy(update={"reports": reports, "datasets": datasets})
            reports, datasets = reports + batch.reports, datasets + batch.datasets

    def complete(self, prompts: list[str], *, max_tokens: int = 48) -> StoredCompletion:
        """Complete prompts with the champion at temperature 0; return one choice for each prompt, in their order."""
        body = {"model": "yuan", "prompt": prompts, "max_tokens": max_tokens, "temperature": 0}
        return parse_response(self._request("POST", "/v1/completions", json=body), TypeAdapter(StoredCompletion))

    def add_contributor(self, name: str) -> ContributorOut:
        """Create an account; operators only."""
        return self._post(ContributorOut, "/api/v1/contributors", None, json={"name": name})

    def start_round(self, parameters: RoundParameters, *, idempotency_key: str | None = None) -> RoundOut:
        """Request a round; operators only."""
        return self._post(RoundOut, "/api/v1/rounds", idempotency_key, json=parameters.model_dump())

    def round(self, round_id: str = "latest") -> RoundOut:
        """Fetch a round by id, or the newest one; operators only."""
        return self._get(RoundOut, f"/api/v1/rounds/{round_id}")

    def cancel_round(self, round_id: str) -> RoundOut:
        """Cancel a running round; operators only."""
        return self._post(RoundOut, f"/api/v1/rounds/{round_id}/cancel", None)

    def version(self, number: int) -> VersionOut:
        """Fetch a version's lineage; operators only."""
        return self._get(VersionOut, f"/api/v1/versions/{number}")

    def _get(self, model: type[ResponseModel], path: str) -> ResponseModel:
        return parse_response(self._request("GET", path), TypeAdapter(model))

    def _get_pages(self, model: type[ResponseModel], path: str) -> list[ResponseModel]:
        items: list[ResponseModel] = []
        params = httpx.QueryParams(limit=CLIENT_PAGE_SIZE)
        seen = set[str]()
        while str(params) not in seen:  # a server that repeats a page would never end
            seen.add(str(params))
            response = self._request("GET", path, params=params)
            items += parse_response_list(response, model)
            if "next" not in response.links:
                return items
            # Use only the link's query: the token must not be sent to another address, whatever a response contains.
            try:
                params = httpx.URL(response.links["next"]["url"]).params
            except httpx.InvalidURL:
                raise make_unusable_error(response, "its link to the next page is no URL") from None
        raise make_unusable_error(response, "its link to the next page leads back to an earlier one")

    def _post(self, model: type[ResponseModel], path: str, key: str | None, **request: Any) -> ResponseModel:
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return parse_response(self._request("POST", path, headers=headers, **request), TypeAdapter(model))

    def _request(self, method: str, path: str, **request: Any) -> httpx.Response:
        for attempt in range(MAX_REQUEST_ATTEMPTS):
            is_last = attempt == MAX_REQUEST_ATTEMPTS - 1
            try:
                response = self._http.request(method, path, **request)
            except httpx.LocalProtocolError:
                raise  # a wrong header: no retry would change it
            except httpx.TransportError as error:
                if attempt + 1 >= self._get_max_attempts(error):
                    raise
            else:
                self._has_connected = True
                if response.is_success:
                    return response
                if response.status_code not in RETRIED_STATUSES or is_last:
                    raise make_refusal(response)
            time.sleep(0.4 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _get_max_attempts(self, error: httpx.TransportError) -> int:
        """Return how often a request is sent at most that failed with an error.

        A server that has answered before is being restarted. One that has not has probably another address; one that
        closes the connection may expect TLS, or its answer was lost, as that of one which is too slow.
        """
        if self._has_connected:
            return MAX_REQUEST_ATTEMPTS
        return 1 if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) else 2
