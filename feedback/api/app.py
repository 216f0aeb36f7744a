"""The portal's FastAPI application: routes, limits and shared resources."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI
from sqlalchemy import Engine, QueuePool, text

from feedback.api import contributors, openai, operators, pages, upload_routes
from feedback.api.access import UploadLimiter
from feedback.api.errors import (
    COMMON_ERROR_STATUSES,
    BodyLimitMiddleware,
    HeadMiddleware,
    InternalErrorMiddleware,
    RequestRulesMiddleware,
    add_error_handlers,
    document_errors,
)
from feedback.api.transactions import Transactions
from infra.database import make_session_factory
from infra.object_store import ObjectStore, open_object_store
from infra.settings import PortalSettings

MODEL_SERVER_TIMEOUT_S = 120.0
# The pool is searched linearly for each request, so few idle connections are kept.
MODEL_SERVER_CONNECTION_LIMITS = httpx.Limits(max_connections=512, max_keepalive_connections=32, keepalive_expiry=5.0)


@asynccontextmanager
async def _close_model_server(app: FastAPI) -> AsyncIterator[None]:
    yield
    await app.state.model_server.aclose()


def make_app(settings: PortalSettings, engine: Engine, objects: ObjectStore) -> FastAPI:
    """Build the portal's application on an open database engine and object store."""
    app = FastAPI(
        title="Yuan co-training portal",
        version="1",
        description="Send reports and datasets, and follow their state.",
        docs_url=None,  # FastAPI's pages load scripts from third-party servers; pages.docs does not
        redoc_url=None,
        lifespan=_close_model_server,
        redirect_slashes=False,  # a path of a record without an id is 404, not the list of records
    )
    assert isinstance(engine.pool, QueuePool), "open_engine makes only QueuePool engines"
    app.state.transactions = Transactions(make_session_factory(engine), engine.pool.size())
    app.state.uploads = UploadLimiter()
    app.state.objects = objects
    endpoint = settings.s3_public_endpoint
    app.state.public_objects = open_object_store(settings, endpoint=endpoint) if endpoint else objects
    app.state.round_ends = {}  # cache of the front page, by round id
    app.state.registered_versions = set()  # cache of submissions; a version is never unregistered
    app.state.docs_page = None  # rendered at the first request
    app.state.max_account_bytes = settings.max_account_bytes
    app.state.max_daily_reports = settings.max_daily_reports
    app.state.max_daily_datasets = settings.max_daily_datasets
    app.state.scratch = settings.home / "portal"
    app.state.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    app.state.model_server = httpx.AsyncClient(
        base_url=settings.model_server_url,
        timeout=MODEL_SERVER_TIMEOUT_S,
        limits=MODEL_SERVER_CONNECTION_LIMITS,
        headers={"Authorization": f"Bearer {settings.model_server_token.get_secret_value()}"},
    )
    add_error_handlers(app)
    for router in (
        contributors.report_router,
        upload_routes.router,  # before the routes of one dataset, whose id would match too
        contributors.router,
        contributors.upload_router,
        operators.router,
    ):
        app.include_router(router, responses=document_errors(*COMMON_ERROR_STATUSES))
    app.include_router(openai.router, responses=document_errors(400, *COMMON_ERROR_STATUSES))
    app.include_router(pages.router)
    app.add_middleware(
        BodyLimitMiddleware, limits={"/api/v1/datasets": settings.max_upload_bytes}, default=settings.max_report_bytes
    )
    app.add_middleware(RequestRulesMiddleware)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(InternalErrorMiddleware)  # added last, so it wraps all others

    @app.get("/health", include_in_schema=False)
    def health() -> dict[str, Any]:
        """Return ok if the portal and its database respond."""
        with engine.connect() as connection:
            connection.execute(text("select 1"))
        return {"ok": True}

    return app
