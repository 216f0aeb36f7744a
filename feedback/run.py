"""Entry point of the portal process: `python -m feedback.run`."""

import uvicorn

from feedback.api.app import make_app
from infra.database import open_engine
from infra.http_server import choose_listen_options, make_server_options
from infra.logs import configure_logging
from infra.object_store import open_object_store
from infra.settings import PortalSettings, load_settings


def main() -> None:
    """Serve the portal until the process is terminated."""
    configure_logging()
    settings = load_settings(PortalSettings)
    app = make_app(settings, open_engine(settings, pool_size=16), open_object_store(settings))
    uvicorn.run(
        app,
        log_config=None,
        access_log=False,
        **choose_listen_options(settings.portal_url),
        **make_server_options(),
    )


if __name__ == "__main__":
    main()
