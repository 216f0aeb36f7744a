"""Freeze a round's mixture in a process of its own: `freeze_process.py ENV_FILE ROUND_ID SCRATCH TARGET_BYTES`.

It logs each shard, and prints the snapshot's id and by how many bytes freezing raised its peak of resident memory.
"""

import json
import logging
import resource
import sys
from pathlib import Path

from feedback import snapshots
from infra.database import make_session_factory, open_engine
from infra.object_store import open_object_store
from infra.settings import Settings


def read_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    env_file, round_id, scratch, target_bytes = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = Settings(_env_file=env_file, home=Path(env_file).parent)
    sessions, objects = make_session_factory(open_engine(settings)), open_object_store(settings)
    with sessions() as session:
        session.connection()
    objects.exists("none")
    peak = read_peak_bytes()
    snapshot_id = snapshots.freeze_mixture(
        sessions, objects, round_id, 0, Path(scratch), target_bytes=int(target_bytes)
    )
    print(json.dumps({"snapshot": snapshot_id, "grown_bytes": read_peak_bytes() - peak}))


if __name__ == "__main__":
    main()
