"""Find the model folder of a version: on this machine, or in the registry."""

from flows.context import Context
from flows.round.versions import open_version
from infra.folder_cache import CachedFolder
from infra.tracker import Tracker
from yuan.version_names import is_version_number, parse_version_number


def resolve_version(tracker: Tracker, version: str) -> int:
    """Resolve 7, v7 or an alias to a version number.

    Raises:
        ValueError: if there is no such alias, whose message lists the existing ones, or the text is no version.
    """
    if is_version_number(version):
        return parse_version_number(version)
    aliases = tracker.read_aliases()
    if version not in aliases:
        names = ", ".join(f"{alias} (v{number})" for alias, number in sorted(aliases.items()))
        raise ValueError(
            f"{version!r} is neither a version nor an alias, of which there are {names or 'none yet'}; give a version "
            "as 7 or v7, an alias, or where a command takes it, the path of a model folder"
        )
    return aliases[version]


def open_model_folder(context: Context, version: str) -> CachedFolder:
    """Return a version's model folder in the cache, locked for use; fetch it from the registry if it is not there.

    Args:
        version: 7, v7 or an alias.

    Raises:
        ValueError: if there is no such alias, there never was such a version, or it was deleted from the registry.
        OSError: if the disk has too little room; the message has the bytes.
    """
    return open_version(context, resolve_version(context.tracker, version), use_export=False)
