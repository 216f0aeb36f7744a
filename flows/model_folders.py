"""Find the model folder of a version: on this machine, or in the registry."""

from pathlib import Path

from flows.context import Context
from flows.round.versions import require_registered
from infra.tracker import Tracker
from yuan.model.model_manifest import MODEL_MANIFEST_FILE
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


def fetch_model_folder(context: Context, version: str) -> Path:
    """Download a version's model folder from this installation's registry below the home folder; return its path.

    Args:
        version: 7, v7 or an alias.

    Raises:
        ValueError: if there is no such alias, there never was such a version, or it was deleted from the registry.
    """
    number = resolve_version(context.tracker, version)
    require_registered(context, number)
    return context.tracker.download(number, context.settings.home / "generate" / f"v{number}", (MODEL_MANIFEST_FILE,))
