"""The embedded stack's portal."""

from pathlib import Path

from flows.stack.platform_service import check_url, make_platform_service
from infra.confinement import Confinement, parse_port
from infra.health import LivenessPolicy, check_answer
from infra.keeper import ManagedService
from infra.settings import PortalSettings, Settings


def make_portal_service(home: Path, settings: Settings) -> ManagedService:
    """Describe the portal, which connects to the database, the store and the model server."""
    servers = (settings.database_url.get_secret_value(), settings.s3_endpoint, settings.model_server_url)
    health_url = f"{settings.portal_url}/health"
    return make_platform_service(
        home,
        name="portal",
        module="feedback.run",
        confinement=Confinement(
            read=tuple(home / name for name in PortalSettings.files),
            write=(home / "portal",),
            connect=tuple(map(parse_port, servers)),
            is_server=True,
        ),
        check=lambda: check_url(health_url),
        liveness=LivenessPolicy(lambda: check_answer(health_url)),  # a HEAD request does not query the database
        needs=("postgres", "s3"),
        listen=settings.portal_url,
    )
