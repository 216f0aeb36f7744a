"""Who is asking, in which transaction, and how the answer to a repeated request is found."""

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
    OPERATOR_ROLE,
    InvalidField,
    claim_idempotency_key,
    digest_token,
    find_contributor_by_token,
)
from feedback.tables import Contributor, new_id
from yuan.data.text import BadJson, make_printable, parse_json

MAX_UPLOADS_PER_ACCOUNT = 2  # of one account at a time
MAX_PARALLEL_FILE_CHECKS = 2  # of files at a time; each keeps a processor, which all other requests share
MAX_CACHED_TOKENS = 10_000  # that are remembered
ANONYMOUS_CALLER, TOKEN_LOOKUP_CALLER = (
    "",
    "look up",
)  # callers that are no account: all without a known token, and the look-up of tokens
CONNECTION_WAIT_TIMEOUT_S = 20.0  # for a connection
ID_PATTERN = "^[0-9a-f]{32}$"

RecordIdPath = Annotated[str, Path(pattern=ID_PATTERN, description="id of the record")]
RoundIdPath = Annotated[str, Path(pattern="^([0-9a-f]{32}|latest)$", description="id of a round, or latest")]


class Unauthorized(Exception):
    """No token, or one that is not known."""


class Forbidden(Exception):
    """The account may not do this."""


class TooManyRequests(Exception):
    """More at once, or in a day, than one account may send; `retry_after_s` says when there is room again."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StorageQuotaExceeded(Exception):
    """More bytes than one account may have stored."""


class PortalBusy(Exception):
    """More callers than can be served."""


class InvalidJsonBody(HTTPException):
    """A body that is no JSON, or has a value no field may hold; FastAPI lets only this kind pass while it reads one."""

    def __init__(self, error: BadJson) -> None:
        super().__init__(422, str(error))
        self.param = error.place or None


class StrictRequest(Request):
    """A request whose JSON is read by `yuan.data.text.parse_json`."""

    async def json(self) -> Any:
        try:
            return parse_json(await self.body())
        except BadJson as error:
            raise InvalidJsonBody(error) from None


class StrictRoute(APIRoute):
    """A route of `StrictRequest`s."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


class CallerSlots:
    """Turns of one caller, so many at a time; `num_users` are those that have one or wait for one."""

    def __init__(self, turns: int) -> None:
        self.slots, self.num_users = asyncio.Semaphore(turns), 0


