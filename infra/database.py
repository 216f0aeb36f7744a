"""Create the SQLAlchemy engine and sessions of the platform's PostgreSQL, and migrate its schema."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session, sessionmaker

from infra.settings import DatabaseAccess


def open_engine(settings: DatabaseAccess, *, pool_size: int = 5) -> Engine:
    """Create an engine that connects lazily and replaces dropped connections before use; errors hide parameters."""
    url = settings.database_url.get_secret_value().replace("postgresql://", "postgresql+psycopg://", 1)
    return create_engine(
        url, pool_pre_ping=True, pool_size=pool_size, hide_parameters=True, connect_args={"connect_timeout": 5}
    )


def make_session_factory(engine: Engine) -> sessionmaker[Session]:
    return sessionmaker(engine, expire_on_commit=False)


def migrate_schema(engine: Engine, scripts: Path) -> None:
    """Migrate the schema to the newest revision; do nothing if it has it already."""
    config = Config()
    config.set_main_option("script_location", str(scripts))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
