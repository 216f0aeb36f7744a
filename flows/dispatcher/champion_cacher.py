"""Keep the champion in the cache of versions, where the model server, which may not write it, reads it."""

import logging

from feedback import rounds
from feedback.promotion import find_champion
from flows.context import DispatcherContext
from yuan.model.model_manifest import ModelManifest

log = logging.getLogger(__name__)


def cache_champion(context: DispatcherContext) -> None:
    """Fetch the champion if the cache lacks it, or has other files than were registered, and mark it as used.

    A candidate is in the cache since its evaluation, so this fetches only what the cache has lost: on a new disk, after
    another version was made champion again, and what was damaged. A large one takes minutes.

    Raises:
        VersionLost: if the registry lacks it, or has other files than were registered.
        OSError: if the disk has too little room.
    """
    with context.sessions() as session:
        champion = find_champion(session)
        if champion is None:
            return
        recorded = ModelManifest.from_json(rounds.find_version(session, champion).manifest)
    folder = context.versions.find(champion, recorded.files)
    if folder is None:
        folder = context.versions.open(champion, recorded.files)
        log.info("v%d, the champion, is in the cache", champion)
    folder.close()
