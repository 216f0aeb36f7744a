"""Retention in the store: which shards and files of datasets go, which stay, and that no freezing loses a shard."""

from datetime import timedelta

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import sessionmaker

from feedback import datasets, rounds, shard_builder, shard_retention, snapshots
from feedback.accounts import add_contributor
from feedback.shard_retention import (
    ManifestUnreadableError,
    SnapshotLimits,
    count_unneeded_entries,
    delete_unneeded_shards,
    delete_withdrawn_upload,
    find_unneeded_shards,
    find_withdrawn_uploads,
)
from feedback.states import RoundState
from feedback.tables import AuditEvent, Promotion, StoredShard, UploadSegment, new_id
from feedback.withdrawal import withdraw_dataset
from tests.feedback.loop import freeze_round, read_snapshot, start_round, upload
from yuan.data.rows import Row
from yuan.model.model_manifest import ModelManifest

FOLDER = new_id()
NO_ROUNDS = SnapshotLimits(keep_rounds=0, keep_promotions=2, unused_days=-1)  # as if a day had passed
SECRET = "a row that its owner withdraws"


@pytest.fixture
def store(objects, monkeypatch):
    """Return the store, with folders of this test's own: the tests delete whatever no record needs."""
    for module in (shard_builder, shard_retention):
        monkeypatch.setattr(module, "SHARDS_FOLDER", f"shards-{FOLDER}")
    for module in (snapshots, shard_retention):
        monkeypatch.setattr(module, "SNAPSHOTS_FOLDER", f"snapshots-{FOLDER}")
    return objects


@pytest.fixture
def sessions(session):
    return sessionmaker(session.connection(), join_transaction_mode="create_savepoint", expire_on_commit=False)


@pytest.fixture
def end_round(session, store):
    """Return a function that freezes a round's snapshot, ends the round, and returns the snapshot's id."""

    def end(version=None, *, promoted=True):
        training_round = start_round(session)
        session.flush()
        snapshot_id = freeze_round(session, store, training_round, target_bytes=4000)
        if version is not None:
            rounds.add_version(session, training_round.id, version, ModelManifest({}, {}))
            session.flush()
        if version is not None and promoted:
            session.add(Promotion(version=version, round_id=training_round.id, actor="t", reason="t"))
        state = RoundState.PROMOTED if version is not None and promoted else RoundState.FAILED
        rounds.finish_round(session, training_round.id, state, "test")
        session.flush()
        return snapshot_id

    return end


def make_rows(prefix, count=100):
    return [Row(prompt=f"{prefix} {n:04}", answer=f"{n}".rjust(50, "."), source="test") for n in range(count)]


def clean(sessions, store, limits=NO_ROUNDS):
    """Delete what the limits do not keep; return the number of objects that were listed."""
    unneeded = find_unneeded_shards(sessions, store, limits)
    delete_unneeded_shards(sessions, store, unneeded, limits)
    return len(unneeded.objects)


def test_withdrawn_row_leaves_the_store_with_the_last_snapshot_that_is_kept(
    session, sessions, store, reporter, end_round
):
    upload(session, store, reporter, make_rows("kept"))
    withdrawn = upload(session, store, reporter, make_rows(SECRET))
    first = end_round(901)
    withdraw_dataset(session, reporter, withdrawn.id, "mine")
    session.flush()
    end_round(902)
    clean(sessions, store)
    assert SECRET.encode() in read_snapshot(store, first)  # v901 is the version before the champion
    end_round(903)
    unneeded = find_unneeded_shards(sessions, store, NO_ROUNDS)
    assert unneeded.objects and count_unneeded_entries(session, unneeded, NO_ROUNDS)
    clean(sessions, store)
    snapshots.read_manifest(store, first)  # counts and digests stay
    for stored in store.list_objects(f"shards-{FOLDER}/"):
        assert stored.key.split("/")[1] in unneeded.needed
    assert set(session.scalars(select(StoredShard.sha256))) <= unneeded.needed
    assert clean(sessions, store) == 0