class Transactions:
    """Transactions of requests, never more at a time than connections, and of one account never more than a quarter.

    A request works in several short turns on the server's threads. Without the limit, those that wait for a connection
    would hold every thread, and those that have one would get none to finish on. Without the quarter, one account's
    slow requests would be waited for by everybody. All callers whose token is not known share one quarter, or tokens
    that somebody makes up would each have their own.
    """

    def __init__(self, sessions: sessionmaker[Session], connections: int) -> None:
        self._sessions, self._connection_slots = sessions, asyncio.Semaphore(connections)
        self._slots_per_caller = max(1, connections // 4)
        self._slots_by_caller: dict[str, CallerSlots] = {}
        self._account_ids_by_digest: dict[str, str] = {}  # ids by the digests of their tokens

    @asynccontextmanager
    async def begin(self, request: Request) -> AsyncIterator[Session]:
        """A session, committed at the end and rolled back after an error; its work belongs on a thread.

        Raises:
            Busy: if there is no room within 20 s.
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
                with anyio.CancelScope(shield=True):  # also for a caller that has hung up
                    await run_in_threadpool(session.close)

    async def _identify_caller(self, request: Request) -> str:
        """Return the id of the account of the request's token, which is looked up at the first request of a token.

        Whether the token still holds is for the route to say; what is remembered here only shares out connections.
        """
        scheme, token = get_authorization_scheme_param(request.headers.get("Authorization"))
        if scheme.lower() != "bearer" or not token:
            return ANONYMOUS_CALLER
        digest = digest_token(token)
        known = self._account_ids_by_digest.get(digest)
        if known is None:
            # These are short, and have turns of their own: slow requests without a token do not hold them up.
            async with self._open_session(TOKEN_LOOKUP_CALLER) as session:
                known = await run_in_threadpool(_find_account_id, session, token)
            if known is None:
                return ANONYMOUS_CALLER
            if len(self._account_ids_by_digest) >= MAX_CACHED_TOKENS:
                self._account_ids_by_digest.clear()
            self._account_ids_by_digest[digest] = known
        return known

    @asynccontextmanager
    async def _hold_slot(self, caller: str) -> AsyncIterator[None]:
        """Wait for a turn of the caller's own first, so that few of one caller stand in everybody's queue."""
        turns = self._slots_by_caller.setdefault(caller, CallerSlots(self._slots_per_caller))
        turns.num_users += 1
        try:
            async with AsyncExitStack() as held:
                try:
                    async with asyncio.timeout(CONNECTION_WAIT_TIMEOUT_S):
                        await held.enter_async_context(turns.slots)
                        await held.enter_async_context(self._connection_slots)
                except TimeoutError:
                    raise PortalBusy(
                        "more requests wait than the portal can serve; try again in a few seconds"
                    ) from None
                yield
        finally:
            turns.num_users -= 1
            if not turns.num_users:
                del self._slots_by_caller[caller]


def _find_account_id(session: Session, token: str) -> str | None:
    found = find_contributor_by_token(session, token)
    return None if found is None else found.id


class UploadLimiter:
    """Files that are arriving or being checked, so many of each account at a time; `checks` limits the checking."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()
        self.checks = anyio.CapacityLimiter(MAX_PARALLEL_FILE_CHECKS)

    @contextmanager
    def begin(self, contributor_id: str) -> Iterator[None]:
        """Count one more while the block runs.

        Raises:
            TooMany: if the account has as many as it may.
        """
        if self._running[contributor_id] >= MAX_UPLOADS_PER_ACCOUNT:
            raise TooManyRequests(
                f"{MAX_UPLOADS_PER_ACCOUNT} uploads of yours are under way; send the next when one has ended"
            )
        self._running[contributor_id] += 1
        try:
            yield
        finally:
            self._running[contributor_id] -= 1


async def open_session(request: Request) -> AsyncIterator[Session]:
    async with request.app.state.transactions.begin(request) as session:
        yield session


# Committed before the answer starts, so that a 201 is never followed by a failed commit.
SessionDep = Annotated[Session, Depends(open_session, scope="function")]


BearerToken = Annotated[
    HTTPAuthorizationCredentials | None,
    Security(HTTPBearer(auto_error=False, scheme_name="token", description="your API token")),
]


def authenticate_contributor(session: SessionDep, bearer: BearerToken = None) -> Contributor:
    """The account of the bearer token.

    Raises:
        Unauthorized: if there is no token or it is not known.
    """
    found = find_contributor_by_token(session, bearer.credentials) if bearer is not None else None
    if found is None:
        raise Unauthorized("a valid token is needed; send the header `Authorization: Bearer TOKEN`")
    return found


@dataclass(frozen=True)
class AuthenticatedAccount:
    """Who asks, outside of a transaction."""

    id: str
    role: str


async def authenticate_account(request: Request, bearer: BearerToken = None) -> AuthenticatedAccount:
    """The account of the bearer token, for routes that wait for others and must not hold a transaction meanwhile."""
    async with request.app.state.transactions.begin(request) as session:
        found = await run_in_threadpool(authenticate_contributor, session, bearer)
        return AuthenticatedAccount(found.id, found.role)


CurrentAccount = Annotated[AuthenticatedAccount, Depends(authenticate_account)]
CurrentContributor = Annotated[Contributor, Depends(authenticate_contributor, scope="function")]


def require_known_query(request: Request, contributor: CurrentContributor) -> None:
    """Refuse query parameters that the route does not have; see `check_query`."""
    check_query(request)


def require_known_query_without_session(request: Request, account: CurrentAccount) -> None:
    """Refuse query parameters like `require_known_query`, for routes that must not hold a transaction."""
    check_query(request)


def check_query(request: Request) -> None:
    """Refuse query parameters that the route does not have, since a misspelt one would go unnoticed.

    Raises:
        Refused: naming the first one, or if the query is not in UTF-8.
    """
    try:
        unquote_to_bytes(request.url.query).decode()
    except UnicodeDecodeError:
        raise InvalidField("must be percent-encoded UTF-8", "query") from None
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise InvalidField("there is no such query parameter; leave it out", make_printable(name))


def require_operator(contributor: CurrentContributor) -> Contributor:
    """The account, if it is an operator's.

    Raises:
        Forbidden: if it is not.
    """
    if contributor.role != OPERATOR_ROLE:
        raise Forbidden("this needs an operator's token")
    return contributor


CurrentOperator = Annotated[Contributor, Depends(require_operator, scope="function")]


@dataclass(frozen=True)
class IdempotentRequest:
    """A write's idempotency key and the request it belongs to."""

    key: str
    request_digest: str

    def claim(self, session: Session, contributor: Contributor) -> tuple[str, bool]:
        """The id for the record to make, and whether an earlier request has made it."""
        fresh = new_id()
        first = claim_idempotency_key(session, contributor, self.key, self.request_digest, fresh)
        return (fresh, False) if first is None else (first, True)


IdempotencyKeyHeader = Annotated[
    str | None,
    Header(
        max_length=200,
        pattern="^[!-~]+$",
        description="repeat a request safely with the same key; of visible ASCII characters",
    ),
]


async def read_idempotent_request(request: Request, idempotency_key: IdempotencyKeyHeader = None) -> IdempotentRequest:
    """Read the key, and digest what was asked; without a key every request is its own."""
    digest = begin_digest(request)
    digest.update(await request.body())
    return IdempotentRequest(idempotency_key or new_id(), digest.hexdigest())


def begin_digest(request: Request) -> "hashlib._Hash":
    """Begin the digest of a request, which goes on with its body."""
    return hashlib.sha256("\n".join((request.method, request.url.path, request.url.query, "")).encode())


IdempotentRequestDep = Annotated[IdempotentRequest, Depends(read_idempotent_request)]
