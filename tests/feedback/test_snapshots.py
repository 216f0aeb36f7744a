"""Snapshots as shards: stable boundaries, shards that are used again, withdrawal, damage and restarts."""

import hashlib
import io
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select, text, update

from feedback import datasets, rounds, snapshots
from feedback.accounts import add_contributor
from feedback.items import find_faults_by_subject
from feedback.mixture_plan import MixtureScope, plan_mixture
from feedback.shard_builder import make_shard_key
from feedback.tables import Case, Dataset, Snapshot, StoredShard, new_id
from feedback.upload_segments import SegmentCutter, cut_upload, make_whole_segment, read_segment_rows
from feedback.withdrawal import withdraw_dataset
from tests.feedback.loop import accept_all, freeze_mixture, freeze_round, read_snapshot, start_round, submit, upload
from yuan.data.rows import Row, parse_rows

TARGET_BYTES = 4000
LINE = st.one_of(
    st.sampled_from([b"", b"  \t", b"oops", b'{"answer": "b"}', b'\xef\xbb\xbf{"answer": "c"}', b"\xef\xbb\xbf "]),
    st.text("ab", max_size=30).map(lambda answer: b'{"answer": "%s"}' % answer.encode()),
)


def make_rows(prefix, count):
    """Return rows of about 100 bytes each that no dataset holds out, since they have no checker."""
    return [Row(prompt=f"{prefix} {n:04}", answer=f"{n}".rjust(50, "."), source="test") for n in range(count)]


def freeze(session, objects):
    """Freeze a mixture in small shards; return the names of its shards by part."""
    snapshot_id, _ = freeze_mixture(session, objects, target_bytes=TARGET_BYTES)
    manifest = snapshots.read_manifest(objects, snapshot_id)
    return {part.name: [shard.sha256 for shard in part.shards] for part in manifest.parts}


def count_changes(before, after):
    return len(set(before) - set(after)), len(set(after) - set(before))


def count_stored_shards(session):
    return session.scalars(select(func.count()).select_from(StoredShard)).one()


@given(st.lists(LINE, max_size=40), st.booleans(), st.integers(1, 200))
def test_segments_have_the_rows_and_lines_of_the_whole_upload(lines, has_last_newline, segment_bytes):
    data = b"\n".join(lines) + b"\n" * has_last_newline
    cutter = SegmentCutter(segment_bytes)
    stream = io.BytesIO(data)
    while piece := stream.readline(7):  # shorter than most lines
        cutter.add(piece)
    segments = cutter.finish()
    assert b"".join(data[segment.start_byte : segment.end_byte] for segment in segments) == data
    whole = make_whole_segment(hashlib.sha256(data).hexdigest())
    rows = []
    for segment in segments:
        part = list(read_segment_rows(io.BytesIO(data[segment.start_byte : segment.end_byte]), segment))
        assert [number for number, _ in part] == list(range(segment.first_row, segment.end_row))
        rows += part
    assert rows == list(read_segment_rows(io.BytesIO(data), whole))


def test_upload_whose_bytes_have_changed_is_not_cut():
    with pytest.raises(ValueError, match="another sha256 than the file that was uploaded; push the file again"):
        cut_upload(io.BytesIO(b"{}\n"), "0" * 64, 3, 1)


def test_large_upload_is_cut_into_shards_that_keep_the_rows_and_their_order(session, objects, reporter):
    rows = make_rows("large", 400)
    dataset = upload(session, objects, reporter, rows)
    snapshot_id, data = freeze_mixture(session, objects, target_bytes=TARGET_BYTES)
    assert list(parse_rows(data)) == rows
    (part,) = snapshots.read_manifest(objects, snapshot_id).parts
    assert part.name == "datasets" and len(part.shards) == round(dataset.num_bytes / TARGET_BYTES)
    assert all(TARGET_BYTES / 2 <= shard.num_bytes <= 2 * TARGET_BYTES for shard in part.shards)
    assert session.get_one(Snapshot, snapshot_id).num_rows == 400


def test_large_file_that_two_accounts_upload_is_in_the_snapshot_once(session, objects, reporter):
    rows = make_rows("large", 150)
    for account in (reporter, add_contributor(session, new_id()).contributor):
        upload(session, objects, account, rows)
    _, data = freeze_mixture(session, objects, target_bytes=TARGET_BYTES)
    assert list(parse_rows(data)) == rows


