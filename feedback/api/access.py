"""Authentication, database transactions per caller, upload limits, and idempotency of requests."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

import anyio
from fastapi import Depends, Header, HTTPException, Path, Request, Response, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from sqlalchemy.orm import Session, sessionmaker

from feedback.accounts import (
    InvalidField,
    claim_idempotency_key,
    digest_token,
    find_contributor_by_token,
)
from feedback.states import AccountRole
from feedback.tables import Contributor, new_id
from yuan.data.text import BadJson, make_printable, parse_json

MAX_UPLOADS_PER_ACCOUNT = 2  # per account at the same time
MAX_PARALLEL_FILE_CHECKS = 2  # at the same time; each uses a CPU core that all other requests share
MAX_CACHED_TOKENS = 10_000  # in memory
# Callers that are not accounts: all requests without a known token, and the lookup of tokens.
ANONYMOUS_CALLER = ""
TOKEN_LOOKUP_CALLER = "look up"
CONNECTION_WAIT_TIMEOUT_S = 20.0  # for a database connection
ID_PATTERN = "^[0-9a-f]{32}$"

RecordIdPath = Annotated[str, Path(pattern=ID_PATTERN, description="id of the record")]
RoundIdPath = Annotated[str, Path(pattern="^([0-9a-f]{32}|latest)$", description="id of a round, or latest")]


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


class PortalBusy(Exception):
    """The portal has no free capacity at present."""


class InvalidJsonBody(HTTPException):
    """The body is not JSON, or has a value that no field may have.

    An HTTPException, since FastAPI replaces every other exception that is raised while it reads a body.
    """

    def __init__(self, error: BadJson) -> None:
        super().__init__(422, str(error))
        self.param = error.place or None


class StrictRequest(Request):
    """A request whose JSON body is parsed by `yuan.data.text.parse_json`."""

    async def json(self) -> Any:
        try:
            return parse_json(await self.body())
        except BadJson as error:
            raise InvalidJsonBody(error) from None


class StrictRoute(APIRoute):
    """A route that parses its requests as `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle_strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle_strict


class CallerSlots:
    """The parallel transactions that one caller may have.

    Attributes:
        slots: one slot for each parallel transaction.
        num_users: number of requests that hold or await a slot.
    """

    def __init__(self, num_slots: int) -> None:
        self.slots, self.num_users = asyncio.Semaphore(num_slots), 0


class Transactions:
    """The database transactions of requests: at most one per connection, and at most a quarter of them per account.

    A request runs in several short steps on the server's threads. Without the limit, requests that wait for a
    connection would hold every thread, and those that have a connection would get no thread to finish on. Without the
    quarter, one account's slow requests would block all others. All callers without a known token share one quarter;
    otherwise each invented token would get its own.
    """

    def __init__(self, sessions: sessionmaker[Session], connections: int) -> None:
        self._sessions, self._connection_slots = sessions, asyncio.Semaphore(connections)
        self._slots_per_caller = max(1, connections // 4)
        self._slots_by_caller: dict[str, CallerSlots] = {}
        self._account_ids_by_digest: dict[str, str] = {}  # account ids by the digests of their tokens

    @asynccontextmanager
    async def begin(self, request: Request) -> AsyncIterator[Session]:
        """Open a session, committed at the end and rolled back after an error; use it on a worker thread only.

        Raises:
            PortalBusy: if no connection is free within 20 s.
        """
        async with self._open_session(await self._identify_caller(request)) as session:
            yield session

    @asynccontextmanager
    async def _open_session(self, caller: str) -> AsyncIterator[Session]:
        async with self._hold_slot(caller):
            session = self._sessions()
            try:
                yield session
                await run_in_threadpool(session.commit)
            finally:
                with anyio.CancelScope(shield=True):  # also after the caller has disconnected
                    await run_in_threadpool(session.close)

    async def _identify_caller(self, request: Request) -> str:
        """Return the account id of the request's token, looked up at the token's first request and then cached.

        The cached id is used only to share out connections; the route itself checks that the token is still valid.
        """
        scheme, token = get_authorization_scheme_param(request.headers.get("Authorization"))
        if scheme.lower() != "bearer" or not token:
            return ANONYMOUS_CALLER
        digest = digest_token(token)
        account_id = self._account_ids_by_digest.get(digest)
        if account_id is None:
            # Lookups are short and have their own slots, so that slow requests without a token do not block them.
            async with self._open_session(TOKEN_LOOKUP_CALLER) as session:
                account_id = await run_in_threadpool(_find_account_id, session, token)
            if account_id is None:
                return ANONYMOUS_CALLER
            if len(self._account_ids_by_digest) >= MAX_CACHED_TOKENS:
                self._account_ids_by_digest.clear()
            self._account_ids_by_digest[digest] = account_id
        return account_id

    @asynccontextmanager
    async def _hold_slot(self, caller: str) -> AsyncIterator[None]:
        """Hold a slot of the caller and a connection slot.

        Waits for the caller's own slot first, so that one caller has few requests in the queue that all share.
        """
        caller_slots = self._slots_by_caller.setdefault(caller, CallerSlots(self._slots_per_caller))
        caller_slots.num_users += 1
        try:
            async with AsyncExitStack() as stack:
                try:
                    async with asyncio.timeout(CONNECTION_WAIT_TIMEOUT_S):
                        await stack.enter_async_context(caller_slots.slots)
                        await stack.enter_async_context(self._connection_slots)
                except TimeoutError:
                    raise PortalBusy("more requests wait than the portal can serve; retry in a few seconds") from None
                yield
        finally:
            caller_slots.num_users -= 1
            if not caller_slots.num_users:
                del self._slots_by_caller[caller]


def _find_account_id(session: Session, token: str) -> str | None:
    contributor = find_contributor_by_token(session, token)
    return None if contributor is None else contributor.id


class UploadLimiter:
    """Limits of parallel uploads per account, and of file checks.

    Attributes:
        checks: limit of the file checks of all accounts together.
    """

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()
        self.checks = anyio.CapacityLimiter(MAX_PARALLEL_FILE_CHECKS)

    @contextmanager
    def begin(self, contributor_id: str) -> Iterator[None]:
        """Count one more upload of the account while the block runs.

        Raises:
            TooManyRequests: if the account has the maximum of parallel uploads.
        """
        if self._running[contributor_id] >= MAX_UPLOADS_PER_ACCOUNT:
            raise TooManyRequests(
                f"{MAX_UPLOADS_PER_ACCOUNT} uploads of yours are in progress; send the next when one has ended"
            )
        self._running[contributor_id] += 1
        try:
            yield
        finally:
            self._running[contributor_id] -= 1


async def open_session(request: Request) -> AsyncIterator[Session]:
    """Open the request's session as a FastAPI dependency; see `Transactions.begin`."""
    async with request.app.state.transactions.begin(request) as session:
        yield session


# Scope "function" commits before the response starts, so that a 201 is never followed by a failed commit.
SessionDep = Annotated[Session, Depends(open_session, scope="function")]


BearerToken = Annotated[
    HTTPAuthorizationCredentials | None,
    Security(HTTPBearer(auto_error=False, scheme_name="token", description="your API token")),
]


def authenticate_contributor(session: SessionDep, bearer: BearerToken = None) -> Contributor:
    """Return the account of the bearer token.

    Raises:
        Unauthorized: if there is no token or it is not known.
    """
    contributor = find_contributor_by_token(session, bearer.credentials) if bearer is not None else None
    if contributor is None:
        raise Unauthorized("a valid token is needed; send the header `Authorization: Bearer TOKEN`")
    return contributor


@dataclass(frozen=True)
class AuthenticatedAccount:
    """The caller's account, for use outside of a transaction."""

    id: str
    role: str


async def authenticate_account(request: Request, bearer: BearerToken = None) -> AuthenticatedAccount:
    """Return the account of the bearer token, for routes that do slow I/O and must not hold a transaction meanwhile."""
    async with request.app.state.transactions.begin(request) as session:
        contributor = await run_in_threadpool(authenticate_contributor, session, bearer)
        return AuthenticatedAccount(contributor.id, contributor.role)


CurrentAccount = Annotated[AuthenticatedAccount, Depends(authenticate_account)]
CurrentContributor = Annotated[Contributor, Depends(authenticate_contributor, scope="function")]


def require_known_query(request: Request, contributor: CurrentContributor) -> None:
    """Refuse query parameters that the route does not have; see `check_query`."""
    check_query(request)


def require_known_query_without_session(request: Request, account: CurrentAccount) -> None:
    """Refuse unknown query parameters as `require_known_query` does, for routes that must not hold a transaction."""
    check_query(request)


def check_query(request: Request) -> None:
    """Refuse query parameters that the route does not have, since a misspelt one would be ignored silently.

    Raises:
        InvalidField: naming the first one, or if the query is not in UTF-8.
    """
    try:
        unquote_to_bytes(request.url.query).decode()
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

    def claim(self, session: Session, contributor: Contributor) -> ClaimedRecord:
        """Bind the key to a new record, or return the record to which an earlier request has bound it.

        Raises:
            Conflict: if the key was used for another request.
        """
        record_id = new_id()
        earlier_id = claim_idempotency_key(session, contributor, self.key, self.request_digest, record_id)
        return ClaimedRecord(record_id, False) if earlier_id is None else ClaimedRecord(earlier_id, True)


IdempotencyKeyHeader = Annotated[
    str | None,
    Header(
        max_length=200,
        pattern="^[!-~]+$",
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
