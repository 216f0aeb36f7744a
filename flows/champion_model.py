"""The model in service, as far as its devices depend on it."""

from sqlalchemy.orm import Session

from feedback import rounds
from feedback.promotion import find_champion
from infra.version_cache import VersionCache
from yuan.model.model_folder import measure_value_bytes, read_model_config
from yuan.model.model_manifest import ModelManifest
from yuan.plan.generation_stages import GenerationModel


def find_champion_model(session: Session, versions: VersionCache) -> GenerationModel | None:
    """Return the model in service; None if there is no champion, or the cache of versions lacks it.

    Raises:
        ValueError: if its folder in the cache is damaged.
    """
    champion = find_champion(session)
    if champion is None:
        return None
    recorded = ModelManifest.from_json(rounds.find_version(session, champion).manifest)
    folder = versions.find(champion, recorded.files)
    if folder is None:
        return None
    with folder:
        config = read_model_config(folder.path)
        return GenerationModel(config, measure_value_bytes(folder.path, config))