def test_same_records_give_the_same_snapshot_and_build_no_shard_again(session, objects, reporter):
    upload(session, objects, reporter, make_rows("a", 100))
    upload(session, objects, reporter, make_rows("b", 10), purpose="base")
    first, num_shards = freeze(session, objects), count_stored_shards(session)
    uploads = session.scalars(select(Dataset.sha256)).all()
    for sha256 in uploads:  # nothing reads them again
        objects.delete(f"{datasets.UPLOADS_FOLDER}/{sha256}")
    assert freeze(session, objects) == first and count_stored_shards(session) == num_shards
    session.execute(text("delete from row_shard"))
    session.execute(text("delete from upload_segment"))
    with pytest.raises(ValueError, match="the mixture is empty"):
        freeze(session, objects)


def test_decontaminating_one_row_changes_its_shard_only(session, objects, reporter):
    rows = make_rows("large", 400)
    upload(session, objects, reporter, rows)
    before = freeze(session, objects)["datasets"]
    assert len(before) >= 10
    session.add(
        Case(suite="s", key="k", prompt_key=rows[200].prompt_key, prompt="p", expected="e", checker={}, role="held_out")
    )
    after = freeze(session, objects)["datasets"]
    assert count_changes(before, after) == (1, 1) and len(before) == len(after)


def make_conversation(*texts):
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return Row.model_validate({"messages": messages})


def test_conversation_with_a_held_out_question_in_any_turn_is_excluded(session, objects, reporter, later):
    conversations = [
        make_conversation("Reverse: abc", "cba", "And: xyz", "zyx"),
        make_conversation("Hello", "Hi", "Reverse: abc", "cba"),
        make_conversation("Hello", "Hi", "Reverse: no", "on"),
    ]
    dataset = upload(session, objects, reporter, conversations)
    submit(session, reporter, prompt="Reverse: no", expected="on")
    submit(session, reporter, prompt="Reverse: new", expected="wen")
    accept_all(session, later, share=1.0)
    roles = dict(session.execute(select(Case.prompt, Case.role)).tuples().all())
    assert roles == {"Reverse: no": "train", "Reverse: new": "held_out"}  # the model was trained on the first

    held_out = Row(prompt="Reverse: abc", answer="cba")
    values = {"prompt": "p", "expected": "e", "checker": {}, "role": "held_out"}
    session.add(Case(suite="s", key="k", prompt_key=held_out.prompt_key, **values))
    _, stored = freeze_mixture(session, objects)
    [row] = [row for row in parse_rows(stored) if row.messages]
    assert row == conversations[2]
    texts = [event.text for event in find_faults_by_subject(session, [dataset.id])[dataset.id]]
    assert any("rows left out, 2 of 3" in text for text in texts)


def test_added_and_withdrawn_datasets_leave_the_other_shards_as_they_are(session, objects, reporter):
    uploads = [upload(session, objects, reporter, make_rows(f"set {n}", 10)) for n in range(24)]
    large = upload(session, objects, reporter, make_rows("large", 150))
    now = session.scalar(select(func.now()))
    for number, dataset in enumerate([*uploads, large]):  # the test's transaction has one time for all
        dataset.decided_at = now - timedelta(hours=1) + timedelta(seconds=number)
    session.flush()
    before = freeze(session, objects)["datasets"]
    assert len(before) > 6

    withdraw_dataset(session, reporter, uploads[10].id, "test")
    withdrawn = freeze(session, objects)["datasets"]
    assert count_changes(before, withdrawn) == (1, 1)
    newest = upload(session, objects, reporter, make_rows("newest", 10))
    newest.decided_at = now + timedelta(hours=1)
    session.flush()
    added = freeze(session, objects)["datasets"]
    assert count_changes(withdrawn, added) == (0, 1)  # since snapshots were frozen before it
    withdraw_dataset(session, reporter, large.id, "test")
    num_large = round(large.num_bytes / TARGET_BYTES)
    assert count_changes(added, freeze(session, objects)["datasets"]) == (num_large, 0)


def test_corrections_accepted_since_a_snapshot_are_in_a_shard_of_their_own(session, objects, reporter, later):
    for number in range(3):
        submit(session, reporter, prompt=f"Old {number}", expected="a")
    accept_all(session, later, share=0.0)
    session.execute(update(Case).values(created_at=Case.created_at - timedelta(hours=1)))
    before = freeze(session, objects)["corrections"]
    submit(session, reporter, prompt="New", expected="a")
    accept_all(session, later, share=0.0)
    session.execute(update(Case).where(Case.prompt == "New").values(created_at=Case.created_at + timedelta(hours=1)))
    after = freeze(session, objects)["corrections"]
    assert len(before) == 1 and count_changes(before, after) == (0, 1)


