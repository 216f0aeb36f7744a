"""Helpers for the steps from report to notice, on a session that is rolled back."""

import io
import tempfile
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import sessionmaker

from feedback import datasets, gate, promotion, reports, rounds, snapshots
from feedback.cases import choose_case_role
from feedback.contracts import FeedbackIn, RoundParameters
from feedback.dataset_acceptance import accept_dataset
from feedback.shard_builder import make_shard_key
from feedback.tables import Case, new_id
from tests.records import add_feedback
from yuan.data.row_shards import read_shard_chunks
from yuan.data.rows import Row, dump_rows
from yuan.eval.results import EvalResult
from yuan.model.model_manifest import ModelManifest

SALT = "salt"
SHARE = 0.1
MAX_CASES = 5000


def submit(session, reporter, prompt="Reverse: abc", expected="cba"):
    form = FeedbackIn(kind="correction", prompt=prompt, response="?", model_version=1, expected=expected)
    return add_feedback(session, reporter, form)


def accept_all(session, later, *, share=0.5, right=False):
    reports.screen_reports(session, later)
    pending = reports.find_unreproduced_reports(session, later, 1)
    reproduce(session, {report.id: report.body["expected"] if right else "wrong" for report in pending})
    return reports.review_reports(session, later, SALT, share)


def reproduce(session, answers, version=1, check=lambda checker, answer: checker.check(answer)):
    """Record answers, by report id, as the version's; return the number of reports that failed."""
    answered = [reports.ReproducedAnswer(feedback_id, answer) for feedback_id, answer in answers.items()]
    return reports.record_reproductions(session, version, answered, check)


def start_round(session):
    return rounds.request_round(session, "test", RoundParameters(), new_id())


def add_candidate(session, training_round, version):
    rounds.add_version(session, training_round.id, version, ModelManifest({}, {}))
    session.flush()


def record_results(session, version, passed):
    cases = session.scalars(select(Case)).all()
    promotion.store_results(session, version, [EvalResult(case.id, "", case.id in passed) for case in cases])


def promote(session, version, passed, *, parent=None):
    training_round = start_round(session)
    training_round.parent_version = parent
    add_candidate(session, training_round, version)
    record_results(session, version, passed)
    decision = gate.decide_promotion(session, training_round)
    if decision.promote:
        promotion.promote_candidate(session, training_round, decision)
    rounds.finish_round(session, training_round.id, "promoted" if decision.promote else "rejected", "test")
    session.flush()
    return decision


def upload(session, objects, reporter, rows, purpose="mixture", max_cases=MAX_CASES):
    data = dump_rows(rows)
    sha256 = objects.put_by_sha256(datasets.UPLOADS_FOLDER, data)
    dataset = datasets.add_dataset(
        session,
        reporter,
        dataset_id=new_id(),
        name=purpose,
        purpose=purpose,
        file=datasets.check_file(io.BytesIO(data)),
        sha256=sha256,
    )
    accept_dataset(session, dataset.id, objects.open_stream, SALT, SHARE, max_cases)
    session.flush()
    return dataset


def make_checked_rows(prefix, count):
    return [
        Row.model_validate({"prompt": f"{prefix}{n}", "answer": "a", "checker": {"type": "exact", "value": "a"}})
        for n in range(count)
    ]


def is_held_out(row):
    """Return True if a row's prompt is held out."""
    return choose_case_role(row.split_key, SALT, SHARE) == "held_out"


def freeze_mixture(session, objects, **options):
    """Freeze the mixture of a new round; return the snapshot's id and its rows as JSONL."""
    training_round = start_round(session)
    session.flush()
    snapshot_id = freeze_round(session, objects, training_round, **options)
    rounds.finish_round(session, training_round.id, "failed", "test")
    session.flush()
    return snapshot_id, read_snapshot(objects, snapshot_id)


def freeze_round(session, objects, training_round, **options):
    """Freeze the mixture of a round in transactions that are nested in the test's, and so are rolled back with it."""
    nested = sessionmaker(session.connection(), join_transaction_mode="create_savepoint", expire_on_commit=False)
    with tempfile.TemporaryDirectory() as folder:
        snapshot_id = snapshots.freeze_mixture(
            nested, objects, training_round.id, training_round.attempt, Path(folder), **options
        )
    session.expire_all()
    return snapshot_id


def read_snapshot(objects, snapshot_id):
    """Return the rows of a snapshot as JSONL."""
    data = b""
    for part in snapshots.read_manifest(objects, snapshot_id).parts:
        for shard in part.shards:
            with objects.open_stream(make_shard_key(shard.sha256)) as stream:
                data += b"".join(read_shard_chunks(stream, shard))
    return data