def test_shards_of_newest_rounds_promotions_and_the_running_round_stay(session, sessions, store, reporter, end_round):
    ids = []
    for version in (901, 902, 903, 904):
        upload(session, store, reporter, make_rows(f"of {version}", 20))
        ids.append(end_round(version))
    lost = end_round(905, promoted=False)  # the newest candidate
    running = start_round(session)
    session.flush()
    assert find_unneeded_shards(sessions, store, NO_ROUNDS) is None  # it may use any shard
    frozen = freeze_round(session, store, running, target_bytes=4000)
    kept = find_unneeded_shards(sessions, store, NO_ROUNDS).snapshot_ids
    assert kept == {ids[2], ids[3], lost, frozen}
    more = SnapshotLimits(keep_rounds=4, keep_promotions=2, unused_days=-1)
    assert find_unneeded_shards(sessions, store, more).snapshot_ids == {*ids[1:], lost, frozen}
    lineage = SnapshotLimits(keep_rounds=0, keep_promotions=4, unused_days=-1)
    assert find_unneeded_shards(sessions, store, lineage).snapshot_ids == {*ids, lost, frozen}


def test_young_shard_stays_and_a_round_that_has_begun_to_freeze_loses_none(
    session, sessions, store, reporter, end_round
):
    upload(session, store, reporter, make_rows("a"))
    snapshot_id = end_round()
    young = SnapshotLimits(keep_rounds=0, keep_promotions=2, unused_days=1)
    assert not find_unneeded_shards(sessions, store, young).objects
    unneeded = find_unneeded_shards(sessions, store, NO_ROUNDS)
    assert unneeded.objects
    training_round = start_round(session)
    session.flush()
    assert delete_unneeded_shards(sessions, store, unneeded, NO_ROUNDS) == 0
    freeze_round(session, store, training_round, target_bytes=4000)
    assert delete_unneeded_shards(sessions, store, unneeded, NO_ROUNDS) == 0  # the new snapshot has the same shards
    assert read_snapshot(store, snapshot_id)


@pytest.mark.parametrize("damage", [b"{", None])
def test_kept_snapshot_whose_manifest_is_damaged_stops_the_deletion_and_is_named(
    session, sessions, store, reporter, end_round, damage
):
    upload(session, store, reporter, make_rows(new_id()))
    snapshot_id = end_round(901)
    key = snapshots.make_manifest_key(snapshot_id)
    store.delete(key) if damage is None else store.put(key, damage)
    with pytest.raises(
        ManifestUnreadableError, match=f"{snapshot_id} .* restore snapshots-{FOLDER}/{snapshot_id}.json from a"
    ):
        find_unneeded_shards(sessions, store, NO_ROUNDS)


def test_snapshot_that_an_older_release_froze_as_one_object_goes_unless_it_is_kept(session, sessions, store, end_round):
    store.put(f"snapshots-{FOLDER}/0123", b"rows")
    assert clean(sessions, store) and not store.exists(f"snapshots-{FOLDER}/0123")


def withdraw_earlier(session, reporter, dataset, days):
    withdraw_dataset(session, reporter, dataset.id, "test")
    event = session.scalars(select(AuditEvent).where(AuditEvent.subject == dataset.id)).all()[-1]
    event.created_at = session.scalar(select(func.now())) - timedelta(days=days)
    session.flush()


def test_file_of_withdrawn_datasets_goes_after_the_days_of_the_policy_unless_another_has_it(session, store, reporter):
    other = add_contributor(session, new_id()).contributor
    alone, shared = make_rows(SECRET), make_rows("shared")
    mine, theirs = upload(session, store, reporter, alone), upload(session, store, other, shared)
    also_mine = upload(session, store, reporter, shared)
    session.add(
        UploadSegment(
            upload_sha256=mine.sha256, num_segments=2, number=0, start_byte=0, end_byte=1, first_line=0, first_row=0,
            end_row=1, sha256="0",
        )
    )  # fmt: skip
    for dataset in (mine, also_mine):
        withdraw_earlier(session, reporter, dataset, days=3)
    assert find_withdrawn_uploads(session, store, 4) == []
    assert find_withdrawn_uploads(session, store, 2) == []  # stored just now: it may have been pushed again
    (withdrawn,) = find_withdrawn_uploads(session, store, -1)
    assert (withdrawn.sha256, withdrawn.num_bytes) == (mine.sha256, mine.num_bytes)
    assert delete_withdrawn_upload(session, store, withdrawn.sha256)
    assert not store.exists(f"{datasets.UPLOADS_FOLDER}/{mine.sha256}")
    assert store.exists(f"{datasets.UPLOADS_FOLDER}/{theirs.sha256}")
    session.refresh(mine)
    assert mine.num_stored_bytes == 0 and find_withdrawn_uploads(session, store, -1) == []
    assert session.scalar(text("select count(*) from upload_segment where upload_sha256 = :s"), {"s": mine.sha256}) == 0
    assert not delete_withdrawn_upload(session, store, also_mine.sha256)
