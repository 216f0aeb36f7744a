"""Inputs that the portal must refuse: characters, numbers, names, and reports about unknown versions or responses."""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from feedback.api.app import make_app
from feedback.contracts import MIN_PART_SHARE
from feedback.tables import Response, new_id
from infra.database import make_session_factory
from tests.serving import serve_app
from yuan.data.mixture import compute_quotas

REPORT = {"kind": "correction", "prompt": "Reverse: abc", "response": "?", "model_version": 1, "expected": "cba"}
JSON = {"Content-Type": "application/json"}


def check_refusal(answer, status, param):
    assert answer.status_code == status, answer.text
    assert answer.json()["error"].get("param") == param
    assert "\0" not in answer.text


@pytest.mark.parametrize("field", ["prompt", "response", "expected", "response_id"])
@pytest.mark.parametrize("text", [r"a\u0000b", r"\ud83d"])
def test_text_that_cannot_be_stored_is_refused_with_its_field(portal, account, field, text):
    body = json.dumps({**REPORT, field: "HERE"}).replace("HERE", text)
    check_refusal(portal.post("/api/v1/feedback", content=body, headers=account.headers | JSON), 422, field)


@pytest.mark.parametrize("field", ["prompt", "expected", "response_id"])
def test_whitespace_only_text_is_refused(portal, account, field):
    check_refusal(
        portal.post("/api/v1/feedback", json={**REPORT, field: " \u3000\n"}, headers=account.headers), 422, field
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"rating": NaN}', "rating"),
        (b'{"examples": [{"prompt": -Infinity}]}', "examples.0.prompt"),
        (b'{"extra": {"deep": [1e999]}}', "extra.deep.0"),
        (b'{"\\u0000": 1}', r"\x00"),
        (b'{"a": "\xff"}', None),
        (b"[" * 50_000, None),
        (b'{"model_version": ' + b"1" * 5000 + b"}", None),
        (b'{"model_version": ' + b"1" * 4000 + b"}", "model_version"),
        (b"{", None),
        (b"null", None),
    ],
)
def test_invalid_json_is_refused_with_its_field(portal, account, body, param):
    valid = json.dumps(REPORT).encode()
    merged = valid[:-1] + b", " + body[1:] if body.startswith(b'{"') else body
    check_refusal(portal.post("/api/v1/feedback", content=merged, headers=account.headers | JSON), 422, param)


@pytest.mark.parametrize(
    "path", ["/api/v1/feedback/%00", "/api/v1/datasets/%00", "/api/v1/datasets/%F0%9F", "/api/v1/rounds/x"]
)
def test_malformed_id_is_refused(portal, operator, path):
    assert portal.get(path, headers=operator).status_code == 422


@pytest.mark.parametrize(
    "number", ["99999999999", "-1", "0", "9" * 5000, "1e3", "1_0", "+1", "1.0", "%201", "%D9%A3", "%00", "x"]
)
def test_invalid_round_number_is_refused(portal, number):
    check_refusal(portal.get(f"/rounds/{number}/plan.svg"), 422, "number")


@pytest.mark.parametrize("name", ["%00", "a%00b", "%20", "", "x" * 101])
def test_invalid_dataset_name_is_refused(portal, account, name):
    response = portal.post(f"/api/v1/datasets?name={name}", content=b'{"answer": "b"}', headers=account.headers)
    check_refusal(response, 422, "name")


@pytest.mark.parametrize("name", ["reports", "Base", "datasets", "a/b", "../x", ".hidden", "加"])
def test_reserved_or_invalid_suite_name_is_refused(portal, operator, name):
    query = {"name": name, "purpose": "suite"}
    check_refusal(
        portal.post("/api/v1/datasets", params=query, content=b'{"answer": "b"}', headers=operator), 422, "name"
    )


def test_reason_of_every_bad_row_is_short_and_printable(portal, account):
    rows = [
        rb'{"answer": "a", "\u0000key": 1}',
        rb'{"answer": "a", "checker": {"type": "\u0000"}}',
        rb'{"answer": "\ud83d"}',
        b'{"answer": "\xff"}',
        b'{"answer": "' + b"\\u0000" * 5000 + b'"}',
        '{"prompt": " ", "answer": "é"}'.encode(),  # so that the invalid line above is not taken for Latin-1
        b'{"answer": "a", "' + b"k" * 50_000 + b'": 1}',
        b"[" * 5000,
        b'{"answer": "a", "checker": {"type": "numeric", "value": ' + b"9" * 5000 + b"}}",
    ]
    response = portal.post("/api/v1/datasets?name=bad", content=b"\n".join(rows), headers=account.headers)
    assert response.status_code == 422
    assert [row["row"] for row in response.json()["error"]["rows"]] == list(range(1, 10))
    assert all(row["reason"].isprintable() and len(row["reason"]) < 500 for row in response.json()["error"]["rows"])


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"seed": 2**70}, "seed"),
        ({"replay_rows": 10**22}, "replay_rows"),
        ({"max_steps": True}, "max_steps"),
        ({"max_steps": "5"}, "max_steps"),
        ({"learning_rate": True}, "learning_rate"),
        ({"checkpoint_every": 10**7}, "checkpoint_every"),
        ({"weights": {"base": 1e308}}, "weights.base"),
        ({"weights": {"base": -1}}, "weights.base"),
        ({"weights": {"base": 1e-9}}, "weights.base"),
        ({"weights": {"base": 1e-6, "datasets": 1}}, "weights"),
        ({"weights": {}}, "weights"),
    ],
)
def test_round_with_invalid_parameters_is_refused(portal, operator, changes, param):
    check_refusal(portal.post("/api/v1/rounds", json=changes, headers=operator), 422, param)


