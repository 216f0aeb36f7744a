"""Entry of the portal: `python -m feedback.run`."""

from urllib.parse import urlsplit

import uvicorn

from feedback.api.app import make_app
from infra.database import open_engine
from infra.http_server import server_options
from infra.logs import configure_logging
from infra.objects import open_objects
from infra.settings import PortalSettings, load_settings


def main() -> None:
    configure_logging()
    settings = load_settings(PortalSettings)
    address = urlsplit(settings.portal_url)
    app = make_app(settings, open_engine(settings, pool_size=16), open_objects(settings))
    uvicorn.run(
        app,
        host=address.hostname or "127.0.0.1",
        port=address.port or 80,
        log_config=None,
        access_log=False,
        **server_options(),
    )


if __name__ == "__main__":
    main()
