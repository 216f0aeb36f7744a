"""Walk a server's routes: which answer to whom, as a table."""

import re
from dataclasses import dataclass

from starlette.routing import Mount, WebSocketRoute

METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")


@dataclass(frozen=True, order=True)
class Route:
    """A method, or WEBSOCKET, and a path as the server writes it."""

    path: str
    method: str

    def example(self, **values):
        """A path of this form; an id that nothing has, and `x` for other parts."""
        parts = {"uuid": "00000000-0000-4000-8000-000000000000", "number": "1", **values}
        return re.sub(
            r"{(\w+)(?::(\w+))?}", lambda m: parts.get(m.group(1)) or parts.get(m.group(2) or "", "x"), self.path
        )


def list_routes(app, prefix=""):
    """Every route of an application, those of mounted and included ones and hidden ones too."""
    found = []
    for route in _flatten(app.routes):
        path = prefix + route.path
        if isinstance(route, Mount):
            found += list_routes(route.app, path) if hasattr(route.app, "routes") else [Route(path + "/x", "GET")]
        elif isinstance(route, WebSocketRoute) or not getattr(route, "methods", None):
            found.append(Route(path, "WEBSOCKET"))
        else:
            found += [Route(path, method) for method in route.methods]
    return found


def _flatten(routes):
    for route in routes:
        if hasattr(route, "effective_route_contexts"):  # FastAPI keeps an included router as one entry
            for context in route.effective_route_contexts():
                yield context if hasattr(context, "path") and context.path else context.original_route
        elif hasattr(route, "path"):
            yield route


def summarise(server, num_walked, open_to):
    """One row of the table: how many of the walked methods and paths answer to each caller."""
    return f"| {server} | {num_walked} | {', '.join(f'{caller} {len(found)}' for caller, found in open_to.items())} |"
