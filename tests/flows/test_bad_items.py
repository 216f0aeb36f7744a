"""Test that one bad item does not fail a round, with the real model server's application."""

import json
import threading

import httpx
import pytest
import torch
from sqlalchemy import delete, update
from starlette.requests import Request
from starlette.responses import JSONResponse

from feedback import datasets, promotion, rounds
from feedback.contracts import RoundParameters
from feedback.promotion_decision import PromotionDecision
from feedback.reproduce import (
    AnswerCut,
    PromptRefused,
    ReproductionPrompt,
    make_reproduction_prompt,
    reproduce_answers,
)
from feedback.tables import Feedback, Promotion, Round, new_id
from flows.context import Context
from flows.round import collect
from flows.round.evaluation_devices import LeasedRunner, build_evaluation_environment
from flows.round.evaluation_process import EvaluationProcess
from flows.stack.stack_config import load_config
from flows.supervisor.lease_holder import GrantedLease
from infra.database import make_session_factory
from tests.serving import serve_app
from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig
from yuan.model.model_manifest import ModelManifest
from yuan.model.transformer import Yuan
from yuan.model.weights import save
from yuan.plan.pool import make_cpu_pool
from yuan.recipe import DEFAULT_EVALUATION
from yuan.serve.api import make_api
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.request import ServedModel
from yuan.serve.response_schemas import TextChoice, TextCompletion
from yuan.serve.service import ModelService

VERSION = 3
WINDOW = 64


@pytest.fixture(scope="module")
def model_server(stores):
    """Serve a tiny model that fails on prompts with a j; yield settings with the URL of its server."""
    tokenizer = tokenizers.train(["abcdefghij 0123456789"], vocab_size=512)
    config = ModelConfig(
        name="test", num_layers=1, hidden_size=32, num_heads=4, vocab_size=len(tokenizer), seq_len=WINDOW
    )
    model, j = Yuan(config).eval(), tokenizer.encode("j")[0]
    model.embedding.register_forward_hook(
        lambda module, tokens, embeddings: torch.where((tokens[0] == j).any(1)[:, None, None], torch.nan, embeddings)
    )
    with torch.no_grad():
        model.embedding.weight[j] = 0
    service = ModelService(ModelServerMetrics())
    service.swap_in(ServedModel(model, tokenizer, VERSION))
    token = stores.model_server_token.get_secret_value()
    with serve_app(make_api(token, service)) as url:
        yield stores.model_copy(update={"model_server_url": url})


def ask_model(settings, prompts, version=VERSION, max_tokens=64, is_cut_wrong=True):
    """Return the answers in the order of the prompts."""
    questions = [ReproductionPrompt(str(n), prompt, max_tokens, is_cut_wrong) for n, prompt in enumerate(prompts)]
    answers = [answer for batch in reproduce_answers(settings, questions, version) for answer in batch]
    return [answer.answer for answer in sorted(answers, key=lambda answer: int(answer.feedback_id))]


@pytest.mark.parametrize("retry_status", [200, 413, 500])
def test_intermittent_model_server_errors_are_retried(stores, retry_status):
    """A failed request is retried once, and the response of the retry counts."""
    requests = []

    async def fail_every_other_request(scope, receive, send):
        request = Request(scope, receive)
        prompts = (await request.json())["prompt"]
        requests.append(prompts)
        status = 500 if prompts != ["?"] and len(requests) % 2 else retry_status if prompts != ["?"] else 200
        choice = TextChoice(index=0, text="a", finish_reason="stop", logprobs=None)
        completion = TextCompletion(id="1", created=0, model=f"yuan-v{VERSION}", choices=(choice,))
        response = {**completion.model_dump(), "error": {"message": "too long"}}
        await JSONResponse(response, status)(scope, receive, send)

    with serve_app(fail_every_other_request) as url:
        results = ask_model(stores.model_copy(update={"model_server_url": url}), ["j"])
    expected = {200: "a", 413: "too long", 500: "the model server fails on it: too long"}
    assert [str(result) for result in results] == [expected[retry_status]] and len(requests) == (
        4 if retry_status == 500 else 2
    )


