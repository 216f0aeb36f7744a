"""List a server's routes, and summarize in a table which of them each caller may use."""

import re
from dataclasses import dataclass

from starlette.routing import Mount, WebSocketRoute

METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")


@dataclass(frozen=True, order=True)
class Route:
    """Hold a method, or WEBSOCKET, and the path template of the server's route."""

    path: str
    method: str

    def example(self, **values):
        """Return a path that matches the template: `values`, an id that does not exist, and `x` for other parts."""
        parts = {"uuid": "00000000-0000-4000-8000-000000000000", "number": "1", **values}
        return re.sub(
            r"{(\w+)(?::(\w+))?}", lambda m: parts.get(m.group(1)) or parts.get(m.group(2) or "", "x"), self.path
        )


def list_routes(app, prefix=""):
    """List every route of an application, including hidden routes and those of mounted and included applications."""
    routes = []
    for route in _flatten(app.routes):
        path = prefix + route.path
        if isinstance(route, Mount):
            routes += list_routes(route.app, path) if hasattr(route.app, "routes") else [Route(path + "/x", "GET")]
        elif isinstance(route, WebSocketRoute) or not getattr(route, "methods", None):
            routes.append(Route(path, "WEBSOCKET"))
        else:
            routes += [Route(path, method) for method in route.methods]
    return routes


def _flatten(routes):
    for route in routes:
        if hasattr(route, "effective_route_contexts"):  # FastAPI keeps an included router as one entry
            for context in route.effective_route_contexts():
                yield context if hasattr(context, "path") and context.path else context.original_route
        elif hasattr(route, "path"):
            yield route


def summarize(server, num_walked, open_to):
    """Return one row of the table: how many of the requested methods and paths each caller may use."""
    counts = ", ".join(f"{caller} {len(routes)}" for caller, routes in open_to.items())
    return f"| {server} | {num_walked} | {counts} |"
