"""The embedded stack's model server."""

from pathlib import Path

from flows.stack.platform_service import check_url, make_platform_service, make_private_folders
from infra.confinement import Confinement, parse_port
from infra.health import LivenessPolicy, check_health
from infra.keeper import ManagedService
from infra.settings import ModelServerSettings, Settings


def make_model_server_service(home: Path, settings: Settings) -> ManagedService:
    """Describe the model server, which downloads versions from MLflow into `serve/`."""
    cache = home / "serve"
    token = settings.model_server_token.get_secret_value()
    return make_platform_service(
        home,
        name="model-server",
        module="yuan.serve.run",
        confinement=Confinement(
            read=tuple(home / name for name in ModelServerSettings.files),
            write=(home / "model-server", cache),
            accelerators="process",
            # MLflow's client fetches large files directly from the store, by presigned URLs.
            connect=(parse_port(settings.mlflow_url), parse_port(settings.s3_endpoint)),
            is_server=True,
        ),
        before=lambda: make_private_folders(cache),
        check=lambda: check_url(f"{settings.model_server_url}/v1/models", token),
        liveness=LivenessPolicy(lambda: check_health(f"{settings.model_server_url}/health")),
        needs=("mlflow",),
        listen=settings.model_server_url,
    )