def test_too_long_or_failing_prompts_are_refused_and_the_others_answered(model_server):
    prompts = [f"{n} + {n}" for n in range(80)]
    expected = ask_model(model_server, prompts)
    prompts[7:7], prompts[70:70] = ["a" * 300], ["b" * 300, "j"]
    results = ask_model(model_server, prompts)
    refused = {n: str(result) for n, result in enumerate(results) if isinstance(result, PromptRefused)}
    assert list(refused) == [7, 70, 71] and [a for a in results if isinstance(a, str)] == expected
    assert refused[7] == f"the prompt has 301 tokens and the window {WINDOW}; shorten the prompt"
    assert "not finite" in refused[71]


def test_answer_that_the_limit_cuts_is_judged_only_if_more_text_cannot_make_it_right(model_server):
    (cut,) = ask_model(model_server, ["abc"], max_tokens=2, is_cut_wrong=False)
    assert isinstance(cut, AnswerCut) and "cut at 2 tokens" in str(cut)
    (judged,) = ask_model(model_server, ["abc"], max_tokens=2, is_cut_wrong=True)
    assert isinstance(judged, str)


@pytest.mark.parametrize(
    ("expected", "checker", "max_tokens", "is_cut_wrong"),
    [
        ("cba", None, 64, True),
        ("加" * 100, None, 600, True),
        ("加" * 5000, None, 4096, False),
        ("42", {"type": "numeric", "value": 42}, 256 + 4, False),
        ("the answer is B" * 10, {"type": "choice", "value": "B"}, 256 + 300, False),
        ("加" * 5000, {"type": "contains", "values": ["加"]}, 4096, False),
    ],
)
def test_limit_of_a_reproduced_answer_leaves_room_for_the_expected_one(expected, checker, max_tokens, is_cut_wrong):
    body = {"kind": "correction", "prompt": "p", "response": "r", "model_version": 1, "expected": expected}
    report = Feedback(id="0", body={**body, **({"checker": checker} if checker else {})})
    prompt = make_reproduction_prompt(report)
    assert (prompt.prompt, prompt.max_tokens, prompt.is_cut_wrong) == ("p", max_tokens, is_cut_wrong)
    assert make_reproduction_prompt(Feedback(id="0", body={"prompt": 1})).prompt == "1"


@pytest.mark.parametrize(
    ("response_id", "response_bytes", "max_tokens"),
    [(None, 20_000, 260), ("0" * 32, 100, 260), ("0" * 32, 300, 600), ("0" * 32, 20_000, 1024)],
)
def test_only_a_recorded_response_raises_the_limit_of_an_explained_answer(response_id, response_bytes, max_tokens):
    body = {"kind": "correction", "prompt": "p", "response": "r" * response_bytes, "model_version": 1, "expected": "42"}
    body = {**body, "checker": {"type": "numeric", "value": 42}, "response_id": response_id}
    assert make_reproduction_prompt(Feedback(id="0", body=body)).max_tokens == max_tokens


@pytest.mark.parametrize(
    "choices", [[], [{"index": 1, "text": "a", "finish_reason": "stop", "logprobs": None}], [{"text": "a"}]]
)
def test_malformed_answer_of_the_model_server_is_retried(stores, choices):
    async def answer(scope, receive, send):
        completion = {"id": "1", "created": 0, "model": f"yuan-v{VERSION}", "choices": choices}
        await JSONResponse(completion)(scope, receive, send)

    with serve_app(answer) as url, pytest.raises(httpx.RemoteProtocolError, match="retry"):
        ask_model(stores.model_copy(update={"model_server_url": url}), ["a"])


def test_wrong_version_or_token_is_not_an_item_error(model_server):
    with pytest.raises(ConnectionError, match="the request was for v4"):
        ask_model(model_server, ["a"], version=4)
    server_with_wrong_token = model_server.model_copy(
        update={"model_server_token": type(model_server.model_server_token)("wrong")}
    )
    with pytest.raises(Exception, match="401"):
        ask_model(server_with_wrong_token, ["a"])


