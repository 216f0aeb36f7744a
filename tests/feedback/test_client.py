"""Test how the client reads the answers of a newer portal, and those of a server that is no portal."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import strategies as st

from feedback.client import Client, PortalError
from tests.fuzzing import JSON_VALUES, each_size, fuzz

MOMENT = "2026-01-01T00:00:00Z"
REPORT = {
    "id": "a",
    "kind": "survey",
    "state": "archived",
    "reason": None,
    "role": "shadow",
    "verdict": "improved",
    "verdict_version": 5,
    "summary": "s",
    "timeline": [{"at": MOMENT, "text": "t", "actor": "new"}],
    "new_field": {"a": [1]},
}
NOTICE = {"number": 1, "feedback_id": "a", "version": 2, "verdict": "improved", "text": "t", "delivered_at": MOMENT}
ROUND = {
    "id": "a",
    "number": 1,
    "state": "awaiting_approval",
    "step": "dream",
    "reason": None,
    "parent_version": None,
    "candidate_version": 2,
    "snapshot_id": None,
    "decision": {"promote": "perhaps"},
    "failed_items": {"dream": 2},
    "status": {"step": "many"},
    "created_at": MOMENT,
    "finished_at": None,
    "timeline": [],
}
DATASET = {
    "id": "a",
    "name": "n",
    "purpose": "preferences",
    "state": "quarantined",
    "reason": None,
    "sha256": "0",
    "num_rows": 1,
    "num_duplicates": 0,
    "num_closed_out": 0,
    "bad_rows": [],
    "timeline": [],
}
CALLS = {
    "feedback": (REPORT, lambda client: client.feedback("a")),
    "all_feedback": ([REPORT], lambda client: client.all_feedback()),
    "all_datasets": ([DATASET], lambda client: client.all_datasets()),
    "notices": ([NOTICE], lambda client: client.notices()),
    "round": (ROUND, lambda client: client.round()),
    "dataset": (DATASET, lambda client: client.dataset("a")),
    "complete": ({"choices": []}, lambda client: client.complete(["p"])),
}


@pytest.fixture(scope="module")
def server():
    """Serve whatever the attribute `answer` holds, with its status."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = self.server.answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(server):
    with Client(f"http://127.0.0.1:{server.server_port}", "t") as client:
        yield client


def test_words_of_a_newer_portal_are_kept_or_none(server, client):
    server.answer = 200, json.dumps(REPORT).encode()
    report = client.feedback("a")
    assert (report.kind, report.state, report.role, report.verdict) == ("survey", "archived", "shadow", None)
    server.answer = 200, json.dumps([NOTICE]).encode()
    assert client.notices()[0].verdict is None
    server.answer = 200, json.dumps(ROUND).encode()
    training_round = client.round()
    assert (training_round.state, training_round.step) == ("awaiting_approval", "dream")
    assert (training_round.decision, training_round.status) == (None, None)
    server.answer = 200, json.dumps(DATASET).encode()
    assert (client.dataset("a").purpose, client.dataset("a").state) == ("preferences", "quarantined")


def test_known_verdict_is_typed(server, client):
    server.answer = 200, json.dumps({**REPORT, "verdict": "fixed"}).encode()
    assert client.feedback("a").verdict.name == "FIXED"


def test_the_text_of_a_refusal_has_the_field_and_the_first_bad_rows(server, client):
    rows = [{"row": number, "reason": "no answer"} for number in range(1, 6)]
    refusal = {"message": "malformed", "type": "invalid", "param": "checker", "rows": rows}
    server.answer = 422, json.dumps({"error": refusal}).encode()
    with pytest.raises(PortalError) as raised:
        client.dataset("a")
    shown = "; ".join(f"row {number}: no answer" for number in (1, 2, 3))
    assert str(raised.value) == f"422: malformed (checker); {shown}; and 2 more in body.rows"


def change_fields(draw, answer):
    """Return an answer with some fields replaced or removed."""
    if isinstance(answer, list):
        return [change_fields(draw, item) for item in answer]
    changed = {name: draw(JSON_VALUES) if draw(st.integers(0, 5)) == 0 else value for name, value in answer.items()}
    return {name: value for name, value in changed.items() if draw(st.integers(0, 9))}


def read_answer(client, name):
    """Return what a call returns, or the error of the client."""
    try:
        return CALLS[name][1](client)
    except PortalError as error:
        return error


@each_size
def test_any_answer_is_a_record_or_one_error(num_cases, server, client):
    @st.composite
    def cases(draw):
        name = draw(st.sampled_from(sorted(CALLS)))
        changed = json.dumps(change_fields(draw, CALLS[name][0])).encode()
        body = draw(st.one_of(st.just(changed), JSON_VALUES.map(lambda value: json.dumps(value).encode()), st.binary()))
        return name, draw(st.sampled_from([200, 201, 204, 307, 400, 404, 422, 500])), body

    def check(case):
        name, status, body = case
        server.answer = status, b"" if status == 204 else body
        answer = read_answer(client, name)
        assert not isinstance(answer, PortalError) or (answer.body.message and answer.status == status)

    fuzz(num_cases, cases(), check)