def test_minimum_part_share_is_the_smallest_weight_that_a_mixture_accepts():
    least = [MIN_PART_SHARE, 1 - MIN_PART_SHARE]
    assert min(compute_quotas((1, 1), least)) > 0
    with pytest.raises(ValueError, match="the smallest weight"):
        compute_quotas((1, 1), [MIN_PART_SHARE / 1.01, 1 - MIN_PART_SHARE / 1.01])


def test_a_misspelt_query_parameter_is_refused(portal, account):
    check_refusal(portal.get("/api/v1/feedback?stat=received", headers=account.headers), 422, "stat")


@pytest.mark.parametrize("limit", ["%2B1", "1.0", "1_0", "%201", "%D9%A3", "", "0", "201"])
def test_page_limit_that_is_not_in_decimal_digits_is_refused(portal, account, limit):
    check_refusal(portal.get(f"/api/v1/notices?limit={limit}", headers=account.headers), 422, "limit")


def test_query_that_is_not_utf8_is_refused(portal, account):
    response = portal.post("/api/v1/datasets?name=%FF", content=b'{"answer": "b"}', headers=account.headers)
    check_refusal(response, 422, "query")


def test_concurrent_requests_for_one_name_create_one_account(portal, operator):
    form = {"name": f"twin-{new_id()}"}
    with ThreadPoolExecutor(8) as callers:
        responses = callers.map(lambda _: portal.post("/api/v1/contributors", json=form, headers=operator), range(8))
        assert sorted(response.status_code for response in responses) == [201] + [409] * 7


def test_list_path_with_a_trailing_slash_is_not_found(portal, account):
    assert portal.get("/api/v1/feedback/", headers=account.headers).status_code == 404


def test_unsupported_method_returns_405_with_the_allowed_methods(portal, account):
    response = portal.delete("/api/v1/feedback", headers=account.headers)
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD, POST")


@pytest.fixture
def response_id(engine, account, first_version):
    """Record a response to the test's contributor and return its id."""
    fields = {"id": new_id(), "prompt": "Reverse: abc", "response": "?", "model_version": first_version}
    with make_session_factory(engine).begin() as session:
        session.add(Response(contributor_id=account.id, **fields))
    return fields["id"]


def test_report_about_a_recorded_response_must_match_its_prompt_and_text(portal, account, response_id):
    report = {**REPORT, "response_id": response_id}
    assert portal.post("/api/v1/feedback", json=report, headers=account.headers).status_code == 201
    for field in ("prompt", "response"):
        changed = {**report, field: "something else"}
        check_refusal(portal.post("/api/v1/feedback", json=changed, headers=account.headers), 422, field)


def test_report_about_an_unknown_or_foreign_response_is_not_found(portal, account, operator, response_id):
    unknown = {**REPORT, "response_id": new_id()}
    check_refusal(portal.post("/api/v1/feedback", json=unknown, headers=account.headers), 404, "response_id")
    foreign = {**REPORT, "response_id": response_id}
    check_refusal(portal.post("/api/v1/feedback", json=foreign, headers=operator), 404, "response_id")


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model_version": 999_999}, 404, "model_version"),
        ({"model_version": 10**40}, 422, "model_version"),
        ({"model_version": True}, 422, "model_version"),
        ({"response": " cba"}, 422, "response"),
        ({"kind": "preference", "chosen": "a", "rejected": "ａ "}, 422, "rejected"),
        ({"checker": {"type": "numeric", "value": "1e9999999"}}, 422, "checker.numeric.value"),
        ({"checker": {"type": "numeric", "value": 5, "tolerance": 5}}, 422, "checker.numeric.tolerance"),
    ],
)
def test_report_with_invalid_or_contradictory_fields_is_refused(portal, account, changes, status, param):
    check_refusal(portal.post("/api/v1/feedback", json={**REPORT, **changes}, headers=account.headers), status, param)


def test_connection_survives_an_unexpected_error_and_contributor_text_is_not_logged(
    stores, engine, objects, operator, caplog
):
    app = make_app(stores, engine, objects)

    @app.get("/fault")
    def raise_error():
        raise KeyError(f"{1}st contributor's text")

    with serve_app(app) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        connection.auto_open = 0  # a closed connection is an error; do not reconnect
        connection.connect()
        for _ in range(2):
            connection.request("GET", "/fault")
            response = connection.getresponse()
            assert (response.status, json.load(response)["error"]["type"]) == (500, "internal")
        connection.request("GET", "/api/v1/feedback", headers=operator)
        assert connection.getresponse().status == 200
        connection.close()
    assert "KeyError" in caplog.text
    assert "1st contributor's" not in caplog.text


@pytest.mark.parametrize("char", ["%0a", "%C2%85", "%E2%80%A8", "%1b"])
def test_dataset_name_must_be_one_line(portal, account, char):
    response = portal.post(f"/api/v1/datasets?name=a{char}b", content=b'{"answer": "b"}', headers=account.headers)
    error = response.json()["error"]
    assert response.status_code == 422 and error["param"] == "name" and "must be one line" in error["message"]


def test_idempotency_key_and_body_are_refused_in_own_words(portal, account):
    spaced = portal.post("/api/v1/feedback", json={}, headers=account.headers | {"Idempotency-Key": "a b"})
    message = "must be visible ASCII characters without spaces, got 'a b'; correct it"
    assert spaced.status_code == 422 and message in spaced.text
    for body in ([], 1):
        refused = portal.post("/api/v1/feedback", json=body, headers=account.headers)
        assert refused.status_code == 422 and "must be a JSON object, got" in refused.text
    misspelt = portal.post("/api/v1/feedback", json=REPORT | {"promt": "a"}, headers=account.headers)
    assert misspelt.json()["error"]["message"] == "is unknown; did you mean 'prompt'?"