def test_only_the_dataset_with_missing_bytes_is_rejected(stores, engine, objects, portal, account):
    context = Context(stores, make_session_factory(engine), objects)
    ids = []
    for name in ("good", "gone", "fine"):
        content = b'{"prompt": "' + new_id().encode() + b'", "answer": "b"}'
        uploaded = portal.post(f"/api/v1/datasets?name={name}", content=content, headers=account.headers).json()
        ids.append(uploaded["id"])
        if name == "gone":
            objects.delete(f"{datasets.UPLOADS_FOLDER}/{uploaded['sha256']}")
    with context.sessions.begin() as session:
        session.execute(update(Round).values(state="cancelled"))
        training_round = rounds.request_round(session, "test", RoundParameters(), new_id()).id
    counts = collect.collect_reports_and_datasets(context, training_round)
    with context.sessions.begin() as session:
        recorded_items = rounds.find_round(session, training_round).failed_items
        rounds.finish_round(session, training_round, "cancelled", "the test is over")
    listed = [portal.get(f"/api/v1/datasets/{dataset_id}", headers=account.headers).json() for dataset_id in ids]
    assert [dataset["state"] for dataset in listed] == ["accepted", "rejected", "accepted"]
    assert "its bytes are missing in the object store" in listed[1]["reason"]
    assert recorded_items["accept"] == 1 <= counts.failed


@pytest.fixture
def context(model_server, engine, objects):
    """Return a context whose champion is the version that the model server serves; remove the champion afterwards."""
    context = Context(model_server, make_session_factory(engine), objects)
    with context.sessions.begin() as session:
        session.execute(update(Round).values(state="cancelled"))
        training_round = rounds.request_round(session, "test", RoundParameters(), new_id())
        rounds.add_version(session, training_round.id, VERSION, ModelManifest({}, {}))
        session.flush()
        decision = PromotionDecision(promote=True, reasons=(), champion=None, candidate=VERSION)
        promotion.promote_candidate(session, training_round, decision)
        rounds.finish_round(session, training_round.id, "promoted", "for the test")
    yield context
    with context.sessions.begin() as session:
        session.execute(delete(Promotion))


def test_valid_reports_are_processed_despite_invalid_ones(context, portal, account):
    prompts = {"fits": "a + b", "long": "a" * 300, "broken": "j", "separators": "a\u2028b\u0085", "last": "c"}
    ids = {}
    for name, prompt in prompts.items():
        body = {"kind": "correction", "prompt": prompt, "response": "?", "model_version": 1, "expected": new_id()}
        ids[name] = portal.post("/api/v1/feedback", json=body, headers=account.headers).json()["id"]
    assert collect.process_waiting_reports(context, 10_000).to_row()["failed"] >= 2
    reports = {
        name: portal.get(f"/api/v1/feedback/{report_id}", headers=account.headers).json()
        for name, report_id in ids.items()
    }
    assert {name for name, report in reports.items() if report["state"] == "accepted"} == {"fits", "separators", "last"}
    assert "301 tokens" in reports["long"]["reason"] and "not finite" in reports["broken"]["reason"]
    assert all(reports[name]["state"] == "in_review" for name in ("long", "broken"))
    assert collect.process_waiting_reports(context, 10_000).reproduced == 0


@pytest.mark.slow
def test_evaluation_process_skips_bad_cases(context, tmp_path):
    folder = tmp_path / "model"
    tokenizer = tokenizers.train(["abcdefghij 0123456789"], vocab_size=512)
    config = ModelConfig(name="t", num_layers=1, hidden_size=32, num_heads=4, vocab_size=len(tokenizer), seq_len=64)
    save(folder, config, Yuan(config).state_dict(), tokenizer, {})
    exact = {"type": "exact", "value": "a"}
    prompts = {"1": "a\u2028b", "2": "a" * 300, "3": "b"}
    cases = [{"id": i, "prompt": prompt, "expected": "a", "checker": exact} for i, prompt in prompts.items()]
    lines = {case["id"]: json.dumps(case).encode() for case in cases}
    stored = []
    runner = LeasedRunner(context, "evaluation with bad cases")
    EvaluationProcess(runner, tmp_path, folder, lines, DEFAULT_EVALUATION, stored.extend).run()
    results = {result.case_id: result for result in stored}
    assert {name: result.reason is None for name, result in results.items()} == {"1": True, "2": False, "3": True}


def test_evaluation_gets_no_account_and_no_secret(context, tmp_path):
    secrets = load_config(context.settings.home).secrets
    lease = GrantedLease("id", ("H100-80/3",), threading.Event())
    environment = build_evaluation_environment(context, tmp_path, make_cpu_pool(), lease)
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"  # it sees the leased device and no other
    assert not [name for name, secret in secrets.items() if secret in " ".join(environment.values())]
