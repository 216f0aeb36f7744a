"""Records that tests store directly, without the portal."""

from feedback import snapshots
from feedback.shard_builder import make_shard_key
from feedback.tables import Feedback, new_id
from yuan.data.row_shards import ShardWriter, SnapshotManifest, SnapshotPart


def add_feedback(session, contributor, form):
    """Store a report as the portal does, within the session; return its row."""
    body = form.model_dump(mode="json", exclude_none=True)
    report = Feedback(id=new_id(), contributor_id=contributor.id, kind=form.kind, body=body)
    session.add(report)
    session.flush()
    return report


def store_snapshot(objects, parts):
    """Store a snapshot, with one shard of the lines (with their newlines) of each part; return its manifest."""
    snapshot_parts = []
    for name, lines in parts.items():
        with ShardWriter() as writer:
            for line in lines:
                writer.add(line)
            shard, path = writer.finish()
            objects.put(make_shard_key(shard.sha256), path.read_bytes())
        snapshot_parts.append(SnapshotPart(name, (shard,)))
    manifest = SnapshotManifest(tuple(snapshot_parts))
    objects.put(snapshots.make_manifest_key(manifest.root), manifest.dump())
    return manifest


def flip_byte(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def flip_stored_byte(stores, objects, key):
    """Change a byte of a stored object on the disk of the embedded store, which cannot read the object any more.

    The object must not be text, which the store compresses.
    """
    content = objects.get(key)
    for volume in (stores.home / "s3").glob("*.dat"):
        start = volume.read_bytes().find(content)
        if start >= 0:
            place = len(content) // 2
            with volume.open("r+b") as stream:
                stream.seek(start + place)
                stream.write(flip_byte(content, place)[place : place + 1])
            return
    raise AssertionError(f"no volume has the bytes of {key}")
