"""Authentication, checks of a request, upload limits, and idempotency of requests."""

import hashlib
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote_to_bytes

import anyio
import anyio.to_thread
from fastapi import Depends, Header, Path, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from sqlalchemy.orm import Session

from feedback.accounts import (
    Account,
    InvalidField,
    claim_idempotency_key,
    find_account_by_token,
    find_contributor_by_token,
)
from feedback.api.transactions import SessionDep, get_transactions
from feedback.contracts import IdempotencyKeyText
from feedback.states import AccountRole
from feedback.tables import Contributor, new_id
from yuan.data.text import PatternRule, make_printable
from yuan.serve.strict_requests import StrictRoute

MAX_UPLOADS_PER_ACCOUNT = 2  # per account at the same time
MAX_PARALLEL_FILE_CHECKS = 2  # at the same time; each uses a CPU core that all other requests share
ID_PATTERN = "^[0-9a-f]{32}$"
CheckResult = TypeVar("CheckResult")


def _check_digits(value: Any) -> Any:
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        raise PydanticCustomError(
            "digits",
            "must be a whole number in decimal digits, got {shown}",
            {"shown": make_printable(value) or "nothing"},
        )
    return value


# For a number in a path or query; pydantic also reads `1_0`, ` 10` and `10.0` as 10. Behind the number's limits, since
# those behind a validator are not in the JSON Schema.
DIGITS_CHECK = BeforeValidator(_check_digits)
DigitsInt = Annotated[int, Field(ge=1, le=2**31 - 1), DIGITS_CHECK]

RecordId = Annotated[str, PatternRule(ID_PATTERN, "the id of a record", max_length=32)]
RecordIdPath = Annotated[RecordId, Path(description="id of the record")]
RoundId = Annotated[
    str,
    PatternRule("^([0-9a-f]{32}|latest)$", "the id of a round, or latest", max_length=32),
]
RoundIdPath = Annotated[RoundId, Path(description="id of a round, or latest")]
VersionPath = Annotated[DigitsInt, Path(description="number of a version")]


class Unauthorized(Exception):
    """The request has no token, or an unknown or revoked one."""


class Forbidden(Exception):
    """The account has no permission for the request."""


class TooManyRequests(Exception):
    """The account exceeds a limit per day or of parallel requests; it may retry after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StorageQuotaExceeded(Exception):
    """The account would exceed its limit of stored bytes."""


class AccountRoute(StrictRoute):
    """A route of accounts: a token that is not valid is reported before any fault of the query or body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle_authenticated(request: Request) -> Response:
            try:
                return await handler(request)
            except (RequestValidationError, InvalidField):
                # Of the routes whose transaction checks the token last. The others hold a session here, besides which
                # this request must not wait for another.
                if not getattr(request.state, "is_authenticated", False):
                    _, token = get_authorization_scheme_param(request.headers.get("Authorization"))
                    await get_transactions(request).run(request, authenticate_token, token)
                raise

        return handle_authenticated


class AccountUploads:
    """The uploads of one account that are in progress: their number, and a lock that one of them checks its file."""

    def __init__(self) -> None:
        self.num_running, self.check_lock = 0, anyio.Lock()


class UploadLimiter:
    """Limits of parallel uploads per account, and of file checks: one per account, and a few of all together.

    A hostile file takes minutes to check, and must not keep every other account's file waiting.
    """

    def __init__(self) -> None:
        self._uploads: dict[str, AccountUploads] = {}
        self._checks = anyio.CapacityLimiter(MAX_PARALLEL_FILE_CHECKS)

    @contextmanager
    def begin(self, contributor_id: str) -> Iterator[AccountUploads]:
        """Count one more upload of the account while the block runs.

        Raises:
            TooManyRequests: if the account has the maximum of parallel uploads.
        """
        uploads = self._uploads.setdefault(contributor_id, AccountUploads())
        if uploads.num_running >= MAX_UPLOADS_PER_ACCOUNT:
            raise TooManyRequests(
                f"{MAX_UPLOADS_PER_ACCOUNT} uploads of yours are in progress; send the next when one has ended"
            )
        uploads.num_running += 1
        try:
            yield uploads
        finally:
            uploads.num_running -= 1
            if not uploads.num_running:
                del self._uploads[contributor_id]

    async def check(self, uploads: AccountUploads, check_file: Callable[[], CheckResult]) -> CheckResult:
        """Run a check on a worker thread, after other checks of the account."""
        async with uploads.check_lock:
            return await anyio.to_thread.run_sync(check_file, limiter=self._checks)


BearerToken = Annotated[
    HTTPAuthorizationCredentials | None,
    Security(HTTPBearer(auto_error=False, scheme_name="token", description="your API token")),
]


def authenticate_contributor(request: Request, session: SessionDep, bearer: BearerToken = None) -> Contributor:
    """Return the account of the bearer token.

    Raises:
        Unauthorized: if there is no token or it is not known.
    """
    contributor = find_contributor_by_token(session, bearer.credentials) if bearer is not None else None
    if contributor is None:
        raise make_token_error()
    request.state.is_authenticated = True
    return contributor


