"""Paged lists: complete, in order, and with a cost that does not grow with the number of older records."""

import subprocess
import sys
from contextlib import contextmanager
from datetime import datetime, timezone

import pytest
from sqlalchemy import event, update

from feedback import client, datasets, promotion, report_records
from feedback.accounts import audit
from feedback.api.app import make_app
from feedback.client import Client
from feedback.items import record_fault_reason
from feedback.reproduce import make_reproduction_prompt
from feedback.tables import Case, Dataset, Feedback, Outbox, new_id
from feedback.withdrawal import WITHDRAWN_ACTION
from infra.database import make_session_factory
from tests.feedback.test_hostile import check_refusal
from tests.serving import serve_app
from yuan.eval.results import EvalResult

LISTS = ("feedback", "datasets", "notices")


def add_records(engine, account, count):
    """Add datasets and reports with every kind of timeline event, and one notice per report, to the account."""
    with make_session_factory(engine).begin() as session:
        for n in range(count):
            case = Case(
                suite="reports", key=new_id(), prompt_key="p", prompt="p", expected="e", checker={}, role="train"
            )
            report = Feedback(contributor_id=account.id, kind="rating", body={"model_version": 1}, state="accepted")
            report.case, report.decided_at = case, datetime.now(timezone.utc)
            facts = {"name": str(n), "purpose": "mixture", "state": "withdrawn", "sha256": "0"} | {
                "num_bytes": 1,
                "num_stored_bytes": 1,
            }
            dataset = Dataset(contributor_id=account.id, **facts, bad_rows=[{"row": n, "reason": "r"}] * 30)
            session.add_all([report, dataset])
            session.flush()
            notice = {"contributor_id": account.id, "feedback_id": report.id, "version": 1, "verdict": "fixed"}
            session.add(Outbox(**notice, text=str(n), delivered_at=datetime.now(timezone.utc)))
            promotion.store_results(session, 1, [EvalResult(case.id, "", True)])
            for record in (report, dataset):
                record_fault_reason(session, record.id, "screen", "a reason")
                audit(session, account.id, WITHDRAWN_ACTION, record.id)


@contextmanager
def count_statements(engine):
    statements = []

    def append_statement(connection, cursor, statement, *rest):
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", append_statement)
    try:
        yield statements
    finally:
        event.remove(engine, "before_cursor_execute", append_statement)


def read_pages(portal, name, headers, limit):
    pages, url = [], f"/api/v1/{name}?limit={limit}"
    while url:
        response = portal.get(url, headers=headers)
        assert response.status_code == 200, response.text
        pages.append(response.json())
        url = response.links.get("next", {}).get("url")
    return pages


def get_id(item):
    return item.get("id") or item["number"]


@pytest.mark.parametrize("name", LISTS)
def test_number_of_queries_does_not_depend_on_the_number_of_records(portal, engine, account, first_version, name):
    counts = []
    portal.get(f"/api/v1/{name}", headers=account.headers)  # the first request of a token also looks up its account
    for num_records in (1, 4, 25):
        add_records(engine, account, num_records)
        with count_statements(engine) as statements:
            response = portal.get(f"/api/v1/{name}", headers=account.headers)
        assert response.status_code == 200
        counts.append(len(statements))
    assert len(response.json()) == 30
    assert counts[0] == counts[1] == counts[2] <= 10


@pytest.mark.parametrize("name", ["feedback", "notices"])
def test_unknown_stored_verdict_is_missing_from_its_own_record_only(
    portal, engine, account, first_version, caplog, name
):
    add_records(engine, account, 3)
    with make_session_factory(engine).begin() as session:
        changed = update(Outbox).where(Outbox.contributor_id == account.id, Outbox.text == "1")
        feedback_id = session.scalars(changed.values(verdict="of a later release").returning(Outbox.feedback_id)).one()
    response = portal.get(f"/api/v1/{name}", headers=account.headers)
    assert response.status_code == 200
    verdicts = {item.get("feedback_id") or item["id"]: item["verdict"] for item in response.json()}
    assert verdicts.pop(feedback_id) is None and list(verdicts.values()) == ["fixed", "fixed"]
    assert f"report {feedback_id} has the unknown verdict 'of a later release'" in caplog.text


