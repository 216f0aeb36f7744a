"""Keep the champion in the cache of versions, where the model server, which may not write it, reads it."""

import logging
import threading

from feedback.promotion import find_champion
from flows.context import DispatcherContext

log = logging.getLogger(__name__)


class ChampionCacher:
    """Fetch the champion in a thread, since a large one takes minutes, in which the other duties run.

    A candidate is in the cache since its evaluation, so this fetches only what the cache has lost: on a new disk, after
    another version was made champion again, and what was damaged.
    """

    def __init__(self, context: DispatcherContext) -> None:
        self._context = context
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def ensure_cached(self) -> None:
        """Start to fetch the champion if the cache lacks it, and mark it as used.

        Raises:
            Exception: the error of the last attempt; the next call starts another one.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = None
        if (error := self._error) is not None:
            self._error = None
            raise error
        with self._context.sessions() as session:
            champion = find_champion(session)
        if champion is None:
            return
        if (folder := self._context.versions.find(champion)) is not None:
            return folder.close()
        self._thread = threading.Thread(target=self._fetch, args=(champion,), daemon=True, name="champion-cacher")
        self._thread.start()

    def _fetch(self, version: int) -> None:
        try:
            self._context.versions.open(version).close()
        except Exception as error:
            self._error = error
        else:
            log.info("v%d, the champion, is in the cache", version)
