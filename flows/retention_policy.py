"""The retention policy: how long what can be made again is kept, from `$COTRAIN_HOME/retention.toml`."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from yuan.config import suggest_nearest_name
from yuan.safe_files import read_regular_file
from yuan.toml_text import parse_toml

RETENTION_FILE = "retention.toml"  # in the home folder
MAX_RETENTION_BYTES = 64 * 1024


class RetentionSection(BaseModel):
    """Keys of one section of the policy."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunRetention(RetentionSection):
    """Limits for the files of runs.

    Attributes:
        keep_rounds: newest ended rounds whose runs keep checkpoints, token files and exported weights on this disk.
    """

    keep_rounds: int = Field(default=2, ge=0, le=10_000)


class VersionRetention(RetentionSection):
    """Limits for the files of versions.

    Attributes:
        keep_rounds_of_losers: ended rounds after which the registry loses the weights of a version that was never
            champion. Its number, manifest, results and lineage stay.
    """

    keep_rounds_of_losers: int = Field(default=6, ge=1, le=10_000)


class SnapshotRetention(RetentionSection):
    """Limits for the shards of snapshots in the object store; the record and the manifest of a snapshot stay.

    Attributes:
        keep_rounds: newest ended rounds whose snapshots keep their shards.
        keep_promotions: last promotions whose rounds do so too: the lineage of these versions can be repeated. Their
            records of the rows in windows are kept as well.
        unused_days: days that a shard or such a record stays which none of them has, since the next round may use it.
    """

    keep_rounds: int = Field(default=6, ge=0, le=10_000)
    keep_promotions: int = Field(default=24, ge=2, le=10_000)
    unused_days: float = Field(default=1, ge=0, le=3650)


class UploadRetention(RetentionSection):
    """Limits for uploaded files.

    Attributes:
        keep_days_of_withdrawn: days from the withdrawal of a dataset to the deletion of its file.
    """

    keep_days_of_withdrawn: float = Field(default=7, ge=0, le=3650)


class RetentionPolicy(RetentionSection):
    """The whole policy; what a running round, the champion, the version before and the candidate need stays anyway."""

    runs: RunRetention = RunRetention()
    versions: VersionRetention = VersionRetention()
    snapshots: SnapshotRetention = SnapshotRetention()
    uploads: UploadRetention = UploadRetention()


POLICY_SECTIONS: dict[str, type[RetentionSection]] = {
    "runs": RunRetention,
    "versions": VersionRetention,
    "snapshots": SnapshotRetention,
    "uploads": UploadRetention,
}


def read_retention_policy(home: Path) -> RetentionPolicy:
    """Read the policy of a home folder; without a file, the defaults.

    Raises:
        ValueError: if the file cannot be read, or a key or value breaks a rule; the message names it.
    """
    file = home / RETENTION_FILE
    try:
        return RetentionPolicy.model_validate(parse_toml(read_regular_file(file, MAX_RETENTION_BYTES)))
    except FileNotFoundError:
        return RetentionPolicy()
    except ValidationError as error:
        details = "; ".join(
            _describe_problem(detail["loc"], detail["msg"], detail["type"]) for detail in error.errors()
        )
        raise ValueError(f"{file}: {details}; correct it") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; correct or remove it") from None
    except ValueError as error:
        raise ValueError(f"{file} {error}") from None


def _describe_problem(place: tuple[int | str, ...], message: str, kind: str) -> str:
    name = ".".join(map(str, place))
    if kind != "extra_forbidden":
        return f"{name}: {message.replace('Input should', 'must', 1)}"
    section = POLICY_SECTIONS.get(str(place[0]), RetentionPolicy)
    suggestion = suggest_nearest_name(str(place[-1]), section.model_fields)
    return f"there is no key {name!r}, {suggestion or 'the keys are ' + ', '.join(section.model_fields)}"
