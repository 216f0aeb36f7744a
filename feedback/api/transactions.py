"""Database transactions of requests, shared out between their callers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Concatenate, ParamSpec, TypeVar

import anyio
from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security.utils import get_authorization_scheme_param
from sqlalchemy.orm import Session, sessionmaker

from feedback.accounts import digest_token, find_account_by_token

MAX_CACHED_TOKENS = 10_000  # in memory
# Callers that are not accounts: all requests without a known token, and the lookup of tokens.
ANONYMOUS_CALLER = ""
TOKEN_LOOKUP_CALLER = "look up"
CONNECTION_WAIT_TIMEOUT_S = 20.0  # for a database connection

WorkArgs = ParamSpec("WorkArgs")
WorkResult = TypeVar("WorkResult")


class PortalBusy(Exception):
    """The portal has no free capacity at present."""


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

    A request runs on the server's threads. Without the limit, requests that wait for a connection would hold every
    thread, and those that have a connection would get no thread to finish on. Without the quarter, one account's slow
    requests would block all others. All callers without a known token share one quarter; otherwise each invented token
    would get its own.
    """

    def __init__(self, sessions: sessionmaker[Session], connections: int) -> None:
        self._sessions, self._connection_slots = sessions, asyncio.Semaphore(connections)
        self._slots_per_caller = max(1, connections // 4)
        self._slots_by_caller: dict[str, CallerSlots] = {}
        self._account_ids_by_digest: dict[str, str] = {}  # account ids by the digests of their tokens

    async def run(
        self,
        request: Request,
        work: Callable[Concatenate[Session, WorkArgs], WorkResult],
        *args: WorkArgs.args,
        **kwargs: WorkArgs.kwargs,
    ) -> WorkResult:
        """Run `work` in a transaction that is committed at its end and rolled back after an error.

        The whole transaction runs in one step on one worker thread, which `begin` needs several of.

        Raises:
            PortalBusy: if no connection is free within 20 s.
        """
        return await self._run(await self._identify_caller(request), work, *args, **kwargs)

    async def _run(
        self,
        caller: str,
        work: Callable[Concatenate[Session, WorkArgs], WorkResult],
        *args: WorkArgs.args,
        **kwargs: WorkArgs.kwargs,
    ) -> WorkResult:
        def run_transaction() -> WorkResult:
            with self._sessions.begin() as session:
                return work(session, *args, **kwargs)

        async with self._hold_slot(caller):
            return await run_in_threadpool(run_transaction)

    @asynccontextmanager
    async def begin(self, request: Request) -> AsyncIterator[Session]:
        """Open a session, committed at the end and rolled back after an error; use it on a worker thread only.

        Raises:
            PortalBusy: if no connection is free within 20 s.
        """
        async with self._hold_slot(await self._identify_caller(request)):
            session = self._sessions()
            try:
                yield session
                await run_in_threadpool(session.commit)
            finally:
                with anyio.CancelScope(shield=True):  # also after the caller has disconnected
                    await run_in_threadpool(session.close)

    async def is_token_known(self, request: Request) -> bool:
        """Return True if the request's token belongs to an account, or did when it was first seen."""
        return await self._identify_caller(request) != ANONYMOUS_CALLER

    async def _identify_caller(self, request: Request) -> str:
        """Return the account id of the request's token, looked up at the token's first request and then cached.

        The cached id is used only to share out connections, and to refuse unknown tokens early; the transaction itself
        checks that the token is still valid.
        """
        scheme, token = get_authorization_scheme_param(request.headers.get("Authorization"))
        if scheme.lower() != "bearer" or not token:
            return ANONYMOUS_CALLER
        digest = digest_token(token)
        account_id = self._account_ids_by_digest.get(digest)
        if account_id is None:
            # Lookups are short and have their own slots, so that slow requests without a token do not block them.
            account = await self._run(TOKEN_LOOKUP_CALLER, find_account_by_token, token)
            if account is None:
                return ANONYMOUS_CALLER
            if len(self._account_ids_by_digest) >= MAX_CACHED_TOKENS:
                self._account_ids_by_digest.clear()
            self._account_ids_by_digest[digest] = account_id = account.id
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


def get_transactions(request: Request) -> Transactions:
    """Return the application's transactions."""
    transactions: Transactions = request.app.state.transactions
    return transactions


async def open_session(request: Request) -> AsyncIterator[Session]:
    """Open the request's session as a FastAPI dependency; see `Transactions.begin`."""
    async with get_transactions(request).begin(request) as session:
        yield session


# Scope "function" commits before the response starts, so that a 201 is never followed by a failed commit.
SessionDep = Annotated[Session, Depends(open_session, scope="function")]
