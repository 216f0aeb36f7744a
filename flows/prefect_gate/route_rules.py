"""Allow-lists of Prefect's server: the routes that the platform and the operators' pages use; all others are closed.

Routes have the same notation as in the server, so that a test can compare both lists.
"""

import re
from collections.abc import Iterable

from starlette.routing import compile_path

WEBSOCKET_METHOD = "WEBSOCKET"


class RouteAllowList:
    """Hold a set of routes, each a method and a path form as in Starlette."""

    def __init__(self, text: str) -> None:
        self.routes = [(method, path) for method, path in (line.split() for line in text.strip().splitlines())]
        self._patterns = [(method, compile_path(path)[0]) for method, path in self.routes]

    def is_allowed(self, method: str, path: str) -> bool:
        """Return True if a request is on the list.

        >>> PUBLIC_ROUTES.is_allowed("GET", "/api/ready"), PUBLIC_ROUTES.is_allowed("GET", "/api/ready/")
        (True, False)
        >>> PUBLIC_ROUTES.is_allowed("POST", "/api/ready")
        False
        >>> PUBLIC_ROUTES.is_allowed("GET", "/api/ready\\n")  # which `$` alone would accept
        False
        """
        return any(method == allowed and pattern.fullmatch(path) for allowed, pattern in self._patterns)


def is_page(method: str, path: str) -> bool:
    """Return True if a request is for a page or its static files; both versions of Prefect's UI are single-page apps.

    >>> is_page("GET", "/runs/flow-run/7"), is_page("GET", "/api/flows/"), is_page("GET", "/docs")
    (True, False, False)
    """
    return method in ("GET", "HEAD") and PAGE_PATH_PATTERN.fullmatch(path) is not None


def _join_alternatives(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))


# First path segments of the older UI's pages; the server returns the app for each, since users can open them directly.
PAGE_NAMES = (
    "dashboard",
    "runs",
    "flow-runs",
    "flows",
    "flow",
    "deployments",
    "artifacts",
    "work-pools",
    "events",
    "settings",
)
PAGE_FILES = ("index.html", "robots.txt", "favicon.ico", "favicon-dark.ico")
PAGE_PATH_PATTERN = re.compile(
    rf"/(?:(?:{_join_alternatives(PAGE_FILES)}|[\w-]+\.svg)?|(?:assets|ico|v2|{_join_alternatives(PAGE_NAMES)})(?:/[\w,:~@+-][\w.,:~@+-]*)*/?)"
)

# Open without sign-in, besides the pages' static files: probes, and what the UI needs to show the sign-in form.
PUBLIC_ROUTES = RouteAllowList("""
GET /api/health
GET /api/ready
GET /ui-settings
""")

# Open with Prefect's password. Closed even so: creating blocks, variables, automations and concurrency limits and
# setting the default result storage, which the platform does not use; all deletions; runs without a deployment; input
# of paused runs. The UI reads settings (secrets are masked), automations and blocks to render other pages.
OPERATOR_ROUTES = RouteAllowList("""
GET /api/version
GET /api/admin/version
GET /api/admin/settings
GET /api/csrf-token
POST /api/flows/
GET /api/flows/{id:uuid}
GET /api/flows/name/{name}
POST /api/flows/filter
POST /api/flows/count
POST /api/flows/paginate
POST /api/deployments/
GET /api/deployments/{id:uuid}
GET /api/deployments/name/{flow_name}/{deployment_name}
POST /api/deployments/filter
POST /api/deployments/count
POST /api/deployments/paginate
POST /api/deployments/get_scheduled_flow_runs
POST /api/deployments/{id:uuid}/create_flow_run
POST /api/deployments/{id:uuid}/pause_deployment
POST /api/deployments/{id:uuid}/resume_deployment
GET /api/deployments/{id:uuid}/schedules
PATCH /api/deployments/{id:uuid}/schedules/{schedule_id:uuid}
GET /api/flow_runs/{id:uuid}
PATCH /api/flow_runs/{id:uuid}
PATCH /api/flow_runs/{id:uuid}/labels
POST /api/flow_runs/{id:uuid}/set_state
GET /api/flow_runs/{id:uuid}/graph-v2
GET /api/flow_runs/{id:uuid}/logs/download
POST /api/flow_runs/filter
POST /api/flow_runs/count
POST /api/flow_runs/paginate
POST /api/flow_runs/history
POST /api/flow_runs/lateness
GET /api/flow_run_states/
GET /api/task_run_states/
GET /api/task_runs/{id:uuid}
POST /api/task_runs/filter
POST /api/task_runs/count
POST /api/task_runs/paginate
POST /api/task_runs/history
POST /api/logs/
POST /api/logs/filter
POST /api/artifacts/
PATCH /api/artifacts/{id:uuid}
GET /api/artifacts/{id:uuid}
GET /api/artifacts/{key}/latest
POST /api/artifacts/filter
POST /api/artifacts/count
POST /api/artifacts/latest/filter
POST /api/artifacts/latest/count
POST /api/work_pools/
PATCH /api/work_pools/{name}
GET /api/work_pools/{name}
POST /api/work_pools/filter
POST /api/work_pools/count
POST /api/work_pools/{name}/concurrency_status
POST /api/work_pools/{name}/get_scheduled_flow_runs
GET /api/work_pools/{work_pool_name}/queues/{name}
POST /api/work_pools/{work_pool_name}/queues/filter
POST /api/work_pools/{work_pool_name}/workers/heartbeat
POST /api/work_pools/{work_pool_name}/workers/filter
POST /api/work_queues/filter
GET /api/work_queues/{id:uuid}
GET /api/work_queues/{id:uuid}/status
GET /api/collections/views/{view}
POST /api/automations/filter
GET /api/automations/related-to/{resource_id:str}
POST /api/block_documents/filter
POST /api/saved_searches/filter
POST /api/events
POST /api/events/filter
GET /api/events/filter/next
POST /api/events/count-by/{countable}
POST /api/ui/flows/count-deployments
POST /api/ui/flows/next-runs
POST /api/ui/flow_runs/history
POST /api/ui/flow_runs/count-task-runs
POST /api/ui/schemas/validate
POST /api/ui/task_runs/dashboard/counts
POST /api/ui/task_runs/count
GET /api/ui/task_runs/{id:uuid}
""")

# The server requires the password in their first message.
WEBSOCKET_ROUTES = RouteAllowList("""
WEBSOCKET /api/events/in
WEBSOCKET /api/events/out
WEBSOCKET /api/logs/out
WEBSOCKET /api/work_pools/{work_pool_name}/workers/connect
""")