@pytest.mark.parametrize("name", LISTS)
def test_concatenated_pages_equal_the_full_list(portal, engine, account, first_version, name):
    add_records(engine, account, 7)
    add_records(engine, account, 3)  # with another creation time
    (whole,) = read_pages(portal, name, account.headers, 200)
    assert len({get_id(item) for item in whole}) == 10
    for limit in (1, 3, 5, 10):
        pages = read_pages(portal, name, account.headers, limit)
        assert [item for page in pages for item in page] == whole
        assert len(pages) == -(-10 // limit)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("limit", ["0", "201", "-1", "x", "1.5", ""])
def test_a_page_has_a_size_from_1_to_200(portal, account, name, limit):
    check_refusal(portal.get(f"/api/v1/{name}?limit={limit}", headers=account.headers), 422, "limit")


@pytest.mark.parametrize("name", LISTS)
def test_cursor_of_another_account_is_refused_like_an_unknown_cursor(portal, engine, account, operator, name):
    add_records(engine, account, 1)
    foreign = get_id(portal.get(f"/api/v1/{name}", headers=account.headers).json()[0])
    responses = []
    for cursor in (foreign, 2**31 - 1 if name == "notices" else new_id()):
        responses.append(portal.get(f"/api/v1/{name}?after={cursor}", headers=operator))
        check_refusal(responses[-1], 422, "after")
    assert responses[0].content == responses[1].content


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("cursor", ["", "x", "-1", "%00", "9" * 40, "'"])
def test_a_malformed_cursor_is_refused(portal, account, name, cursor):
    check_refusal(portal.get(f"/api/v1/{name}?after={cursor}", headers=account.headers), 422, "after")


def test_the_client_reads_every_page(stores, objects, portal, engine, account, monkeypatch):
    add_records(engine, account, 5)
    monkeypatch.setattr(client, "CLIENT_PAGE_SIZE", 2)
    with serve_app(make_app(stores, engine, objects)) as url, Client(url, account.token) as account_client:
        assert [notice.text for notice in account_client.notices()] == list("01234")
        reports = [report.id for report in account_client.all_feedback()]
        names = {dataset.name for dataset in account_client.all_datasets()}
    assert names == set("01234")
    assert reports == [report["id"] for report in portal.get("/api/v1/feedback", headers=account.headers).json()]


def test_list_has_the_first_20_bad_rows_of_a_dataset_and_its_record_has_all(portal, account):
    portal.post("/api/v1/datasets?name=bad", content=b"1\n" * 300, headers=account.headers)
    (listed,) = portal.get("/api/v1/datasets", headers=account.headers).json()
    whole = portal.get(f"/api/v1/datasets/{listed['id']}", headers=account.headers).json()
    assert [row["row"] for row in listed["bad_rows"]] == list(range(1, 21))
    assert [row["row"] for row in whole["bad_rows"]] == list(range(1, 301))


@pytest.mark.parametrize("damaged", [{}, [], 3, "x", None])
def test_stored_report_without_a_model_version_does_not_hide_the_others(session, reporter, caplog, damaged):
    bodies = ({"model_version": 1}, damaged)
    reports = [Feedback(contributor_id=reporter.id, kind="rating", body=body, state="received") for body in bodies]
    session.add_all(reports)
    session.flush()
    records = report_records.describe_reports(session, reports)
    assert [record.id for record in records] == [report.id for report in reports]
    texts = [record.timeline[0].text for record in records]
    assert texts == ["received: rating about v1", "received: rating"]
    assert f"the stored report {reports[1].id} names no model version" in caplog.text
    assert make_reproduction_prompt(reports[1]).prompt == ""


def test_malformed_stored_bad_row_does_not_hide_other_rows_and_datasets(session, reporter, caplog):
    facts = {"name": "d", "purpose": "mixture", "state": "rejected", "sha256": "0", "num_bytes": 1}
    facts |= {"num_stored_bytes": 0, "contributor_id": reporter.id}
    entry = {"row": 1, "reason": "r"}
    stored = [Dataset(**facts, bad_rows=bad_rows) for bad_rows in ([entry], [{"line": 1}, None, entry], [])]
    session.add_all(stored)
    session.flush()
    records = datasets.describe_datasets(session, stored)
    assert [[row.model_dump() for row in record.bad_rows] for record in records] == [[entry], [entry], []]
    assert datasets.describe_dataset(session, stored[1]) == records[1]
    assert f"a stored bad row of dataset {stored[1].id} cannot be read: row" in caplog.text


def test_client_imports_nothing_foreign_but_httpx_and_pydantic():
    """Contributors install it without the platform; rich and click come with httpx, if they are installed."""
    code = "import sys, feedback.client; print(*{name.split('.')[0] for name in sys.modules})"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(printed.split())
    allowed = {"feedback", "yuan", "httpx", "idna", "pydantic", "pydantic_core", "annotated_types", "typing_extensions"}
    # httpx imports zstandard if it is installed, to decode responses.
    allowed |= {"typing_inspection", "rich", "click", "pygments", "zstandard", *sys.stdlib_module_names}
    assert {name for name in loaded - allowed if not name.startswith("_")} == set()


def test_submission_of_a_report_takes_one_statement(portal, engine, account, first_version):
    report = {"kind": "correction", "prompt": "1 + 1 = ?", "response": "3", "model_version": 1, "expected": "2"}
    first = portal.post("/api/v1/feedback", json=report, headers=account.headers)  # caches account and version
    with count_statements(engine) as statements:
        second = portal.post("/api/v1/feedback", json=report, headers=account.headers)
    assert (first.status_code, second.status_code) == (201, 201)
    assert len(statements) == 1, statements
    stored = portal.get(f"/api/v1/feedback/{second.json()['id']}", headers=account.headers).json()
    assert stored == second.json()