def test_lost_or_cut_shard_is_built_again(session, objects, reporter):
    upload(session, objects, reporter, make_rows(new_id(), 100))
    shards = freeze(session, objects)["datasets"]
    objects.delete(make_shard_key(shards[0]))
    objects.put(make_shard_key(shards[1]), b"cut")
    _, data = freeze_mixture(session, objects, target_bytes=TARGET_BYTES)
    assert data.count(b"\n") == 100 and freeze(session, objects)["datasets"] == shards


@pytest.mark.parametrize("num_rows", [5, 400], ids=["small", "large"])
def test_dataset_whose_upload_is_lost_or_changed_costs_itself_only(session, objects, reporter, num_rows):
    kept = make_rows("kept", 20)
    lost, changed = (upload(session, objects, reporter, make_rows(new_id(), num_rows)) for _ in range(2))
    upload(session, objects, reporter, kept)
    objects.delete(f"{datasets.UPLOADS_FOLDER}/{lost.sha256}")
    other = objects.get(f"{datasets.UPLOADS_FOLDER}/{changed.sha256}").replace(b"0003", b"0004")
    objects.put(f"{datasets.UPLOADS_FOLDER}/{changed.sha256}", other)
    snapshot_id, data = freeze_mixture(session, objects, target_bytes=TARGET_BYTES)
    assert list(parse_rows(data)) == kept and snapshots.read_failed_count(session, snapshot_id) == 2
    texts = {dataset: find_faults_by_subject(session, [dataset.id])[dataset.id][-1].text for dataset in (lost, changed)}
    assert "its bytes are missing in the object store" in texts[lost]
    assert "its stored bytes have another sha256 than the file that was uploaded; push the file" in texts[changed]


def test_segment_that_changes_after_the_upload_was_cut_costs_its_dataset_only(session, objects, reporter):
    rows = make_rows(new_id(), 400)
    dataset = upload(session, objects, reporter, rows)
    kept = upload(session, objects, reporter, make_rows("kept", 20))
    freeze(session, objects)
    key = f"{datasets.UPLOADS_FOLDER}/{dataset.sha256}"
    objects.put(key, objects.get(key).replace(b" 0300", b" 9999"))
    session.execute(text("delete from row_shard"))
    _, data = freeze_mixture(session, objects, target_bytes=TARGET_BYTES)
    assert data.count(b"\n") == 20 == kept.num_rows
    assert "another sha256" in find_faults_by_subject(session, [dataset.id])[dataset.id][-1].text


def test_bad_rows_of_a_shard_that_is_used_again_count_again_and_are_named_once(session, objects, reporter):
    dataset = upload(session, objects, reporter, make_rows("a", 100))
    lines = objects.get(f"{datasets.UPLOADS_FOLDER}/{dataset.sha256}").splitlines(keepends=True)
    lines[30] = lines[70] = b'{"prompt": " ", "answer": "an older release accepted it"}\n'
    lines.insert(50, b"\n")  # a blank line is no row
    data = b"".join(lines)
    dataset.sha256, dataset.num_bytes = objects.put_by_sha256(datasets.UPLOADS_FOLDER, data), len(data)
    session.flush()
    for _ in range(2):
        snapshot_id, rows = freeze_mixture(session, objects, target_bytes=TARGET_BYTES)
        assert (rows.count(b"\n"), snapshots.read_failed_count(session, snapshot_id)) == (98, 2)
    (event,) = find_faults_by_subject(session, [dataset.id])[dataset.id]
    assert "rows left out, 2: row 31: prompt" in event.text and "; row 72: prompt" in event.text


def test_replay_sample_is_stable_when_the_base_grows(session, objects, reporter):
    def plan(limit, seed=3):
        scope = MixtureScope(session.scalar(select(func.now())), seed, limit)
        return sum(shard.num_rows for shard in plan_mixture(session, scope).shards)

    first, second = make_rows("first", 300), make_rows("second", 300)
    samples = []
    for rows in (first, second):
        upload(session, objects, reporter, rows, purpose="base")
        training_round = start_round(session)
        training_round.parent_version = 1
        session.flush()
        snapshot_id = freeze_round(session, objects, training_round, replay_rows=100)
        assert snapshots.read_part_sizes(session, snapshot_id)["base"] == 100
        samples.append({row.prompt for row in parse_rows(read_snapshot(objects, snapshot_id))})
        rounds.finish_round(session, training_round.id, "failed", "test")
    kept = samples[0] & samples[1]
    assert 25 < len(kept) < 75 and all(prompt.startswith("second") for prompt in samples[1] - kept)
    assert [plan(limit) for limit in (None, 0, 1, 599, 600, 10**8)] == [600, 0, 1, 599, 600, 600]