def make_token_error() -> Unauthorized:
    """Return the error of a request without a valid token."""
    return Unauthorized("a valid token is needed; send the header `Authorization: Bearer TOKEN`")


def authenticate_token(session: Session, token: str) -> Account:
    """Return the account of a token, without its row as an object of the session.

    Raises:
        Unauthorized: if the token is not known, or revoked.
    """
    account = find_account_by_token(session, token)
    if account is None:
        raise make_token_error()
    return account


async def require_known_token(request: Request, bearer: BearerToken = None) -> str:
    """Return the bearer token, for routes whose own transaction then calls `authenticate_token`.

    Raises:
        Unauthorized: if there is no token or none that was ever valid, before the body is validated.
    """
    if bearer is None or not await get_transactions(request).is_token_known(request):
        raise make_token_error()
    return bearer.credentials


KnownToken = Annotated[str, Depends(require_known_token)]


async def authenticate_account(request: Request, token: KnownToken) -> Account:
    """Return the account of the bearer token, for routes that do slow I/O and must not hold a transaction meanwhile."""
    account = await get_transactions(request).run(request, authenticate_token, token)
    request.state.is_authenticated = True
    return account


CurrentAccount = Annotated[Account, Depends(authenticate_account)]
CurrentContributor = Annotated[Contributor, Depends(authenticate_contributor, scope="function")]


def require_known_query(request: Request, contributor: CurrentContributor) -> None:
    """Refuse query parameters that the route does not have; see `check_query`."""
    check_query(request)


async def require_known_query_without_session(request: Request, account: CurrentAccount) -> None:
    """Refuse unknown query parameters as `require_known_query` does, for routes that open their own transactions."""
    check_query(request)


def check_query(request: Request) -> None:
    """Refuse query parameters that the route does not have, since a misspelt one would be ignored silently.

    Raises:
        InvalidField: naming the first one, or if the query is not in UTF-8.
    """
    query = request.scope["query_string"]
    if not query:
        return
    try:
        unquote_to_bytes(query).decode()
    except UnicodeDecodeError:
        raise InvalidField("must be percent-encoded UTF-8; encode its characters again", "query") from None
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise InvalidField("there is no such query parameter; leave it out", make_printable(name))


def require_operator(contributor: CurrentContributor) -> Contributor:
    """Return the account if it is an operator's.

    Raises:
        Forbidden: if it is not.
    """
    if contributor.role != AccountRole.OPERATOR:
        raise Forbidden("this needs an operator's token; ask an operator to do it")
    return contributor


CurrentOperator = Annotated[Contributor, Depends(require_operator, scope="function")]


@dataclass(frozen=True)
class ClaimedRecord:
    """The record to which the key of a request is bound.

    Attributes:
        id: its id, new for a new key.
        is_repeat: True if an earlier request has bound the key.
    """

    id: str
    is_repeat: bool


@dataclass(frozen=True)
class IdempotentRequest:
    """A write's idempotency key and the request it belongs to."""

    key: str
    request_digest: str

    def claim(self, session: Session, account_id: str) -> ClaimedRecord:
        """Bind the key to a new record, or return the record to which an earlier request has bound it.

        Raises:
            Conflict: if the key was used for another request.
        """
        record_id = new_id()
        earlier_id = claim_idempotency_key(session, account_id, self.key, self.request_digest, record_id)
        return ClaimedRecord(record_id, False) if earlier_id is None else ClaimedRecord(earlier_id, True)


IdempotencyKeyHeader = Annotated[
    IdempotencyKeyText | None,
    Header(
        description="key to repeat a request safely; visible ASCII characters only",
    ),
]


async def read_idempotent_request(request: Request, idempotency_key: IdempotencyKeyHeader = None) -> IdempotentRequest:
    """Read the idempotency key and digest the request; a request without a key gets a random one."""
    digest = begin_digest(request)
    digest.update(await request.body())
    return IdempotentRequest(idempotency_key or new_id(), digest.hexdigest())


def begin_digest(request: Request) -> "hashlib._Hash":
    """Start the digest of a request with its method, path and query; the caller adds the body."""
    return hashlib.sha256("\n".join((request.method, request.url.path, request.url.query, "")).encode())


IdempotentRequestDep = Annotated[IdempotentRequest, Depends(read_idempotent_request)]


@dataclass(frozen=True)
class SubmissionRequest:
    """A write whose own transaction checks the token."""

    token: str
    repeat: IdempotentRequest


async def read_submission_request(
    request: Request, bearer: BearerToken = None, idempotency_key: IdempotencyKeyHeader = None
) -> SubmissionRequest:
    """Check token and query, and read the idempotency key, in one step: FastAPI takes as long for each dependency.

    Raises:
        Unauthorized, InvalidField: as `require_known_token` and `check_query`.
    """
    token = await require_known_token(request, bearer)
    check_query(request)
    return SubmissionRequest(token, await read_idempotent_request(request, idempotency_key))


SubmissionRequestDep = Annotated[SubmissionRequest, Depends(read_submission_request)]
