"""Held-out prompts across accounts: no account can exclude more than the share of others' prompts; owners see it."""

import pytest
from sqlalchemy import select

from feedback import datasets, report_records
from feedback.accounts import add_contributor
from feedback.cases import choose_case_role
from feedback.tables import Case, DatasetRow, Snapshot, new_id
from feedback.withdrawal import withdraw_report
from flows.demo.demo_corpus import BASE_SKILLS
from tests.feedback.loop import (
    SALT,
    SHARE,
    accept_all,
    freeze_mixture,
    is_held_out,
    make_checked_rows,
    submit,
    upload,
)
from yuan.data.rows import Row, parse_rows
from yuan.data.skills import load_skills

HONEST = 200


@pytest.fixture
def attacker(session):
    return add_contributor(session, new_id()).contributor


def make_variants(rows, answers):
    """Return rows with each row's prompt and many wrong answers, which the rows' checkers accept."""
    return [
        Row.model_validate({"prompt": row.prompt, "answer": answer, "checker": {"type": "exact", "value": answer}})
        for row in rows
        for answer in (f"wrong {number}" for number in range(answers))
    ]


def read_roles(session, dataset):
    return session.scalars(select(DatasetRow.role).where(DatasetRow.dataset_id == dataset.id)).all()


@pytest.mark.parametrize("is_first", [True, False], ids=["the attacker first", "the honest first"])
@pytest.mark.parametrize("answers", [1, 40])
def test_account_cannot_hold_out_more_than_the_share_of_other_accounts_prompts(
    session, objects, reporter, attacker, answers, is_first
):
    rows = make_checked_rows("honest ", HONEST)
    submissions = [(reporter, rows), (attacker, make_variants(rows, answers))]
    uploads = {
        contributor.id: upload(session, objects, contributor, owned_rows)
        for contributor, owned_rows in (reversed(submissions) if is_first else submissions)
    }
    _, snapshot = freeze_mixture(session, objects)
    trained = {row.key for row in parse_rows(snapshot)}
    assert all((row.key in trained) is not is_held_out(row) for row in rows)
    assert len(trained & {row.key for row in rows}) > 0.8 * HONEST
    assert read_roles(session, uploads[attacker.id]).count("held_out") <= 4 * sum(map(is_held_out, rows))


def test_share_of_prompts_is_held_out_regardless_of_the_uploading_account(session, objects, reporter, attacker):
    rows = [row for skill in load_skills(BASE_SKILLS) for row in skill.make_rows(300, seed=0)]
    half = len(rows) // 2
    for contributor, part in ((reporter, rows[:half]), (attacker, rows[half:])):
        upload(session, objects, contributor, part)
    roles = session.execute(select(DatasetRow.prompt_key, DatasetRow.role)).all()
    drawn = {prompt for prompt, role in roles if role == "held_out"}
    prompts = {row.prompt_key: row.split_key for row in rows if row.checker is not None and row.prompt}
    assert drawn == {
        key for key, split_key in prompts.items() if choose_case_role(split_key, SALT, SHARE) == "held_out"
    }
    four_sigma = 4 * (SHARE * (1 - SHARE) / len(prompts)) ** 0.5
    assert len(prompts) > 1000 and abs(len(drawn) / len(prompts) - SHARE) < four_sigma


def test_resubmitted_prompt_gets_the_same_role_after_withdrawal(session, reporter, later):
    roles = []
    for number in range(8):
        row = submit(session, reporter, expected=f"wrong {number}")
        accept_all(session, later)
        roles.append(session.get_one(Case, row.case_id).role)
        withdraw_report(session, reporter, row.id, "mistaken")
    assert len(set(roles)) == 1


def test_accepted_reports_do_not_exclude_rows_with_the_train_role(session, objects, reporter, attacker, later):
    rows = make_checked_rows("honest ", 60)
    upload(session, objects, reporter, rows)
    reports = [submit(session, attacker, row.prompt, "false") for row in rows]
    assert accept_all(session, later).accepted == len(reports)
    _, snapshot = freeze_mixture(session, objects)
    trained = {row.key for row in parse_rows(snapshot)}
    assert all((row.key in trained) is not is_held_out(row) for row in rows)


def test_dataset_owner_sees_how_many_rows_were_excluded_as_held_out(session, objects, reporter, attacker, later):
    rows = [Row(prompt=row.prompt, answer="right") for row in make_checked_rows("told ", 100)]
    honest = upload(session, objects, reporter, [*rows, Row(answer="a document")])
    untouched = upload(session, objects, reporter, [Row(prompt="nobody else's", answer="a")])
    num_drawn = sum(map(is_held_out, rows))
    for closed in (0, num_drawn, num_drawn):
        if closed and not honest.num_closed_out:
            upload(session, objects, attacker, make_variants(rows, 1))
        snapshot_id, _ = freeze_mixture(session, objects)
        session.refresh(honest)
        assert datasets.describe_dataset(session, honest).num_closed_out == closed
        assert session.get_one(Snapshot, snapshot_id).counts["datasets_closed_out"] == closed
    texts = [event.text for event in datasets.describe_dataset(session, honest).timeline if "left out" in event.text]
    sentence = f"(snapshot): rows left out, {num_drawn} of 101: their prompts are those of held-out cases"
    assert len(texts) == 2 and sentence in texts[-1]  # beside how many duplicates it has
    assert len(datasets.describe_dataset(session, untouched).timeline) == 2


def test_reporter_sees_that_a_correction_was_excluded_as_held_out(session, objects, reporter, attacker, later):
    row = submit(session, reporter, "told 1", "right")
    accept_all(session, later, share=0.0)
    upload(session, objects, attacker, make_variants(make_checked_rows("told ", 5), 1), purpose="suite")
    upload(session, objects, attacker, [Row(answer="a document")])
    for _ in range(2):
        freeze_mixture(session, objects)
    texts = [event.text for event in report_records.describe_report(session, row).timeline if "left out" in event.text]
    assert len(texts) == 1 and "its correction is left out: its prompt is that of a held-out case" in texts[0]


def test_rows_beyond_the_accounts_case_limit_get_the_train_role(session, objects, reporter, attacker):
    num_drawn = sum(map(is_held_out, make_checked_rows("a ", 100)))
    first = upload(session, objects, reporter, make_checked_rows("a ", 100), max_cases=num_drawn + 1)
    second = upload(session, objects, reporter, make_checked_rows("b ", 100), max_cases=num_drawn + 1)
    assert read_roles(session, first).count("held_out") == num_drawn
    assert (read_roles(session, second).count("held_out"), read_roles(session, second).count("train")) == (1, 99)
    attacker.role = "operator"
    exempt = upload(session, objects, attacker, make_checked_rows("c ", 100), max_cases=0)
    assert read_roles(session, exempt).count("held_out") == sum(map(is_held_out, make_checked_rows("c ", 100)))
